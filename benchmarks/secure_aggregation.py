"""What secure aggregation costs a round: bytes, and seconds of a processor at client and server.

    python benchmarks/secure_aggregation.py [--K 4096] [--clients 3,10,50] [--json FILE]

Rounds of Ferret with a shared basis in one process, on real bytes, with a model of 100,000 parameters whose
"training" adds noise. Beside rounds with masks stand ones in which a fifth of the clients, at least one,
send no update after they gave their keys, and rounds without masks. Seconds are the processor's in all that
masking takes, without training and projection; bytes are those of a round's messages over all clients drawn.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timer import write
from torch import nn

from ferret_ext.federated.algorithms.base import Reply
from ferret_ext.federated.algorithms.ferret import SharedFerret
from ferret_ext.federated.config import FerretConfig
from ferret_ext.federated.engines.in_process import InProcessClients
from ferret_ext.federated.evaluation import Evaluation
from ferret_ext.federated.rounds import Deaf, run_rounds
from ferret_ext.federated.secure.assembly import MaskedSum
from ferret_ext.federated.secure.ferret import SecureFerret
from ferret_ext.federated.secure.participant import Participant
from ferret_ext.federated.server import Server

ROUNDS = 4  # the first is not counted


def model() -> Any:
    torch.manual_seed(0)
    return nn.Linear(400, 250, bias=False)


def drift(model: Any, examples: Any, seed: int, client: int = 0) -> float:
    """In place of training."""
    random = torch.Generator().manual_seed(seed % 2**63)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=random), alpha=1e-3)
    return 0.0


class Absent:
    """Clients of whom the last so many never send an update."""

    def __init__(self, members: InProcessClients, clients: int, dropped: int) -> None:
        self._members, self._last = members, clients - dropped

    def exchange(self, round_: int, chosen: list[int], server: Server[Any]) -> list[Reply]:
        replies = self._members.exchange(Deaf(), round_, chosen, server)
        return [
            reply if reply.client < self._last else replace(reply, payload=b"", failure="no reply")
            for reply in replies
        ]

    def ask(self, round_: int, requests: Mapping[int, bytes], enough: int, least: int) -> list[Reply]:
        return self._members.ask(round_, requests, enough, least)


@contextmanager
def metered(seconds: defaultdict[str, float]) -> Iterator[None]:
    """Counts the processor's seconds in what masking takes, by the names of the calls."""
    calls: list[tuple[type, str]] = [(Participant, name) for name in ("reply", "join", "hide")]
    calls += [(Server, "assemble"), (MaskedSum, "settle")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in calls]

    def timed(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            start = time.process_time()
            try:
                return original(*given)
            finally:
                seconds[name] += time.process_time() - start

        return call

    for owner, name, original in originals:
        setattr(owner, name, timed(name, original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def row(what: str, algorithm: SharedFerret, clients: int, dropped: int = 0) -> dict[str, Any]:
    """Means over the rounds that count, of a client and of the server."""
    members = InProcessClients(algorithm, model(), [[]] * clients, [1.0] * clients, seed=0)
    server = Server(algorithm, model(), range(clients), 1.0, 0, verify_weights=False, equal_weights=True)
    carrier, seconds = Absent(members, clients, dropped), defaultdict[str, float](float)

    def evaluate(round_: int, model: Any, watch: Any) -> Evaluation:
        if round_ == 1:
            seconds.clear()
        return Evaluation(0.0, 1, {}, [])

    with metered(seconds):
        history = run_rounds(ROUNDS, server, carrier.exchange, evaluate, Deaf(), 1, ask=carrier.ask)[2:]
    turns = len(history) * clients
    return {
        "what": what,
        "clients": clients,
        "dropped": dropped,
        "K": algorithm.config.K,
        "bytes_up": round(sum(it.payload_bytes_up for it in history) / turns),
        "bytes_down": round(sum(it.payload_bytes_down for it in history) / turns),
        "client_seconds": sum(seconds[name] for name in ("reply", "join", "hide")) / turns,
        "server_seconds": (seconds["assemble"] + seconds["settle"] - seconds["reply"]) / len(history),
    }


def rows(K: int, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    shared = FerretConfig(K=K, seeds="shared-round", allocation="size")
    masked = SecureFerret(replace(shared, secure_aggregation=True), 0.1, drift, seed=1)
    for clients in counts:
        for coordinates in ("float32", "int8"):
            plain = SharedFerret(replace(shared, coordinates=coordinates), 0.1, drift, seed=1)
            yield row(f"plain, {coordinates}", plain, clients)
        yield row("masked", masked, clients)
        yield row("masked", masked, clients, max(1, clients // 5))


def table(made: Sequence[Mapping[str, Any]]) -> str:
    lines = ["clients  dropped  what              bytes up  bytes down  client ms  server ms"]
    for it in made:
        client, server = (1000 * it[f"{who}_seconds"] for who in ("client", "server"))
        lines.append(
            f"{it['clients']:7}  {it['dropped']:7}  {it['what']:16}  {it['bytes_up']:8,}  "
            f"{it['bytes_down']:10,}  {client:9.1f}  {server:9.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--K", type=int, default=4096)
    parser.add_argument("--clients", default="3,10,50")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    made = list(rows(arguments.K, [int(number) for number in arguments.clients.split(",")]))
    print(table(made))
    if arguments.json is not None:
        write(arguments.json, made)


if __name__ == "__main__":
    main()
