"""What a round costs with a million clients, by where seeds come from: computed, from rates measured here.

    python benchmarks/many_clients.py [--clients 1000000] [--chosen 100,1000] [--rounds 1000] [--json FILE]

    per-client     a basis for each client and round; the server relays every update (the default)
    shared-round   one basis for all clients of a round; it relays their mean
    fixed-pool     one basis for all clients and rounds, with K columns for every block (reference-code)

Bytes are those of messages and ledger records of these shapes. Which clients a round draws, and so how many
broadcasts each of them has missed, is simulated client by client. Seconds are basis elements over the rate at
which a core of this machine adds them up, measured on the tensors of one layer with their share of K. The
model has TinyLlama-1.1B's shape, and nothing is trained.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from bench_round import llama
from timer import write

import ferret_ext
from ferret_ext import BlockPlan, Packed
from ferret_ext.federated import coordinates, estimate, wire
from ferret_ext.federated.algorithms.base import trainable
from ferret_ext.federated.config import FerretConfig, SimulationConfig
from ferret_ext.federated.models import trainable_bytes
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.wire import Message

POLICIES: dict[str, dict[str, Any]] = {
    "per-client": {},
    "shared-round": {"seeds": "shared-round"},
    "fixed-pool": {"mode": "reference-code"},
}
LAYER = "model.layers.0."  # whose tensors the rates are measured on
MOST_COLUMNS = 256  # of a block when they are; from there on the rate does not change
TERMS = 2  # updates that are added up in one call


@dataclass(frozen=True)
class Costs:
    """Of one round: bytes of messages and of the ledger's record, and basis elements to rebuild it."""

    update: int
    broadcast: int
    record: int
    elements: int


def config_of(policy: str, clients: int, chosen: int, K: int) -> SimulationConfig:
    ferret = FerretConfig(K=K, **POLICIES[policy])
    return SimulationConfig(num_clients=clients, client_fraction=chosen / clients, ferret=ferret)


def costs_of(config: SimulationConfig, model: Any) -> Costs:
    """From the shapes alone; the model may be on the meta device."""
    traffic, plan = estimate.traffic(config, model), estimate.plan_of(config, model)
    assert plan is not None, "ferret has a plan"
    terms = traffic.chosen if estimate.name_of(config) == "ferret" else 1
    elements = terms * sum(block.numel * block.k for block in plan.blocks)
    return Costs(traffic.update, traffic.broadcast, record_bytes(traffic), elements)


def record_bytes(traffic: estimate.Traffic) -> int:
    """What a round adds to the ledger (`journal.record_of`) when every update is taken."""
    chosen, nobody = np.zeros(traffic.chosen, np.uint32), np.zeros(0, np.uint32)
    values: dict[str, wire.Value] = {
        "previous": bytes(32),
        "broadcast": bytes(traffic.broadcast),
        "clients": chosen,
        "left_out": nobody,
        "accepted": chosen,
        "rejected": nobody,
        "reasons": [],
        "updates": [bytes(32)] * traffic.chosen,
        "bytes_up": traffic.chosen * traffic.update,
        "bytes_down": traffic.chosen * traffic.broadcast,
        "train_loss": 1.0,
    }
    return 8 + len(wire.encode(Message("ferret", "record", wire.NO_DIGEST, 1, values=values)))


def missed(clients: int, chosen: int, rounds: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """By round, the broadcasts that its clients together still have to receive, as the server draws them."""
    seen = np.zeros(clients, np.int64)
    sums = np.zeros(rounds, np.int64)
    for round_ in range(1, rounds + 1):
        random = np.random.Generator(np.random.PCG64(derive(seed, "clients", round_)))
        drawn = random.choice(clients, chosen, replace=False)
        sums[round_ - 1] = (round_ - seen[drawn]).sum()
        seen[drawn] = round_
    return sums


# ---- rates ----


def layer_plan(config: SimulationConfig, model: Any) -> BlockPlan:
    """A plan for one layer's tensors, each with the columns that it has in the model's."""
    of_layer = {name: param for name, param in trainable(model).items() if name.startswith(LAYER)}
    plan = estimate.plan_of(config, model)
    assert plan is not None, "ferret has a plan"
    counts = {block.name: min(block.k, MOST_COLUMNS) for block in plan.blocks}
    few = [counts.get(name, MOST_COLUMNS) for name in of_layer]  # packed blocks have other names
    blocks = BlockPlan.from_parameters(of_layer.items(), K=sum(few), granularity="tensor", allocation="size")
    return blocks.with_counts(few)


def rate_of_rebuilding(config: SimulationConfig, model: Any, calls: int) -> float:
    """Basis elements that one core adds up in a second of its time, in one layer's weights; the median."""
    plan, kind = layer_plan(config, model), config.ferret.chosen_coordinates
    weights = [torch.zeros(param.shape, dtype=param.dtype) for param in plan.select(trainable(model))]
    relays_floats = estimate.name_of(config) != "ferret"
    generator = torch.Generator().manual_seed(0)

    def coordinates_of() -> torch.Tensor | Packed:
        if relays_floats or kind not in coordinates.PACKINGS:
            return torch.randn(plan.K, generator=generator)
        packing = coordinates.PACKINGS[kind]
        return ferret_ext.pack(plan, torch.randn(packing.candidates(plan).K, generator=generator), packing)

    terms = [(seed, coordinates_of(), 0.5) for seed in range(1 if relays_floats else TERMS)]
    seconds = []
    for _ in range(1 + calls):
        begun = time.process_time()  # others may use the machine too
        ferret_ext.apply_(plan, weights, terms, -1e-3, basis=config.ferret.chosen_basis)
        seconds.append(time.process_time() - begun)
    elements = len(terms) * sum(block.numel * block.k for block in plan.blocks)
    return elements / statistics.median(seconds[1:])


# ---- rows ----


def rows_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each policy and number of clients a round, see `row`."""
    with torch.device("meta"):
        model = llama(options.layers, options.hidden)
    rates = {}
    for policy in POLICIES:
        config = config_of(policy, options.clients, options.chosen[0], options.K)
        rates[policy] = rate_of_rebuilding(config, model, options.calls)
    for chosen in options.chosen:
        gaps = missed(options.clients, chosen, options.rounds)
        for policy in POLICIES:
            costs = costs_of(config_of(policy, options.clients, chosen, options.K), model)
            yield row(policy, chosen, costs, gaps, rates[policy], trainable_bytes(model))


def row(
    policy: str, chosen: int, costs: Costs, gaps: npt.NDArray[np.int64], rate: float, model_bytes: int
) -> dict[str, Any]:
    """rate is measured; all else is computed. `by_round` has the rounds 1, 2, 5, 10, .. and the last."""
    seconds = costs.elements / rate
    return {
        "policy": policy,
        "chosen": chosen,
        "update_bytes": costs.update,
        "broadcast_bytes": costs.broadcast,
        "ledger_bytes_a_round": costs.record,
        "elements": costs.elements,
        "measured_elements_per_second": rate,
        "seconds_a_broadcast": seconds,
        "model_bytes": model_bytes,
        "whole_weights_are_cheaper_from": model_bytes // costs.broadcast + 1,
        "by_round": [
            {
                "round": round_,
                "server_receives": chosen * costs.update,
                "server_sends": int(gaps[round_ - 1]) * costs.broadcast,
                "missed_broadcasts": float(gaps[round_ - 1] / chosen),
                "client_seconds": float(gaps[round_ - 1] / chosen) * seconds,
                "ledger_bytes": round_ * costs.record,
                "newcomer_bytes": round_ * costs.broadcast,
                "newcomer_seconds": round_ * seconds,
            }
            for round_ in shown_rounds(len(gaps))
        ],
    }


def shown_rounds(rounds: int) -> list[int]:
    steps = (step * 10**power for power in range(10) for step in (1, 2, 5))
    return sorted({*(round_ for round_ in steps if round_ <= rounds), rounds})


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, at the last round."""
    lines = [
        "| seeds | clients a round | update | broadcast | rebuilt in | in the last round, the server sends "
        "| ledger | a newcomer receives | and rebuilds in | whole weights are cheaper from round |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for it in rows:
        last = it["by_round"][-1]
        cells = [
            it["policy"],
            f"{it['chosen']:,}",
            amount(it["update_bytes"], "B"),
            amount(it["broadcast_bytes"], "B"),
            amount(it["seconds_a_broadcast"], "s"),
            *(amount(last[name], "B") for name in ("server_sends", "ledger_bytes", "newcomer_bytes")),
            amount(last["newcomer_seconds"], "s"),
            f"{it['whole_weights_are_cheaper_from']:,}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def amount(value: float, unit: str) -> str:
    """With three digits and a unit that suits."""
    units = {
        "B": (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)),
        "s": (("d", 86400), ("h", 3600), ("min", 60)),
    }
    for name, size in units[unit]:
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.3g} {unit}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=1_000_000)
    parser.add_argument("--chosen", type=_numbers, default=[100, 1000], help="clients a round, e.g. 100,1000")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--K", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 64")
    parser.add_argument("--calls", type=int, default=9, help="for each rate that is measured")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(rows_of(options))
    print(table(rows))
    if options.json is not None:
        facts = {name: getattr(options, name) for name in ("clients", "rounds", "K")}
        write(options.json, rows, isa=ferret_ext.cpu_capability()["isa"], **facts)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
