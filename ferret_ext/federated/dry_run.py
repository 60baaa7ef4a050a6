"""`ferret simulate --dry-run`: the plan, memory and traffic of a run, with no weights and no data loaded."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ferret_ext.federated import adapters, compatibility, estimate, models
from ferret_ext.federated.algorithms.base import trainable
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.units import in_words
from ferret_ext.federated.zeroth_order import PUBLISHED, given, with_published
from ferret_ext.plan import BlockPlan

SHOWN_BLOCKS = 3


def describe(config: SimulationConfig) -> Iterator[str]:
    """Lines on what the run of this config will be and take. Raises ConfigError."""
    config = adapters.resolve(config)
    if (clients := estimate.clients_of(config)) is not None:
        compatibility.check_quorum(config, clients)
    base = models.skeleton(config.model, config.dtype)
    full = models.trainable_bytes(base)
    model = adapters.attach_blank(base, config)
    yield _model_line(config, model)
    plan = estimate.plan_of(config, model)
    if plan is not None:
        yield _plan_line(plan)
    yield from _work_lines(config, model)
    yield from _memory_lines(config, model)
    yield from _traffic_lines(config, model, full)


def _model_line(config: SimulationConfig, model: Any) -> str:
    every = sum(param.numel() for param in model.parameters())
    trained = trainable(model).values()
    count, dtype = sum(param.numel() for param in trained), next(iter(trained)).dtype
    which = "all" if count == every else f"{count:,} of {config.adapter.type}"
    return (
        f"model: {every:,} parameters, {which} trained: {in_words(models.trainable_bytes(model))} in "
        f"{str(dtype).removeprefix('torch.')}"
    )


def _plan_line(plan: BlockPlan) -> str:
    largest = sorted(plan.blocks, key=lambda block: -block.numel)[:SHOWN_BLOCKS]
    shown = ", ".join(f"{block.name} ({block.numel:,} on {block.k:,})" for block in largest)
    more = ", .." if len(plan.blocks) > SHOWN_BLOCKS else ""
    return f"plan: {len(plan.blocks):,} blocks on {plan.K:,} coordinates; the largest: {shown}{more}"


def _work_lines(config: SimulationConfig, model: Any) -> Iterator[str]:
    clients, training = estimate.clients_of(config), config.training
    length = models.max_length(model, config.dataset.max_length)
    if clients is None:
        share = f"{config.client_fraction:.0%} of them a round"
        yield f"clients: as many as the data has values to divide by, {share}"
    else:
        chosen = max(1, round(config.client_fraction * clients))
        yield f"clients: {chosen:,} of {clients:,} a round, {config.rounds:,} rounds of {config.algorithm}"
    if config.algorithm in PUBLISHED:
        walk = with_published(config.zeroth_order, config.algorithm)
        count = given(walk.steps) * given(walk.perturbations)
        work = f"{count:,} directions, two forward passes each"
    elif training.num_train_epochs is not None:
        work = f"{training.num_train_epochs:g} epochs by {training.optim}"
    else:
        passes = training.max_steps * training.gradient_accumulation_steps
        work = f"{training.max_steps:,} steps by {training.optim}, {passes:,} forward and backward passes"
    batch = training.per_device_train_batch_size
    yield f"a client's round: {work}, batches of {batch} with at most {batch * length:,} tokens"


def _memory_lines(config: SimulationConfig, model: Any) -> Iterator[str]:
    device = models.pick_device(config.device)
    parts = estimate.memory(config, model)
    if device.type == "cpu":
        parts["this process with its libraries"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    free, needed = free_memory(device), sum(parts.values())
    verdict = "" if free is None else f" of {in_words(free)} free"
    yield f"memory on {device}, about: {in_words(needed)}{verdict}"
    yield from (f"  {in_words(size):>10}  {name}" for name, size in parts.items())
    if free is not None and needed > free:
        yield "warning: the memory will not be enough"
    out, size = Path(config.out or ".").expanduser(), estimate.disk(config, model)
    left = free_disk(out)
    yield f"disk for {out}, about: {in_words(size)} of {in_words(left)} free"
    if size > left:
        yield "warning: the disk will not be enough"


def _traffic_lines(config: SimulationConfig, model: Any, full: int) -> Iterator[str]:
    it = estimate.traffic(config, model)
    at_most = "at most " if it.at_most else ""
    yield f"a client's update: {at_most}{it.update:,} bytes, {_times(full, it.update)}"
    yield f"a round's broadcast: {it.broadcast:,} bytes, {_times(full, it.broadcast)}"
    if estimate.clients_of(config) is None:
        yield "all rounds: depends on how many clients the data gives"
        return
    whole = config.rounds * it.chosen * full
    yield (
        f"all rounds and clients, about: {at_most}{in_words(it.up(config.rounds))} up, "
        f"{in_words(it.down(config.rounds))} down; whole models would be {in_words(whole)} each way"
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that a program may still take there; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def free_disk(path: Path) -> int:
    """Bytes left where the path is or will be."""
    existing = next(it for it in (path, *path.absolute().parents) if it.exists())
    return shutil.disk_usage(existing).free


def _times(full: int, size: int) -> str:
    return (
        f"{full / size:,.0f} times less than the whole model"
        if size < full
        else "no less than the whole model"
    )
