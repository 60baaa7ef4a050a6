"""Masked sums: exact whoever drops out, with nothing but sums to see, and what a client refuses to tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from circle import RUN, Circle, about, seeded, settle
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from ferret_ext.federated import wire
from ferret_ext.federated.errors import QuorumError, RunError
from ferret_ext.federated.secure import masks, messages
from ferret_ext.federated.secure.assembly import MaskedSum
from ferret_ext.federated.secure.integers import bits_of
from ferret_ext.federated.secure.masks import MaskError
from ferret_ext.federated.secure.participant import Participant, RefusalError
from ferret_ext.federated.wire import WireError

STAGES = ("keys", "update", "pairs", "shares")


def integers(count: int, clients: int, seed: int = 0) -> list[npt.NDArray[np.int64]]:
    """Any integers of the range, its ends among them."""
    most = 1 << bits_of(clients)
    rows = np.random.default_rng(seed).integers(-most, most + 1, (clients, count))
    rows[:, 0], rows[:, -1] = most, -most
    return list(rows)


# ---- sums ----


@st.composite
def rounds(draw: Any) -> tuple[list[int], dict[str, set[int]], float]:
    """Clients of any numbers, who falls silent at which stage, and the share that must stay."""
    clients = sorted(draw(st.sets(st.integers(0, 2**32 - 1), min_size=1, max_size=7)))
    leaves = [draw(st.sampled_from([None, None, None, *STAGES])) for _ in clients]
    silent = {
        stage: {client for client, at in zip(clients, leaves, strict=True) if at == stage} for stage in STAGES
    }
    return clients, silent, draw(st.sampled_from([0.5, 0.7, 1.0]))


@given(rounds(), st.integers(0, 99))
@settings(max_examples=120)
def test_the_sum_is_exact_whoever_drops_out(
    played: tuple[list[int], dict[str, set[int]], float], seed: int
) -> None:
    """Or there is none, where fewer are left than the threshold."""
    clients, silent, share = played
    joined = [client for client in clients if client not in silent["keys"]]
    threshold = max(2, len(joined) // 2 + 1, int(np.ceil(share * len(joined))))
    counted = [client for client in joined if client not in silent["update"]]
    if counted != joined:
        counted = [client for client in counted if client not in silent["pairs"]]
    answering = [client for client in counted if client not in silent["shares"]]
    numbers = dict(zip(clients, integers(9, len(clients), seed), strict=True))
    circle = Circle(clients, silent)
    if len(answering) < threshold:
        with pytest.raises(QuorumError, match=r"round 1: expected (keys|updates|shares) of at least \d"):
            circle.sum(numbers, share=share)
        return
    survivors, summed = circle.sum(numbers, share=share)
    assert survivors == counted
    assert summed.bits == bits_of(len(joined))
    assert summed.integers.tolist() == [sum(int(numbers[c][k]) for c in counted) for k in range(9)]


def test_a_round_without_dropouts_takes_no_seeds_of_pairs() -> None:
    circle = Circle(range(3))
    circle.sum(dict(enumerate(integers(4, 3))))
    assert circle.asked == ["keys", "shares"]


def test_who_drops_out_while_seeds_are_given_is_dropped_too() -> None:
    """A second wave, without giving away both seed and shares of anybody."""
    circle = Circle(range(7), {"update": [6], "pairs": [2, 4]})
    numbers = dict(enumerate(integers(4, 7)))
    survivors, summed = circle.sum(numbers)
    assert circle.asked == ["keys", "pairs", "pairs", "shares"]
    assert survivors == [0, 1, 3, 5]
    assert (summed.integers == sum(numbers[client] for client in survivors)).all()


def test_the_quorum_counts_keys_too() -> None:
    with pytest.raises(QuorumError, match="expected keys of at least 3 clients, got 2; client 1: no reply"):
        Circle(range(3), {"keys": [1]}).gather(quorum=3)


def test_sums_of_fifty_clients_are_exact() -> None:
    numbers = dict(enumerate(integers(64, 50)))
    circle = Circle(range(50), {"update": range(12), "shares": range(12, 24)})
    survivors, summed = circle.sum(numbers)
    assert survivors == list(range(12, 50))
    assert (summed.integers == sum(numbers[client] for client in survivors)).all()


# ---- what the server sees ----


def assert_uniform(words: npt.NDArray[Any]) -> None:
    """Chi-square of each byte of the words; their seeds are fixed."""
    flat = np.ascontiguousarray(words, np.uint32).view(np.uint8).reshape(-1, 4)
    for column in flat.T:
        assert stats.chisquare(np.bincount(column, minlength=256)).pvalue > 1e-4


def masked_in(circle: Circle, client: int) -> npt.NDArray[np.uint32]:
    found: npt.NDArray[np.uint32] = wire.decode(circle.seen["update", client]).value("masked", np.ndarray)
    return found


def test_a_masked_update_looks_like_noise_and_never_twice_the_same() -> None:
    """Of the same integers, all of them 5, in two rounds."""
    same = dict.fromkeys(range(3), np.full(1 << 16, 5))
    circle, seen = Circle(range(3), seed=1), []
    for round_ in (1, 2):
        circle.sum(same, round_)
        seen += [masked_in(circle, client) for client in range(3)]
    for words in seen:
        assert_uniform(words)
    for one, other in combinations(seen, 2):
        assert_uniform(one - other)


def test_no_part_of_a_sum_can_be_unmasked() -> None:
    """With all that the server is told, any proper part of the survivors' updates still looks like noise."""
    circle = Circle(range(5), {"update": [4]}, seed=2)
    numbers = {client: np.full(1 << 16, client) for client in range(5)}
    assembly = circle.gather()
    sent = [circle.update(assembly, client, numbers[client]) for client in range(4)]
    survivors, summed = settle(assembly, sent, circle.talk())
    known = {message.client: unmasked_alone(circle, assembly, message) for message in sent}
    for size in (1, 2, 3):
        for part in combinations(survivors, size):
            assert_uniform(sum(known[client] for client in part))
    assert (sum(known.values()).view(np.int32) == summed.integers).all()  # type: ignore[union-attr]


def unmasked_alone(circle: Circle, assembly: MaskedSum, update: wire.Message) -> npt.NDArray[np.uint32]:
    """An update without the masks whose seeds the server got from the clients' answers."""
    context = masks.context(RUN, 1, assembly.session)
    given = [
        messages.read(circle.seen["shares", by], "answer").value("shares", np.ndarray) for by in range(3)
    ]
    secret = masks.combine([(by, bytes(shares[update.client])) for by, shares in enumerate(given)])
    words = masked_in(circle, update.client)
    seeds = messages.read(circle.seen["pairs", update.client], "answer").value("seeds", np.ndarray)
    left: npt.NDArray[np.uint32] = (
        words - masks.own_stream(secret, context, len(words)) - masks.stream(bytes(seeds[0]), len(words))
    )
    return left


def test_one_honest_client_hides_another() -> None:
    """All others tell the server everything, and the client's own seed is known too: the one seed that is
    left makes any integers as likely as its own."""
    circle = Circle(range(4), seed=3)
    assembly = circle.gather()
    secret = np.full(1 << 16, 7)
    for client in range(4):
        circle.update(assembly, client, secret)
    session = circle.participants[0]._session
    assert session is not None
    shares = [circle.participants[by]._session for by in (1, 2, 3)]
    words = masked_in(circle, 0)
    for other in (2, 3):
        words = words - masks.stream(session.pairs[other].seed, len(words))
    sealed = messages.rows_of(wire.decode(circle.seen["update", 0]), "sealed", 4, masks.SEALED_BYTES)
    opened = [
        (by, masks.unseal(of.pairs[0].of, sealed[by])) for by, of in zip((1, 2, 3), shares, strict=True) if of
    ]
    words = words - masks.own_stream(masks.combine(opened), session.context, len(words))
    assert_uniform(words)
    assert (words - masks.stream(session.pairs[1].seed, len(words)) == secret).all()
    for guess in (0, 7, 2**20):
        assert_uniform(words - np.uint32(guess))


def test_all_that_the_server_gets_is_masked_encrypted_or_asked_for() -> None:
    """No secret of anybody is in any message, but for the seeds and shares of the answers."""
    circle = Circle(range(3), {"update": [2]}, seed=4)
    numbers = integers(8, 3)
    circle.sum(dict(enumerate(numbers)))
    everything = b"".join(circle.seen.values())
    for client in (0, 1):
        session = circle.participants[client]._session
        assert session is not None
        assert session.pairs[1 - client].seed not in everything
        assert numbers[client].astype(np.uint32).tobytes() not in everything
        asked = messages.read(circle.seen["shares", client], "answer").value("shares", np.ndarray)
        assert bytes(asked[client]) == session.share


# ---- refusals ----


@dataclasses.dataclass
class Masked:
    """A round of five clients whose updates are sent."""

    circle: Circle
    assembly: MaskedSum
    sent: list[wire.Message]

    def request(self, stage: str, **values: wire.Value) -> bytes:
        return messages.write("request", stage, about(), self.assembly.session, 0, **values)

    def pairs(self, *dropped: int) -> bytes:
        return self.request("pairs", dropped=messages.numbers(dropped))

    def shares(self, client: int, *survivors: int) -> bytes:
        sealed = self.assembly._sealed_for(client, [self.sent[place] for place in survivors])
        return self.request("shares", survivors=messages.numbers(survivors), sealed=sealed)

    def ask(self, client: int, request: bytes) -> bytes:
        return self.circle.participants[client].answer(request)


@pytest.fixture
def masked() -> Masked:
    return masked_by(Circle(range(5)))


def masked_by(circle: Circle, round_: int = 1) -> Masked:
    assembly = circle.gather(round_)
    numbers = integers(6, 5)
    return Masked(circle, assembly, [circle.update(assembly, client, numbers[client]) for client in range(5)])


def test_seed_and_share_of_the_same_client_are_never_both_given(masked: Masked) -> None:
    masked.ask(0, masked.pairs(4))
    with pytest.raises(RefusalError, match="expected survivors whose seeds it has not given, got 4"):
        masked.ask(0, masked.shares(0, 0, 1, 2, 3, 4))
    masked.ask(1, masked.shares(1, 0, 1, 2, 3, 4))
    for dropped in ((4,), (0,), (0, 4)):
        with pytest.raises(RefusalError, match="expected clients whose shares it has not given as dropped"):
            masked.ask(1, masked.pairs(*dropped))


def test_asked_again_a_client_says_the_same_and_no_more(masked: Masked) -> None:
    first = masked.ask(0, masked.pairs(4))
    assert masked.ask(0, masked.pairs(4)) == first
    first = masked.ask(0, masked.shares(0, 0, 1, 2, 3))
    assert masked.ask(0, masked.shares(0, 0, 1, 2, 3)) == first
    with pytest.raises(RefusalError, match=r"expected every client of the round as a survivor or dropped"):
        masked.ask(0, masked.shares(0, 0, 1, 2))


def test_a_round_is_summed_once_even_if_it_is_begun_again(masked: Masked) -> None:
    """The difference of two sums of the same updates would be one client's."""
    masked.ask(0, masked.shares(0, 0, 1, 2, 3, 4))
    again = masked_by(masked.circle)
    again.ask(0, again.pairs(4))
    with pytest.raises(
        RefusalError, match=r"expected one sum in round 1, which was that of clients \[0, 1, 2"
    ):
        again.ask(0, again.shares(0, 0, 1, 2, 3))
    again = masked_by(masked.circle)
    again.ask(0, again.shares(0, 0, 1, 2, 3, 4))


def test_sums_of_fewer_than_the_threshold_are_refused(masked: Masked) -> None:
    masked.ask(0, masked.pairs(3, 4))
    with pytest.raises(RefusalError, match="expected at least 3 clients in a sum, got 2"):
        masked.ask(0, masked.pairs(2))


def test_every_client_of_the_round_must_be_accounted_for(masked: Masked) -> None:
    with pytest.raises(RefusalError, match="expected every client of the round"):
        masked.ask(0, masked.shares(0, 0, 1, 2))
    with pytest.raises(RefusalError, match="expected other clients of the round as dropped, got 0"):
        masked.ask(0, masked.pairs(0))
    with pytest.raises(RefusalError, match="expected other clients of the round as dropped, got 9"):
        masked.ask(0, masked.pairs(9))


def test_a_client_that_was_started_again_knows_nothing(masked: Masked) -> None:
    masked.circle.participants[0] = Participant(0)
    for request in (masked.pairs(4), masked.shares(0, 0, 1, 2, 3, 4)):
        with pytest.raises(RefusalError, match="expected a request of the newest session"):
            masked.ask(0, request)
    with pytest.raises(RefusalError, match="expected a request of the newest session"):
        masked.circle.participants[0].join(masked.assembly.invitation)


def test_keys_of_a_former_session_are_forgotten(masked: Masked) -> None:
    Circle.gather(masked.circle)
    with pytest.raises(RefusalError, match="expected a request of the newest session"):
        masked.ask(0, masked.pairs(4))


def test_keys_are_the_same_in_a_session_and_new_in_every_other() -> None:
    participant = Participant(3)

    def key(session: bytes, round_: int = 1) -> bytes:
        answer = participant.answer(messages.write("request", "keys", about(round_), session, 0))
        return bytes(messages.read(answer, "answer").array("key", "u1", (32,)))

    one, two = b"1" * 16, b"2" * 16
    keys = [key(one), key(two), key(one), key(one, 2)]
    assert len(set(keys)) == 4
    assert key(one, 2) == keys[-1]


def test_an_update_is_masked_once_a_session(masked: Masked) -> None:
    participant = masked.circle.participants[0]
    participant.join(masked.assembly.invitation)
    with pytest.raises(RefusalError, match="expected one update a session"):
        participant.hide(np.zeros(6, np.int64))


def test_nothing_is_told_before_an_update() -> None:
    circle = Circle(range(3))
    assembly = circle.gather()
    request = messages.write("request", "pairs", about(), assembly.session, 0, dropped=messages.numbers([1]))
    with pytest.raises(RefusalError, match="expected a request for an update first"):
        circle.participants[0].answer(request)
    with pytest.raises(RefusalError, match="expected to join a round first"):
        circle.participants[0].hide(np.zeros(3, np.int64))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: {"threshold": 1}, "expected 2 clients or more and a threshold of more than half"),
        (lambda values: {"threshold": 4}, "expected 2 clients or more and a threshold of more than half"),
        (
            lambda values: {"clients": values["clients"][:1], "keys": values["keys"][:1], "threshold": 1},
            "expected 2 clients or more and a threshold of more than half, got 1 and 1",
        ),
        (lambda values: {"keys": values["keys"][::-1]}, "expected an invitation of client 0 with its newest"),
        (lambda values: {"clients": values["clients"] + np.uint32(1)}, "expected an invitation of client 0"),
        (lambda values: {"clients": values["clients"][::-1]}, "must have clients in ascending order"),
        (lambda values: {"clients": np.zeros(3, np.uint32)}, "must have clients in ascending order"),
        (lambda values: {"keys": values["keys"][:, :31]}, r"must have keys as uint8 of shape \[3, 32\]"),
        (
            lambda values: {"keys": np.vstack([values["keys"][:2], np.zeros((1, 32), np.uint8)])},
            "expected a key of X25519, got a point of low order",
        ),
        (
            lambda values: {"keys": values["keys"][[0, 0, 2]]},
            "expected another client's key, got one's own",
        ),
        (lambda values: {"session": bytes(16)}, "expected a request of the newest session"),
        (lambda values: {"session": bytes(15)}, "must have session as 16 bytes, got 15"),
        (lambda values: {"more": 1}, "must have no values but stage, session, threshold, clients, keys"),
    ],
)
def test_a_bad_invitation_is_refused(change: Callable[[Any], Any], words: str) -> None:
    circle = Circle(range(3))
    invitation = wire.decode(circle.gather().invitation)
    changed = {**invitation.values, **change(invitation.values)}
    with pytest.raises(RefusalError, match=words):
        circle.participants[0].join(wire.encode(dataclasses.replace(invitation, values=changed)))


def test_a_second_invitation_of_a_session_is_refused() -> None:
    circle = Circle(range(3))
    invitation = circle.gather().invitation
    other = dataclasses.replace(wire.decode(invitation), client=1)
    circle.participants[0].join(invitation)
    circle.participants[0].join(invitation)
    with pytest.raises(RefusalError, match="expected one invitation a session, got another one"):
        circle.participants[0].join(wire.encode(other))


@pytest.mark.parametrize("place", range(masks.SEALED_BYTES))
def test_a_tampered_share_is_noticed_and_nothing_given(masked: Masked, place: int) -> None:
    message = wire.decode(masked.shares(0, 0, 1, 2, 3, 4))
    sealed = message.value("sealed", np.ndarray).copy()
    sealed[3, place] ^= 1
    bad = wire.encode(dataclasses.replace(message, values={**message.values, "sealed": sealed}))
    with pytest.raises(MaskError, match="client 3's share: expected a share as it was encrypted"):
        masked.ask(0, bad)
    masked.ask(0, masked.pairs(3))  # it has not given its share of anybody


@pytest.mark.parametrize(("spoiled", "survives"), [((0, 2), True), ((0, 1, 2), False)])
def test_shares_that_are_spoiled_for_a_few_are_survived(spoiled: tuple[int, ...], survives: bool) -> None:
    """Client 4's update has them for clients 0 and 2, or one more, of which 3 of 5 are needed."""

    def change(stage: str, client: int, data: bytes) -> bytes:
        if (stage, client) != ("update", 4):
            return data
        message = wire.decode(data)
        sealed = message.value("sealed", np.ndarray).copy()
        sealed[list(spoiled)] ^= 1
        return wire.encode(dataclasses.replace(message, values={**message.values, "sealed": sealed}))

    numbers = dict(enumerate(integers(6, 5)))
    circle = Circle(range(5), change=change)
    if survives:
        assert (circle.sum(numbers)[1].integers == sum(numbers.values())).all()
        return
    with pytest.raises(
        QuorumError, match="expected shares of at least 3 clients, got 2; client 0: client 4's"
    ):
        circle.sum(numbers)


@pytest.mark.parametrize(("stage", "name"), [("pairs", "seeds"), ("shares", "shares")])
def test_false_seeds_and_shares_never_give_a_false_sum(stage: str, name: str) -> None:
    """128 coordinates that all stay in range by chance would be one case in 2^128."""

    def lie(at: str, client: int, data: bytes) -> bytes:
        if (at, client) != (stage, 1):
            return data
        message = wire.decode(data)
        false = message.value(name, np.ndarray) ^ 1
        return wire.encode(dataclasses.replace(message, values={**message.values, name: false}))

    numbers = dict(enumerate(integers(128, 5)))
    with pytest.raises(RunError, match=r"round 1: expected a sum of at most .* in every coordinate, got"):
        Circle(range(5), {"update": [4]}, change=lie).sum(numbers)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"FRET",
        messages.write("answer", "keys", about(), b"s" * 16, 1, key=np.zeros(32, np.uint8)),
        messages.write("request", "keys", about(), b"s" * 16, 1),
    ],
    ids=["nothing", "garbage", "of another session", "a request"],
)
def test_an_answer_that_is_none_leaves_its_client_out(answer: bytes) -> None:
    circle = Circle(range(3), change=lambda stage, c, data: answer if (stage, c) == ("keys", 1) else data)
    assert circle.sum(dict(enumerate(integers(4, 3))))[0] == [0, 2]
    assert circle.left_out.keys() == {1}
    assert circle.left_out[1].startswith(("wire:", "ferret-secure:"))


def test_an_update_of_another_session_is_rejected(masked: Masked) -> None:
    new = masked_by(masked.circle)
    with pytest.raises(WireError, match="client 0's update must have session"):
        new.assembly.check(masked.sent[0])


@pytest.mark.parametrize("request_", [b"", bytes(40)])
def test_requests_that_are_none_are_said_in_the_reply(request_: bytes) -> None:
    reply = Participant(0).reply(request_)
    assert (reply.payload, reply.failure[:5]) == (b"", "wire:")


def test_unknown_stages_are_refused(masked: Masked) -> None:
    with pytest.raises(WireError, match="request must have stage keys, pairs or shares, got 'more'"):
        masked.ask(0, masked.request("more"))


# ---- primitives ----


@given(st.integers(2, 9), st.data())
@settings(max_examples=20)
def test_any_threshold_of_shares_gives_the_secret_and_one_less_does_not(threshold: int, data: Any) -> None:
    secret = seeded(threshold)(16)
    shares = list(enumerate(masks.split(secret, threshold, 9)))
    chosen = data.draw(st.permutations(shares))
    assert masks.combine(chosen[:threshold]) == secret
    assert masks.combine(chosen[: threshold - 1]) != secret


def test_two_clients_agree_and_each_direction_has_its_key() -> None:
    one, two = masks.Key(), masks.Key()
    mine, theirs = one.agree(two.public, b"here"), two.agree(one.public, b"here")
    assert (mine.seed, mine.to, mine.of) == (theirs.seed, theirs.of, theirs.to)
    assert len({mine.seed, mine.to, mine.of, one.agree(two.public, b"there").seed}) == 4


def test_the_stream_is_chacha20s() -> None:
    """RFC 8439, A.1, test vector 1: a key, nonce and counter of zeros."""
    assert masks.stream(bytes(32), 4).tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"
