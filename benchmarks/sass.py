"""Kernels as `cuobjdump -sass` prints them: instructions, the pipes they run on, branches and loops."""

from __future__ import annotations

import re
from dataclasses import dataclass

# The pipe of an opcode, by its first part; what is in none of them is counted as "other".
PIPES: dict[str, str] = {
    "IMAD": "IMAD",
    "FMA": "FFMA FMUL FADD HFMA2 HMUL2 HADD2 FFMA2",
    "ALU": "LOP3 SHF IADD3 IADD VIADD ISETP PRMT SEL FSEL VIMNMX IMNMX FMNMX LEA PLOP3 FSETP IABS MOV R2P P2R"
    " BMSK SGXT FSWZADD I2FP F2FP VIADDMNMX VIMNMX3 FMNMX3 IADD64 FCHK VOTE CSEL LOP32I IMNMX2",
    "FP64": "DADD DMUL DFMA DSETP",
    "XU": "MUFU I2F F2I F2F POPC FLO BREV FRND I2I",
    "shared": "LDS STS LDSM STSM SHFL REDUX ATOMS",
    "MMA": "IMMA BMMA HMMA DMMA QMMA",
    "memory": "LDG STG LD ST LDC RED ATOM ATOMG CCTL LDGSTS ERRBAR MEMBAR",
    "local": "LDL STL",
    "control": "BRA BRX BRXU JMP EXIT BSSY BSYNC BMOV WARPSYNC BAR NOP CALL RET YIELD NANOSLEEP DEPBAR BPT"
    " KILL BREAK LEPC RPCMOV ENDCOLLECTIVE COLLECTIVE CS2R S2R",
}
PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}

FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
TARGET = re.compile(r"\b0x([0-9a-f]+)")
MULTIPLIERS = re.compile(r"0x(d2511f53|cd9e8d57|2daee0ad|326172a9)\b")  # Philox's, the last two as -0x..
ACCUMULATES = re.compile(r"\s*R\d+,\s*-?R\d+(\.reuse)?,\s*-?R\d+(\.reuse)?,\s*R\d+")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str
    guard: str = ""  # @P0, @!P0, or none

    @property
    def pipe(self) -> str:
        first = self.opcode.split(".")[0]
        if self.opcode.startswith(("IMAD.WIDE", "IMAD.HI")):
            return "IMAD.WIDE"
        if (first.startswith("U") and first not in PIPE_OF) or first in ("R2UR", "S2UR", "LDCU"):
            return "uniform"
        return PIPE_OF.get(first, "other")

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        match = TARGET.search(self.operands) if self.opcode.split(".")[0] == "BRA" else None
        return int(match[1], 16) if match else None

    @property
    def conditional(self) -> bool:
        """Whether the instruction after it may run instead of a branch's target."""
        return bool(self.guard) or re.match(r"\s*!?U?P\d", self.operands) is not None

    @property
    def multiplies_in_philox(self) -> bool:
        return MULTIPLIERS.search(self.operands) is not None and self.pipe == "IMAD.WIDE"

    @property
    def accumulates(self) -> bool:
        return self.opcode == "IMAD.WIDE" and ACCUMULATES.match(self.operands) is not None


@dataclass(frozen=True)
class Kernel:
    name: str  # mangled
    architecture: str
    code: tuple[Instruction, ...]

    def inner_loops(self) -> list[tuple[Instruction, ...]]:
        spans = {(i.target, i.address) for i in self.code if i.target is not None and i.target < i.address}
        inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        return [tuple(i for i in self.code if begin <= i.address <= end) for begin, end in sorted(inner)]


def parse(text: str) -> list[Kernel]:
    """The kernels of what `cuobjdump -sass` printed."""
    kernels = []
    for part in re.split(r"^Fatbin .*code:$", text, flags=re.MULTILINE):
        architecture = re.search(r"^arch = (\S+)", part, re.MULTILINE)
        pieces = FUNCTION.split(part)
        for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
            found = INSTRUCTION.findall(body)
            code = tuple(Instruction(int(at, 16), op, rest, guard.strip()) for at, guard, op, rest in found)
            kernels.append(Kernel(name, architecture[1] if architecture else "unknown", code))
    return kernels
