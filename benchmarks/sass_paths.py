"""The cheapest way round a loop of a kernel's machine code that does a thread's whole work on some elements.

Loads, checks and rounding have no inner loop that could be counted: there is code for every dtype, and for
tiles that lie badly. What an ordinary tile costs is the cheapest way round the loop over tiles on which all
of the thread's elements are loaded, scaled (a fused multiply-add or more each) and, where the kernel writes,
stored, and which passes the inner loop as often as wanted. What some warps do only, folding sums, is not on
that way.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sass import Instruction, Kernel

Done = tuple[int, int, int, int]  # elements loaded and stored, fused multiply-adds, passes of the inner loop
State = tuple[int, Done]  # a block, and what has been done before it
ENDS = ("EXIT", "RET", "KILL")


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other, and where control goes from there."""

    code: tuple[Instruction, ...]
    targets: tuple[int, ...]


def blocks_of(kernel: Kernel) -> dict[int, Block]:
    """By address."""
    starts = {i.target for i in kernel.code} | {kernel.code[0].address}
    starts |= {after.address for i, after in zip(kernel.code, kernel.code[1:], strict=False) if leaves(i)}
    blocks: dict[int, Block] = {}
    code: list[Instruction] = []
    for i, after in zip(kernel.code, [*kernel.code[1:], None], strict=True):
        code.append(i)
        if after is None or after.address in starts:
            falls = [after.address] if after is not None and not (leaves(i) and not i.conditional) else []
            jumps = [i.target] if i.target is not None else []
            blocks[code[0].address] = Block(tuple(code), tuple(falls + jumps))
            code = []
    return blocks


def leaves(i: Instruction) -> bool:
    return i.target is not None or i.opcode.split(".")[0] in ENDS


def elements_moved(i: Instruction, opcode: str, size: int) -> int:
    """Elements of `size` bytes that a load or store of global memory moves; tables are read by 8 bytes."""
    if not i.opcode.startswith(f"{opcode}.E"):
        return 0
    if ".128" in i.opcode:
        return 16 // size
    return int((".U16" in i.opcode) == (size == 2) and ".64" not in i.opcode)


def cheapest_way(
    kernel: Kernel, inner: int, size: int, run: int, wanted: Done
) -> tuple[Instruction, ...] | None:
    """Its instructions, for elements of `size` bytes, `inner` being an address in the inner loop; None where
    there is no such way. A thread moves `run` elements at a time: what moves more or less at once is
    another dtype's, or a table's."""
    blocks = blocks_of(kernel)
    jumps = [(i.target, i.address) for i in kernel.code if i.target is not None]
    headers = {target for target, at in jumps if target <= inner <= at}
    ways = [way_round(blocks, header, inner, size, run, wanted) for header in headers]
    return min((way for way in ways if way is not None), key=len, default=None)


def way_round(
    blocks: dict[int, Block], header: int, inner: int, size: int, run: int, wanted: Done
) -> tuple[Instruction, ...] | None:
    """Dijkstra's algorithm from `header` back to it, over blocks and what has been done."""
    after = step_over(blocks, inner, size, run, wanted)
    start: State = (header, (0, 0, 0, 0))
    queue = [(0, start)]
    best, before = {start: 0}, dict[State, State]()
    while queue:
        cost, state = heapq.heappop(queue)
        if state == (header, wanted):
            return tuple(i for at in walked(before, state) for i in blocks[at].code)
        for length, to in after(state):
            if cost + length < best.get(to, cost + length + 1):
                best[to], before[to] = cost + length, state
                heapq.heappush(queue, (cost + length, to))
    return None


def walked(before: dict[State, State], end: State) -> list[int]:
    """The blocks on the way to `end`, without its own."""
    way = []
    while end in before:
        end = before[end]
        way.append(end[0])
    return way[::-1]


def step_over(
    blocks: dict[int, Block], inner: int, size: int, run: int, wanted: Done
) -> Callable[[State], Iterator[tuple[int, State]]]:
    """From a block and what has been done, the blocks that may come next."""

    def facts_of(block: Block) -> Done:
        moved = (sum(elements_moved(i, op, size) for i in block.code) for op in ("LDG", "STG"))
        loads, stores = (n if n == run else 0 for n in moved)
        fused = sum(i.opcode.startswith("FFMA") for i in block.code)
        return loads, stores, fused, int(any(i.address == inner for i in block.code))

    facts = {at: facts_of(block) for at, block in blocks.items()}

    def after(state: State) -> Iterator[tuple[int, State]]:
        at, before = state
        loaded, stored, fused, passed = (
            min(most, done + more) for most, done, more in zip(wanted, before, facts[at], strict=True)
        )
        done = (loaded, stored, fused, passed)
        for target in blocks[at].targets:
            yield len(blocks[at].code), (target, done)

    return after
