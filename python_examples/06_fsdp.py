"""A model cut over several processes: each projects its own part, and K numbers are summed.

    python python_examples/06_fsdp.py

Two processes on this machine's CPU train one client's model, which FSDP2 has cut by rows. With a GPU each:

    torchrun --standalone --nproc-per-node 4 python_examples/06_fsdp.py

For comparison each of them trains the whole model, too: the coordinates are the same to rounding, and what is
rebuilt is the same to the bit. In a federation `ferret join --nproc-per-node 4` does it all.
"""

import copy
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy

import ferret_ext
from ferret_ext import fsdp

PROCESSES, ROUNDS, STEPS, K = 2, 3, 10, 1024


def train(model: nn.Module, batches: list[Tensor], x: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for batch in batches:
        optimizer.zero_grad()
        cross_entropy(model(x[batch]), labels[batch]).backward()
        optimizer.step()


def client(device: torch.device) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(2048, 32)
    x, labels = x.to(device), teacher(4 * x).argmax(1).to(device)
    whole = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 4)).to(device)
    model = copy.deepcopy(whole)
    for module in (model[0], model[2], model):
        fully_shard(module)

    plan = ferret_ext.BlockPlan.from_parameters(model.named_parameters(), K)
    params = plan.select(model.named_parameters())
    part = plan.shard(fsdp.ranges(params))  # what this rank has of the plan's tensors
    mine, all_of_it = fsdp.local(params), list(whole.parameters())
    if rank == 0:
        held = sum(tensor.numel() for tensor in mine)
        print(f"{size} processes; rank 0 holds {held:,} of {sum(n for _, n in plan.tensors):,} parameters")
    for round_ in range(1, ROUNDS + 1):
        start, start_of_all = ([t.detach().clone() for t in tensors] for tensors in (mine, all_of_it))
        batches = [torch.randperm(len(x))[: 64 * size] for _ in range(STEPS)]
        train(model, [batch.chunk(size)[rank] for batch in batches], x, labels)
        train(whole, batches, x, labels)
        gammas = fsdp.total(ferret_ext.project_difference(part, start, mine, round_), params)
        expected = ferret_ext.project_difference(plan, start_of_all, all_of_it, round_)

        updates, step = [(round_, gammas, 1.0)], -K / (K + sum(n for _, n in plan.tensors))
        with torch.no_grad():
            torch._foreach_copy_([*mine, *all_of_it], [*start, *start_of_all])
            ferret_ext.apply_(part, mine, updates, step)
            ferret_ext.apply_(plan, all_of_it, updates, step)
            loss = cross_entropy(whole(x), labels).item()
        off = float((gammas - expected).norm() / expected.norm())
        same = all(map(torch.equal, list(fsdp.whole(params)), all_of_it))
        if rank == 0:
            print(f"round {round_}: {K:,} coordinates, {off:.0e} off those of one process; loss {loss:.3f}")
            print(f"         rebuilt from them: {'the same bits' if same else 'other weights'}")


def leave() -> None:
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo's may still hold a tensor, and aborts a process whose Python has ended


def work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    client(torch.device("cpu"))
    leave()


def main() -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started this process
        gpu = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if gpu else "gloo")
        client(device)
        leave()
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (str(Path(folder, "store")),), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
