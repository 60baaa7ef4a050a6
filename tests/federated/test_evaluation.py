"""Scores of generated text, in a run and of a model on its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from conftest import SMALL, read_metrics
from transformers import AutoModelForCausalLM

from ferret_ext.federated.cli import main
from ferret_ext.federated.client import DivergedError
from ferret_ext.federated.config import EvaluationConfig
from ferret_ext.federated.data.errors import DataError
from ferret_ext.federated.data.formats import Format
from ferret_ext.federated.data.tokens import tokenise
from ferret_ext.federated.evaluation import Evaluator
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.models import byte_tokenizer, tiny_llama
from ferret_ext.federated.scores import gsm8k_exact_match, load
from ferret_ext.federated.standalone import whole_file

FORM = Format("{q}", "{a}")
EXACT = ["evaluation.scores=gsm8k-exact-match", "evaluation.max_new_tokens=8"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluator(answers: list[str], **settings: Any) -> Evaluator:
    tokenizer = byte_tokenizer()
    records = [{"q": f"question {i}: ", "a": answer} for i, answer in enumerate(answers)]
    held, _ = tokenise(records, FORM, tokenizer, 100)
    config = EvaluationConfig(scores=("gsm8k-exact-match",), max_new_tokens=4, **settings)
    return Evaluator(config, held, tokenizer, load(config.scores))


def test_evaluator_scores_the_first_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model that always says what one reference says, that many are right."""
    model = tiny_llama(0)
    said = byte_tokenizer()("####7")["input_ids"][1:]
    monkeypatch.setattr(
        model,
        "generate",
        lambda input_ids, **_: torch.cat([input_ids, torch.tensor([said] * len(input_ids))], dim=1),
    )
    answers = ["steps #### 7", "#### 8", "#### 7.0", "#### 7", "#### 1"]
    result = evaluator(answers, max_generated_samples=4).evaluate(model, Stopwatch())
    assert result.records == 5
    assert result.scores == {"gsm8k-exact-match": 0.75}
    assert [sample.scores["gsm8k-exact-match"] for sample in result.samples] == [1, 0, 1, 1]
    sample = result.samples[1]
    assert (sample.index, sample.prompt, sample.reference) == (1, "question 1: ", "#### 8")
    assert (sample.output, sample.stop) == ("####7", "max_new_tokens")


def test_evaluator_generates_when_it_is_due() -> None:
    model = tiny_llama(0)

    def due(rounds: int, **settings: Any) -> list[int]:
        it = evaluator(["#### 1"], **settings)
        return [r for r in range(rounds + 1) if it.after_round(rounds, r, model, Stopwatch()).samples]

    assert due(5) == [5]
    assert due(5, generate_every=2) == [0, 2, 4, 5]


def test_evaluator_refuses_references_that_a_score_cannot_use() -> None:
    with pytest.raises(DataError, match="expected references with a number after ####, got 'seven'"):
        evaluator(["#### 7", "seven"])
    evaluator(["#### 7", "seven"], max_generated_samples=1)  # the second is not scored


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_evaluator_refuses_a_model_of_bad_numbers(bad: float) -> None:
    model = tiny_llama(0)
    with torch.no_grad():
        model.model.norm.weight.fill_(bad)
    with pytest.raises(DivergedError, match="expected a finite evaluation loss, got nan"):
        evaluator(["#### 7"]).evaluate(model, Stopwatch())


def test_evaluator_refuses_bad_numbers_that_only_generation_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that overflows on a long context may have a finite loss on short ones."""
    model = tiny_llama(0)
    forward = model.lm_head.forward

    def overflowing(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = forward(hidden)
        return logits * float("nan") if hidden.shape[1] == 1 else logits

    monkeypatch.setattr(model.lm_head, "forward", overflowing)
    with pytest.raises(DivergedError, match="generation: expected finite logits, got nan"):
        evaluator(["#### 7"]).evaluate(model, Stopwatch())


def test_run_writes_scores_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [*EXACT, "evaluation.generate_every=2", "evaluation.max_generated_samples=3"]
    assert main(["simulate", *SMALL, *more, "--out", str(tmp_path / "run")]) == 0
    rows: list[dict[str, Any]] = read_metrics(tmp_path / "run")
    scored = [row["round"] for row in rows if row["scores"]]
    assert scored == [0, 2, 3]
    assert [row["round"] for row in rows if row["seconds_generate"] > 0] == scored
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    assert [(s["round"], s["index"]) for s in samples] == [(r, i) for r in scored for i in range(3)]
    for row in rows:
        own = [s["scores"]["gsm8k-exact-match"] for s in samples if s["round"] == row["round"]]
        assert row["scores"] == ({"gsm8k-exact-match": fmean(own)} if own else {})
    for sample in samples:
        assert sample["prompt"].startswith("Question: ")
        assert sample["prompt"].endswith("\nAnswer: ")
        assert "####" in sample["reference"]
        assert (
            gsm8k_exact_match(sample["output"], sample["reference"]) == sample["scores"]["gsm8k-exact-match"]
        )
    shown = capsys.readouterr().out
    assert "round 3/3: gsm8k-exact-match 0.0000 over 3 generated texts" in shown
    assert "round 1/3: gsm8k" not in shown
    table = shown.partition("full model")[2].splitlines()
    assert [line.split() for line in table if line.strip().endswith("0.0000")] == [
        [str(round_), "0.0000"] for round_ in scored
    ]


def test_scores_leave_the_weights_alone(small_run: Path, tmp_path: Path) -> None:
    config = ["--config", str(small_run / "config.yaml"), "--out", str(tmp_path / "run")]
    assert main(["simulate", *config, *EXACT, "evaluation.generate_every=1"]) == 0
    weights = "model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (small_run / weights).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.generation_config.max_new_tokens is None  # a setting of ours, not of the model


def test_overwriting_removes_former_samples(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path), "--overwrite", "rounds=1"]
    assert main(["simulate", *SMALL, *EXACT, *out]) == 0
    assert (tmp_path / "samples.jsonl").exists()
    assert main(["simulate", *SMALL, *out]) == 0
    assert not (tmp_path / "samples.jsonl").exists()


def test_missing_package_shows_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rouge", None)
    arguments = ["--model", "/absent", "--data", "builtin:gsm8k", "--out", str(tmp_path / "run")]
    assert main(["simulate", *arguments, "evaluation.scores=rouge-l"]) == 2
    assert "rouge-l: expected the package rouge" in capsys.readouterr().err


def test_eval_repeats_a_runs_last_round(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores"
    config = ["--config", str(small_run / "config.yaml"), "--out", str(out), *EXACT]
    assert main(["eval", str(small_run / "model"), "builtin:gsm8k", *config]) == 0
    written = json.loads((out / "evaluation.json").read_text())
    assert written["loss"] == read_metrics(small_run)[-1]["eval_loss"]
    assert written["records"] == 4
    assert written["scores"] == {"gsm8k-exact-match": 0.0}
    assert len(read_lines(out / "samples.jsonl")) == 4
    shown = capsys.readouterr().out
    assert f"evaluation loss {written['loss']:.4f} over 4 records" in shown
    assert "gsm8k-exact-match 0.0000 over 4 generated texts, " in shown
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "samples.jsonl"}
    assert main(["eval", str(small_run / "model"), "builtin:gsm8k", *config]) == 2
    assert "ferret eval: error: out: expected a new or empty folder" in capsys.readouterr().err


def test_eval_takes_a_file_whole_or_as_a_run_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    records = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(40)]
    data.write_text("\n".join(map(json.dumps, records)))
    few = ["--data", str(data), "rounds=1", "evaluation.max_samples=none"]
    assert main(["simulate", *SMALL, *few, "--out", str(run)]) == 0
    capsys.readouterr()
    assert main(["eval", str(run / "model"), str(data), "dataset.max_length=160"]) == 0
    assert "over 40 records" in capsys.readouterr().out
    assert ("evaluation.max_samples", None) in whole_file(str(data))
    assert main(["eval", str(run / "model"), str(data), "--config", str(run / "config.yaml")]) == 0
    loss = read_metrics(run)[-1]["eval_loss"]
    assert f"evaluation loss {loss:.4f} over 4 records" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/absent", "builtin:gsm8k"], "model: expected a folder or a hub name, got '/absent'"),
        (["builtin:tiny-llama", "builtin:none"], "data builtin:none: expected one of"),
        (["builtin:tiny-llama", "builtin:gsm8k", "evaluation.scores=bleu"], "got 'bleu'"),
        (["builtin:tiny-llama", "builtin:dolly", *EXACT], "expected references with a number after ####"),
    ],
)
def test_eval_refuses_with_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["eval", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ferret eval: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_eval_refuses_a_broken_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(0)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert main(["eval", str(tmp_path), "builtin:gsm8k", "evaluation.max_samples=4"]) == 2
    assert "ferret eval: error: expected a finite evaluation loss, got nan" in capsys.readouterr().err


def test_real_answers_score_1_against_themselves(real_data: Path) -> None:
    answers = [json.loads(line)["answer"] for line in (real_data / "gsm8k" / "test.jsonl").open()]
    assert len(answers) == 1319
    assert all(gsm8k_exact_match(answer, answer) == 1 for answer in answers)
    assert sum("," in answer.rpartition("####")[2] for answer in answers) == 14
