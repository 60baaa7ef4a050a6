"""A worker at its socket: calls come from any number of connections and are answered one after the other."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.worker import calls
from ferret_ext.federated.worker.calls import Frame
from ferret_link import frames
from ferret_link.frames import FrameError, Listener, SocketError

Answered = Callable[[Frame], None]


class Party(Protocol):
    """A `Worker`, or several processes that are one together."""

    def greet(self) -> Frame:
        """Who it is and how far, from any thread."""

    def attend(self, call: Frame, answered: Answered) -> None:
        """Has a call answered, once."""


Jobs = queue.Queue[tuple[Frame, Answered]]


def serve(party: Party, path: Path, limit: int = frames.LARGEST_FRAME) -> None:
    """Answers at the socket until it is interrupted. limit: bytes of a call. Raises ConfigError.

    This thread trains, others listen: they answer a hello at once, whatever the training does, and wait for
    the answers to the rest.
    """
    jobs: Jobs = queue.Queue()
    try:
        listener = Listener(path)
    except (SocketError, OSError) as error:
        raise ConfigError(str(error)) from None
    with listener:
        threading.Thread(target=_accept, args=(listener, party, jobs, limit), daemon=True).start()
        while True:
            call, answered = jobs.get()
            party.attend(call, answered)


def _accept(listener: Listener, party: Party, jobs: Jobs, limit: int) -> None:
    while True:
        try:
            connection = listener.accept()
        except OSError:  # closed
            return
        threading.Thread(target=_converse, args=(connection, party, jobs, limit), daemon=True).start()


def _converse(connection: socket.socket, party: Party, jobs: Jobs, limit: int) -> None:
    """Answers the calls of one connection until it closes; what is no frame closes it."""
    with connection:
        try:
            while (call := frames.receive(connection, limit)) is not None:
                frames.send(connection, _answer(call, party, jobs))
        except FrameError as error:
            _try_to_send(connection, calls.error("FrameError", str(error)))
        except (OSError, MemoryError):
            return


def _answer(call: Frame, party: Party, jobs: Jobs) -> Frame:
    if call.get("kind") == "hello":
        return party.greet()
    if call.get("kind") not in ("train", "ask"):
        return calls.error("CallError", f"kind: expected hello, train or ask, got {call.get('kind')!r:.80}")
    box: queue.Queue[Frame] = queue.Queue(1)
    jobs.put((call, box.put))
    return box.get()


def _try_to_send(connection: socket.socket, answer: dict[str, Any]) -> None:
    try:
        frames.send(connection, answer)
    except OSError:
        return
