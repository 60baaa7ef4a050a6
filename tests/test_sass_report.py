"""The report on machine code reads loops, pipes and bounds off what cuobjdump prints, and stops at spills."""

from pathlib import Path
from typing import Any

import kernel_resources
import pytest
import sass
import sass_report
from sass_paths import cheapest_way

PHILOX = "IMAD.WIDE.U32 R2, R2, -0x2daee0ad, RZ ;"


def listing(name: str, architecture: str, *instructions: str) -> str:
    """As cuobjdump prints a function, at addresses 0x0000, 0x0010, .."""
    lines = [f"        /*{16 * i:04x}*/   {text}  /* 0x0 */" for i, text in enumerate(instructions)]
    head = ["Fatbin elf code:", "================", f"arch = {architecture}", f"\t\tFunction : {name}"]
    return "\n".join([*head, *lines]) + "\n"


FUSED = listing(
    "_ZN6ferret4cuda14project_kernelILNS_5BasisE1EfEEvNS1_13ProjectParamsE",
    "sm_90a",
    "MOV R1, c[0x0][0x28] ;",
    "@!P0 BRA 0x30 ;",  # forward: no loop
    "LDG.E R4, desc[UR4][R2.64] ;",
    *[PHILOX] * 19,  # 0x30 .. 0x150, one of twenty moved out of the loop
    "LOP3.LUT R4, R4, R5, R6, 0x96, !PT ;",  # 0x160
    "@P1 IMAD.WIDE R8, R4.reuse, R6, R8 ;",
    "LDS.128 R12, [R3+0x10] ;",
    "UIADD3 UR4, UR4, 0x1, URZ ;",
    "@P0 BRA 0x30 ;",  # 0x1a0
    "@P2 BRA 0x10 ;",  # an outer loop
    "FROB R1, R2 ;",
    "EXIT ;",
)

APART = listing(
    "_ZN12_GLOBAL__N_112apply_kernelILN6ferret5BasisE2EdEEvNS_1PE",
    "sm_120",
    *[PHILOX] * 40,  # 0x0000 .. 0x0270: two calls
    "@!P0 BRA `0x0                              &req={0}   ?trans5;",
    *["IMAD.WIDE R8, R4, R6, R8 ;"] * 8,  # 0x290
    "BRA.U UP0, 0x290                           ?trans5;",
    "STL.64 [R1], R2 ;",
)


def test_inner_loop_is_found_and_counted_by_pipe() -> None:
    (kernel,) = sass.parse(FUSED)
    assert kernel.architecture == "sm_90a"
    assert [(loop[0].address, loop[-1].address) for loop in kernel.inner_loops()] == [(0x30, 0x1A0)]
    (loop,) = sass_report.hot_loops(kernel)
    assert loop.elements == 128  # one rademacher call
    assert loop.pipes == {"IMAD.WIDE": 20, "ALU": 1, "shared": 1, "uniform": 1, "control": 1}


def test_bound_is_that_of_the_slowest_pipe() -> None:
    row = sass_report.row(*sass.parse(FUSED))
    assert row is not None
    assert row["kernel"] == "project_kernel<rademacher, float>"
    assert row["instructions"] == 24 / 128
    clocks = 132 * 1.98e9
    assert row["bound"] == pytest.approx([32 * 128 / 20 * clocks, 64 * 128 / 20 * clocks])
    assert row["limits"] == ["IMAD.WIDE", "IMAD.WIDE"]
    assert "project_kernel<rademacher, float>" in sass_report.table([row])


def test_words_and_sums_in_loops_of_their_own_are_added_up() -> None:
    (kernel,) = sass.parse(APART)
    words, sums = sass_report.hot_loops(kernel)
    assert (words.role, words.elements, words.pipes["IMAD.WIDE"]) == ("words", 32, 40)  # uniform: 16 a call
    assert (sums.role, sums.elements, sums.pipes["IMAD.WIDE"]) == ("sums", 4, 8)  # two limbs
    row = sass_report.row(kernel)
    assert row is not None
    assert row["instructions"] == pytest.approx(41 / 32 + 9 / 4)
    assert row["architecture"] == "sm_120"


def test_unknown_opcodes_are_told_and_other_kernels_left_out() -> None:
    kernel, other = sass.parse(FUSED + listing("_Z11fold_kernel1P", "sm_80", "EXIT ;"))
    assert sass_report.pipes(kernel.code)["other"] == 1  # FROB
    assert sass_report.row(other) is None


def run(monkeypatch: pytest.MonkeyPatch, text: str, *arguments: str) -> None:
    monkeypatch.setattr(sass_report, "disassemble", lambda _: text)
    monkeypatch.setattr("sys.argv", ["sass_report.py", "some.o", *arguments])
    sass_report.main()


def test_report_writes_json_and_fails_at_local_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, FUSED, "--json", str(tmp_path / "sass.json"))
    assert '"computed": true' in (tmp_path / "sass.json").read_text()
    assert "sm_90a" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"local memory.*apply_kernel<uniform, double> \(sm_120\)"):
        run(monkeypatch, APART)
    with pytest.raises(SystemExit, match="got none"):
        run(monkeypatch, "")


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sass_report, "tool_folders", list)
    with pytest.raises(SystemExit, match=r"cuobjdump and nvdisasm: expected .* pip install triton"):
        sass_report.disassemble([tmp_path / "some.o"])


PTXAS = """ptxas info    : Compiling entry function '_Z4fastv' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
ptxas info    : Compiling entry function '_Z4slowv' for '{}'
    {} bytes stack frame, {} bytes spill stores, {} bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem
"""


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_120"])
def test_spills_and_stack_frames_fail_a_strict_build(architecture: str) -> None:
    clean = kernel_resources.parse(PTXAS.format(architecture, 0, 0, 0))
    assert [k.registers for k in clean] == [30, 255]
    assert kernel_resources.in_local_memory(clean) == ""
    for stack, spill in ((16, 0), (8, 8)):
        bad = kernel_resources.in_local_memory(
            kernel_resources.parse(PTXAS.format(architecture, stack, spill, 0))
        )
        assert bad.startswith(f"_Z4slowv ({architecture}")
        assert "fast" not in bad


# Code for two dtypes, one of them with a rare way out, and an inner loop within the loop over tiles.
TILES = listing(
    "_Z12matrix_kernelILi16EEvv",
    "sm_90a",
    "MOV R1, R2 ;",
    "ISETP.NE.AND P0, PT, R1, RZ, PT ;",  # 0x10: the loop over tiles
    "@P0 BRA 0x70 ;",
    "LDG.E.U16 R4, desc[UR4][R2.64] ;",
    "LDG.E.U16 R5, desc[UR4][R2.64+0x2] ;",
    "@P1 BRA 0x90 ;",  # 0x50
    "BRA 0xa0 ;",
    "LDG.E.128 R4, desc[UR4][R2.64] ;",  # 0x70: four of float32
    "BRA 0xa0 ;",
    "NOP ;",  # 0x90
    "FFMA R4, R4, R5, R6 ;",  # 0xa0
    "IADD3 R7, R7, R8, RZ ;",  # 0xb0: the inner loop
    "@P2 BRA 0xb0 ;",
    "STG.E [R2.64], R4 ;",
    "STG.E.U16 [R2.64], R4 ;",
    "@P3 BRA 0x10 ;",  # 0xf0
    "EXIT ;",
)


def test_cheapest_way_does_all_the_work() -> None:
    (kernel,) = sass.parse(TILES)

    def way(size: int, run: int, *done: Any) -> list[int] | None:
        found = cheapest_way(kernel, 0xB0, size, run, done)
        return None if found is None else sorted(i.address for i in found)

    rest = [0xA0, 0xB0, 0xC0, 0xD0, 0xE0, 0xF0]
    assert way(4, 4, 4, 0, 1, 1) == [0x10, 0x20, 0x70, 0x80, *rest]
    assert way(2, 2, 2, 0, 1, 1) == [0x10, 0x20, 0x30, 0x40, 0x50, 0x60, *rest]  # the vector is not theirs
    assert way(2, 8, 8, 0, 1, 1) == [0x10, 0x20, 0x70, 0x80, *rest]  # or it is
    assert way(4, 2, 2, 0, 1, 1) is None  # nothing moves two of four bytes
    twice = way(4, 4, 8, 0, 1, 1)
    assert twice is not None
    assert twice.count(0x70) == 2
    assert way(4, 4, 4, 0, 1, 3) == sorted([0x10, 0x20, 0x70, 0x80, *rest, *[0xB0, 0xC0] * 2])
    assert way(4, 1, 0, 2, 0, 1) == sorted([0x10, 0x20, 0x70, 0x80, *rest] * 2)  # a store each time
    assert cheapest_way(kernel, 0x100, 4, 1, (0, 0, 0, 1)) is None  # in no loop
