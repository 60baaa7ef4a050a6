"""Scores of a generated text beside its reference, each from 0 to 1; a run's score is the mean over samples.

The two packages that compute Rouge-L disagree, so each goes by the name that its package gives it: "rouge-l"
is that of `rouge`, which the Ferret paper reports (arXiv 2409.06277), "rougeL" that of `rouge_score`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from importlib import import_module
from typing import Any

from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.settings import ConfigError

Score = Callable[[str, str], float]  # output, reference -> 0 .. 1

# "#### " and a number, of which only digits, a sign and a decimal point count.
ANSWER = re.compile(r"####\s*(?P<sign>[-−]?)\s*\$?\s*(?P<minus>[-−]?)(?P<number>\d[\d,]*(\.\d+)?|\.\d+)")


def load(names: Sequence[str]) -> dict[str, Score]:
    """The scores of these names. Raises ConfigError where the package of one is missing."""
    return {name: SCORES[name]() for name in names}


def gsm8k_answer(text: str) -> Decimal | None:
    """The number after the first `####` that one follows, as in GSM8K's own grader; None if there is none.

    "#### 1,234", "####-5.", "#### $18.00" and "#### 18 dollars" are 1234, -5, 18 and 18.
    """
    if (found := ANSWER.search(text)) is None:
        return None
    number = Decimal(found["number"].replace(",", ""))
    return -number if found["sign"] or found["minus"] else number


def gsm8k_exact_match(output: str, reference: str) -> float:
    """1 if the output's number after `####` is the reference's, 0 if it is another or missing.

    Raises DataError for a reference without such a number.
    """
    wanted = gsm8k_answer(reference)
    if wanted is None:
        raise DataError(
            f"evaluation.scores: gsm8k-exact-match: expected references with a number after ####, "
            f"got {reference[:60]!r}"
        )
    return float(gsm8k_answer(output) == wanted)


def _rouge() -> Score:
    """Rouge-L F1 of `rouge`: sentences end at a period, words at white space, and each word counts once."""
    package = _package("rouge", "rouge-l")

    def score(output: str, reference: str) -> float:
        if not _has_word(output) or not _has_word(reference):
            return 0.0  # the package refuses texts without a sentence
        with _recursion(len(output) + len(reference)):  # its search descends once a word
            [result] = package.Rouge(metrics=["rouge-l"], stats=["f"]).get_scores(output, reference)
        return float(result["rouge-l"]["f"])

    return score


def _has_word(text: str) -> bool:
    return bool(text.replace(".", " ").split())


def _rouge_score(use_stemmer: bool) -> Score:
    """Rouge-L F1 of `rouge_score`: runs of a-z and 0-9 in lower case, one sequence, no sentences."""
    package = _package("rouge_score.rouge_scorer", "rougeL")
    scorer = package.RougeScorer(["rougeL"], use_stemmer=use_stemmer)

    def score(output: str, reference: str) -> float:
        return float(scorer.score(reference, output)["rougeL"].fmeasure)

    return score


SCORES: dict[str, Callable[[], Score]] = {
    "rouge-l": _rouge,
    "rougeL": partial(_rouge_score, use_stemmer=False),
    "rougeL-stem": partial(_rouge_score, use_stemmer=True),
    "gsm8k-exact-match": lambda: gsm8k_exact_match,
}


def _package(module: str, score: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"evaluation.scores: {score}: expected the package {module.partition('.')[0]}, got: {error}; "
            "in the source tree, pip install '.[scores]'"
        ) from None


@contextmanager
def _recursion(depth: int) -> Iterator[None]:
    """Room for this many calls in each other."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
