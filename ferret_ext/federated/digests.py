"""Digests of weights: whether two parties hold the same bits, and if not, which parameter differs first.

XXH3 tells apart what went wrong, at the speed of memory. It is no defence against weights that were made to
collide; where a digest names a model for good, it is SHA-256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor


def of_each(tensors: Sequence[Tensor]) -> list[bytes]:
    """XXH3's 8 bytes of each tensor's elements in C order, whatever the device."""
    return [xxhash.xxh3_64(_bytes_of(tensor)).digest() for tensor in tensors]


def of_each_cut(params: Sequence[Tensor]) -> list[bytes]:
    """The same of parameters that FSDP2 has cut, on every rank; of so many parameters as there are ranks each
    hashes one."""
    from ferret_ext import fsdp

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    table = torch.zeros(len(params), 8, dtype=torch.uint8)
    for index, tensor in enumerate(fsdp.whole(params)):
        if index % size == rank:
            table[index] = torch.frombuffer(bytearray(of_each([tensor])[0]), dtype=torch.uint8)
    rows = fsdp.total(table.to(params[0].device), params)  # a row is one rank's, and 0 on the others
    return [bytes(row) for row in rows.tolist()]


def together(digests: Iterable[bytes]) -> bytes:
    """8 bytes that stand for all of the digests in their order."""
    return xxhash.xxh3_64(b"".join(digests)).digest()


def of_model(model: Any) -> bytes:
    """SHA-256 of names, shapes, dtypes and elements of all parameters and saved buffers.

    Tied parameters count once, under their first name. The file that the model came from does not matter.
    """
    saved = model.state_dict()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    whole = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *buffers], key=lambda pair: pair[0]):
        whole.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        whole.update(_bytes_of(tensor))
    return whole.digest()


def first_difference(names: Sequence[str], ours: Sequence[bytes], theirs: Sequence[bytes]) -> str:
    """In words: how many of the parameters differ, and the name of the first."""
    different = [name for name, a, b in zip(names, ours, theirs, strict=True) if a != b]
    if not different:
        return "no parameter differs"
    return f"{different[0]} is the first of {len(different)} parameters that differ, of {len(names)}"


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
