"""One round of Ferret on a Llama of 1.1 or 6.7 billion bfloat16 parameters: seconds, bytes and memory.

    python benchmarks/bench_round.py [--layers 22] [--length 512] [--K 1000] [--clients 10] [--json FILE]
    python benchmarks/bench_round.py --shape llama-7b --device cuda --steps 10 --accumulation 4 --trained 2
                                     [--start-on-host]

The model has TinyLlama-1.1B's or Llama 2 7B's shape and random weights; nothing is downloaded. Every client
starts from the same weights, takes `steps` local steps, each on the mean gradient of `accumulation` sequences
of random tokens of its own, and sends its update, projected and encoded by the federated layer as in any
other run. With `trained` only so many clients do; the others take one step on one sequence, which is not
timed. Then the next model is rebuilt from all clients' messages, as every party does. With `start-on-host`
the copy of the weights as the round began lies in host memory, as with `training.start_on_host`. For a quick
trial: --layers 1 --hidden 256.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Shape:
    """A Llama with 32 heads; hidden must be a multiple of 64."""

    layers: int
    hidden: int
    inner: float  # the width of the MLPs, in hidden
    kv_heads: int


SHAPES = {"tinyllama": Shape(22, 2048, 11 / 4, 4), "llama-7b": Shape(32, 4096, 11008 / 4096, 32)}


@dataclass(frozen=True)
class Work:
    """What a client does in a round."""

    length: int = 512  # tokens of a sequence
    steps: int = 1
    accumulation: int = 1  # sequences of a step


def llama(shape: Shape, device: torch.device) -> Any:
    """With random bfloat16 weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=int(shape.hidden * shape.inner),
        num_hidden_layers=shape.layers,
        num_attention_heads=32,
        num_key_value_heads=shape.kv_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    return model.train()


def random_examples(client: int, work: Work) -> list[Example]:
    generator = torch.Generator().manual_seed(client)
    tokens = torch.randint(VOCABULARY, (work.steps * work.accumulation, work.length), generator=generator)
    return [Example(tuple(row), prompt_length=0) for row in tokens.tolist()]


def train(model: Any, examples: Sequence[Example], accumulation: int) -> float:
    """A step of SGD on the mean gradient of every `accumulation` examples; the mean loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for at, example in enumerate(examples, 1):
        loss = model(**collate([example], 0, model.device), use_cache=False).loss
        (loss / accumulation).backward()
        losses.append(loss.detach())
        if at % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return float(torch.stack(losses).mean())


def play_round(
    model: Any, K: int, clients: int, work: Work, trained: int, start_on_host: bool = False
) -> dict[str, Any]:
    """A round, after one local step that is not counted, as one row of results in seconds and bytes.

    The rebuilding is repeated, and the first one not counted.
    """

    def local_training(model: Any, examples: Sequence[Example], seed: int, client: int = 0) -> float:
        return train(model, examples, min(work.accumulation, len(examples)))

    settings = FerretConfig(K=K, coordinates="float32", allocation="size", granularity="tensor")
    ferret = Ferret(settings, 1.0, local_training)
    replica = ferret.replicate(model)
    replica.start_on_host = start_on_host
    replica.mark()
    short = Work(work.length)
    train(model, random_examples(clients, short), 1)

    messages, watches = [], []
    for client in range(clients):
        replica.rewind()
        seed, watch = derive(0, "client", 1, client), Stopwatch()
        data = LocalData(client, 1, seed, random_examples(client, work if client < trained else short))
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
    local = timing([watch["local"] for watch in watches[:trained]])
    project = timing([watch["project"] for watch in watches])
    rebuild = timing(rebuilds[1:])
    return {
        "what": "round",
        "device": model.device.type,
        "isa": ferret_ext.cpu_capability()["isa"],
        "parameters": sum(block.numel for block in blocks),
        "blocks": len(blocks),
        "K": replica.plan.K,
        "smallest_k": min(block.k for block in blocks),
        "largest_k": max(block.k for block in blocks),
        "basis_elements": sum(block.numel * block.k for block in blocks),
        "clients": clients,
        "trained": trained,
        "length": work.length,
        "steps": work.steps,
        "accumulation": work.accumulation,
        "start_on_host": start_on_host,
        "share_changed": changed,
        "local": local,
        "project": project,
        "rebuild": rebuild,
        "share_of_local": (project.median + rebuild.median) / local.median,
        "sent_bytes": len(messages[0]),
        "received_bytes": len(broadcast),
        "model_bytes": trainable_bytes(model),
        "peak_memory_bytes": peak_memory(model.device),
    }


@torch.no_grad()
def share_changed(replica: Replica) -> float:
    """The share of the weights that differ from the round's start."""
    pairs = zip(replica.params, replica.start, strict=True)
    changed = sum(int(torch.count_nonzero(param != start.to(param.device))) for param, start in pairs)
    return changed / sum(param.numel() for param in replica.params)


def timing(seconds: list[float]) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors have had on the GPU; elsewhere, that this process has had (VmHWM)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def table(row: dict[str, Any]) -> str:
    def seconds(what: str) -> str:
        t = row[what]
        return f"{t.median:8.3f} s   ({t.fastest:.3f} to {t.slowest:.3f}, {t.calls} times)"

    share, smaller = row["share_of_local"], row["model_bytes"] / row["sent_bytes"]
    path = row["isa"] if row["device"] == "cpu" else row["device"]
    sequences = f"{row['steps']} x {row['accumulation']} x {row['length']}"
    return f"""\
Llama of {row["parameters"]:,} bfloat16 parameters, {row["clients"]} clients, path {path}
K = {row["K"]} over {row["blocks"]} blocks, {row["smallest_k"]} to {row["largest_k"]} a block

local training        {seconds("local")}
                      {sequences} tokens; the last client changes {row["share_changed"]:.1%} of the weights
projection            {seconds("project")}
rebuilding            {seconds("rebuild")}
together              {share:8.3f} of the local training

sent by a client      {row["sent_bytes"]:,} bytes
received by a client  {row["received_bytes"]:,} bytes
full model            {row["model_bytes"]:,} bytes, {smaller:,.0f} times what a client sends
peak memory           {row["peak_memory_bytes"] / 2**30:.2f} GiB"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--layers", type=int, help="other than the shape's")
    parser.add_argument("--hidden", type=int, help="other than the shape's; a multiple of 64")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=1, help="of local training")
    parser.add_argument(
        "--accumulation", type=int, default=1, help="sequences of a step, one after the other"
    )
    parser.add_argument("--trained", type=int, help="clients that take all steps (all of them)")
    parser.add_argument("--K", type=int, default=1000, help="coordinates of an update, over all blocks")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument(
        "--start-on-host", action="store_true", help="keep the round's start in host memory, not on the GPU"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.device.type == "cuda":  # stopwatches wait for the current device
        torch.cuda.set_device(arguments.device.index or 0)

    given = {name: value for name in ("layers", "hidden") if (value := getattr(arguments, name)) is not None}
    model = llama(replace(SHAPES[arguments.shape], **given), arguments.device)
    work = Work(arguments.length, arguments.steps, arguments.accumulation)
    trained = arguments.clients if arguments.trained is None else arguments.trained
    row = play_round(model, arguments.K, arguments.clients, work, trained, arguments.start_on_host)
    print(table(row))
    if arguments.json is not None:
        write(arguments.json, [row])


if __name__ == "__main__":
    main()
