"""Memory that a step of local training takes beyond the model: forward, zeroth-order or by gradients.

    python benchmarks/memory_training.py --json FILE [--layers 8] [--width 512] [--tokens 256]

Every figure is the peak of resident memory during one step less that before it, in a process of its own whose
weights have been written and whose code has been loaded by a pass over a short example. The model is a Llama
with random weights.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memory_cpu import forget_peak, resident
from timer import write

from ferret_ext.federated.config import ZerothOrderConfig
from ferret_ext.federated.data.tokens import Example
from ferret_ext.federated.zeroth_order import Walk, batch_loss

M_MMAP_THRESHOLD = -3  # of mallopt in malloc.h
STEPS = ("forward", "layerwise", "in_place", "torch", "gradient")


def extra_memory(step: str, layers: int, width: int, tokens: int) -> tuple[int, int]:
    """Bytes at the peak of one step beyond what its process held before; the model's bytes. A new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(extra_memory_here, step, layers, width, tokens).result()


def extra_memory_here(step: str, layers: int, width: int, tokens: int) -> tuple[int, int]:
    """The same in this process."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # so that what is freed goes back to the system
    torch.set_num_threads(1)
    model = make_model(layers, width)
    example = Example(tuple(i % 500 + 3 for i in range(tokens)), tokens // 2)
    prepare(step, model, Example(example.input_ids[:4], 1))()
    call = prepare(step, model, example)
    before = resident("VmRSS")
    forget_peak()
    call()
    return resident("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters())


def prepare(step: str, model: Any, example: Example) -> Callable[[], object]:
    """One step on one example."""
    loss = partial(batch_loss, pad_token_id=0)
    if step == "forward":
        return partial(loss, model, [example])
    if step == "gradient":
        return partial(gradient_step, model, example)
    generator = "torch" if step == "torch" else "streams"
    perturbation = "auto" if step == "torch" else step
    config = ZerothOrderConfig(
        steps=1,
        perturbations=1,
        learning_rate=1e-6,
        eps=1e-3,
        generator=generator,  # type: ignore[arg-type]
        perturbation=perturbation,  # type: ignore[arg-type]
    )
    walk = Walk.on(model, loss, 1, config)
    return partial(walk.run, [example], 0, [[1]], last_step=True)


def gradient_step(model: Any, example: Example) -> None:
    """Plain SGD, which holds a gradient for every weight and the activations of a pass, but no state."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    tokens = torch.tensor([example.input_ids])
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def make_model(layers: int, width: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path, help="where results go too")
    arguments = parser.parse_args()
    shape = {"layers": arguments.layers, "width": arguments.width, "tokens": arguments.tokens}

    rows = []
    for step in STEPS:
        extra, weights = extra_memory(step, **shape)
        print(
            f"{step:10} {extra:>13,} bytes, {extra / weights:5.2f} times the model's {weights:,}", flush=True
        )
        rows.append({"what": step, **shape, "extra_bytes": extra, "model_bytes": weights})
    if arguments.json is not None:
        write(arguments.json, rows)


if __name__ == "__main__":
    main()
