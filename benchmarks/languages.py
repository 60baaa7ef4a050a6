"""A data set outside English: names and dates in eight languages, from Unicode CLDR as Babel ships it.

    python benchmarks/languages.py FOLDER

writes train.jsonl and test.jsonl with the keys language, input and output. A record asks in English for the
name of a territory, language or currency in another language, or for a date written out in it; names that
are the same in English are left out. A tenth is for the test. Babel has a BSD licence, its data the Unicode
licence.

    ferret simulate --preset small/gsm8k --model MODEL --data FOLDER --out OUT num_clients=none \\
        partition.kind=natural-id partition.column=language dataset.format=auto \\
        "dataset.prompt={language}: {input} = " "dataset.response={output}"

makes every language a client.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import numpy as np

LANGUAGES = ("de", "es", "fi", "fr", "pl", "tr", "el", "ru")
NAMES, DATES = 300, 100  # of each language

Record = dict[str, str]


def records(language: str) -> list[Record]:
    random = np.random.Generator(np.random.PCG64(0))
    every = list(names(language))
    chosen = [every[i] for i in random.permutation(len(every))[:NAMES]]
    return [*chosen, *(dated(language, days) for days in random.integers(0, 36525, DATES).tolist())]


def names(language: str) -> Iterator[Record]:
    from babel import Locale

    english, locale = Locale("en"), Locale(language)
    for kind in ("territories", "languages", "currencies"):
        theirs, ours = getattr(english, kind), getattr(locale, kind)
        for code in sorted(set(theirs) & set(ours)):
            if theirs[code] != ours[code]:
                yield {"language": language, "input": theirs[code], "output": ours[code]}


def dated(language: str, days: int) -> Record:
    from babel.dates import format_date

    day = date(1950, 1, 1) + timedelta(days=days)
    written = format_date(day, "full", locale=language)
    return {"language": language, "input": day.isoformat(), "output": written}


def shuffled(seed: int = 0) -> list[Record]:
    """All records, languages mixed."""
    every = [record for language in LANGUAGES for record in records(language)]
    return [every[i] for i in np.random.Generator(np.random.PCG64(seed)).permutation(len(every))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    every = shuffled()
    cut = len(every) // 10
    for name, part in (("test", every[:cut]), ("train", every[cut:])):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
        print(f"{folder / name}.jsonl: {len(part):,} records in {len(LANGUAGES)} languages")


if __name__ == "__main__":
    main()
