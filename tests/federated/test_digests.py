"""Digests tell weights apart, and a client whose weights differ in one bit stops the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import xxhash
from federation import federate, toy, train
from hypothesis import given
from hypothesis import strategies as st
from tampering import MAKERS, Listener
from torch import Tensor, nn
from toy import examples

from ferret_ext.federated import digests, wire
from ferret_ext.federated.engines.in_process import InProcessClients
from ferret_ext.federated.errors import DisagreementError
from ferret_ext.federated.evaluation import Evaluation
from ferret_ext.federated.rounds import run_rounds
from ferret_ext.federated.server import Server

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def flip(tensor: Tensor, element: int, bit: int) -> None:
    words = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    words.view(-1)[element] ^= 1 << bit


def test_a_digest_is_xxh3_of_the_elements() -> None:
    tensor = torch.arange(6, dtype=torch.float32)
    assert digests.of_each([tensor]) == [xxhash.xxh3_64(tensor.numpy().tobytes()).digest()]
    assert digests.of_each([torch.zeros(0)])[0].hex() == "2d06800538d394c2"  # XXH3's answer for no bytes
    assert digests.together([b"a", b"bc"]) == xxhash.xxh3_64(b"abc").digest()


def test_a_digest_goes_by_elements_and_not_by_layout() -> None:
    matrix = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    apart = torch.empty(3, 8, dtype=torch.bfloat16)[:, ::2].copy_(matrix)
    for same in (matrix.t().contiguous().t(), apart, nn.Parameter(matrix)):
        assert digests.of_each([same]) == digests.of_each([matrix])
    assert digests.of_each([matrix.t()]) != digests.of_each([matrix])


@given(element=st.integers(0, 999), bit=st.integers(0, 14), dtype=st.sampled_from(["bfloat16", "float32"]))
def test_any_bit_changes_the_digest(element: int, bit: int, dtype: str) -> None:
    tensors = [torch.ones(3), torch.linspace(-1, 1, 1000).to(getattr(torch, dtype))]
    before = digests.of_each(tensors)
    flip(tensors[1], element, bit)
    after = digests.of_each(tensors)
    assert before[0] == after[0]
    assert before[1] != after[1]
    assert digests.together(before) != digests.together(after)


def test_minus_zero_is_not_zero() -> None:
    assert digests.of_each([torch.tensor([0.0])]) != digests.of_each([torch.tensor([-0.0])])


def test_a_models_digest_goes_by_names_shapes_dtypes_and_elements() -> None:
    model = toy()
    same = toy()
    assert digests.of_model(model) == digests.of_model(same)
    others: list[Any] = [toy().double(), nn.Sequential(*toy(), nn.Linear(3, 1)), toy()]
    flip(others[2][0].weight.data, 62, 0)
    renamed = nn.ModuleDict({"a": toy()[0], "c": toy()[2]})
    reshaped = toy()
    reshaped[0].weight = nn.Parameter(reshaped[0].weight.detach().reshape(9, 7))
    buffered = toy()
    buffered.register_buffer("scale", torch.ones(1))
    unsaved = toy()
    unsaved.register_buffer("cache", torch.ones(1), persistent=False)
    everything = [model, *others, renamed, reshaped, buffered]
    assert len({digests.of_model(it) for it in everything}) == len(everything)
    assert digests.of_model(unsaved) == digests.of_model(model)


def test_the_first_difference_is_named() -> None:
    ours, theirs = [b"1", b"2", b"3", b"4"], [b"1", b"x", b"3", b"y"]
    expected = "0.bias is the first of 2 parameters that differ, of 4"
    assert digests.first_difference(NAMES, ours, theirs) == expected
    assert digests.first_difference(NAMES, ours, ours) == "no parameter differs"


# ---- in a run ----


@pytest.mark.parametrize("index", range(4))
def test_a_flipped_bit_in_a_client_stops_the_run(index: int) -> None:
    """The first parameter that differs is named; the server's model stays that of the round before."""
    algorithm = MAKERS["ferret"]()
    members = InProcessClients(algorithm, toy(), [examples(1)] * 3, [1.0] * 3, seed=0)
    server = Server(algorithm, toy(), range(3), 1.0, 0)
    weights = []

    def exchange(round_: int, chosen: list[int], server: Server[Any]) -> Any:
        if round_ == 3:
            flip(members._members.replica.start[index], 0, 20)
        return members.exchange(Listener(), round_, chosen, server)

    def evaluate(round_: int, *_: Any) -> Evaluation:
        weights.append(digests.of_each(server.replica.params))
        return Evaluation(1.0, 1, {}, [])

    expected = (
        f"after round 2 client 0 has other weights than the server: {NAMES[index]} is the first of 1 "
        "parameters that differ, of 4"
    )
    with pytest.raises(DisagreementError, match=expected):
        run_rounds(4, server, exchange, evaluate, Listener(), 1)
    assert len(weights) == 3
    assert digests.of_each(server.replica.params) == weights[2]


@pytest.mark.parametrize("name", MAKERS)
def test_a_flipped_bit_in_a_broadcast_is_refused_by_its_checksum(name: str) -> None:
    fed = federate(MAKERS[name]())
    fed.round()
    broadcast = bytearray(fed.server.broadcasts[1])
    broadcast[len(broadcast) // 2] ^= 1
    with pytest.raises(wire.WireError, match="checksum must be"):
        fed.algorithm.rebuild(fed.client, bytes(broadcast))


def test_clients_that_were_told_other_weights_say_so() -> None:
    """A dissent has the digest of each parameter; without digests in the broadcasts nobody looks."""
    told, silent = (federate(MAKERS["ferret"](), verify_weights=verify) for verify in (True, False))
    for fed in (told, silent):
        fed.round()
        fed.catch_up()
        fed.client.mark()
        flip(fed.client.start[3], 1, 20)
        fed.round()
    (reply, *_) = told.replies()
    said = wire.decode(reply.payload)
    assert said.kind == "dissent"
    assert said.round == 3
    each = digests.of_each(told.server.replica.params)
    sent = said.array("digests", "u1", (32,)).tobytes()
    assert [sent[at : at + 8] == own for at, own in zip(range(0, 32, 8), each, strict=True)] == [
        *[True] * 3,
        False,
    ]
    assert [wire.decode(reply.payload).kind for reply in silent.replies()] == ["update"] * 3


def test_training_that_is_undone_leaves_no_difference() -> None:
    fed = federate(MAKERS["ferret"]())
    for _ in range(3):
        fed.round()
    fed.catch_up()
    fed.client.mark()
    train(fed.client.model, [], 5)
    fed.catch_up()
    assert digests.of_each(fed.client.params) == digests.of_each(fed.server.replica.params)
