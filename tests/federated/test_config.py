"""Settings from presets, files and overrides, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ferret_ext.federated import config as configuration
from ferret_ext.federated import settings
from ferret_ext.federated.config import FerretConfig, SimulationConfig, build
from ferret_ext.federated.presets import PRESETS, settings_of
from ferret_ext.federated.settings import ConfigError, read_override, read_yaml

NEEDED = [("model", "m"), ("data", "d"), ("out", "o")]
HALF_OF_SIX = [("num_clients", 6), ("client_fraction", 0.5)]


def test_build_takes_dotted_settings_and_the_later_wins() -> None:
    config = build([*NEEDED, ("rounds", 3), ("ferret.K", 16), ("rounds", "5"), ("training.optim", "adam")])
    assert (config.rounds, config.ferret.K, config.training.optim) == (5, 16, "adam")
    assert config.training.max_steps == SimulationConfig().training.max_steps


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("training.learning_rate", "1e-4", 1e-4),
        ("training.learning_rate", 1, 1.0),
        ("ferret.granularity", "packed", "packed"),
        ("ferret.granularity", "4096", 4096),
        ("training.max_grad_norm", "none", None),
        ("training.max_grad_norm", None, None),
        ("training.max_grad_norm", "2", 2.0),
        ("dataset.prompt", "{q}", "{q}"),
        ("model", 7, "7"),
        ("rounds", 5.0, 5),
        ("full_determinism", "false", False),
        ("full_determinism", True, True),
        ("seed", 2**62, 2**62),
        ("evaluation.scores", "rouge-l", ("rouge-l",)),
        ("evaluation.scores", "rouge-l, rougeL,rouge-l", ("rouge-l", "rougeL")),
        ("evaluation.scores", ["rougeL", "gsm8k-exact-match"], ("rougeL", "gsm8k-exact-match")),
        ("evaluation.scores", "none", ()),
        ("evaluation.scores", [], ()),
        ("evaluation.scores", None, ()),
    ],
)
def test_build_reads_values_in_the_settings_type(key: str, value: Any, read: Any) -> None:
    settings = [*NEEDED, ("dataset.response", "{a}"), ("dataset.prompt", "{b}"), (key, value)]
    config: Any = build(settings)
    for name in key.split("."):
        config = getattr(config, name)
    assert config == read
    assert type(config) is type(read)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rounds", "many", r"rounds: expected an integer >= 1 and < 2\^32, got 'many'"),
        ("rounds", 0, r"rounds: expected an integer >= 1 and < 2\^32, got 0"),
        ("rounds", 1.5, r"rounds: expected an integer >= 1 and < 2\^32, got 1.5"),
        ("rounds", True, r"rounds: expected an integer >= 1 and < 2\^32, got True"),
        ("rounds", None, r"rounds: expected an integer >= 1 and < 2\^32, got None"),
        ("rounds", [1], "rounds: expected an integer"),
        ("client_fraction", "1.5", "client_fraction: expected a number > 0 and <= 1, got '1.5'"),
        ("training.learning_rate", "nan", "training.learning_rate: expected a finite number > 0, got 'nan'"),
        ("training.learning_rate", "inf", "training.learning_rate: expected a finite number > 0, got 'inf'"),
        ("training.optim", "sgdd", "training.optim: expected auto or sgd or adam or adamw, got 'sgdd'"),
        ("ferret.granularity", "row", "expected an integer >= 1 or auto or tensor or packed"),
        ("algorithm", "FedAvg", r"algorithm: expected ferret or .*, got 'FedAvg'; did you mean fedavg\?$"),
        ("algorithm", "foo", "algorithm: expected ferret or .*, got 'foo'$"),
        ("evaluation.scores", "rouge-m", r"got 'rouge-m'; did you mean rouge-l\?$"),
        ("ferret.granularity", 0, "ferret.granularity: expected"),
        ("training.max_grad_norm", "x", "expected a finite number > 0 or none, got 'x'"),
        ("full_determinism", "yes", "full_determinism: expected true or false, got 'yes'"),
        ("ferret", 4096, r"ferret: expected a section with the keys ferret.mode, ferret.K, .*, got 4096"),
        (
            "evaluation.scores",
            "bleu",
            "evaluation.scores: expected none or, .*, rouge-l or rougeL",
        ),
        ("evaluation.scores", "rouge-l,", "evaluation.scores: expected .*, got 'rouge-l,'"),
        ("evaluation.scores", 7, "evaluation.scores: expected .*, got 7"),
        ("ronds", 4, "ronds: no such setting .* did you mean rounds?"),
        ("K", 4, "K: no such setting .* did you mean ferret.K?"),
        ("learning_rate", 3, r"did you mean training.learning_rate or zeroth_order.learning_rate\?"),
        ("optim", "adam", r"did you mean training.optim or server.optim\?"),
        ("k", 4, r"did you mean ferret.K\?"),
        ("lr", 3, r"lr: no such setting \(got 3\); ferret simulate --help lists all$"),
        ("model", "", r"model: expected a value, got none; give model=\.\."),
        ("partition.kind", "dirichlet", "partition.column: expected a column for partition.kind dirichlet"),
        ("partition.kind", "lda", "partition.kind: expected auto or iid or dirichlet or natural-id or"),
        ("partition.min_size", -1, "partition.min_size: expected an integer >= 0 or none, got -1"),
        ("seed", 2**63, r"seed: expected an integer >= 0 and < 2\^63, got 9223372036854775808"),
        ("num_clients", 0, r"num_clients: expected an integer >= 1 and < 2\^32 or none, got 0"),
        ("robust.quorum", 4, "robust.quorum: expected at most 3, the clients that a round draws of 6, got 4"),
        ("dataset.protocol", "ni", "dataset.protocol: expected none or natural-instructions or dolly or"),
        ("dataset.prompt", "{q}", "dataset.prompt: expected together with dataset.response"),
        (
            "dataset.max_prompt_length",
            1024,
            "dataset.max_prompt_length: expected less than dataset.max_length",
        ),
    ],
)
def test_build_names_key_expected_and_got(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build([*NEEDED, *HALF_OF_SIX, (key, value)])


def test_saved_config_reads_back_as_itself(tmp_path: Path) -> None:
    templates = [("dataset.prompt", "Ä {q}\n"), ("dataset.response", "{a}")]
    scores = ("evaluation.scores", "rougeL,rouge-l")
    config = build([*NEEDED, *settings_of("small/gsm8k", "ferret"), *templates, scores])
    config.save(tmp_path / "config.yaml")
    assert build(read_yaml(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    build([*NEEDED, *settings_of(name, "ferret")])


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "a: [", "just text", "a: 1\na: 2\n"])
def test_read_yaml_says_what_is_wrong(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"config file .*run.yaml: expected"):
        read_yaml(path)
    with pytest.raises(ConfigError, match="expected readable YAML"):
        read_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize("content", ["rounds: 1\nseed: 2\nrounds: 3\n", "ferret:\n  K: 1\n  'K': 1\n"])
def test_read_yaml_takes_no_key_twice(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"got: the key '(rounds|K)' a second time in .*, line 3"):
        read_yaml(path)


def test_read_override_splits_at_the_first_equals_sign() -> None:
    assert read_override("dataset.prompt=a=b") == ("dataset.prompt", "a=b")
    for text in ("rounds", "=3"):
        with pytest.raises(ConfigError, match=f"override '{text}': expected key=value"):
            read_override(text)


def test_every_setting_has_a_help_text_and_a_default_in_its_range() -> None:
    for leaf in configuration.leaves():
        assert leaf.help
        if leaf.default != "":
            assert settings._convert(leaf, leaf.default) == leaf.default


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "choice8"),
        ({"seeds": "shared-round"}, "int8"),
        ({"mode": "reference-code"}, "float32"),
        ({"seeds": "shared-round", "coordinates": "int1"}, "int1"),
    ],
)
def test_coordinates_are_the_best_known_that_the_seeds_allow(settings: Any, expected: str) -> None:
    given = [("model", "m"), ("data", "d"), ("out", "o")]
    config = build([*given, *((f"ferret.{key}", value) for key, value in settings.items())])
    assert config.ferret.chosen_coordinates == expected


def test_presets_keep_to_what_is_published() -> None:
    for name in PRESETS:
        given = settings_of(name, "ferret")
        config = build([*given, ("model", "m"), ("data", "d"), ("out", "o")])
        assert config.ferret.chosen_coordinates in ("float16", "float32")
        assert config.ferret.allocation in ("norm", "size")
        assert config.ferret.granularity in ("tensor", "packed")
        assert config.ferret.server_warmup == 0


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, 3), ({"mode": "reference-code"}, 0), ({"server_warmup": 0}, 0)]
)
def test_the_servers_step_warms_up_unless_told_otherwise(settings: Any, expected: int) -> None:
    assert FerretConfig(**settings).chosen_server_warmup == expected
