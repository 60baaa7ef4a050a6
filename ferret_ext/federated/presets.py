"""Settings under a name: `--preset NAME` puts them below the YAML file and the command line.

A preset may have more settings for single variants. A variant is an algorithm, or Ferret as its authors' code
runs it ("ferret-reference-code"), or with one basis for all clients of a round ("ferret-shared-round");
`ferret compare` runs several.

The `paper/` presets hold the published hyper-parameters (arXiv 2409.06277, appendix); what is not published
is marked "ours". The `small/` ones are their twins for a model of 260,000 parameters with 512 positions
(stories260K) on two CPU cores; their step sizes were chosen by short trials.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ferret_ext.federated.settings import Setting, flatten

REFERENCE_CODE = "ferret-reference-code"
SHARED_ROUND = "ferret-shared-round"
Settings = Mapping[str, Any]


def settings_of(name: str, variant: str) -> list[Setting]:
    """The preset's settings for a variant, which need not be one that it knows."""
    preset = dict(PRESETS[name])
    variants: Settings = preset.pop("variants", {})
    kin = "ferret" if variant == SHARED_ROUND else variant
    return [*flatten(preset), *flatten(variants.get(kin, {})), *choice_of(variant)]


def choice_of(variant: str) -> list[Setting]:
    """The settings that make a run one of this variant."""
    return _FERRETS.get(variant, [("algorithm", variant)])


def variant_of(settings: Iterable[Setting], default: str = "ferret") -> str:
    """The variant that settings choose."""
    chosen = dict(settings)
    algorithm = str(chosen.get("algorithm", default))
    if algorithm != "ferret":
        return algorithm
    if chosen.get("ferret.mode") == "reference-code":
        return REFERENCE_CODE
    return SHARED_ROUND if chosen.get("ferret.seeds") == "shared-round" else "ferret"


def variants_of(name: str | None) -> list[str]:
    """The variants that a preset has settings for, in the order of the paper's tables."""
    return list(PRESETS[name].get("variants", {})) if name else []


_FERRETS: dict[str, list[Setting]] = {
    "ferret": [("algorithm", "ferret"), ("ferret.mode", "paper"), ("ferret.seeds", "per-client")],
    REFERENCE_CODE: [
        ("algorithm", "ferret"),
        ("ferret.mode", "reference-code"),
        ("ferret.seeds", "per-client"),
    ],
    SHARED_ROUND: [("algorithm", "ferret"), ("ferret.mode", "paper"), ("ferret.seeds", "shared-round")],
}
# The method as published, but for 16 bits.
_FLOATS = {"coordinates": "float32", "allocation": "size", "granularity": "tensor", "server_warmup": 0}
_ZEROTH_ORDER = {"perturbation": "in_place"}
_SCALAR_ROUNDS = {"per_device_train_batch_size": 4}


def _small_variants(zeroth_order_rate: float) -> dict[str, Any]:
    """zeroth_order_rate: FedZO's and FedKSeed's learning rate."""
    zeroth_order = {**_ZEROTH_ORDER, "learning_rate": zeroth_order_rate}
    return {
        "fedptuning": {"training": {"learning_rate": 0.01}},
        "fedprompt": {"training": {"learning_rate": 0.3}},
        "fedit-sgd": {},
        "fedit": {"training": {"learning_rate": 0.01}},
        "fedzo": {"zeroth_order": zeroth_order},
        "fedkseed": {"zeroth_order": zeroth_order},
        "fedkseed-pro": {"zeroth_order": zeroth_order},
        "decomfl": {
            "training": _SCALAR_ROUNDS,
            "zeroth_order": {**_ZEROTH_ORDER, "learning_rate": 1e-3, "perturbations": 10},
        },
        "feedsign": {
            "training": _SCALAR_ROUNDS,
            "zeroth_order": {**_ZEROTH_ORDER, "learning_rate": 3e-2, "perturbations": 10},
        },
        "fedavg": {},
        "ferret": {"server_learning_rate": 0.4, "ferret": {"K": 4096, **_FLOATS}},
        REFERENCE_CODE: {"server_learning_rate": 3.0, "ferret": {"K": 256}},
    }


_SMALL: dict[str, Any] = {
    "rounds": 10,
    "num_threads": 1,  # the model is too small for more
    "dataset": {"max_length": 512},
    "training": {"max_steps": 10, "gradient_accumulation_steps": 4, "learning_rate": 0.1},
    "evaluation": {"max_samples": 100},
    "variants": _small_variants(1e-4),
}


def _paper(
    model: str,
    protocol: str,
    rounds: int,
    ferret_rounds: int,
    ferret: tuple[float, float],
    fedavg: tuple[float, float],
    adapter_rate: float,
    *,
    epochs: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """ferret, fedavg: local and server learning rate; adapter_rate: of Adam. epochs: of all but Ferret.

    Ferret's published experiments are those of its authors' code. Its paper's mode has the same local steps
    here; the rest is ours: the server's step is a sixth, because that code rebuilds a third of an update in
    expectation and lets its step fall to 0. In that code K counts for each block, in the paper for all.
    """
    rate, server = ferret
    local = {"num_train_epochs": epochs} if epochs else {}
    adapters = {"training": {**local, "learning_rate": adapter_rate}}
    seeds = {"zeroth_order": {"snapshot": "disk"}}  # the rest is published, and the default
    return {
        "model": model,
        "rounds": rounds,
        "client_fraction": 0.05,
        "dtype": "float16",
        "dataset": {"protocol": protocol, "max_length": 1024},
        "training": {"max_steps": 10, "gradient_accumulation_steps": 4},
        "evaluation": {"scores": ["rouge-l"], "max_samples": None, "max_new_tokens": 128},
        **more,
        "variants": {
            "fedptuning": adapters,
            "fedprompt": adapters,
            "fedit-sgd": adapters,
            "fedit": adapters,
            "fedzo": seeds,
            "fedkseed": seeds,
            "fedkseed-pro": seeds,
            "fedavg": {"server_learning_rate": fedavg[1], "training": {**local, "learning_rate": fedavg[0]}},
            "ferret": {
                "rounds": ferret_rounds,
                "server_learning_rate": server / 6,
                "training": {"learning_rate": rate},
                "ferret": {
                    "allocation": "norm",
                    "granularity": "packed",
                    "coordinates": "float16",
                    "server_warmup": 0,
                },
            },
            REFERENCE_CODE: {
                "rounds": ferret_rounds,
                "server_learning_rate": server,
                "training": {"learning_rate": rate},
            },
        },
    }


_MODELS = {
    "1.3b": "datajuicer/LLaMA-1B-dj-refine-150B",
    "3b": "openlm-research/open_llama_3b",
    "7b": "meta-llama/Llama-2-7b-hf",
    "13b": "meta-llama/Llama-2-13b-hf",
}
_LARGE: dict[str, Any] = {
    "7b": {"ferret": (3e-4, 5.0), "fedavg": (3e-4, 1.0)},
    "13b": {"ferret": (5e-4, 10.0), "fedavg": (3e-4, 1.0)},
}

PRESETS: dict[str, dict[str, Any]] = {
    # A small Llama from scratch on text made here: nothing to download, a minute on two cores.
    "demo": {
        "model": "builtin:tiny-llama",
        "data": "builtin:alpaca",
        "rounds": 20,
        "num_clients": 3,
        "server_learning_rate": 0.5,
        "num_threads": 1,  # the model is too small for more, and the weights do not depend on the cores
        "dataset": {
            "prompt": "{instruction}\n{input}\n> ",
            "response": "{output}",
            "max_length": 128,
        },
        "training": {
            "max_steps": 10,
            "gradient_accumulation_steps": 4,
            "optim": "adam",
            "learning_rate": 0.003,
        },
        "ferret": {"K": 4096, **_FLOATS, "granularity": "packed"},
        "evaluation": {"max_samples": 150, "per_device_eval_batch_size": 16},
    },
    # The paper's three clients. A short prompt, because the Alpaca one takes 95 of 512 positions.
    "small/gsm8k": {
        **_SMALL,
        "num_clients": 3,
        "dataset": {"format": "gsm8k", "max_length": 512, "max_prompt_length": 399},
    },
    # 12 languages of the 2k file (with dataset.labels_file) that have 10 records.
    "small/codealpaca": {
        **_SMALL,
        "client_fraction": 0.25,
        "dataset": {"protocol": "codealpaca", "max_length": 512},
        "partition": {"min_size": 10},
    },
    "small/dolly": {
        **_SMALL,
        "variants": _small_variants(3e-5),
        "num_clients": 40,
        "client_fraction": 0.1,
        "dataset": {"protocol": "dolly", "max_length": 512},
    },
    "small/ni": {
        **_SMALL,
        "variants": _small_variants(1e-5),  # with 1e-4 the loss goes from 6.7 to 50 in the first round
        "client_fraction": 0.2,
        "dataset": {"protocol": "natural-instructions", "max_length": 512},
        "evaluation": {"max_samples": 60},
    },
    **{  # FedAvg's and the prompts' learning rates are ours for these two data sets
        f"paper/ni-{size}": _paper(
            _MODELS[size], "natural-instructions", 40, 12, (1e-4, 10.0), (1e-4, 1.0), 3e-4, epochs=1
        )
        for size in ("1.3b", "3b")
    },
    **{
        f"paper/dolly-{size}": _paper(
            _MODELS[size], "dolly", 60, 20, (1e-4, 3.0), (1e-4, 1.0), 3e-5, epochs=1
        )
        for size in ("1.3b", "3b")
    },
    **{  # the adapters' learning rate and number of steps are ours for these two
        f"paper/gsm8k-{size}": _paper(
            _MODELS[size],
            "gsm8k",
            20,
            20,
            adapter_rate=3e-4,
            **_LARGE[size],
            client_fraction=1.0,
            num_clients=3,
        )
        for size in ("7b", "13b")
    },
    **{
        f"paper/codealpaca-{size}": _paper(
            _MODELS[size], "codealpaca", 20, 20, adapter_rate=3e-4, **_LARGE[size], client_fraction=1.0
        )
        for size in ("7b", "13b")
    },
}
