"""Which settings of a run go together. What one setting may be by itself stands beside it, in `config`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ferret_ext.federated import draws
from ferret_ext.federated.settings import ConfigError

if TYPE_CHECKING:
    from ferret_ext.federated.config import SimulationConfig


def check(config: SimulationConfig) -> None:
    """What no single setting shows."""
    if (config.dataset.prompt is None) != (config.dataset.response is None):
        raise ConfigError("dataset.prompt: expected together with dataset.response, got only one of the two")
    if config.training.momentum and config.training.optim not in ("auto", "sgd"):
        raise ConfigError(
            f"training.momentum: expected 0 unless training.optim is sgd, got {config.training.momentum}"
        )
    keyed = config.partition.kind in ("dirichlet", "natural-id", "pathological")
    if keyed and config.partition.column is None and config.dataset.protocol in ("none", "gsm8k"):
        raise ConfigError(
            f"partition.column: expected a column for partition.kind {config.partition.kind}, got none"
        )
    limit = config.dataset.max_prompt_length
    if limit is not None and limit >= config.dataset.max_length:
        raise ConfigError(
            f"dataset.max_prompt_length: expected less than dataset.max_length, which is "
            f"{config.dataset.max_length}, got {limit}"
        )
    if config.ferret.mode == "reference-code" and config.ferret.chosen_coordinates != "float32":
        raise ConfigError(
            f"ferret.coordinates: expected float32 where ferret.mode is reference-code, got "
            f"{config.ferret.coordinates}"
        )
    if config.ferret.seeds == "shared-round" and config.ferret.coordinates.startswith("choice"):
        raise ConfigError(
            "ferret.coordinates: expected floats or levels where ferret.seeds is shared-round, since clients "
            f"would choose different columns, got {config.ferret.coordinates}"
        )
    if config.ferret.server_warmup and config.ferret.mode == "reference-code":
        raise ConfigError(
            "ferret.server_warmup: expected 0 where ferret.mode is reference-code, whose step falls, got "
            f"{config.ferret.server_warmup}"
        )
    if config.ferret.seeds == "shared-round" and config.ferret.mode == "reference-code":
        raise ConfigError(
            "ferret.seeds: expected per-client where ferret.mode is reference-code, which has seeds of its "
            "own, got shared-round"
        )
    if config.algorithm == "ferret" and config.ferret.secure_aggregation:
        _check_secure(config)
    if config.ferret.rounding == "stochastic":
        _check_rounding(config)
    _check_privacy(config)
    _check_server(config)
    if config.num_clients is not None:  # else it is checked once the data has said it
        check_quorum(config, config.num_clients)
    if config.federation.min_deadline > config.federation.max_deadline:
        raise ConfigError(
            f"federation.min_deadline: expected at most federation.max_deadline, which is "
            f"{config.federation.max_deadline:g}, got {config.federation.min_deadline:g}"
        )
    if config.zeroth_order.generator == "torch" and config.zeroth_order.perturbation == "layerwise":
        raise ConfigError(
            "zeroth_order.perturbation: expected in_place or auto where zeroth_order.generator is torch, got "
            "layerwise; only the streams give a direction layer by layer"
        )


def check_quorum(config: SimulationConfig, clients: int) -> None:
    """Whether a round of so many clients can have the updates that it must. Raises ConfigError."""
    drawn = draws.count(clients, config.client_fraction, config.federation.over_selection)
    most = clients if config.privacy.sampling == "secret" else drawn
    if config.robust.quorum > most:
        raise ConfigError(
            f"robust.quorum: expected at most {most}, the clients that a round draws of {clients}, got "
            f"{config.robust.quorum}"
        )


def _check_secure(config: SimulationConfig) -> None:
    """What a server that sees sums alone cannot do."""
    default = type(config.robust)()
    wanted: tuple[tuple[str, object, object, str], ...] = (
        ("ferret.seeds", config.ferret.seeds, "shared-round", "only coordinates on one basis have a sum"),
        ("ferret.coordinates", config.ferret.coordinates, "auto", "updates are masked integers"),
        ("robust.rule", config.robust.rule, "mean", "a server that sees the sum alone cannot screen updates"),
        (
            "robust.max_norm_ratio",
            config.robust.max_norm_ratio,
            default.max_norm_ratio,
            "a server that sees the sum alone knows no norms",
        ),
    )
    for key, got, expected, why in wanted:
        if got != expected:
            raise ConfigError(
                f"{key}: expected {expected} where ferret.secure_aggregation is set, since {why}, got {got}"
            )
    if config.client_weights not in ("auto", "uniform"):
        raise ConfigError(
            "client_weights: expected uniform where ferret.secure_aggregation is set, since the server could "
            f"not tell whether a client keeps to its weight, got {config.client_weights}"
        )


def _check_privacy(config: SimulationConfig) -> None:
    """What differential privacy does not go with."""
    privacy, ferret = config.privacy, config.ferret
    if privacy.noise == "none":
        if privacy.noise_multiplier or privacy.target_epsilon or privacy.sampling == "secret":
            raise ConfigError(
                "privacy.noise: expected central, distributed or local where other settings of privacy are "
                "given, got none"
            )
        return
    projects = config.algorithm == "ferret"
    where = f"where privacy.noise is {privacy.noise}"
    unfit = [
        (
            privacy.noise_multiplier is None and privacy.target_epsilon is None,
            f"privacy.noise_multiplier: expected a number, or a privacy.target_epsilon, {where}, got none",
        ),
        (
            config.algorithm in ("fedkseed", "fedkseed-pro", "decomfl", "feedsign"),
            f"privacy.noise: expected none with {config.algorithm}, got {privacy.noise}; ferret, fedavg and "
            "those who send what fedavg sends can be private",
        ),
        (
            projects and ferret.mode == "reference-code",
            f"ferret.mode: expected paper {where}, got reference-code",
        ),
        (
            projects and privacy.of_sums and ferret.seeds == "per-client",
            f"ferret.seeds: expected shared-round {where}, since with per-client every update is relayed as "
            "it came, got per-client; privacy.noise=local allows it",
        ),
        (
            privacy.of_sums and config.robust.rule != "mean",
            f"robust.rule: expected mean {where}, got {config.robust.rule}",
        ),
        (
            projects and ferret.secure_aggregation and privacy.noise == "central",
            "privacy.noise: expected distributed or local where ferret.secure_aggregation is set, since a "
            "server that sees the sum alone cannot clip updates, got central",
        ),
        (
            config.client_weights in ("examples", "batches"),
            f"client_weights: expected auto or uniform {where}, got {config.client_weights}",
        ),
        (
            privacy.noise == "distributed" and projects and ferret.chosen_coordinates != "float32",
            f"ferret.coordinates: expected float32 {where}, since parts of noise that are rounded do not add "
            f"up, got {ferret.coordinates}",
        ),
        (
            privacy.noise == "distributed" and config.dtype != "float32",
            f"dtype: expected float32 {where}, since parts of noise that are rounded do not add up, got "
            f"{config.dtype}",
        ),
        (
            privacy.sampling == "secret" and privacy.noise != "central",
            f"privacy.sampling: expected public {where}, got secret; only a server that is trusted can draw "
            "clients secretly",
        ),
        (
            privacy.sampling == "secret" and config.federation.over_selection > 0,
            "federation.over_selection: expected 0 where privacy.sampling is secret, got "
            f"{config.federation.over_selection:g}",
        ),
    ]
    for found, text in unfit:
        if found:
            raise ConfigError(text)


def _check_rounding(config: SimulationConfig) -> None:
    """Stochastic rounding belongs to the step that an update alone makes."""
    for wrong, text in (
        (
            config.algorithm != "ferret" or config.ferret.mode == "reference-code",
            "ferret in paper mode",
        ),
        (config.dtype == "float32", "dtype bfloat16 or float16"),
        (not config.server.plain, "server.optim sgd without momentum"),
    ):
        if wrong:
            raise ConfigError(f"ferret.rounding: expected nearest unless with {text}, got stochastic")


def _check_server(config: SimulationConfig) -> None:
    """The server's optimiser: which numbers it has, and who takes its steps."""
    server = config.server
    if server.momentum and server.optim != "sgd":
        raise ConfigError(f"server.momentum: expected 0 unless server.optim is sgd, got {server.momentum:g}")
    if server.beta1 is not None and server.optim == "sgd":
        raise ConfigError(f"server.beta1: expected none where server.optim is sgd, got {server.beta1:g}")
    steps_of_its_own = config.algorithm in ("fedkseed", "fedkseed-pro", "decomfl", "feedsign")
    reference = config.algorithm == "ferret" and config.ferret.mode == "reference-code"
    if not server.plain and (steps_of_its_own or reference):
        which = "ferret.mode=reference-code" if reference else config.algorithm
        told = f"server.optim {server.optim} with server.momentum {server.momentum:g}"
        raise ConfigError(
            f"server.optim: expected sgd without momentum for {which}, whose steps are its own, got {told}"
        )
