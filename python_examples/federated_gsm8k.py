"""Federated full-parameter tuning on GSM8K: three clients, kilobytes a round.

    python federated_gsm8k.py --model FOLDER --data FOLDER --out DIR [--rounds N]

The first FOLDER holds a causal language model of transformers, the second GSM8K's train.jsonl and test.jsonl.
The settings are the preset "small/gsm8k" of `ferret simulate`, and every setting of that command can follow,
e.g. ferret.K=8192.
"""

import sys

from ferret_ext.federated.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["simulate", "--preset", "small/gsm8k", *sys.argv[1:]]))
