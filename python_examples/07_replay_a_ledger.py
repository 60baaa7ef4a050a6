"""Replay a ledger: a fine-tuned model is its base and some kilobytes a round.

    python python_examples/07_replay_a_ledger.py

A short run on a small Llama made on the spot leaves a ledger. The model after any of its rounds is rebuilt
from the ledger alone, with no data and no training, to the bit; a ledger that was changed is refused.
"""

import io
import json
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ferret_ext.federated import cli, ledger
from ferret_ext.federated.errors import LedgerError
from ferret_ext.federated.replay import replay

BASE = "builtin:tiny-llama"
SETTINGS = ("rounds=3", "training.max_steps=4", "evaluation.max_samples=20", "ferret.K=1024")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        with redirect_stdout(io.StringIO()):  # what `ferret simulate` shows
            failed = cli.main(["simulate", "--preset", "demo", "--out", str(run), *SETTINGS])
        if failed:
            raise SystemExit(failed)
        show(run)


def show(run: Path) -> None:
    print("the ledger, a record a round:")
    for record in ledger.read(run / "ledger"):
        told = len(record.value("broadcast", bytes))
        print(f"  round {record.round}: {told:,} bytes relayed, leads to weights {record.weights.hex()}")

    tuned = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    rebuilt = replay(BASE, run)
    same = all(torch.equal(tensor, tuned[name]) for name, tensor in rebuilt.model.state_dict().items())
    size = sum(param.numel() * param.element_size() for param in rebuilt.model.parameters())
    kept = json.loads((run / "ledger.head").read_text())["bytes"]
    verdict = "the run's weights to the bit" if same else "other weights"
    print(f"rebuilt from {kept:,} bytes, where the model has {size:,}: {verdict}")

    data = bytearray((run / "ledger").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "ledger").write_bytes(data)
    try:
        replay(BASE, run)
    except LedgerError as error:
        print(f"with one bit changed: {str(error).replace(str(run), 'RUN')}")


if __name__ == "__main__":
    main()
