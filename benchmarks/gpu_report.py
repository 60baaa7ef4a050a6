"""Puts together what the stages of gpu_suite.sh left: gpu.json, and a short table of it.

    python benchmarks/gpu_report.py PARTS OUT

PARTS holds stages.tsv (name, exit status, seconds, last line) and, where their stages got so far, gpu.csv,
bench.json, round-simt.json, round-mma.json, round-host.json, micro.jsonl and profile.csv. Only the standard
library is needed, so that there is a report whatever failed.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Of the hundreds of counters of a profile, those that say what a kernel is limited by.
COUNTERS = re.compile(
    r"gpu__time_duration\.sum|dram__bytes_(read|write)\.sum|sm__inst_executed\.sum|smsp__inst_executed\.sum"
    r"|(dram|sm|lts|l1tex|gpu__compute_memory)_*throughput\.avg\.pct_of_peak_sustained_elapsed"
    r"|sm__inst_executed_pipe_\w+\.avg\.pct_of_peak_sustained_active|smsp__issue_active\.avg\.pct\S*"
    r"|sm__warps_active\.avg\.pct_of_peak_sustained_active|smsp__average_warps?_\w*stall\w*\.ratio"
    r"|smsp__average_warp_latency_issue_stalled_\w+|l1tex__data_bank_conflicts_pipe_lsu\S*"
    r"|launch__(registers_per_thread|occupancy_limit_\w+|grid_size|waves_per_multiprocessor)"
    r"|smsp__cycles_active\.avg|sm__cycles_elapsed\.max|\S+hit_rate\.pct"
)
STATUS = {-1: "left out", 0: "passed", 124: "out of time", 137: "out of time"}


def read_stages(parts: Path) -> list[Row]:
    rows = []
    for line in read(parts / "stages.tsv").splitlines():
        name, code, seconds, note = line.split("\t", 3)
        status = STATUS.get(int(code), f"failed ({code})")
        if note.startswith("left out: "):
            status, note = "left out", note.removeprefix("left out: ")
        rows.append({"stage": name, "status": status, "seconds": int(seconds), "note": note[:200]})
    return rows


def read_profile(text: str) -> list[Row]:
    """A kernel's key counters. The second line of the file holds units."""
    lines = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    if len(lines) < 3:
        return []
    names, units, *kernels = lines
    result = []
    for kernel in kernels:
        values = dict(zip(names, kernel, strict=False))
        counters = {
            f"{name} [{unit}]" if unit else name: number(values[name])
            for name, unit in zip(names, units, strict=False)
            if COUNTERS.fullmatch(name) and values.get(name)
        }
        result.append({"kernel": values.get("Kernel Name", ""), "counters": counters})
    return result


def number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def collect(parts: Path) -> Row:
    bench = json.loads(read(parts / "bench.json") or "{}")
    return {
        "machine": bench.get("machine", {}) | {"nvidia-smi": read(parts / "gpu.csv").splitlines()},
        "stages": read_stages(parts),
        "micro": [json.loads(line) for line in read(parts / "micro.jsonl").splitlines() if line[:1] == "{"],
        "rounds": [
            row | {"path": path}
            for part, path in (("simt", "simt"), ("mma", "mma"), ("host", "mma"))
            for row in json.loads(read(parts / f"round-{part}.json") or '{"rows": []}')["rows"]
        ],
        "profile": read_profile(read(parts / "profile.csv")),
        "rows": bench.get("rows", []),
    }


def table(run: Row) -> str:
    machine = run["machine"]
    facts = [f"{key} {machine[key]}" for key in ("device", "torch", "cuda", "commit") if key in machine]
    lines = [", ".join(facts) or "no device was seen", *machine["nvidia-smi"], ""]
    lines += [
        f"{s['stage']:10} {s['status']:12} {s['seconds']:4d} s  {s['note'][:90]}" for s in run["stages"]
    ]
    lines += [f"left out: {note}" for note in machine.get("notes", [])]
    lines += ["", *map(micro_line, run["micro"]), "", *map(round_line, run["rounds"]), ""]
    section = ""
    for row in run["rows"]:
        if row["section"] != section:
            section = row["section"]
            lines.append(f"-- {section}")
        lines.append(row_line(row))
    return "\n".join(lines) + "\n"


def micro_line(row: Row) -> str:
    return f"{row['name']:40} {row['per_second']:10.3e} {row['unit']}/s"


def round_line(row: Row) -> str:
    seconds = {part: row[part]["median"] for part in ("local", "project", "rebuild")}
    parts = ", ".join(f"{part} {value:.4f} s" for part, value in seconds.items())
    path = row["path"] + (", start on host" if row.get("start_on_host") else "")
    text = f"round of {row['parameters'] / 1e9:.1f}e9 parameters, {row['clients']} clients, {path}: "
    memory = f"peak {row['peak_memory_bytes'] / 2**30:.1f} GiB"
    return f"{text}{parts}; projection and rebuilding {row['share_of_local']:.1%} of local, {memory}"


def row_line(row: Row) -> str:
    name = " ".join(
        [row["what"], row.get("path", ""), row.get("shape", ""), row.get("basis", ""), row.get("dtype", "")]
    )
    name = name.replace(" rademacher", "").replace(" float32", "")
    text = f"{' '.join(name.split()):40} {row['numel']:>13,} K {row['K']:>6.4g}"
    if "same" in row:
        return f"{text}  {'the same bits' if row['same'] else 'OTHER BITS'}"
    text += f" {row['timing']['median'] * 1e3:10.3f} ms"
    if "host" in row["timing"]:
        text += f" host {row['timing']['host'] * 1e3:8.3f} ms"
    if row.get("rate"):
        text += f" {row['rate'] / 1e12:8.3f} T/s"
    if row.get("bandwidth"):
        text += f" {row['bandwidth'] / 1e12:6.3f} TB/s"
    if row.get("share_of_copy"):
        text += f" {row['share_of_copy']:5.0%}"
    return text + (f" {row['ratio']:8.4f} x project" if "ratio" in row else "")


def main(parts: Path, out: Path) -> None:
    run = collect(parts)
    (out / "gpu.json").write_text(json.dumps(run, indent=1) + "\n")
    (out / "table.txt").write_text(table(run))
    print(table(run), end="")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: gpu_report.py PARTS OUT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
