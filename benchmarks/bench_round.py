"""One round of Ferret on a Llama of 1.1 billion bfloat16 parameters: seconds, bytes and memory.

    python benchmarks/bench_round.py [--layers 22] [--length 512] [--K 1000] [--clients 10] [--json FILE]

The model has TinyLlama-1.1B's shape and random weights; nothing is downloaded. Every client starts from the
same weights, takes one local step on a sequence of random tokens of its own, and sends its update, projected
and encoded by the federated layer as in any other run. Then the next model is rebuilt from all clients'
messages, as every party does. For a quick trial: --layers 1 --hidden 256.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timer import Timing, write

import ferret_ext
from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.base import LocalData, Replica
from ferret_ext.federated.algorithms.ferret import Ferret
from ferret_ext.federated.algorithms.updates import Updates
from ferret_ext.federated.config import FerretConfig
from ferret_ext.federated.data.tokens import Example, collate
from ferret_ext.federated.metrics import Stopwatch
from ferret_ext.federated.models import trainable_bytes
from ferret_ext.federated.seeds import derive

VOCABULARY = 32000
LEARNING_RATE = 1.0  # a random model's gradients are small: bfloat16 would round smaller steps away
REBUILDS = 3


def llama(layers: int, hidden: int) -> Any:
    """TinyLlama-1.1B's shape for 22 layers and hidden = 2048, with random bfloat16 weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    return model.train()


def random_example(client: int, length: int) -> Example:
    generator = torch.Generator().manual_seed(client)
    tokens = torch.randint(VOCABULARY, (length,), generator=generator)
    return Example(tuple(tokens.tolist()), prompt_length=0)


def local_step(model: Any, examples: Sequence[Example], seed: int, client: int = 0) -> float:
    """Forward, backward and one step of SGD on the examples; the loss. Nothing in it is random."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    loss = model(**collate(examples, 0, model.device), use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.item())


def play_round(model: Any, K: int, clients: int, length: int) -> dict[str, Any]:
    """A round, after one local step that is not counted, as one row of results in seconds and bytes.

    The rebuilding is repeated, and the first one not counted.
    """
    ferret = Ferret(
        FerretConfig(K=K, coordinates="float32", allocation="size", granularity="tensor"), 1.0, local_step
    )
    replica = ferret.replicate(model)
    replica.mark()
    local_step(model, [random_example(clients, length)], 0)

    messages, watches = [], []
    for client in range(clients):
        replica.rewind()
        seed, watch = derive(0, "client", 1, client), Stopwatch()
        data = LocalData(client, 1, seed, [random_example(client, length)])
        messages.append(ferret.train_and_encode(replica, data, watch)[0])
        watches.append(watch)
    changed = share_changed(replica)

    replica.rewind()
    updates = Updates([wire.decode(message) for message in messages], messages, [1.0] * clients)
    broadcast = ferret.server_apply(replica, updates)
    rebuilds = []
    for _ in range(1 + REBUILDS):
        replica.rewind()
        replica.round = 0  # as if it had not seen the broadcast
        watch = Stopwatch()
        with watch("rebuild"):
            ferret.rebuild(replica, broadcast)
        rebuilds.append(watch["rebuild"])

    blocks = replica.plan.blocks
    local = timing([watch["local"] for watch in watches])
    project = timing([watch["project"] for watch in watches])
    rebuild = timing(rebuilds[1:])
    return {
        "what": "round",
        "isa": ferret_ext.cpu_capability()["isa"],
        "parameters": sum(block.numel for block in blocks),
        "blocks": len(blocks),
        "K": replica.plan.K,
        "smallest_k": min(block.k for block in blocks),
        "largest_k": max(block.k for block in blocks),
        "basis_elements": sum(block.numel * block.k for block in blocks),
        "clients": clients,
        "length": length,
        "share_changed": changed,
        "local_step": local,
        "project": project,
        "rebuild": rebuild,
        "share_of_local_step": (project.median + rebuild.median) / local.median,
        "sent_bytes": len(messages[0]),
        "received_bytes": len(broadcast),
        "model_bytes": trainable_bytes(model),
        "peak_memory_bytes": peak_memory(),
    }


@torch.no_grad()
def share_changed(replica: Replica) -> float:
    """The share of the weights that differ from the round's start."""
    pairs = zip(replica.params, replica.start, strict=True)
    changed = sum(int(torch.count_nonzero(param != start)) for param, start in pairs)
    return changed / sum(param.numel() for param in replica.params)


def timing(seconds: list[float]) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def peak_memory() -> int:
    """The most bytes that this process has had in memory (VmHWM)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def table(row: dict[str, Any]) -> str:
    def seconds(what: str) -> str:
        t = row[what]
        return f"{t.median:8.3f} s   ({t.fastest:.3f} to {t.slowest:.3f}, {t.calls} times)"

    share, smaller = row["share_of_local_step"], row["model_bytes"] / row["sent_bytes"]
    return f"""\
Llama of {row["parameters"]:,} bfloat16 parameters, {row["clients"]} clients, path {row["isa"]}
K = {row["K"]} over {row["blocks"]} blocks, {row["smallest_k"]} to {row["largest_k"]} a block

local step            {seconds("local_step")}
                      1 x {row["length"]} tokens; changes {row["share_changed"]:.1%} of the weights
projection            {seconds("project")}
rebuilding            {seconds("rebuild")}
together              {share:8.2f} local steps: {"less" if share < 1 else "NOT less"} than one

sent by a client      {row["sent_bytes"]:,} bytes
received by a client  {row["received_bytes"]:,} bytes
full model            {row["model_bytes"]:,} bytes, {smaller:,.0f} times what a client sends
peak memory           {row["peak_memory_bytes"] / 2**30:.2f} GiB"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 64")
    parser.add_argument("--length", type=int, default=512, help="tokens of a client's one sequence")
    parser.add_argument("--K", type=int, default=1000, help="coordinates of an update, over all blocks")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    model = llama(arguments.layers, arguments.hidden)
    row = play_round(model, arguments.K, arguments.clients, arguments.length)
    print(table(row))
    if arguments.json is not None:
        write(arguments.json, [row])


if __name__ == "__main__":
    main()
