"""From settings to each client's examples: nothing is lost on the way, and what is dropped is said."""

from __future__ import annotations

import html
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from matplotlib import rc_context

from ferret_ext.federated import config as configuration
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.data import instructions
from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.loading import ClientData, load
from ferret_ext.federated.models import byte_tokenizer
from ferret_ext.federated.plot_partition import save_partition_plot

TEMPLATES = {"dataset.prompt": "{instruction}\n", "dataset.response": "{output}"}


def settings(data: Path | str, **more: Any) -> SimulationConfig:
    given = {"model": "m", "data": str(data), "out": "o", "evaluation.max_samples": "none", **more}
    return configuration.build(list(given.items()))


def loaded(data: Path | str, **more: Any) -> tuple[ClientData, list[str]]:
    lines: list[str] = []
    return load(settings(data, **more), byte_tokenizer(), 1024, lines.append), lines


def write_code(path: Path) -> Path:
    """Ten records a language, of which one has no response, and all of Perl's are too long."""
    records = []
    for language in ("C", "Go", "Perl", "SQL"):
        prompt = "x" * (40 if language == "Perl" else 5)
        for i in range(10):
            answer = "" if i == 0 else f"{language} {i}"
            records.append({"instruction": prompt, "output": answer, "language": language})
    path.write_text(json.dumps(records))
    return path


def texts(data: ClientData) -> list[list[str]]:
    """The responses that each client holds."""
    tokenizer = byte_tokenizer()
    return [
        [tokenizer.decode(example.input_ids[example.prompt_length : -1]) for example in shard]
        for shard in data.shards
    ]


def test_keys_follow_the_examples_that_tokenisation_keeps(tmp_path: Path) -> None:
    """Each client holds its own language only, though records in between were dropped and held out."""
    by_language = {"partition.kind": "natural-id", "partition.column": "language"}
    data, lines = loaded(
        write_code(tmp_path / "code.json"), **by_language, **TEMPLATES, **{"dataset.max_prompt_length": 20}
    )
    assert data.holdings.names == ["C", "Go", "SQL"]
    for name, held in zip(data.holdings.names, texts(data), strict=True):
        assert {text.split()[0] for text in held} == {name}
    assert data.holdings.lost == ["Perl"]
    assert [sum(held.values()) for held in data.holdings.by_key] == data.holdings.sizes
    assert "1 more values have no example left (first: Perl)" in lines[-1]
    assert any("with too long a prompt dropped (first: code.json[" in line for line in lines)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "natural-id", "pathological", "exponential"])
def test_every_record_is_kept_or_dropped_for_a_reason(tmp_path: Path, kind: str) -> None:
    data, _ = loaded(
        write_code(tmp_path / "code.json"),
        **TEMPLATES,
        **{"partition.kind": kind, "partition.column": "language", "partition.min_size": 1},
    )
    report = data.holdings.as_dict()
    assert report["training"]["read"] + report["evaluation"]["read"] == 40
    assert sum(report["keys"].values()) == sum(data.holdings.sizes) == report["training"]["kept"]
    assert len(data.held) == len(data.held_records) == report["evaluation"]["kept"]
    held = [text for shard in texts(data) for text in shard]
    assert len(held) == len(set(held))
    for row, shard in zip(report["clients"], texts(data), strict=True):
        assert row["by_key"] == dict(Counter(text.split()[0] for text in shard))


def test_held_records_belong_to_the_held_examples(tmp_path: Path) -> None:
    data, lines = loaded(write_code(tmp_path / "code.json"), **TEMPLATES, **{"evaluation.max_samples": 2})
    tokenizer = byte_tokenizer()
    for example, record in zip(data.held, data.held_records, strict=True):
        assert tokenizer.decode(example.input_ids[example.prompt_length : -1]) == record["output"]
    assert any(line.endswith("the first 2 are evaluated") for line in lines)


def test_a_length_that_the_model_does_not_take_is_said(tmp_path: Path) -> None:
    path = write_code(tmp_path / "code.json")
    said = "data: examples have at most 1,024 tokens, as many as the model takes; dataset.max_length is 2,048"
    for length, expected in ((2048, 1), (1024, 0)):
        _, lines = loaded(path, **TEMPLATES, **{"dataset.max_length": length})
        assert lines.count(said) == expected


def test_small_values_are_left_out_and_counted(tmp_path: Path) -> None:
    languages = ["C"] * 40 + ["R", "Go", "R"] + ["Go"] * 20
    records = [{"instruction": "x", "output": f"{i}", "language": name} for i, name in enumerate(languages)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    (tmp_path / "test.json").write_text(json.dumps(records[:2]))
    by_language = {"partition.kind": "natural-id", "partition.column": "language", "partition.min_size": 9}
    data, _ = loaded(tmp_path, **by_language, **TEMPLATES)
    training = data.holdings.as_dict()["training"]
    assert (data.holdings.names, data.holdings.sizes) == (["C", "Go"], [40, 21])
    assert training["dropped"] == {"of a language with fewer than 9": {"count": 2, "places": ["R"]}}
    assert (training["read"], training["kept"]) == (63, 61)


def test_clients_with_one_example_and_without_any_are_said(tmp_path: Path) -> None:
    path = tmp_path / "few.json"
    path.write_text(json.dumps([{"instruction": "x", "output": f"{i}"} for i in range(25)]))
    grow = {"partition.kind": "exponential", "num_clients": 8, **TEMPLATES}
    data, lines = loaded(path, **grow)
    assert data.holdings.sizes == [1, 1, 1, 1, 1, 1, 4, 12]
    assert lines[-1].endswith("; 6 with one only")
    data, lines = loaded(path, **grow, **{"partition.min_size": 0})
    assert len(data.shards) == 8 - data.holdings.empty < 8
    assert f"; {data.holdings.empty} more got none and take no part" in lines[-1]


def write_set(folder: Path, name: str, count: int) -> Path:
    """A set of the generator's, as train.jsonl and test.jsonl."""
    for split, size, seed in (("train", count, 1), ("test", 10, 2)):
        rows = instructions.SETS[name](size, seed)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("protocol", "name", "line"),
    [
        ("gsm8k", "gsm8k", "partition: iid; clients: 3; training examples of each: 20"),
        ("dolly", "dolly", "partition: dirichlet by category, 5 values; clients: 200;"),
        ("none", "alpaca", "partition: iid; clients: 3; training examples of each: 20"),
    ],
)
def test_protocols_bring_their_partition(tmp_path: Path, protocol: str, name: str, line: str) -> None:
    dolly = protocol == "dolly"
    more = {"partition.alpha": 50.0, "partition.min_size": 1} if dolly else {}
    folder = write_set(tmp_path, name, 900 if dolly else 60)
    data, lines = loaded(folder, **{"dataset.protocol": protocol, **more})
    assert len(data.shards) == (200 if dolly else 3)
    assert lines[-1].startswith(line)


def test_natural_instructions_gives_each_task_a_client(tmp_path: Path) -> None:
    instructions.write(tmp_path, count=300)
    folder = tmp_path / "natural_instructions"
    data, _ = loaded(folder, **{"dataset.protocol": "natural-instructions"})
    assert data.holdings.names == sorted(task.name for task in instructions.TASKS[:-3])
    assert data.holdings.sizes == [4] * 12
    with pytest.raises(DataError, match="num_clients: expected 5 for partition natural-id, the data has 12"):
        loaded(folder, num_clients=5, **{"dataset.protocol": "natural-instructions"})
    other, _ = loaded(folder, **{"dataset.protocol": "natural-instructions", "partition.kind": "iid"})
    assert len(other.shards) == 3


def test_protocols_use_the_alpaca_prompt(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "gsm8k", 10)
    data, _ = loaded(folder, **{"dataset.protocol": "gsm8k"})
    assert "### Instruction:" in data.form.prompt
    own, _ = loaded(folder, **{"dataset.protocol": "gsm8k", "dataset.format": "gsm8k"})
    assert own.form.prompt.startswith("Question: ")


def test_loading_repeats_for_equal_seeds(tmp_path: Path) -> None:
    path = write_code(tmp_path / "code.json")
    skew = {"partition.kind": "dirichlet", "partition.column": "language", "partition.min_size": 1}
    first, again, other = (loaded(path, seed=seed, **skew, **TEMPLATES)[0] for seed in (1, 1, 2))
    assert first.shards == again.shards
    assert first.held == again.held
    assert first.shards != other.shards


def test_a_partition_needs_its_column(tmp_path: Path) -> None:
    path = write_code(tmp_path / "code.json")
    with pytest.raises(
        DataError, match=r"in the column task .*, found instruction, language, output at code"
    ):
        loaded(path, **TEMPLATES, **{"partition.kind": "natural-id", "partition.column": "task"})


@pytest.mark.parametrize("kind", ["natural-id", "pathological"])
def test_picture_shows_any_name(tmp_path: Path, kind: str) -> None:
    names = ["$x_{$", "_hidden", "long " * 20, "C#", "<b>&"]
    rows = [{"instruction": "x", "output": f"{i}", "key": names[i % 5]} for i in range(50)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    more = {"partition.kind": kind, "partition.column": "key"}
    data, _ = loaded(tmp_path / "rows.json", **TEMPLATES, **more)
    with rc_context({"svg.fonttype": "none"}):  # text as text
        save_partition_plot(data.holdings, tmp_path)
    drawn = html.unescape((tmp_path / "partition.svg").read_text())
    for name in ("$x_{$", "_hidden", f"{'long ' * 8}lon…", "C#", "<b>&"):
        assert name in drawn


@pytest.mark.parametrize(
    "more",
    [
        {"partition.kind": "natural-id", "partition.column": "language"},
        {"partition.kind": "pathological", "partition.column": "language"},
        {"partition.kind": "iid"},
    ],
)
def test_picture_is_drawn_and_repeats(tmp_path: Path, more: dict[str, str]) -> None:
    data, _ = loaded(write_code(tmp_path / "code.json"), **TEMPLATES, **more)
    drawn = []
    for folder in (tmp_path / "first", tmp_path / "again"):
        folder.mkdir()
        save_partition_plot(data.holdings, folder)
        assert (folder / "partition.png").read_bytes().startswith(b"\x89PNG")
        drawn.append((folder / "partition.svg").read_text())
    assert drawn[0] == drawn[1]
    assert "<svg" in drawn[0]
