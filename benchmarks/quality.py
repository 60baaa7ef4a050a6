"""How much of FedAvg's loss reduction a client's bytes buy, and the errors that theory has for it.

    python benchmarks/quality.py frontier --model FOLDER --data FOLDER --json FILE [--seeds 0,1,2]
    python benchmarks/quality.py errors --model FOLDER --data FOLDER --json FILE
    python benchmarks/quality.py phases --model FOLDER --data FOLDER --json FILE

frontier: runs of the preset small/gsm8k (--preset NAME for another) by FedAvg and by Ferret with coordinates
of several forms and sizes (--only NAME: those whose name begins so). A row is one of the forms, with its runs
by seed; a share is of the reduction that FedAvg reaches with the same seed. Runs that the file has are
not run again.

errors: the mean-square error of one reconstruction beside its closed form (docs/quality.md), over forms at
equal bytes for normal updates, and over blocks and allocations for an update out of training.

phases: seconds of a client's local round, of projecting and packing its update, and of rebuilding from three
clients, on every CPU path of the machine, one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from timer import measure_in_turns, write

import ferret_ext
from ferret_ext import BlockPlan, Packing
from ferret_ext.federated import config as configuration
from ferret_ext.federated import coordinates, models, presets
from ferret_ext.federated.algorithms.ferret import first_plan
from ferret_ext.federated.client import LocalTrainer
from ferret_ext.federated.config import Coordinates, FerretConfig, SimulationConfig
from ferret_ext.federated.coordinates import PACKINGS
from ferret_ext.federated.data import loading
from ferret_ext.federated.data.holdings import Holdings
from ferret_ext.federated.engines.in_process import simulate
from ferret_ext.federated.rounds import Deaf

SCALES = 8  # bytes of the unit beside a byte a block


class Quiet(Deaf):
    """A narrator that takes no notice either."""

    def say(self, text: str) -> None: ...

    def dealt(self, holdings: Holdings) -> None: ...


# ---- frontier ----


@dataclass(frozen=True)
class Form:
    """How coordinates are sent, in so many bytes with their scales, and the settings that go with it."""

    name: str
    kind: Coordinates
    allocation: str
    bytes: int
    server_learning_rate: float
    server_warmup: int = 0
    granularity: Literal["auto", "tensor"] = "tensor"

    def count(self, blocks: int) -> int:
        """K: as many coordinates as the bytes hold. Those of float16 count without their scales."""
        if self.kind in PACKINGS:
            return (self.bytes - SCALES - blocks) * 8 // PACKINGS[self.kind].width
        return self.bytes // {"float32": 4, "float16": 2}[self.kind]

    def fitted(self, model: Any) -> int:
        """K where its own plan has as many blocks as its bytes leave room for, or fewer."""
        blocks = 0 if self.granularity == "auto" else len(list(model.named_parameters()))
        while self.granularity == "auto":
            config = FerretConfig(K=self.count(blocks), coordinates=self.kind)
            needed = len(first_plan(config, model).blocks)
            if needed <= blocks:
                break
            blocks = needed
        return self.count(blocks)


FORMS = [
    Form("float16", "float16", "norm", 512, 0.15),
    Form("float16", "float16", "norm", 4096, 0.3),
    Form("float16", "float16", "norm", 32768, 0.6),
    Form("int1", "int1", "mse", 512, 0.5),
    Form("int1", "int1", "mse", 4096, 0.9),
    Form("choice8", "choice8", "curvature", 128, 0.3),
    Form("choice8", "choice8", "curvature", 512, 0.6),
    Form("choice8", "choice8", "curvature", 4096, 1.0),
    Form("choice8 warm-up 3,", "choice8", "curvature", 512, 0.8, 3),
    Form("choice8 warm-up 3,", "choice8", "curvature", 4096, 1.0, 3),
    Form("float16 warm-up 3,", "float16", "norm", 512, 0.3, 3),
    Form("choice12", "choice12", "curvature", 512, 0.7),
    Form("choice12", "choice12", "curvature", 4096, 1.0),
    Form("auto warm-up 3,", "choice8", "curvature", 512, 0.8, 3, "auto"),
    Form("auto warm-up 3,", "choice8", "curvature", 4096, 1.0, 3, "auto"),
    Form("auto", "choice8", "curvature", 128, 0.3, 0, "auto"),
]


def frontier(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for FedAvg, then one a form, with what the file had already."""
    found = read(options.json)
    rows = []
    for form in (None, *FORMS):
        name = "fedavg" if form is None else f"{form.name} {form.bytes}"
        before = found.get(name, {})
        wanted = options.only is None or name == "fedavg" or name.startswith(options.only)
        missing = [seed for seed in options.seeds if str(seed) not in before.get("runs", {})]
        runs = {
            **before.get("runs", {}),
            **{str(seed): run(options, form, seed) for seed in missing if wanted},
        }
        if runs:
            rows.append({**({} if form is None else vars(form)), "name": name, "runs": runs})
            write(
                options.json,
                rows + [row for key, row in found.items() if key not in {r["name"] for r in rows}],
            )
            print_row(rows[-1], rows[0])
    return rows


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of the file by name, none where there is no file."""
    if not path.exists():
        return {}
    return {row["name"]: row for row in json.loads(path.read_text("utf-8"))["rows"]}


def run(options: argparse.Namespace, form: Form | None, seed: int) -> dict[str, Any]:
    """One run's losses by round, and a client's bytes of one round."""
    config = config_of(options, "fedavg" if form is None else "ferret", seed)
    given: list[tuple[str, Any]] = []
    if form is not None:
        model, _ = models.load(config.model, config.dtype, torch.device("cpu"), 0)
        given = [
            ("ferret.K", form.fitted(model)),
            ("ferret.granularity", form.granularity),
            ("ferret.coordinates", form.kind),
            ("ferret.allocation", form.allocation),
            ("server_learning_rate", form.server_learning_rate),
            ("ferret.server_warmup", form.server_warmup),
        ]
    config = config_of(options, "fedavg" if form is None else "ferret", seed, given)
    history = simulate(config, Quiet()).history
    last, clients = history[-1], len(history[-1].clients)
    return {
        "K": None if form is None else config.ferret.K,
        "losses": [metrics.eval_loss for metrics in history],
        "bytes_up": last.payload_bytes_up / clients,
        "bytes_down": last.payload_bytes_down / clients,
        "seconds_local": sum(metrics.seconds_local for metrics in history) / clients,
        "seconds_project": sum(metrics.seconds_project for metrics in history) / clients,
        "seconds_rebuild": sum(metrics.seconds_rebuild for metrics in history) / clients,
    }


def config_of(
    options: argparse.Namespace, variant: str, seed: int, given: Sequence[Any] = ()
) -> SimulationConfig:
    where = [("model", str(options.model)), ("data", str(options.data)), ("out", "unused"), ("seed", seed)]
    more = [tuple(setting.split("=", 1)) for setting in options.set]
    return configuration.build([*presets.settings_of(options.preset, variant), *where, *more, *given])


def shares(row: Mapping[str, Any], fedavg: Mapping[str, Any]) -> list[float]:
    """The share of FedAvg's loss reduction that each seed reaches."""
    result = []
    for seed, one in row["runs"].items():
        if seed in fedavg["runs"]:
            best = fedavg["runs"][seed]["losses"]
            result.append((one["losses"][0] - one["losses"][-1]) / (best[0] - best[-1]))
    return result


def print_row(row: dict[str, Any], fedavg: dict[str, Any]) -> None:
    runs = row["runs"].values()
    losses, reached = [one["losses"][-1] for one in runs], shares(row, fedavg)
    spread = f"{min(reached):.3%} .. {max(reached):.3%}"
    told = f"{fmean(one['bytes_up'] for one in runs):>9,.0f} bytes up"
    print(
        f"{row['name']:16} {told}  loss {fmean(losses):.4f}  share {fmean(reached):.3%} ({spread})",
        flush=True,
    )


# ---- errors ----


def errors(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of both tables."""
    rows = list(by_form())
    for row in rows:
        print("{form:10} {bytes:>6} bytes  K {K:>5}  error {error:.4g}  theory {theory:.4g}".format(**row))
    for row in by_plan(options):
        print(
            "{update:8} {granularity!s:>8} L {L:>6} {allocation:10} error {error:.4g} theory {theory:.4g} "
            "project {seconds:.4f} s".format(**row),
            flush=True,
        )
        rows.append(row)
    write(options.json, rows)
    return rows


def worth(packing: Packing) -> float:
    """What a coordinate is worth beside an exact one: E[level x]^2 / E[level^2].

    x is the largest of its candidates, standard normal; by a million draws.
    """
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(2**20 >> packing.choice, 2**packing.choice, generator=generator)
    x = draws.abs().amax(1).double()
    step = {1: math.inf, 2: 0.995687, 4: 0.335201, 8: 0.030762}[packing.bits]
    level = 2 * (x / step).floor().clamp(max=2 ** (packing.bits - 1) - 1) + 1
    return float((level * x).mean() ** 2 / level.square().mean())


def by_form(d: int = 4096, size: int = 64, draws: int = 200) -> Iterator[dict[str, Any]]:
    """||delta~ - delta||^2 / ||delta||^2 of a normal update in one block, so many bytes of codes."""
    torch.manual_seed(0)
    delta, zeros = torch.randn(d), torch.zeros(d)
    for kind in coordinates.KINDS:
        packing = PACKINGS.get(kind)
        width = packing.width if packing else {"float32": 32, "float16": 16}[kind]
        k = size * 8 // width
        plan = BlockPlan.from_parameters([("delta", delta.requires_grad_(False).requires_grad_())], k)
        squares = [error_of(plan, [delta.detach()], [zeros], packing, seed) for seed in range(draws)]
        of_exact = (d - 1) / k
        theory = d / (k * worth(packing)) if packing else of_exact
        yield {
            "table": "form", "form": kind, "bytes": size, "d": d, "K": k, "draws": draws,
            "error": fmean(squares), "theory": theory,
        }  # fmt: skip


def error_of(
    plan: BlockPlan, delta: list[torch.Tensor], zeros: list[torch.Tensor], packing: Packing | None, seed: int
) -> float:
    """The relative mean-square error of one reconstruction."""
    full = packing.candidates(plan) if packing else plan
    gammas = ferret_ext.project_difference(full, delta, zeros, seed)
    rebuilt = [torch.zeros_like(part) for part in delta]
    sent = ferret_ext.pack(plan, gammas, packing) if packing else gammas
    ferret_ext.apply_(plan, rebuilt, [(seed, sent, 1.0)], 1.0)
    pairs = list(zip(rebuilt, delta, strict=True))
    return math.fsum(float((a - b).double().square().sum()) for a, b in pairs) / math.fsum(
        float(b.double().square().sum()) for _, b in pairs
    )


ALLOCATIONS = ("size", "sqrt-size", "norm", "sqrt-norm", "mse", "curvature")
GRANULARITIES: tuple[Any, ...] = (262144, 65536, 16384, "packed", "tensor", 4096, 1024, 256, 64, 26)


def by_plan(options: argparse.Namespace, K: int = 16384, draws: int = 10) -> Iterator[dict[str, Any]]:
    """Float coordinates of normal numbers and of a client's first update, over blocks and allocations."""
    named, trained, _ = first_update(options)
    torch.manual_seed(0)
    for update, delta in (("normal", [torch.randn_like(part) for part in trained]), ("trained", trained)):
        zeros = [torch.zeros_like(part) for part in delta]
        for granularity in GRANULARITIES:
            base = BlockPlan.from_parameters(named, K, granularity=granularity)
            norms = base.block_norms(delta)
            for allocation in ALLOCATIONS if update == "trained" else ("size",):
                plan = base.with_allocation(allocation, norms=norms)  # type: ignore[arg-type]
                began = time.perf_counter()
                for seed in range(draws):
                    ferret_ext.project_difference(plan, delta, zeros, seed)
                seconds = (time.perf_counter() - began) / draws
                yield {
                    "table": "plan", "update": update, "granularity": granularity, "L": len(plan.blocks),
                    "allocation": allocation, "K": K, "draws": draws, "seconds": seconds,
                    "error": fmean(error_of(plan, delta, zeros, None, seed) for seed in range(draws)),
                    "theory": predicted(plan, norms),
                }  # fmt: skip


def predicted(plan: BlockPlan, norms: Sequence[float]) -> float:
    """sum_l ||delta_l||^2 (d_l - 1) / K_l over ||delta||^2."""
    pairs = zip(plan.blocks, norms, strict=True)
    total = math.fsum(norm**2 for norm in norms)
    return math.fsum(norm**2 * (block.numel - 1) / block.k for block, norm in pairs) / total


def first_update(
    options: argparse.Namespace,
) -> tuple[list[tuple[str, torch.Tensor]], list[torch.Tensor], float]:
    """The model's parameters, what client 0's first round changes in them, and the seconds that it takes."""
    config = config_of(options, "fedavg", 0)
    model, tokenizer = models.load(config.model, config.dtype, torch.device("cpu"), 0)
    data = loading.load(
        config, tokenizer, models.max_length(model, config.dataset.max_length), lambda _: None
    )
    before = [param.detach().clone() for param in model.parameters()]
    began = time.perf_counter()
    LocalTrainer(config.training, tokenizer.pad_token_id).train(model, data.shards[0], 0)
    seconds = time.perf_counter() - began
    after = [param.detach() for param in model.parameters()]
    return list(model.named_parameters()), [a - b for a, b in zip(before, after, strict=True)], seconds


# ---- phases ----

TIMED = ("float16 512", "float16 4096", "choice12 512", "auto warm-up 3, 512", "auto warm-up 3, 4096")
CLIENTS = 3


def phases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a form and path, with the seconds of its phases."""
    named, update, seconds_local = first_update(options)
    model = torch.nn.Module()
    for name, param in named:
        model.register_parameter(name.replace(".", "_"), torch.nn.Parameter(param.detach()))
    rows = []
    for form in FORMS:
        if (name := f"{form.name} {form.bytes}") not in TIMED:
            continue
        config = FerretConfig(K=form.fitted(model), granularity=form.granularity, coordinates=form.kind)
        plan = first_plan(config, model)
        project, rebuild = phases_of(plan, PACKINGS.get(form.kind), update)
        isas = ferret_ext.cpu_capability()["available"]
        timings = measure_in_turns([on(isa, call) for isa in isas for call in (project, rebuild)])
        for isa, projects, rebuilds in zip(isas, timings[::2], timings[1::2], strict=True):
            row = {"name": name, "K": plan.K, "isa": isa, "local": seconds_local}
            rows.append({**row, "project": projects, "rebuild": rebuilds})
            told = f"project {1e3 * projects.median:.2f} ms, rebuild {1e3 * rebuilds.median:.2f} ms"
            print(f"{name:22} {isa:11} {told}", flush=True)
    write(options.json, rows)
    return rows


def phases_of(
    plan: BlockPlan, packing: Packing | None, update: list[torch.Tensor]
) -> tuple[Callable[[], Any], Callable[[], None]]:
    """Projecting and packing the update; rebuilding from several clients' coordinates of it."""
    full = packing.candidates(plan) if packing else plan
    zeros, weights = ([torch.zeros_like(part) for part in update] for _ in range(2))

    def project(seed: int = 0) -> Any:
        gammas = ferret_ext.project_difference(full, update, zeros, seed)
        return ferret_ext.pack(plan, gammas, packing) if packing else gammas

    terms = [(seed, project(seed), 1 / CLIENTS) for seed in range(CLIENTS)]
    return project, lambda: ferret_ext.apply_(plan, weights, terms, -1.0)


def on(isa: str, call: Callable[[], Any]) -> Callable[[], None]:
    def there() -> None:
        ferret_ext.set_cpu_isa(isa)
        call()

    return there


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["frontier", "errors", "phases"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--preset", default="small/gsm8k")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2]
    )
    parser.add_argument("--only", help="only forms whose name begins so")
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"frontier": frontier, "errors": errors, "phases": phases}[options.what](options)


if __name__ == "__main__":
    main()
