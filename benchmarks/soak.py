"""A federation that everything happens to: 200 clients, hundreds of rounds, faults, a server that is killed.

    python benchmarks/soak.py [--rounds 400] [--clients 200] [--kills 10] [--seed 0] [--json FILE]

In every round a quarter of the clients trains a small regression for real and sends real bytes. What happens
to them is drawn from the seed: clients crash before they send, messages are late, come twice, are damaged or
cut off, carry NaN, a huge norm, another round, a seed that was used, another client's name or another shape.
The server's process is killed (SIGKILL) at random moments and resumed. In the end the ledger must account for
every message: the updates that count are exactly those that nothing was done to, every other one was rejected
with its reason, and the model follows from the ledger, bit for bit. The server's memory is told, by round.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import signal
import statistics
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timer import write
from torch import nn

from ferret_ext.federated import digests, ledger, wire
from ferret_ext.federated.algorithms.base import Reply
from ferret_ext.federated.algorithms.ferret import Ferret
from ferret_ext.federated.config import FerretConfig, LedgerConfig, RobustConfig, SimulationConfig
from ferret_ext.federated.engines.in_process import InProcessClients
from ferret_ext.federated.evaluation import Evaluation, Sample
from ferret_ext.federated.journal import Genesis, replay
from ferret_ext.federated.metrics import RoundMetrics, Stopwatch
from ferret_ext.federated.report import RunFolder
from ferret_ext.federated.rounds import Deaf, run_rounds
from ferret_ext.federated.seeds import derive
from ferret_ext.federated.server import Server

FAULTS = {  # how likely each is, of a client's turn
    "crash": 0.03,
    "late": 0.03,
    "twice": 0.03,
    "damaged": 0.03,
    "cut off": 0.02,
    "NaN": 0.02,
    "huge": 0.02,
    "other round": 0.02,
    "used seed": 0.02,
    "other name": 0.02,
    "other shape": 0.02,
}
KEPT = ("none", "twice")  # of a message sent twice the first one counts
K = 64


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 4))


def train(net: Any, _: Any, seed: int, client: int = 0) -> float:
    """Three steps of SGD on the client's own view of one regression."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    inputs = torch.randn(16, 24, generator=generator)
    targets = torch.stack([inputs[:, i] * inputs[:, i + 4] for i in range(4)], 1) + 0.001 * client
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        loss = (net(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.item())


# ---- what happens to messages ----


def fault_of(seed: int, round_: int, client: int) -> str:
    """What happens to a client's message, the same whenever it is asked."""
    draw = random.Random(derive(seed, "fault", round_, client)).random()
    for fault, chance in FAULTS.items():
        if draw < chance:
            return "none" if fault == "used seed" and round_ == 1 else fault
        draw -= chance
    return "none"


def spoil(fault: str, payload: bytes, earlier: int | None) -> bytes:
    """The message after the fault. earlier: a seed that was used before."""
    message = wire.decode(payload)
    gammas = message.array("gammas", "<f4", (K,)).copy()
    if fault == "damaged":
        at = len(payload) // 2
        return payload[:at] + bytes([payload[at] ^ 0x40]) + payload[at + 1 :]
    if fault == "cut off":
        return payload[: len(payload) * 2 // 3]
    if fault == "NaN":  # no sender of ours can write it
        body = payload[: -4 - 4 * K] + struct.pack("<f", math.nan) + payload[-4 * K : -4]
        return body + struct.pack("<I", zlib.crc32(body))
    if fault == "huge":
        return wire.encode(replace(message, values={**message.values, "gammas": gammas * np.float32(1e12)}))
    if fault == "other round":
        return wire.encode(replace(message, round=message.round - 1))
    if fault == "used seed" and earlier is not None:
        return wire.encode(replace(message, values={**message.values, "seed": earlier}))
    if fault == "other name":
        return wire.encode(replace(message, client=message.client + 1))
    if fault == "other shape":
        return wire.encode(replace(message, values={**message.values, "gammas": gammas[:-1]}))
    return payload


class Carrier:
    """Carries the messages of `clients`, or what is left of them."""

    def __init__(self, clients: InProcessClients, seed: int, watcher: Any) -> None:
        self._clients, self._seed, self._watcher = clients, seed, watcher
        self._late: list[Reply] = []

    def exchange(self, round_: int, chosen: list[int], server: Server[Any]) -> list[Reply]:
        arrived, self._late = self._late, []
        used = min(server.admission.used, default=None)
        for reply in self._clients.exchange(self._watcher, round_, chosen, server):
            fault = fault_of(self._seed, round_, reply.client)
            if fault == "crash":
                arrived.append(replace(reply, payload=b"", failure="the client crashed"))
                continue
            spoiled = replace(reply, payload=spoil(fault, reply.payload, used))
            if fault == "late":
                self._late.append(spoiled)
            else:
                arrived += [spoiled] * (2 if fault == "twice" else 1)
        return arrived


class Watcher(Deaf):
    """Keeps metrics, and the server's memory after each round."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def round_ends(self, metrics: RoundMetrics, samples: Sequence[Sample]) -> None:
        self._folder.append(metrics, samples)
        row = {"process": os.getpid(), "round": metrics.round, "bytes": resident()}
        with (self._folder.path / "memory.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def evaluate(round_: int, net: Any, watch: Stopwatch) -> Evaluation:
    generator = torch.Generator().manual_seed(99)
    inputs = torch.randn(256, 24, generator=generator)
    targets = torch.stack([inputs[:, i] * inputs[:, i + 4] for i in range(4)], 1)
    with torch.no_grad():
        return Evaluation((net(inputs) - targets).square().mean().item(), 256, {}, [])


# ---- the server's process ----


def serve(path: Path, rounds: int, clients: int, seed: int) -> None:
    """The run from where its folder stands to its last round."""
    torch.set_num_threads(1)
    config = SimulationConfig(
        model="soak", data="soak", out=str(path), ledger=LedgerConfig(snapshot_every=20)
    )
    folder = RunFolder(config, resume=True)
    server, genesis = server_of(clients, seed)
    parties = InProcessClients(server.algorithm, model(), [[]] * clients, [1.0] * clients, seed)
    watcher = Watcher(folder)
    carrier = Carrier(parties, seed, watcher)
    run_rounds(rounds, server, carrier.exchange, evaluate, watcher, 1, folder.open_journal(genesis, {}))


def server_of(clients: int, seed: int) -> tuple[Server[Any], Genesis]:
    net = model()
    algorithm = Ferret(
        FerretConfig(K=K, coordinates="float32", granularity="tensor", server_warmup=0), 0.3, train
    )
    genesis = Genesis(digests.of_model(net), json.dumps({"soak": seed}))
    server = Server(
        algorithm, net, range(clients), 0.25, seed, run=genesis.run, robust=RobustConfig(quorum=clients // 20)
    )
    return server, genesis


def run_with_kills(path: Path, kills: int, options: argparse.Namespace) -> int:
    """Starts the server's process again and again, kills it so often, and lets it finish; deaths in all."""
    draw = random.Random(options.seed)
    deaths = 0
    while True:
        process = os.fork()
        if process == 0:
            try:
                serve(path, options.rounds, options.clients, options.seed)
            except BaseException as error:
                print(f"the server failed: {error!r}", file=sys.stderr)
                os._exit(1)
            os._exit(0)
        if deaths < kills:
            time.sleep(draw.uniform(1, 4))
            os.kill(process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if status not in (0, -signal.SIGKILL):
            raise SystemExit(f"the server ended with status {status}")
        deaths += status != 0
        if status == 0:
            return deaths


# ---- the account ----


def account(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Goes through the ledger with clients of its own; raises AssertionError where anything is amiss."""
    server, _ = server_of(options.clients, options.seed)
    parties = InProcessClients(
        server.algorithm, model(), [[]] * options.clients, [1.0] * options.clients, options.seed
    )
    nobody = Deaf()
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for record in ledger.read(path / "ledger"):
        if record.round == 0:
            continue
        chosen = server.choose(record.round)
        replies = parties.exchange(nobody, record.round, chosen, server)
        faults = {client: fault_of(options.seed, record.round, client) for client in chosen}
        expected = {
            reply.client: hashlib.sha256(reply.payload).digest()
            for reply in replies
            if faults[reply.client] in KEPT
        }
        accepted = numbers(record, "accepted")
        got = dict(zip(accepted, record.value("updates", list), strict=True))
        assert got == expected, f"round {record.round}: other updates count than those that arrived whole"
        silent_ones = {client for client in chosen if faults[client] == "crash"}
        assert set(numbers(record, "left_out")) == silent_ones
        check_rejections(record, faults)
        counts.update(faults.values())
        reasons["accepted"] += len(accepted)
        reasons["rejected"] += len(numbers(record, "rejected"))
        replay(server, record)
    assert server.replica.round == options.rounds
    return {"turns": sum(counts.values()), **reasons, "faults": dict(counts)}


def check_rejections(record: wire.Message, faults: dict[int, str]) -> None:
    """Each spoiled message of the round was rejected, and nothing else but messages that were late."""
    rejected = Counter(numbers(record, "rejected"))
    spoiled = Counter(c for c, fault in faults.items() if fault not in ("none", "crash", "late"))
    assert not spoiled - rejected, f"round {record.round}: {spoiled - rejected} were not rejected"
    reasons = [reason.decode() for reason in record.value("reasons", list)]
    late = sum((rejected - spoiled).values())
    told = sum("round" in reason for reason in reasons)
    assert late <= told, f"round {record.round}: rejected without a fault: {reasons}"


def numbers(record: wire.Message, name: str) -> list[int]:
    found: list[int] = record.value(name, np.ndarray).tolist()
    return found


def growth(path: Path) -> dict[str, Any]:
    """Memory of the process that lived longest: at a fifth of its rounds, and at its end, in bytes."""
    rows = [json.loads(line) for line in (path / "memory.jsonl").read_text().splitlines()]
    longest = Counter(row["process"] for row in rows).most_common(1)[0][0]
    sizes = [row["bytes"] for row in rows if row["process"] == longest]
    fifth = max(1, len(sizes) // 5)
    early, late = statistics.median(sizes[fifth : 2 * fifth]), statistics.median(sizes[-fifth:])
    apart = len(sizes) * 0.6  # rounds, from the middle of the second fifth to that of the last
    return {"rounds": len(sizes), "early": early, "late": late, "bytes_a_round": (late - early) / apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "run"
        begin = time.perf_counter()
        deaths = run_with_kills(path, options.kills, options)
        seconds = time.perf_counter() - begin
        told = account(path, options)
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        result = {
            "what": "soak",
            "rounds": options.rounds,
            "clients": options.clients,
            "server_killed": deaths,
            "seconds": seconds,
            "first_loss": rows[0]["eval_loss"],
            "last_loss": rows[-1]["eval_loss"],
            **told,
            "memory": growth(path),
            "ledger_bytes": (path / "ledger").stat().st_size,
        }
    print(json.dumps(result, indent=1))
    if options.json:
        write(options.json, [result])


if __name__ == "__main__":
    main()
