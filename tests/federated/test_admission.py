"""Seeds, norms, weights, order and dissent: the limits of what a round takes."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation, deliver, federate, flat, toy, train
from hypothesis import given, settings
from hypothesis import strategies as st
from tampering import MAKERS, Listener, changed, multiplied, seed_of

from ferret_ext.federated import digests, wire
from ferret_ext.federated.admission import Admission, Sent
from ferret_ext.federated.algorithms.ferret import Ferret
from ferret_ext.federated.config import FerretConfig, RobustConfig
from ferret_ext.federated.errors import DisagreementError, QuorumError
from ferret_ext.federated.evaluation import Evaluation
from ferret_ext.federated.metrics import Rejection
from ferret_ext.federated.rounds import run_rounds
from ferret_ext.federated.server import Server
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.wire import Message, WireError


def ferret(**settings: Any) -> Federation:
    return federate(Ferret(FerretConfig(K=40, coordinates="float32"), 0.4, train), **settings)


@pytest.mark.parametrize("way", ["went on", "replayed", "restored"])
def test_a_seed_counts_once_in_a_run_also_after_a_resume(way: str) -> None:
    fed = ferret()
    former = [seed_of(message) for _ in range(2) for message in fed.round()]
    server = fed.server
    if way != "went on":
        server = Server(fed.algorithm, toy(), range(3), 1.0, 0)
        broadcasts = fed.server.broadcasts_since(1)
        if way == "replayed":
            for broadcast in broadcasts:
                server.replay(broadcast)
        else:
            replica = fed.server.replica
            for broadcast in broadcasts:
                server.recall(broadcast)
            state = Message("ferret", "record", replica.digest, 2, values=replica.state())
            server.restore([p.detach().clone() for p in replica.params], state, replica.weights)
    assert server.admission.used == set(former)
    sent = [reply.payload for reply in fed.replies()]
    rejections = deliver(server, [changed(sent[0], {"seed": former[4]}), *sent[1:]])
    assert rejections == [Rejection(0, f"client 0's update must have a new seed, got {former[4]} again")]


def test_seeds_of_updates_that_did_not_count_are_not_used_up() -> None:
    """Else a run that went on would know more than one that was resumed from what counted."""
    fed = ferret()
    sent = [reply.payload for reply in fed.replies()]
    copied = multiplied(changed(sent[0], {"seed": seed_of(sent[1])}), 1e9)
    (rejection,) = fed.apply([copied, *sent[1:]])
    assert "norm" in rejection.reason
    assert fed.server.admission.used == {seed_of(message) for message in sent[1:]}


def test_a_round_that_fails_may_be_played_again() -> None:
    """Too few updates: the model and what is known of seeds stay, and the same messages are taken later."""
    algorithm = MAKERS["ferret"]()
    fed = federate(algorithm)
    server = Server(algorithm, toy(), range(3), 1.0, 0, robust=RobustConfig(quorum=3))
    sent = [reply.payload for reply in fed.replies()]
    before = flat(server.replica.params)
    expected = (
        r"round 1: expected at least 3 updates, got 2; client 1: wire: message must have at least \d+ bytes"
    )
    with pytest.raises(QuorumError, match=expected):
        deliver(server, [sent[0], b"", sent[2]])
    assert torch.equal(before, flat(server.replica.params))
    assert not server.admission.used
    assert not deliver(server, sent)


# ---- norms and weights ----


def update_of(fed: Federation, client: int, norm: float, weight: float = 1.0) -> Sent:
    """An update of this Euclidean norm."""
    replica = fed.server.replica
    gammas = np.zeros(40, np.float32)
    gammas[client % 40] = norm
    values = {"contract": fed.algorithm.contract, "seed": client, "gammas": gammas}
    message = Message("ferret", "update", replica.digest, 1, client, weight, values, weights=replica.weights)
    return Sent(client, wire.encode(message))


def screen(
    fed: Federation, norms: Sequence[float], weights: Sequence[float] = (), **robust: Any
) -> tuple[list[int], list[float], list[int]]:
    """Whose updates are taken, their factors, and whose are not."""
    weights = list(map(float, weights or [1] * len(norms)))
    sent = [
        update_of(fed, client, norm, weight)
        for client, (norm, weight) in enumerate(zip(norms, weights, strict=True))
    ]
    admission = Admission(fed.algorithm, RobustConfig(**robust))
    updates, rejections = admission.screen(fed.server.replica, range(len(norms)), sent)
    return (
        [message.client for message in updates.messages],
        list(updates.factors),
        [rejection.client for rejection in rejections],
    )


@pytest.fixture(scope="module")
def still() -> Federation:
    return ferret()


@pytest.mark.parametrize(
    ("norms", "rejected"),
    [
        ([3e30], []),
        ([1, 3e30], [1]),
        ([3e30, 1], [0]),
        ([1, 999], []),
        ([1, 1001], [1]),
        ([0, 0], []),
        ([0, 1], []),
        ([0, 0, 1], []),
        ([0, 1, 1], []),
        ([0, 1, 1, 1001], [3]),
        ([1e-40, 1e-20], [1]),
        ([3e38, 3e38, 3e38], []),
    ],
)
def test_norms_are_measured_by_the_lower_median(
    still: Federation, norms: list[float], rejected: list[int]
) -> None:
    """Of two the smaller one is the measure; where most are zero there is none."""
    assert screen(still, norms)[2] == rejected


@pytest.mark.parametrize(
    ("weights", "rejected"),
    [([1, 2.0**64], [1]), ([2.0**64, 2.0**64], []), ([2.0**-64, 1], [1]), ([5, 4000, 7], []), ([1] * 3, [])],
)
def test_weights_are_measured_by_the_lower_median(
    still: Federation, weights: list[float], rejected: list[int]
) -> None:
    assert screen(still, [1.0] * len(weights), weights)[2] == rejected


def test_a_client_is_rejected_once_though_norm_and_weight_stand_out(still: Federation) -> None:
    assert screen(still, [1, 1e6, 1], [1, 1e6, 1])[2] == [1]


@settings(max_examples=40, deadline=None)
@given(
    honest=st.lists(st.floats(1, 50), min_size=2, max_size=6),
    others=st.lists(st.floats(0, 2.0**120, width=32), max_size=5),
    draw=st.randoms(use_true_random=False),
)
def test_a_minority_neither_gets_through_nor_keeps_others_out(
    honest: list[float], others: list[float], draw: Any
) -> None:
    """Colluding as they may: no honest update is lost, and none counts of 1000 times an honest norm."""
    norms = [(norm, True) for norm in honest] + [(norm, False) for norm in others[: len(honest) - 1]]
    draw.shuffle(norms)
    taken, factors, rejected = screen(ferret(), [norm for norm, _ in norms], rule="norm-clip")
    assert not any(norms[client][1] for client in rejected)
    assert all(norms[client][0] <= 1000.01 * max(honest) for client in taken)
    for client, factor in zip(taken, factors, strict=True):
        assert factor * norms[client][0] <= 1.001 * max(honest)


def test_what_a_client_claims_to_count_for_is_checked_where_all_count_alike() -> None:
    fed = ferret()
    sent = [reply.payload for reply in fed.replies()]
    server = Server(fed.algorithm, toy(), range(3), 1.0, 0, equal_weights=True)
    (rejection,) = deliver(server, [changed(sent[0], weight=999.0), *sent[1:]])
    assert rejection == Rejection(0, "ferret: client 0's update must have weight 1.0, got 999.0")


# ---- order, dissent, and anything at all ----


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(5)))
def test_the_order_of_arrival_changes_no_bit(order: list[int]) -> None:
    fed = ferret()
    sent = [update_of(fed, client, (client % 3 and 0.1 * client) or 1e9) for client in range(5)]
    server = Server(fed.algorithm, toy(), range(5), 1.0, 0, robust=RobustConfig(rule="norm-clip"))
    updates, rejections = server.apply(range(5), [sent[client] for client in order])
    assert [message.client for message in updates.messages] == [1, 2, 4]
    assert {rejection.client for rejection in rejections} == {0, 3}
    assert server.replica.weights == _weights_in_order()


def _weights_in_order() -> bytes:
    fed = ferret()
    server = Server(fed.algorithm, toy(), range(5), 1.0, 0, robust=RobustConfig(rule="norm-clip"))
    server.apply(range(5), [update_of(fed, client, 0.1 * client) for client in (1, 2, 4)])
    return server.replica.weights


@pytest.mark.parametrize("policy", ["stop", "reject"])
def test_a_client_with_other_weights_stops_the_run_or_is_rejected(policy: Any) -> None:
    algorithm = MAKERS["ferret"]()
    fed = federate(algorithm)
    server = Server(algorithm, toy(), range(3), 1.0, 0, robust=RobustConfig(on_dissent=policy))
    sent = [reply.payload for reply in fed.replies()]
    each = bytearray(b"".join(digests.of_each(server.replica.params)))
    each[8] ^= 1
    values = {"digests": np.frombuffer(bytes(each), np.uint8)}
    said = dataclasses.replace(wire.decode(sent[1]), kind="dissent", values=values, weights=b"another.")
    messages = [sent[0], wire.encode(said), sent[2]]
    reason = (
        "after round 0 client 1 has other weights than the server: 0.bias is the first of 1 parameters that "
        "differ, of 4"
    )
    if policy == "stop":
        before = flat(server.replica.params)
        with pytest.raises(DisagreementError, match=reason):
            deliver(server, messages)
        assert torch.equal(before, flat(server.replica.params))
    else:
        assert deliver(server, messages) == [Rejection(1, reason)]


def renamed(payload: bytes, algorithm: str) -> bytes:
    """The message under a name that `encode` would refuse."""
    name = algorithm.encode()
    data = changed(payload, algorithm="A" * len(name)).replace(b"A" * len(name), name)
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))


def test_reasons_are_one_short_line() -> None:
    fed = ferret()
    sent = [reply.payload for reply in fed.replies()]
    forged = "\x1b[2J\nround 9/9: all well \u202e"
    many = {f"{index:05}": 1 for index in range(3000)}
    reasons = [
        rejection.reason
        for rejection in fed.apply([renamed(sent[0], forged), changed(sent[1], many), sent[2]])
    ]
    assert r"got '\x1b[2J\nround 9/9: all well \u202e'" in reasons[0]
    assert reasons[1].startswith("ferret: client 1's update must have no values but contract, seed, gammas, ")
    assert all(reason.isprintable() and len(reason) < 310 for reason in reasons)


VALUES = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.binary(max_size=3), max_size=3),
    st.sampled_from(
        [np.zeros(40, np.float32), np.zeros((0, 3)), np.ones(40, np.uint8), np.ones((2, 2), "<i8")]
    ),
)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), name=st.sampled_from(list(MAKERS)))
def test_any_message_is_taken_or_rejected(data: st.DataObject, name: str) -> None:
    """A message with one field or value replaced by anything costs nobody else their update."""
    fed, sent = _prepared(name)
    message = wire.decode(sent[0])
    fields = {
        "algorithm": st.text(min_size=1, max_size=64),
        "kind": st.sampled_from(wire.KINDS),
        "round": st.integers(0, 2**32 - 1),
        "client": st.integers(0, 2**32 - 1),
        "weight": st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        "digest": st.binary(min_size=8, max_size=8),
        "values": st.builds(
            lambda key, value: {**message.values, key: value},
            st.sampled_from([*message.values, "digests", "other"]),
            VALUES,
        ),
    }
    names = data.draw(st.lists(st.sampled_from(list(fields)), min_size=1, max_size=3, unique=True))
    try:
        bad = wire.encode(dataclasses.replace(message, **{key: data.draw(fields[key]) for key in names}))
    except WireError:
        return
    admission = Admission(fed.algorithm, RobustConfig(on_dissent="reject"))
    updates, rejections = admission.screen(
        fed.server.replica, range(3), list(map(Sent, range(3), [bad, *sent[1:]]))
    )
    assert [m.client for m in updates.messages][-2:] == [1, 2]
    assert len(updates.messages) + len(rejections) == 3
    assert {rejection.client for rejection in rejections} <= {0}


_ready: dict[str, tuple[Federation, list[bytes]]] = {}


def _prepared(name: str) -> tuple[Federation, list[bytes]]:
    if name not in _ready:
        fed = federate(MAKERS[name]())
        _ready[name] = fed, [reply.payload for reply in fed.replies()]
    return _ready[name]


def test_a_rule_that_the_algorithm_does_not_know_is_a_config_error() -> None:
    expected = "robust.rule: expected one of mean, norm-clip with ferret, got median"
    with pytest.raises(ConfigError, match=expected):
        Server(MAKERS["ferret"](), toy(), range(3), 1.0, 0, robust=RobustConfig(rule="median"))


def test_a_round_without_any_reply_fails_for_want_of_a_quorum() -> None:
    algorithm = MAKERS["fedavg"]()
    server = Server(algorithm, toy(), range(3), 1.0, 0)
    evaluate = lambda round_, model, watch: Evaluation(1.0, 1, {}, [])  # noqa: E731
    with pytest.raises(QuorumError, match="round 1: expected at least 1 updates, got 0"):
        run_rounds(1, server, lambda *_: [], partial(evaluate), Listener(), 1)
