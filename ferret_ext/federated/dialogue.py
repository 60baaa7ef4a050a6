"""What a round needs of its clients beside their updates: who takes part, and a word once it is over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ferret_ext.federated.errors import QuorumError, RunError
from ferret_ext.federated.wire import Message

if TYPE_CHECKING:
    from ferret_ext.federated.algorithms.base import Reply
    from ferret_ext.federated.algorithms.updates import Updates

# round, request by client, answers that suffice, answers needed -> replies
Ask = Callable[[int, Mapping[int, bytes], int, int], "list[Reply]"]
LeftOut = Callable[[int, str], None]  # client, reason


def nobody_to_ask(round_: int, requests: Mapping[int, bytes], enough: int, least: int) -> list[Reply]:
    """For engines that carry updates alone. Raises RunError."""
    raise RunError(f"round {round_}: expected an engine that carries requests to clients, got updates alone")


class Dialogue:
    """Requests to a round's clients and their answers, counted.

    left_out: the clients that the round goes on without, in their order. bytes_up, bytes_down: of answers and
    requests.
    """

    def __init__(
        self, round_: int, ask: Ask = nobody_to_ask, say: LeftOut = lambda client, reason: None
    ) -> None:
        """say: hears of each client that is left out."""
        self.round = round_
        self.left_out: list[int] = []
        self.bytes_up = self.bytes_down = 0
        self._ask, self._say = ask, say

    def __call__(
        self, requests: Mapping[int, bytes], enough: int, least: int
    ) -> tuple[dict[int, bytes], dict[int, str]]:
        """The answers of those that gave one, and what the others said instead.

        Waits for `enough` answers, or until the engine's deadline for `least` of them. Raises QuorumError.
        """
        replies = self._ask(self.round, requests, enough, least)
        self.bytes_up += sum(len(reply.payload) for reply in replies)
        self.bytes_down += sum(reply.payload_bytes_down for reply in replies)
        answers = {reply.client: reply.payload for reply in replies if not reply.failure}
        return answers, {reply.client: reply.failure for reply in replies if reply.failure}

    def leave_out(self, client: int, reason: str) -> None:
        """The round goes on without this client."""
        self.left_out.append(client)
        self._say(client, reason)


@dataclass(frozen=True)
class Assembly:
    """The clients that take part in a round, as the server sees them. Here everybody who was drawn does.

    invitation: what they are told with their call to train, if anything. least: updates that the round needs
    on its own account.
    """

    clients: Sequence[int]
    invitation: bytes = b""
    least: int = 0

    def check(self, update: Message) -> None:
        """Raises WireError for an update that does not fit the invitation."""

    def settle(self, updates: Updates, talk: Dialogue) -> Updates:
        """The updates that count, once the clients have said what else it takes. Raises RunError."""
        return updates


def too_few(round_: int, what: str, least: int, reasons: Mapping[int, str], got: int) -> QuorumError:
    """A round for which too few clients gave what it takes."""
    told = "".join(f"; client {client}: {reason}" for client, reason in reasons.items())
    return QuorumError(f"round {round_}: expected {what} of at least {least} clients, got {got}{told}")
