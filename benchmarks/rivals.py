"""What a user could pick instead of `ferret_ext.project`, each as fast as its library's own means make it.

Every rival turns a float32 delta [d] into gamma [K] such that V gamma is an unbiased estimate of delta, V
being the rival's own d x K basis. tests/test_rivals.py checks that. Those of torch work on delta's device.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Project = Callable[[Tensor, int, int], Tensor]

# Elements of V made at a time: of 2^13 to 2^21 among the fastest at K = 16 and 64, with 2 MB of L2 cache. On
# a GPU enough of them to keep it busy.
NUMPY_CHUNK = 1 << 17
TORCH_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}

# A byte's eight bits, the highest first as unpackbits has them, as signs.
SIGNS = 1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32)


def numpy_unpack(delta: Tensor, seed: int, K: int) -> Tensor:
    """Bits of numpy's Philox by unpackbits, as 0 and 1 in float32, times delta."""
    gamma = np.zeros(K, np.float32)
    floats = np.empty(max(NUMPY_CHUNK, K), np.float32)
    for part, random in numpy_chunks(delta, seed, K):
        bits = floats[: K * len(part)]
        np.copyto(bits, np.unpackbits(random, count=len(bits)))
        gamma += part.sum() - 2 * (bits.reshape(K, -1) @ part)
    return torch.from_numpy(gamma * (math.sqrt(delta.numel()) / K))


def numpy_table(delta: Tensor, seed: int, K: int) -> Tensor:
    """The same bits, each byte looked up as eight signs: fewer passes than unpacking and converting."""
    gamma = np.zeros(K, np.float32)
    floats = np.empty((max(NUMPY_CHUNK, K) // 8 + 1, 8), np.float32)
    for part, random in numpy_chunks(delta, seed, K):
        signs = np.take(SIGNS, random, axis=0, out=floats[: len(random)], mode="clip")  # "raise" would copy
        gamma += signs.reshape(-1)[: K * len(part)].reshape(K, -1) @ part
    return torch.from_numpy(gamma * (math.sqrt(delta.numel()) / K))


def numpy_chunks(delta: Tensor, seed: int, K: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint8]]]:
    """Parts of delta, each with at least K random bits an element."""
    generator = np.random.Philox(seed)
    values, chunk = delta.numpy(), max(1, NUMPY_CHUNK // K)
    for begin in range(0, len(values), chunk):
        part = values[begin : begin + chunk]
        words = generator.random_raw(math.ceil(len(part) * K / 64))
        yield part, words.view(np.uint8)[: math.ceil(len(part) * K / 8)]


def torch_randn(delta: Tensor, seed: int, K: int) -> Tensor:
    """Chunks of torch.randn times delta."""

    def product(chunk: Tensor, part: Tensor, generator: torch.Generator) -> Tensor:
        return chunk.normal_(generator=generator) @ part

    return torch_chunks(delta, seed, K, product)


def torch_bernoulli(delta: Tensor, seed: int, K: int) -> Tensor:
    """Chunks of fair bits times delta. random_(0, 2) draws them, three times as fast as bernoulli_(0.5)."""

    def product(chunk: Tensor, part: Tensor, generator: torch.Generator) -> Tensor:
        return part.sum() - 2 * (chunk.random_(0, 2, generator=generator) @ part)

    return torch_chunks(delta, seed, K, product)


def torch_chunks(
    delta: Tensor, seed: int, K: int, product: Callable[[Tensor, Tensor, torch.Generator], Tensor]
) -> Tensor:
    """sqrt(d)/K times the sum of product(buffer [K, n], part [n] of delta, generator) -> [K]."""
    generator = torch.Generator(delta.device).manual_seed(seed)
    chunk = TORCH_CHUNK[delta.device.type]
    gamma, buffer = delta.new_zeros(K), delta.new_empty(max(chunk, K))
    for part in torch.split(delta, max(1, chunk // K)):
        gamma += product(buffer[: K * part.numel()].view(K, -1), part, generator)
    return gamma * (math.sqrt(delta.numel()) / K)


def authors(delta: Tensor, seed: int, K: int) -> Tensor:
    """What Ferret's published code does, written from its description: for every k, reseed torch's generator,
    draw a whole truncated normal vector, multiply and sum. Cut at +-1/sqrt(d), its variance is 1/(3d)."""
    bound = 1 / math.sqrt(delta.numel())
    gamma, vector = delta.new_empty(K), torch.empty_like(delta)
    for k in range(K):
        torch.manual_seed(seed + k)
        torch.nn.init.trunc_normal_(vector, a=-bound, b=bound)
        gamma[k] = (vector * delta).sum()
    return gamma * (3 * delta.numel() / K)


def scikit_learn(delta: Tensor, seed: int, K: int) -> Tensor:
    """GaussianRandomProjection, which draws V as a whole and keeps it: 4 d K bytes, 12 while it is drawn."""
    return scikit_learn_transform(delta, scikit_learn_fit(delta, seed, K))


def scikit_learn_fit(delta: Tensor, seed: int, K: int) -> Any:
    module = importlib.import_module("sklearn.random_projection")
    return module.GaussianRandomProjection(n_components=K, random_state=seed).fit(delta[None].numpy())


def scikit_learn_transform(delta: Tensor, fitted: Any) -> Tensor:
    """Elements of its matrix have variance 1/K."""
    (gamma,) = fitted.transform(delta[None].numpy())
    return torch.from_numpy(gamma) * math.sqrt(delta.numel() / len(gamma))


def fast_jl(delta: Tensor, seed: int, K: int) -> Tensor:
    """TRAK's CUDA extension for one gradient: signs, K a multiple of 512, delta rounded to float16."""
    module = importlib.import_module("fast_jl")
    multiprocessors = torch.cuda.get_device_properties(delta.device).multi_processor_count
    sums = module.project_rademacher_8(delta[None], K, seed, multiprocessors)
    gamma: Tensor = sums[0] * (math.sqrt(delta.numel()) / K)
    return gamma


def gpu_rivals(K: int) -> dict[str, Project]:
    """By name; fast_jl only where it is installed and knows this K."""
    every: dict[str, Project] = {
        "torch randn": torch_randn,
        "torch bernoulli": torch_bernoulli,
        "authors' loop": authors,
    }
    if importlib.util.find_spec("fast_jl") is not None and K % 512 == 0:
        every["fast_jl"] = fast_jl
    return every


def rivals() -> dict[str, Project]:
    """By name; scikit-learn, which is optional, only where it is installed."""
    every: dict[str, Project] = {
        "numpy unpackbits": numpy_unpack,
        "numpy table": numpy_table,
        "torch randn": torch_randn,
        "torch bernoulli": torch_bernoulli,
        "authors' loop": authors,
    }
    if importlib.util.find_spec("sklearn") is not None:
        every["scikit-learn"] = scikit_learn
    return every
