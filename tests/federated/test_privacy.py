"""Privacy's mechanism: what one client can change, how much noise there is, and what is not told."""

from __future__ import annotations

import math
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, interrupted_after, read_metrics
from federation import deliver, federate, flat, toy, train
from hypothesis import given, settings
from hypothesis import strategies as st
from tampering import changed

from ferret_ext.federated import journal, ledger, wire
from ferret_ext.federated.admission import Admission, Sent
from ferret_ext.federated.algorithms.base import pack, unpack
from ferret_ext.federated.algorithms.fedavg import FedAvg
from ferret_ext.federated.algorithms.ferret import Ferret, SharedFerret
from ferret_ext.federated.cli import main
from ferret_ext.federated.config import FerretConfig, PrivacyConfig, RobustConfig, build
from ferret_ext.federated.privacy import ClientSide, Release, secure_normal
from ferret_ext.federated.server import Server
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.wire import Message

K = 12
CLIP, EXPECTED = 0.5, 4.0
STILL = PrivacyConfig(noise="central", clip_norm=CLIP, noise_multiplier=0.0)  # clips, and adds nothing
NEEDED = [("model", "m"), ("data", "d"), ("out", "o"), ("num_clients", 30)]


def shared(kind: Any = "float32", **more: Any) -> SharedFerret:
    return SharedFerret(FerretConfig(K=K, coordinates=kind, allocation="size"), 0.5, train, seed=3, **more)


# ---- sensitivity ----


SERVER = Server(shared(), toy(), range(9), 1.0, 0)


def released(updates: dict[int, Sequence[float]]) -> torch.Tensor:
    """The mean float64 [K] of these clients' updates before its noise, from their bytes on."""
    replica = SERVER.replica
    sent = []
    for client, numbers in updates.items():
        gammas = np.array(numbers, np.float64).astype(np.float32)
        values = {"contract": SERVER.algorithm.contract, "seed": replica.next_seed, "gammas": gammas}
        message = Message(
            *("ferret-round", "update", replica.digest, 1, client, 1.0, values), weights=replica.weights
        )
        sent.append(Sent(client, wire.encode(message)))
    admission = Admission(
        SERVER.algorithm, RobustConfig(), True, lambda round_: Release.of(STILL, EXPECTED, round_)
    )
    taken, rejections = admission.screen(replica, range(9), sent)
    assert not rejections, "no client's update may decide over another's"
    return taken.average(lambda update: torch.from_numpy(update.array("gammas", "<f4", (K,)).astype(float)))


update = st.tuples(
    st.lists(st.floats(-1, 1, width=32), min_size=K, max_size=K), st.sampled_from([1e-30, 1e-3, 1, 1e9, 1e30])
).map(lambda drawn: [number * drawn[1] for number in drawn[0]])


@settings(max_examples=60, deadline=None)
@given(others=st.lists(update, min_size=1, max_size=6), one=update, another=update)
def test_a_client_moves_the_release_by_its_clipped_update_and_nothing_else(
    others: list[list[float]], one: list[float], another: list[float]
) -> None:
    """However long updates are: by at most clip_norm / expected, twice that for one in place of another."""
    rest = dict(enumerate(others))
    without = released(rest)
    with_one, with_another = released({**rest, 8: one}), released({**rest, 8: another})
    assert torch.linalg.vector_norm(with_one - without) <= CLIP / EXPECTED
    assert torch.linalg.vector_norm(with_one - with_another) <= 2 * CLIP / EXPECTED
    exact = np.array(one, np.float64).astype(np.float32).astype(np.float64)
    term = exact * min(1.0, CLIP / (np.linalg.norm(exact) or 1.0)) / EXPECTED
    np.testing.assert_allclose((with_one - without).numpy(), term, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    scale=st.sampled_from([1e-20, 0.1, 1.0, 1e15]),
    noise=st.sampled_from(["local", "distributed"]),
    seed=st.integers(0, 99),
)
def test_clients_clip_all_tensors_together(sizes: list[int], scale: float, noise: Any, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    before = [scale * torch.randn(size, generator=random) for size in sizes]
    side = ClientSide(PrivacyConfig(noise=noise, clip_norm=CLIP, noise_multiplier=0.0), 1)
    after = side.protect(before, 1, 0)
    norm, norm_after = (torch.linalg.vector_norm(flat(of)).item() for of in (before, after))
    assert norm_after <= CLIP
    assert norm_after == pytest.approx(min(norm, CLIP), rel=1e-5)
    assert [tensor.dtype for tensor in after] == [torch.float32] * len(sizes)
    cosine = torch.dot(flat(before), flat(after))
    assert cosine == pytest.approx(norm * norm_after, rel=1e-5, abs=1e-38)


def test_quantised_updates_are_clipped_as_the_server_reads_them() -> None:
    """What a client says its scale is does not matter."""
    fed = federate(shared("int8"))
    fed.server.admission.release = lambda round_: Release.of(STILL, 3.0, round_)
    sent = [reply.payload for reply in fed.replies()]
    sent[0] = changed(sent[0], {"unit": 1e20})
    assert not deliver(fed.server, sent)
    told = wire.decode(fed.server.broadcasts_since(1)[0]).array("gammas", "<f4", (K,))
    assert np.linalg.norm(told) <= CLIP


# ---- noise ----


def assert_normal(numbers: np.ndarray, std: float) -> None:
    """Mean, variance and fourth moment, within 8 of their standard errors."""
    count, scaled = numbers.size, numbers / std
    assert abs(scaled.mean()) < 8 / math.sqrt(count)
    assert abs((scaled**2).mean() - 1) < 8 * math.sqrt(2 / count)
    assert abs((scaled**4).mean() - 3) < 8 * math.sqrt(96 / count)


def test_secure_noise_is_standard_normal_and_never_the_same() -> None:
    numbers = secure_normal(200_001)
    assert numbers.shape == (200_001,)
    assert_normal(numbers, 1.0)
    below = [(numbers < point).mean() for point in (-1.959964, -0.674490, 0, 0.674490, 1.959964)]
    np.testing.assert_allclose(below, [0.025, 0.25, 0.5, 0.75, 0.975], atol=0.01)
    assert abs(np.mean(numbers[1:] * numbers[:-1])) < 0.02
    assert abs(np.mean(numbers[:100_000] * numbers[100_000:200_000])) < 0.03
    assert not set(numbers) & set(secure_normal(1000))


def wide() -> torch.nn.Module:
    """20,100 parameters, all 0, so that an update is 0 or noise."""
    model = torch.nn.Linear(200, 100)
    for param in model.parameters():
        torch.nn.init.zeros_(param)
    return model


def no_change(*_: Any) -> float:
    return 0.5


def round_of(algorithm: Any, config: PrivacyConfig, clients: int) -> tuple[list[bytes], Message]:
    """The updates of a round of clients that learn nothing, and what the server makes of them."""
    model = wide()
    fed = federate(algorithm, model)
    server = Server(algorithm, wide(), range(clients), 1.0, 0, privacy=config, equal_weights=True)
    sent = [reply.payload for reply in fed.replies([1.0] * clients)]
    assert not deliver(server, sent)
    return sent, wire.decode(server.broadcasts_since(1)[0])


def config_of(noise: Any, seed: int | None = None) -> PrivacyConfig:
    return PrivacyConfig(noise=noise, clip_norm=0.25, noise_multiplier=1.5, noise_seed=seed)


@pytest.mark.parametrize("noise", ["central", "distributed", "local"])
@pytest.mark.parametrize("name", ["fedavg", "ferret"])
@pytest.mark.parametrize("seed", [None, 5])
def test_a_round_has_as_much_noise_as_is_said(noise: str, name: str, seed: int | None) -> None:
    """z C of the sum over n clients, in every number; of 16 clients each adds a fourth of it in parts."""
    clients, std = 16, 1.5 * 0.25
    config = config_of(noise, seed)
    side = ClientSide(config, clients)
    if name == "fedavg":
        algorithm: Any = FedAvg(1.0, no_change, privacy=side)
    else:
        of_coordinates = FerretConfig(K=20_000, coordinates="float32", allocation="size")
        algorithm = SharedFerret(of_coordinates, 1.0, no_change, privacy=side, seed=3)
    sent, broadcast = round_of(algorithm, config, clients)

    def numbers(message: Message) -> np.ndarray:
        if name == "ferret":
            return message.array("gammas", "<f4", (20_000,)).astype(float)
        params = list(wide().parameters())
        return flat(unpack(message, index, param) for index, param in enumerate(params)).numpy()

    of_mean = {"central": std / clients, "distributed": std / clients, "local": std / math.sqrt(clients)}
    of_one = {"central": 0.0, "distributed": std / math.sqrt(clients), "local": std}
    assert_normal(numbers(broadcast), of_mean[noise])
    first, second = (numbers(wire.decode(payload)) for payload in sent[:2])
    if of_one[noise]:
        assert_normal(first, of_one[noise])
        assert_normal(first - second, math.sqrt(2) * of_one[noise])
    else:
        assert not first.any()


def test_tensors_have_noise_of_their_own() -> None:
    release = Release.of(config_of("central", seed=1), 1.0, 1)
    assert release is not None
    first, second = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    release.add_noise(first)
    release.add_noise(second)
    assert not torch.equal(first, second)


def test_parts_of_noise_are_enough_for_the_fewest_clients_that_a_round_may_have() -> None:
    side = ClientSide(config_of("distributed"), quorum=4)
    (sent,) = side.protect([torch.zeros(40_000)], 1, 0)
    assert_normal(sent.double().numpy(), 1.5 * 0.25 / 2)


def test_with_seeds_of_their_own_clients_send_private_updates_and_no_loss() -> None:
    """Noise stands in front of the choice of coordinates."""
    config = FerretConfig(K=64, coordinates="choice4", allocation="size")
    side = ClientSide(PrivacyConfig(noise="local", clip_norm=1.0, noise_multiplier=3.0), 1)
    fed = federate(Ferret(config, 0.5, train, privacy=side))
    replies = fed.replies()
    assert all(math.isnan(reply.train_loss) for reply in replies)
    again = fed.replies()
    assert all(a.payload != b.payload for a, b in zip(replies, again, strict=True))
    assert not fed.apply([reply.payload for reply in replies])


def test_a_divisor_does_not_depend_on_who_comes() -> None:
    """Half of the clients: half of the mean."""
    algorithm = FedAvg(1.0, train, privacy=ClientSide(STILL, 1))
    fed = federate(algorithm)
    servers = [Server(algorithm, toy(), range(4), 1.0, 0, privacy=STILL) for _ in range(2)]
    one = changed(next(reply.payload for reply in fed.replies()), weight=1.0)
    same = [Sent(client, changed(one, client=client)) for client in range(4)]
    start = flat(servers[0].replica.params)
    for server, sent in zip(servers, (same, same[:2]), strict=True):
        server.apply(range(4), sent)
    all_came, half_came = (flat(server.replica.params) - start for server in servers)
    torch.testing.assert_close(half_came, all_came / 2, rtol=1e-4, atol=1e-7)


def test_hashes_of_single_updates_are_not_told_where_sums_are_private() -> None:
    fed = federate(shared(privacy=ClientSide(STILL, 1)))
    fed.server.admission.release = lambda round_: Release.of(STILL, 3.0, round_)
    everybody = range(3)
    sent = [reply.payload for reply in fed.replies()]
    updates, _ = fed.server.apply(everybody, list(map(Sent, everybody, sent)))
    assert updates.hashes == [bytes(32)] * 3


# ---- refusals ----


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise": "central"}, "privacy.noise_multiplier: expected a number, or a privacy.target_epsilon"),
        (
            {"noise": "none", "target_epsilon": 3},
            "privacy.noise: expected central, distributed or local where",
        ),
        ({"noise": "central", "noise_multiplier": 0.1}, "privacy.noise_multiplier: expected .* >= 0.3"),
        ({}, "ferret.seeds: expected shared-round where privacy.noise is central"),
        ({"ferret.mode": "reference-code"}, "ferret.mode: expected paper where privacy.noise"),
        ({"algorithm": "fedkseed"}, "privacy.noise: expected none with fedkseed, got central"),
        ({"algorithm": "fedavg", "robust.rule": "median"}, "robust.rule: expected mean where privacy.noise"),
        ({"algorithm": "fedavg", "robust.rule": "norm-clip"}, "robust.rule: expected mean"),
        ({"algorithm": "fedavg", "client_weights": "examples"}, "client_weights: expected auto or uniform"),
        ({"noise": "distributed", "ferret.seeds": "shared-round"}, "ferret.coordinates: expected float32"),
        ({"noise": "distributed", "algorithm": "fedavg", "dtype": "bfloat16"}, "dtype: expected float32"),
        (
            {"ferret.secure_aggregation": True, "ferret.seeds": "shared-round"},
            "privacy.noise: expected distributed or local where ferret.secure_aggregation is set",
        ),
        ({"noise": "local", "sampling": "secret"}, "privacy.sampling: expected public .* local, got secret"),
        (
            {"algorithm": "fedavg", "sampling": "secret", "federation.over_selection": 0.5},
            "federation.over_selection: expected 0 where privacy.sampling is secret, got 0.5",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], message: str) -> None:
    chosen = {"noise": "central", "noise_multiplier": None if "noise" in given else 1.0, **given}
    if chosen["noise"] != "central" and "target_epsilon" not in given:
        chosen["noise_multiplier"] = 1.0
    pairs = [(key if "." in key or key in TOP else f"privacy.{key}", value) for key, value in chosen.items()]
    with pytest.raises(ConfigError, match=message):
        build([*NEEDED, *pairs])


TOP = ("algorithm", "client_weights", "dtype")


@pytest.mark.parametrize("algorithm", ["ferret", "fedavg", "fedit", "fedzo"])
def test_local_noise_goes_with_seeds_of_their_own_and_any_rule(algorithm: str) -> None:
    build(
        [
            *NEEDED,
            ("algorithm", algorithm),
            ("privacy.noise", "local"),
            ("privacy.noise_multiplier", 1),
            ("robust.rule", "norm-clip"),
        ]
    )


# ---- runs ----

PRIVATE = ["privacy.noise=central", "ferret.seeds=shared-round", "privacy.clip_norm=2", "privacy.delta=1e-3"]


def simulate(out: Path, *more: str) -> int:
    pytest.importorskip("dp_accounting", reason="epsilon needs dp-accounting")
    return main(["simulate", *SMALL, "--out", str(out), "rounds=3", *PRIVATE, *more])


def test_noise_of_clients_goes_with_secure_aggregation(tmp_path: Path) -> None:
    """The same noise under masks: the same run, but for the rounding to integers, and the same epsilon."""
    more = (
        "privacy.noise=distributed",
        "privacy.noise_multiplier=2",
        "privacy.noise_seed=7",
        "robust.quorum=2",
    )
    plain, masked = tmp_path / "plain", tmp_path / "masked"
    assert simulate(plain, *more) == 0
    assert simulate(masked, *more, "ferret.secure_aggregation=true", "ferret.coordinates=auto") == 0
    for row, other in zip(read_metrics(plain), read_metrics(masked), strict=True):
        assert other["eval_loss"] == pytest.approx(row["eval_loss"], rel=1e-3)
        assert other["epsilon"] == row["epsilon"]
    assert read_metrics(masked)[-1]["epsilon"] is not None


def test_a_run_that_goes_on_has_spent_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same epsilon and, since this noise repeats, the same bits; a replay needs no noise at all."""
    more = ("privacy.noise_multiplier=2", "privacy.noise_seed=7")
    alone, cut = tmp_path / "alone", tmp_path / "cut"
    assert simulate(alone, *more) == 0
    said = capsys.readouterr().out
    assert "privacy: none, since privacy.noise_seed lets everybody take the noise off again" in said
    interrupted_after(monkeypatch, 2)
    assert simulate(cut, *more) == 130
    assert main(["resume", str(cut)]) == 0
    rows = read_metrics(alone)
    spent = [row["epsilon"] for row in rows]
    assert spent[0] is None
    assert 0 < spent[1] < spent[2] <= spent[3]  # type: ignore[operator]
    assert f"epsilon {spent[3]:.3f} at delta 0.001" in said
    assert [row["epsilon"] for row in read_metrics(cut)] == spent
    assert all(row["train_loss"] is None for row in rows)
    assert (cut / "ledger").read_bytes() == (alone / "ledger").read_bytes()
    records = list(ledger.read(cut / "ledger"))
    assert [record.value("epsilon", float) for record in records[1:]] == spent[1:]
    assert all(set(record.value("updates", list)) == {bytes(32)} for record in records[1:])
    assert main(["replay", "builtin:tiny-llama", str(cut), str(tmp_path / "again")]) == 0
    weights = (alone / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    page = (alone / "report.html").read_text()
    assert f"{spent[3]:.3f}" in page
    assert "at delta 0.001, all rounds together" in page


def test_secret_draws_go_on_after_a_resume_and_stand_in_no_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("privacy.noise_multiplier=2", "privacy.sampling=secret", "num_clients=40", "client_fraction=0.5")
    interrupted_after(monkeypatch, 2)
    assert simulate(tmp_path, *more) == 130
    key = tmp_path / journal.KEY
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = journal.read_key(key)
    assert simulate(tmp_path, *more, "--resume") == 0
    assert journal.read_key(key) == before
    rows = read_metrics(tmp_path)
    drawn = [row["clients"] for row in rows]
    assert len({tuple(of) for of in drawn[1:]}) > 1  # type: ignore[arg-type]
    for record in list(ledger.read(tmp_path / "ledger"))[1:]:
        told = journal.outcome_of(record)
        assert (told.clients, told.accepted, told.updates, told.payload_bytes_up) == ([], [], [], 0)
        assert told.epsilon is not None


def test_a_run_ends_when_its_budget_is_spent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("privacy.noise_multiplier=1", "privacy.target_epsilon=5", "client_fraction=1")
    assert simulate(tmp_path, *more) == 0
    rows = read_metrics(tmp_path)
    assert rows[-1]["epsilon"] <= 5  # type: ignore[operator]
    assert f"privacy: the run ends after round {len(rows) - 1} of 3" in capsys.readouterr().out
    assert (tmp_path / "run.json").exists()
    assert simulate(tmp_path, *more, "--overwrite", "privacy.target_epsilon=1") == 2
    assert "privacy.target_epsilon: expected at least" in capsys.readouterr().err


def test_packed_updates_are_of_the_right_kind() -> None:
    """FedAvg's clipped updates have the parameters' dtype."""
    side = ClientSide(config_of("local"), 1)
    model = wide().bfloat16()
    values = pack(side.protect([param.detach() for param in model.parameters()], 1, 0))
    assert all(value.dtype == wire.BFLOAT16 for value in values.values() if isinstance(value, np.ndarray))
