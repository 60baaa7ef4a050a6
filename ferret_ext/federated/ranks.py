"""The processes that are one client together, as torchrun starts them: how they find and follow one another.

They speak through torchrun's store, beside the collectives of training: it can be looked at without waiting,
also while a rank is stuck in a collective.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ferret_ext.federated import sharded
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.models import pick_device
from ferret_ext.federated.settings import ConfigError

SLOWEST = timedelta(minutes=30)  # of a collective: a rank that hangs longer ends all
PIECE = 1 << 20  # bytes of a value in the store, which takes 8 MiB at most
PAUSE = 0.02  # seconds between two looks at the store


class Ranks:
    """This process, `rank` of `size`, on its own `device`.

    A call is counted from 1 on, the same on all ranks; whatever is said about it goes by that number.
    """

    trainer = sharded.ShardedTrainer

    def __init__(self, rank: int, size: int, device: torch.device, store: Store, mesh: DeviceMesh) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._store, self._mesh = store, mesh
        self._turns = 0

    @classmethod
    def join(cls, device: str) -> Ranks:
        """Meets the others that torchrun has started, by its environment.

        device: auto, cpu or cuda; each process takes a GPU of its own. Raises ConfigError.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, size, place, here = (int(os.environ[name]) for name in names)
        own = own_device(device, place, here)
        if own.type == "cuda":
            torch.cuda.set_device(own)
        (meeting, *_), (talk, *_) = (next(rendezvous("env://", rank, size)) for _ in range(2))
        backend = "nccl" if own.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=meeting, rank=rank, world_size=size, timeout=SLOWEST)
        return cls(rank, size, own, PrefixStore("ferret", talk), init_device_mesh(own.type, (size,)))

    # ---- the model ----

    def check(self, config: SimulationConfig) -> None:
        """Raises ConfigError for settings that several processes cannot have."""
        sharded.check(config)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One rank after the other, so that memory holds the whole model once at a time."""
        self._turns += 1
        name = f"turn {self._turns}"
        if self.rank > 0:
            self._wait([f"{name} {self.rank - 1}"])
        try:
            yield
        finally:
            self._store.set(f"{name} {self.rank}", "")

    def cut(self, model: nn.Module) -> None:
        """Leaves this rank its part of the model, on its device."""
        sharded.cut(model, self._mesh)

    # ---- calls ----

    def tell(self, call: int, data: bytes) -> None:
        """Has the others hear a call."""
        pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)]
        for index, piece in enumerate(pieces):
            self._store.set(f"call {call} {index}", piece)  # type: ignore[arg-type]  # it takes bytes too
        self._store.set(f"call {call}", str(len(pieces)))

    def hear(self, call: int) -> bytes:
        """What rank 0 tells, however long that takes."""
        self._wait([f"call {call}"])
        count = int(self._store.get(f"call {call}"))
        return b"".join(self._store.get(f"call {call} {index}") for index in range(count))

    def report(self, call: int, outcome: str, failed: bool) -> None:
        """Says what came of a call on this rank."""
        if failed:
            self._store.set(f"failed {call}", f"rank {self.rank}: {outcome}")
        self._store.set(f"outcome {call} {self.rank}", outcome)

    def failure(self, call: int) -> str:
        """What went wrong with a call on the rank that said so last; "" as long as none does. Never waits."""
        return self._read(f"failed {call}") if self._store.check([f"failed {call}"]) else ""

    def outcomes(self, call: int) -> list[str]:
        """What came of a call on each rank, once all have said so."""
        names = [f"outcome {call} {rank}" for rank in range(self.size)]
        self._wait(names)
        return [self._read(name) for name in names]

    def forget(self, call: int) -> None:
        """Takes a call that is over out of the store."""
        names = [f"call {call}", f"failed {call}", *(f"outcome {call} {rank}" for rank in range(self.size))]
        names += [f"call {call} {index}" for index in range(int(self._read(f"call {call}")))]
        for name in names:
            self._store.delete_key(name)

    def _read(self, name: str) -> str:
        return str(self._store.get(name), "utf-8")

    def _wait(self, names: Sequence[str]) -> None:
        while not self._store.check(list(names)):
            time.sleep(PAUSE)


def own_device(device: str, place: int, count: int) -> torch.device:
    """The device of process `place` of `count` on this machine. Raises ConfigError."""
    if device == "auto":
        device = pick_device("auto").type
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or cuda with several processes a client, got {device}")
    if device == "cpu":
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible < count:
        raise ConfigError(f"device: expected {count} visible GPUs, one a process, got {visible}")
    return torch.device("cuda", place)
