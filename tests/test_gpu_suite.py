"""What is to run on a GPU fits together where there is none: sections, report, a suite whose stages fail."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_gpu
import bench_round
import gpu_timer
import pytest
import torch
from bench_gpu import QUICK, SECTIONS, Bench, profile
from gpu_cases import by_size, llama_7b, plan_cases, project_case, update_case
from gpu_report import collect, read_profile, table
from gpu_timer import GpuTimer
from timer import write

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(QUICK, CPU, budget=600)
    names = [name for name in SECTIONS if name not in ("plans", "rivals")]  # they take seconds on a CPU
    path = tmp_path_factory.mktemp("gpu") / "bench.json"
    bench.run(names, lambda: write(path, bench.rows, notes=bench.notes))
    assert len(json.loads(path.read_text())["rows"]) == len(bench.rows)
    return bench


def rows(bench: Bench, section: str) -> list[dict[str, Any]]:
    return [row for row in bench.rows if row["section"] == section]


def test_gpu_cases_count_elements_and_bytes_of_all_clients() -> None:
    project, apply = project_case(torch.zeros(1000), 64), update_case(torch.zeros(1000), 64)
    assert (project.elements, project.bytes_read, project.bytes_written) == (64000, 4000, 0)
    assert (apply.elements, apply.bytes_read, apply.bytes_written) == (64000, 4000, 4000)
    difference, one, three = plan_cases([1000, 200], [3, 8], torch.bfloat16, CPU, clients=3)
    assert difference.elements == one.elements == 1000 * 3 + 200 * 8
    assert three.elements == 3 * one.elements
    assert (difference.bytes_read, three.bytes_read, three.bytes_written) == (4800, 2400, 2400)
    for case in (project, apply, difference, one, three):
        case.call()


def test_llama_has_7b_parameters_and_all_get_coordinates() -> None:
    numels = llama_7b()
    assert sum(numels) == 6_738_415_616
    assert min(by_size(numels, 1000)) == 1
    assert sum(by_size(numels, 16384)) == pytest.approx(16384, rel=0.01)


def test_every_section_leaves_rows_and_nothing_is_left_out(bench: Bench) -> None:
    assert bench.notes == []
    for section in {row["section"] for row in bench.rows}:
        assert rows(bench, section)
    for row in rows(bench, "columns"):
        assert row["rate"] == pytest.approx(row["numel"] * row["K"] / row["timing"].median)
        assert row["share_of_copy"] == pytest.approx(row["bandwidth"] / bench.copy_bandwidth)
    assert [row["same"] for row in rows(bench, "checks")] == [True] * 4
    assert {row["path"] for row in rows(bench, "paths")} == {"mma", "simt"}
    assert {row["path"] for row in rows(bench, "sizes") + rows(bench, "calls")} == {"mma"}
    host, ours = rows(bench, "from_host")
    assert (host["what"], ours["what"], ours["path"]) == ("copy from the host", "project_difference", "mma")
    assert ours["share_of_copy"] == pytest.approx(host["timing"].median / ours["timing"].median)
    assert ours["rate"] == pytest.approx(6000 * 4 / ours["timing"].median)


def test_rows_say_which_kernels_ran(bench: Bench) -> None:
    """As csrc/cuda/path.h chooses: rademacher columns of at most 32 bits go to the matrix units."""
    yardsticks = ("copy", "copy from the host", "update in place", "read")
    for row in bench.rows:
        assert ("path" in row) == (row["what"] not in yardsticks), row
    for row in rows(bench, "bases"):
        assert row["path"] == "simt"
    for row in rows(bench, "dtypes"):
        assert row["path"] == {"float16": "mma", "float64": "simt"}[row["dtype"]]


@pytest.mark.parametrize(("wanted", "path"), [(None, "mma"), ("", "mma"), ("mma", "mma"), ("simt", "simt")])
def test_the_environment_chooses_the_kernels_of_a_case(
    wanted: str | None, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FERRET_CUDA_PATH", raising=False)
    if wanted is not None:
        monkeypatch.setenv("FERRET_CUDA_PATH", wanted)
    cases = plan_cases([1000] * 20, [3] * 20, torch.float32, CPU, clients=2)
    for case in (project_case(torch.zeros(10), 512), update_case(torch.zeros(10).bfloat16(), 1), *cases):
        assert case.path == path
    for wide in (update_case(torch.zeros(10).double(), 4), project_case(torch.zeros(10), 4, "gaussian")):
        assert wide.path == "simt"


def test_sections_come_in_the_order_of_what_one_would_miss() -> None:
    order = [name for name in SECTIONS if name not in ("from_host", "updates", "bases")]
    assert order == ["copy", "checks", "paths", "sizes", "plans", "rivals", "dtypes", "columns", "calls"]


def test_bench_notes_what_fails_or_comes_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Bench) -> None:
        """Broken"""
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setitem(SECTIONS, "columns", broken)
    saved = []
    late = Bench(QUICK, CPU, budget=600)
    late.run(["columns", "checks"], lambda: saved.append(len(late.rows)))
    assert late.notes == ["columns: RuntimeError: no kernel image"]
    assert saved == [0, 4]
    late = Bench(QUICK, CPU, budget=0)
    late.run(["copy", "checks"], lambda: None)
    assert late.notes == ["copy: no time left", "checks: no time left"]


class StandIn:
    """A GPU of a clock of its own: a queue that runs in the host's time."""

    clock = gpu_timer.CLOCK / 2

    def __init__(self) -> None:
        self.free = 0.0

    def queue(self, seconds: float) -> float:
        """When it is done."""
        self.free = max(self.free, time.perf_counter()) + seconds
        return self.free

    def sleep(self, cycles: int) -> None:
        self.queue(cycles / self.clock)

    def event(self, enable_timing: bool) -> "Event":
        return Event(self)


class Event:
    def __init__(self, gpu: StandIn) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = self.gpu.queue(0)

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.at - time.perf_counter()))

    def elapsed_time(self, stop: "Event") -> float:
        return (stop.at - self.at) * 1e3


def test_timer_leaves_the_hosts_work_out_and_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, timer = StandIn(), GpuTimer(CPU)
    monkeypatch.setattr(timer, "_buffer", torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)

    def call() -> None:
        gpu.queue(1e-3)
        time.sleep(0.02)
        gpu.queue(2e-3)

    timing = timer.measure(call, seconds=0)
    assert timing.calls == 5
    assert timing.median == pytest.approx(3e-3)
    assert timing.host >= 0.02


def test_bench_saves_within_a_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "SAVE_EVERY", 0.0)
    saved: list[int] = []
    bench = Bench(QUICK, CPU, budget=600)
    bench.run(["copy"], lambda: saved.append(len(bench.rows)))
    assert saved == [1, 2, 3, 3]


@pytest.mark.parametrize(("device", "current"), [("cpu", []), ("cuda", [0]), ("cuda:1", [1])])
def test_device_of_a_benchmark_is_the_current_one(
    device: str, current: list[int], monkeypatch: pytest.MonkeyPatch, restored_threads: None
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(bench_gpu, "profile", lambda settings, device: None)
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--profile", "--device", device])
    bench_gpu.main()
    assert chosen == current

    def llama(shape: bench_round.Shape, device: torch.device) -> None:
        raise InterruptedError

    monkeypatch.setattr(bench_round, "llama", llama)
    monkeypatch.setattr(sys, "argv", ["bench_round.py", "--device", device])
    with pytest.raises(InterruptedError):
        bench_round.main()
    assert chosen == 2 * current


def test_profile_runs_its_calls() -> None:
    profile(QUICK, CPU)


NCU = """==PROF== Disconnected
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","launch__registers_per_thread","device"
"","","ns","Gbyte","register/thread",""
"0","project_kernel<1, float>","1,234.5","1.07","64","X"
"""


def test_profile_keeps_key_counters_with_units() -> None:
    (kernel,) = read_profile(NCU)
    assert kernel["kernel"] == "project_kernel<1, float>"
    assert kernel["counters"] == {
        "gpu__time_duration.sum [ns]": 1234.5,
        "dram__bytes_read.sum [Gbyte]": 1.07,
        "launch__registers_per_thread [register/thread]": 64.0,
    }
    assert read_profile("==ERROR== no permission\n") == []


ROUND = {
    "parameters": 6.7e9,
    "clients": 10,
    "peak_memory_bytes": 3 << 30,
    "share_of_local": 0.0312,
} | {part: {"median": 2.0} for part in ("local", "project", "rebuild")}


def test_report_of_all_parts(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "stages.tsv").write_text("build\t0\t61\tbuilt for 90a-real\nbench\t124\t200\trow\n")
    (tmp_path / "micro.jsonl").write_text(
        '{"name": "LOP3", "unit": "thread instructions", "per_second": 1.6e13}\n'
    )
    (tmp_path / "profile.csv").write_text(NCU)
    (tmp_path / "round-mma.json").write_text(json.dumps({"rows": [ROUND]}))
    (tmp_path / "round-host.json").write_text(json.dumps({"rows": [ROUND | {"start_on_host": True}]}))
    write(tmp_path / "bench.json", bench.rows, notes=["sizes: no time left"], device="some GPU")
    run = collect(tmp_path)
    text = table(run)
    assert len(run["rows"]) == len(bench.rows)
    for part in (
        "some GPU",
        "built for 90a-real",
        "out of time",
        "1.600e+13",
        "sizes: no time left",
        "10 clients, mma: local 2.0000 s",
        "10 clients, mma, start on host: local 2.0000 s",
        "3.1% of local, peak 3.0 GiB",
        "the same bits",
    ):
        assert part in text


def python_that(folder: Path, cases: str) -> str:
    """This interpreter behind a script: `cases` are shell code for arguments that match a pattern."""
    program = folder / "python"
    program.write_text(f'#!/usr/bin/env bash\ncase "$*" in\n{cases}\nesac\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return str(program)


def run_suite(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"PYTHON": sys.executable, "WORK": str(folder / "work"), "COMMIT": "0123456"} | environment
    command = ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), *arguments, str(folder / "out")]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)


def test_suite_says_what_it_would_do(tmp_path: Path) -> None:
    run = run_suite(tmp_path, "--dry-run")
    assert run.returncode == 0
    stages = "machine build answers tests sanitizer bench micro profile peers round"
    assert [line.split()[0] for line in run.stdout.splitlines()] == [*stages.split(), "in"]
    assert "bench      at most 150 s" in run.stdout
    assert "in all     at most 525 s" in run.stdout
    assert not any((tmp_path / "out").iterdir())


def test_suite_goes_on_when_stages_fail_or_tools_are_missing(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("stages would not fail here")
    tools = tmp_path / "bin"
    tools.mkdir()
    needed = "bash env cat date dirname mkdir rm tee tail head timeout grep sed sort tr find wc"
    for tool in needed.split():
        source = next(p for p in (Path("/usr/bin") / tool, Path("/bin") / tool) if p.exists())
        (tools / tool).symlink_to(source)
    run = run_suite(tmp_path, STAGES="machine answers peers profile bench", PATH=str(tools))
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    stages = {stage["stage"]: stage for stage in result["stages"]}
    assert stages["profile"]["note"] == "ncu is not installed"
    assert stages["peers"]["status"] == "left out"
    assert stages["bench"]["status"].startswith("failed")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu.json", "table.txt", "suite.log"}


MISSING = "ModuleNotFoundError: No module named '{}'"


def failing(arguments: str, error: str) -> str:
    """A case of `python_that`: these arguments end with a traceback."""
    return f'"-c {arguments}") echo "Traceback"; echo "{error}"; exit 1 ;;'


@pytest.mark.parametrize(
    ("others", "status", "note"),
    [
        ('"-m pytest"*) echo 3 passed; exit ;;', "passed", "tests/federated tests/remote: 3 passed"),
        ('"-m pytest"*) echo 1 failed; exit 1 ;;', "failed (1)", "tests/federated tests/remote: 1 failed"),
        ('"-m pytest"*) echo 9 skipped; exit ;;', "failed (1)", "tests/federated tests/remote: 9 skipped"),
        (
            f"{failing('import transformers', MISSING.format('transformers'))}",
            "passed",
            f"tests/federated and tests/remote left out: {MISSING.format('transformers')}",
        ),
        (
            f"{failing('import ferret_ext.federated.cli', MISSING.format('ferret_ext.wire'))}",
            "failed (1)",
            f"tests/federated and tests/remote left out: {MISSING.format('ferret_ext.wire')}",
        ),
        (
            f"{failing('import ferret_ext.federated.cli', 'SyntaxError: invalid syntax')}",
            "failed (1)",
            "tests/federated and tests/remote left out: SyntaxError: invalid syntax",
        ),
    ],
)
def test_suite_runs_the_tests_of_every_folder(others: str, status: str, note: str, tmp_path: Path) -> None:
    python = python_that(tmp_path, f'"-m pytest"*tests/native*) echo 350 passed; exit ;; {others}')
    run_suite(tmp_path, STAGES="tests", PYTHON=python)
    (stage,) = json.loads((tmp_path / "out" / "gpu.json").read_text())["stages"]
    assert (stage["status"], stage["note"]) == (status, f"tests/native: 350 passed; {note}")


def test_suite_says_when_the_package_itself_is_broken(tmp_path: Path) -> None:
    error = "OSError: libferret_ops_cuda.so: undefined symbol: f"
    run_suite(tmp_path, STAGES="tests", PYTHON=python_that(tmp_path, failing("import ferret_ext", error)))
    (stage,) = json.loads((tmp_path / "out" / "gpu.json").read_text())["stages"]
    assert (stage["status"], stage["note"]) == ("failed (1)", f"ferret_ext cannot be imported: {error}")
    assert "Traceback" in (tmp_path / "out" / "suite.log").read_text()
    crashing = python_that(tmp_path, '"-c import ferret_ext") exit 139 ;;')
    run_suite(tmp_path, STAGES="tests", PYTHON=crashing)
    (stage,) = json.loads((tmp_path / "out" / "gpu.json").read_text())["stages"]
    assert stage["note"] == "ferret_ext cannot be imported: exit status 139"


@pytest.mark.parametrize("stages", ["bench round", "bench round machine", "bench machine round"])
def test_suite_keeps_time_for_a_round(stages: str, tmp_path: Path) -> None:
    python = python_that(
        tmp_path, "*bench_round*) exit 0 ;; *transformers*) exit 0 ;; *gpu_report*) ;; *) exit 1 ;;"
    )
    run = run_suite(tmp_path, STAGES=stages, TOTAL="120", PYTHON=python)
    allowed = {name: int(seconds) for name, seconds in re.findall(r"== (\w+) \(at most (\d+) s", run.stdout)}
    assert [*allowed] == stages.split()
    assert allowed["bench"] == 40
    assert 110 <= allowed["round"] <= 120


def test_a_round_that_fails_on_one_path_is_timed_on_the_other(tmp_path: Path) -> None:
    (tmp_path / "round.json").write_text(json.dumps({"rows": [ROUND]}))
    answer = '[[ "$FERRET_CUDA_PATH $*" = "mma "*"--trained 2"* ]] && exit 3; '
    answer += f'cp {tmp_path}/round.json "${{@: -1}}"; exit'
    run = run_suite(tmp_path, STAGES="round", PYTHON=python_that(tmp_path, f"*bench_round*) {answer} ;;"))
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    (stage,) = result["stages"]
    assert (stage["status"], stage["note"]) == ("failed (1)", "failed: mma (exit status 3)")
    assert result["rounds"] == [ROUND | {"path": path} for path in ("simt", "mma")]


def test_a_start_in_host_memory_is_timed_in_what_two_rounds_leave(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    answer = f'echo "$FERRET_CUDA_PATH $*" >> {seen}; exit'
    python = python_that(tmp_path, f"*bench_round*) {answer} ;; *transformers*) exit ;;")
    run_suite(tmp_path, STAGES="round", PYTHON=python)
    third = seen.read_text().splitlines()[2]
    assert third.startswith("mma ")
    assert "--start-on-host" in third
    seen.unlink()
    run_suite(tmp_path, STAGES="round", TOTAL="18", PYTHON=python)
    (stage,) = json.loads((tmp_path / "out" / "gpu.json").read_text())["stages"]
    assert (stage["status"], stage["note"]) == ("passed", "no time left for a start in host memory")
    assert len(seen.read_text().splitlines()) == 2


def test_suite_leaves_out_stages_without_time(tmp_path: Path) -> None:
    run_suite(tmp_path, STAGES="machine bench", TOTAL="5")
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [stage["status"] for stage in result["stages"]] == ["left out", "left out"]
