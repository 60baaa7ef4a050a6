"""Several processes as one worker: rank 0 is asked, the others follow, and all do the same.

A call's outcome must be the same everywhere. Where one rank fails and another waits for it in a collective,
there is no way back: the caller gets the error, the process ends, and torchrun ends the others. Whoever has
started torchrun starts it again (`ferret join`).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ferret_ext.federated.explain import FAILED
from ferret_ext.federated.ranks import Ranks
from ferret_ext.federated.settings import Setting
from ferret_ext.federated.worker import calls
from ferret_ext.federated.worker.calls import Frame
from ferret_ext.federated.worker.serving import serve
from ferret_ext.federated.worker.worker import Say, Worker, check_own
from ferret_link import frames

PATIENCE = 30.0  # seconds from one rank's error until those that have not come to one are given up
PR_SET_PDEATHSIG = 1  # of prctl(2)
ERROR = "error: "
FAREWELL = 1.0  # seconds for an answer to leave
GLANCE = 0.5  # seconds between two looks at how the others do


class Answering(Protocol):
    """A `Worker`, as far as its rank goes."""

    def greet(self) -> Frame: ...

    def answer(self, frame: Mapping[str, Any]) -> Frame: ...


class Leader:
    """Rank 0's worker, whose calls the other ranks hear. Answers as `Worker` does."""

    def __init__(
        self, worker: Answering, ranks: Ranks, patience: float, end: Callable[[int], object] = os._exit
    ) -> None:
        """patience: seconds for all ranks to come to an error that one has come to. end: ends the process."""
        self._worker, self._ranks, self._patience, self._exit = worker, ranks, patience, end
        self._call = 0

    def greet(self) -> Frame:
        return self._worker.greet()

    def attend(self, call: Frame, answered: Callable[[Frame], None]) -> None:
        """Has a call answered; ends the process where the ranks are no longer of one mind."""
        self._call += 1
        over = threading.Event()
        threading.Thread(target=self._watch, args=(self._call, over, answered), daemon=True).start()
        self._ranks.tell(self._call, frames.encode(call))
        answer = self._worker.answer(call)
        self._ranks.report(self._call, *outcome(answer))
        outcomes = self._ranks.outcomes(self._call)
        over.set()
        if not alike(outcomes):
            return self._end(
                answered, self._ranks.failure(self._call) or f"ranks differ: {', '.join(outcomes)}"
            )
        self._ranks.forget(self._call)
        return answered(answer)

    def _watch(self, call: int, over: threading.Event, answered: Callable[[Frame], None]) -> None:
        """Waits no longer than patience goes for what will never come."""
        since = None
        while not over.wait(GLANCE):
            if since is None and self._ranks.failure(call):
                since = time.monotonic()
            if since is not None and time.monotonic() - since > self._patience:
                self._end(answered, self._ranks.failure(call))
                break

    def _end(self, answered: Callable[[Frame], None], text: str) -> None:
        answer = calls.error("RankError", f"{text}; all processes of this client end")
        print(f"ferret worker: {answer['type']}: {answer['text']}", flush=True)
        answered(answer)
        time.sleep(FAREWELL)
        self._exit(FAILED)  # at once: other threads may be stuck for ever


def run(
    path: Path, client: int, own: Sequence[Setting], device: str, say: Say, *, share: bool = False
) -> None:
    """This process's part of a worker at the socket `path`, as torchrun has started it. Does not return.

    own, share: as for `Worker`. Raises ConfigError.
    """
    end_at_once()
    check_own(own)
    ranks = Ranks.join(device)

    def speak(text: str) -> None:
        """All ranks say the same, but where they fail."""
        if ranks.rank == 0 or text.startswith("Traceback"):
            say(f"rank {ranks.rank}: {text}" if ranks.rank else text)

    worker = Worker(client, [*own, ("device", str(ranks.device))], speak, share=share, ranks=ranks)
    if ranks.rank == 0:
        serve(Leader(worker, ranks, PATIENCE), path)
    follow(worker, ranks)


def end_at_once() -> None:
    """SIGTERM and SIGINT end the process even while it waits in a collective; so does the end of torchrun."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def follow(worker: Answering, ranks: Ranks) -> None:
    """Does what rank 0 is asked to do, until the process ends."""
    call = 0
    while True:
        call += 1
        heard = frames.decode(ranks.hear(call)[frames.PREFIX :])
        ranks.report(call, *outcome(worker.answer(heard)))


def alike(outcomes: Sequence[str]) -> bool:
    """Whether all ranks go on from the same place: after one answer, or after errors, which may differ."""
    return len(set(outcomes)) == 1 or all(text.startswith(ERROR) for text in outcomes)


def outcome(answer: Frame) -> tuple[str, bool]:
    """What an answer must have in common with the other ranks', and whether it is an error."""
    if answer["kind"] == "error":
        return f"{ERROR}{answer['type']}: {answer['text']}", True
    told = [answer.get(name) for name in ("kind", "payload", "failure", "seen")]
    return hashlib.sha256(repr(told).encode()).hexdigest(), False
