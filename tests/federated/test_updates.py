"""The rules by which updates are added up, against a few lines of numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from federation import Federation, deliver, federate, flat, toy, train
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tampering import MAKERS, changed, multiplied

from ferret_ext.federated import wire
from ferret_ext.federated.algorithms.fedavg import FedAvg
from ferret_ext.federated.algorithms.ferret import Ferret
from ferret_ext.federated.algorithms.updates import Rule, Updates
from ferret_ext.federated.config import FerretConfig, RobustConfig
from ferret_ext.federated.server import Server
from ferret_ext.federated.wire import Message

Rows = npt.NDArray[np.float32]
ROWS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=7),
    elements=st.floats(-1000, 1000, width=32),
)


def updates(
    rows: Sequence[Any],
    rule: Rule,
    weights: Sequence[float] = (),
    factors: Sequence[float] = (),
    trim: float = 0.1,
) -> Updates:
    weights = weights or [1.0] * len(rows)
    messages = [
        Message("test", "update", bytes(8), 1, client, weight, {"row": np.asarray(row)})
        for client, (row, weight) in enumerate(zip(rows, weights, strict=True))
    ]
    return Updates(messages, [b""] * len(rows), factors or [1.0] * len(rows), rule, trim)


def average(rows: Sequence[Any], rule: Rule, **more: Any) -> Any:
    made = updates(rows, rule, **more).average(lambda m: torch.from_numpy(m.value("row", np.ndarray)))
    return made.numpy()


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, data=st.data())
def test_mean_is_weighted_and_clipped(rows: Rows, data: st.DataObject) -> None:
    def numbers(low: float, high: float) -> list[float]:
        return data.draw(st.lists(st.floats(low, high), min_size=len(rows), max_size=len(rows)))

    weights, factors = numbers(0.01, 100), numbers(0, 1)
    expected = np.average(
        rows.astype(float) * np.reshape(factors, (-1, *[1] * (rows.ndim - 1))), axis=0, weights=weights
    )
    got = average(rows, "norm-clip", weights=weights, factors=factors)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_median_is_numpys(rows: Rows) -> None:
    np.testing.assert_allclose(average(rows, "median"), np.median(rows.astype(float), axis=0), rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, trim=st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.49]))
def test_trimmed_mean_leaves_out_the_ends_of_each_coordinate(rows: Rows, trim: float) -> None:
    """The share rounded down, at least one at either end unless it is 0, and never all."""
    count = len(rows)
    out = min(max(int(trim * count), int(trim > 0)), (count - 1) // 2)
    expected = np.sort(rows.astype(float), axis=0)[out : count - out].mean(axis=0)
    np.testing.assert_allclose(average(rows, "trimmed-mean", trim=trim), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("count", "trim", "kept"),
    [(1, 0.4, 1), (2, 0.4, 2), (3, 0.1, 1), (3, 0, 3), (10, 0.3, 4), (100, 0.29, 42), (100, 0.49, 2)],
)
def test_trimmed_mean_keeps_so_many(count: int, trim: float, kept: int) -> None:
    """Of 0, 1, 4, .. the mean of the middle ones, which tells how many they are."""
    middle = np.arange(count, dtype=float)[(count - kept) // 2 : (count + kept) // 2]
    got = average(np.arange(count, dtype=np.float64)[:, None] ** 2, "trimmed-mean", trim=trim)
    assert got == pytest.approx(np.mean(middle**2))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rule=st.sampled_from(["median", "trimmed-mean"]))
def test_a_minority_cannot_leave_the_range_of_the_others(data: st.DataObject, rule: Any) -> None:
    """In no coordinate, whatever it sends and however much it says that it counts."""
    honest = data.draw(hnp.arrays(np.float32, (5, 3), elements=st.floats(-9, 9, width=32)))
    liars = data.draw(hnp.arrays(np.float32, (4, 3), elements=st.floats(width=32, allow_nan=False)))
    liars = np.nan_to_num(liars)
    rows = data.draw(st.permutations([*honest, *liars]))
    got = average(rows, rule, trim=0.45, weights=[1e6] * 9)
    assert (got >= honest.min(0) - 1e-5).all()
    assert (got <= honest.max(0) + 1e-5).all()


@settings(max_examples=30, deadline=None)
@given(rows=ROWS, data=st.data(), rule=st.sampled_from(["median", "trimmed-mean"]))
def test_the_middle_does_not_depend_on_the_order_of_clients(
    rows: Rows, data: st.DataObject, rule: Any
) -> None:
    other = data.draw(st.permutations(list(rows)))
    assert np.array_equal(average(rows, rule), average(other, rule))


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_sums_are_in_float32_or_wider(rule: Any, dtype: torch.dtype, wide: torch.dtype) -> None:
    """1 + 1/512 + 1/512 is 1 in bfloat16."""
    made = updates([[1.0], [1 / 512], [1 / 512]], rule)
    got = made.average(lambda m: torch.tensor(m.value("row", np.ndarray)).to(dtype))
    assert got.dtype == wide
    if rule in ("mean", "norm-clip"):
        assert 3 * got.item() == pytest.approx(1 + 2 / 512, rel=1e-6)


def test_shares_and_factors_multiply() -> None:
    made = updates([[0.0]] * 3, "norm-clip", weights=[1.0, 2.0, 5.0], factors=[1.0, 0.5, 0.0])
    assert made.shares == [0.125, 0.125, 0.0]


# ---- in a round ----


def serve(fed: Federation, messages: Sequence[bytes], **robust: Any) -> Server[Any]:
    """A server that has taken clients 0, 1, ..'s messages by these rules."""
    server = Server(fed.algorithm, toy(), range(len(messages)), 1.0, 0, robust=RobustConfig(**robust))
    assert not deliver(server, messages)
    return server


@pytest.mark.parametrize("ratio", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("name", MAKERS)
def test_norm_clip_is_the_mean_of_updates_cut_to_the_median_norm(name: str, ratio: float) -> None:
    fed = federate(MAKERS[name]())
    sent = [reply.payload for reply in fed.replies()]
    sent[1] = all_multiplied(sent[1], 80)
    norms = [norm_of(message) for message in sent]
    factors = [min(1.0, ratio * float(np.median(norms)) / norm) for norm in norms]
    got = serve(fed, sent, rule="norm-clip", clip_ratio=ratio)
    plain = serve(
        fed,
        [all_multiplied(m, f) for m, f in zip(sent, factors, strict=True)],
        max_norm_ratio=1e9,
    )
    start = flat(toy().parameters())
    assert min(factors) < 0.1
    torch.testing.assert_close(
        flat(got.replica.params) - start, flat(plain.replica.params) - start, rtol=1e-4, atol=1e-6
    )


def all_multiplied(message: bytes, factor: float) -> bytes:
    values = wire.decode(message).values
    arrays = {n: (v * factor).astype(v.dtype) for n, v in values.items() if isinstance(v, np.ndarray)}
    return changed(message, arrays)


def norm_of(message: bytes) -> float:
    arrays = [v for v in wire.decode(message).values.values() if isinstance(v, np.ndarray)]
    return float(np.linalg.norm(np.concatenate(arrays).astype(float)))


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_fedavg_steps_along_the_middle(rule: Any) -> None:
    fed = federate(FedAvg(0.4, train))
    sent = [reply.payload for reply in fed.replies((1.0, 1.0, 1.0, 1.0, 1.0))]
    got = serve(fed, [multiplied(sent[0], 50), *sent[1:]], rule=rule, trim=0.2)
    for index, (param, start) in enumerate(zip(got.replica.params, toy().parameters(), strict=True)):
        rows = np.array([wire.decode(message).values[str(index)] for message in sent], float)
        rows[0] *= 50 if index == 0 else 1
        middle = np.median(rows, 0) if rule == "median" else np.sort(rows, 0)[1:4].mean(0)
        expected = start.detach().double().flatten() - 0.4 * torch.from_numpy(middle)
        torch.testing.assert_close(param.detach().double().flatten(), expected, rtol=0, atol=1e-6)


def test_clients_follow_clipped_rounds_to_the_bit() -> None:
    """Also where the next plan goes by norms: those of what was clipped, not of what was sent."""
    fed = federate(
        Ferret(FerretConfig(K=400, allocation="norm", coordinates="float32", server_warmup=0), 0.4, train)
    )
    sent = [reply.payload for reply in fed.replies()]
    gammas = np.zeros(400, np.float32)
    gammas[:9] = 10 * norm_of(sent[1])  # all in the first block
    loud = changed(sent[1], {"gammas": gammas})
    clipped = serve(fed, [sent[0], loud, sent[2]], rule="norm-clip")
    client = fed.algorithm.replicate(toy())
    for broadcast in clipped.broadcasts:
        fed.algorithm.rebuild(client, broadcast)
    assert wire.decode(clipped.broadcasts[1]).array("factors", "<f8", (3,))[1] < 0.05
    assert client.plan == clipped.replica.plan
    assert torch.equal(flat(client.params), flat(clipped.replica.params))
    honest = serve(fed, sent).replica.plan
    loudest = serve(fed, [sent[0], loud, sent[2]]).replica.plan
    first = [plan.blocks[0].k for plan in (honest, clipped.replica.plan, loudest)]
    assert first[1] < first[2] - 50
