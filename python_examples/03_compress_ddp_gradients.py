"""Compress the gradients of DistributedDataParallel with a communication hook: K numbers instead of a bucket.

    python python_examples/03_compress_ddp_gradients.py

Two processes on this machine's CPU train one model (backend gloo; on GPUs the same hook runs over NCCL). In
every step all of them use the same seed, so that the sum of their coordinates is that of their gradients:
only K numbers are all-reduced. What a step could not carry is added to the next one's gradient (error
feedback, Karimireddy et al., arXiv 1901.09847), which lets the usual learning rate stay.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import ferret_ext

PROCESSES, STEPS, K = 2, 100, 1024


class FerretHook:
    """gradient -> c V mean_i(gamma_i), with gamma_i = V^T gradient_i / (rho K) and c = K / (K + d)."""

    def __init__(self, K: int) -> None:
        self.K = K
        self.step = -1
        self.errors: dict[int, Tensor] = {}  # by bucket: what has not been carried yet
        self.floats_sent = 0

    def __call__(self, _: None, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        if bucket.index() == 0:
            self.step += 1
        gradient = bucket.buffer()
        wanted = gradient + self.errors.get(bucket.index(), torch.zeros(()))
        seed, shrink = (self.step << 16) + bucket.index(), self.K / (self.K + gradient.numel())
        own = ferret_ext.project(wanted, seed, self.K)
        carried = ferret_ext.reconstruct(own, seed, wanted.shape).mul_(shrink)
        if self.step > 0:  # after its first step DDP lays the buckets out anew
            self.errors[bucket.index()] = wanted - carried
        self.floats_sent += self.K

        def rebuild(reduced: Future[list[Tensor]]) -> Tensor:
            mean = reduced.value()[0] / dist.get_world_size()
            return ferret_ext.reconstruct(mean, seed, wanted.shape).mul_(shrink)

        work = dist.all_reduce(own, async_op=True)
        assert work is not None
        gradient_of_all: Future[Tensor] = work.get_future().then(rebuild)
        return gradient_of_all


def train(hook: FerretHook | None) -> tuple[float, float, int]:
    """The first and last loss over all processes' examples, and the number of parameters."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(2048, 32)
    labels = teacher(4 * x).argmax(1)
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 4))
    ddp = DistributedDataParallel(model)
    if hook is not None:
        ddp.register_comm_hook(None, hook.__call__)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.2)
    losses = [cross_entropy(model(x), labels).item()]
    for _ in range(STEPS):
        batch = torch.randperm(len(x))[: 64 * PROCESSES].chunk(PROCESSES)[dist.get_rank()]
        optimizer.zero_grad()
        cross_entropy(ddp(x[batch]), labels[batch]).backward()
        optimizer.step()
    losses.append(cross_entropy(model(x), labels).item())
    return losses[0], losses[1], sum(param.numel() for param in model.parameters())


def work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    hook = FerretHook(K)
    first, whole, numel = train(None)
    _, compressed, _ = train(hook)
    if rank == 0:
        print(f"loss before training: {first:.3f}")
        print(f"after {STEPS} steps: {whole:.3f}, all-reducing {4 * numel:,} bytes a step")
        sent = 4 * hook.floats_sent // STEPS
        print(f"after {STEPS} steps: {compressed:.3f}, all-reducing {sent:,} bytes a step")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo's may still hold a tensor, and aborts a process whose Python has ended


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (str(Path(folder, "store")),), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
