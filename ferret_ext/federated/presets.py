"""Settings under a name: `--preset NAME` puts them below the YAML file and the command line."""

from __future__ import annotations

from typing import Any

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
        "ferret": {"K": 4096, "granularity": "packed"},
        "evaluation": {"max_samples": 150, "per_device_eval_batch_size": 16},
    },
    # GSM8K over three clients: the paper's partition and prompt, steps for a small model.
    "gsm8k": {
        "rounds": 10,
        "num_clients": 3,
        "server_learning_rate": 0.4,
        "num_threads": 1,
        "dataset": {"format": "gsm8k", "max_length": 512, "max_prompt_length": 399},
        "training": {"max_steps": 10, "gradient_accumulation_steps": 4, "optim": "sgd", "learning_rate": 0.1},
        "ferret": {"K": 4096},
        "evaluation": {"max_samples": 100},
    },
}
