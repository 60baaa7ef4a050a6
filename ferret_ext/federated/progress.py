"""What a run is doing right now, for whoever shows it; where nobody listens it costs nothing.

It is told from deep inside training and evaluation, which know nothing of who calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Listener = Callable[[str, int, int], None]  # what is done, how much of it, out of how much; 0 if unknown
T = TypeVar("T")

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def report(what: str, done: int = 0, total: int = 0) -> None:
    if (listener := _listener.get()) is not None:
        listener(what, done, total)


def each(what: str, items: Iterable[T], total: int) -> Iterator[T]:
    """The items, each reported once whoever takes them asks for the next."""
    for done, item in enumerate(items, start=1):
        yield item
        report(what, done, total)
