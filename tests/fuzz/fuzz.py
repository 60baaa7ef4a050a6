"""Fuzzes what takes bytes from outside: python tests/fuzz/fuzz.py TARGET --seconds N

TARGET is one of targets.py, of which `all` takes turns, or `each`: one after the other, a process each.

With atheris (`pip install '.[fuzz]'`) inputs are guided by coverage of ferret_ext.federated; without it, or
with --engine random, they are drawn at random from --seed. A finding ends the target with its traceback, and
its input is left in a file, which `fuzz.py TARGET FILE` takes again. An input may take 10 seconds and 2 GiB.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SLOWEST = 10  # seconds
MEMORY = 2 << 30  # bytes beyond what the process has when it begins
INSTRUMENTED = ["ferret_ext.federated"]


def play(name: str, seconds: float, seed: int, folder: Path) -> int:
    """Inputs drawn at random for so long; their number. A finding's input is left in the folder."""
    target = make(name)
    draw = random.Random(f"{name} {seed}")
    end, count = time.monotonic() + seconds, 0
    while (begin := time.monotonic()) < end:
        data = draw.randbytes(draw.choice((4, 16, 64, 256)))
        try:
            target(data)
            taken = time.monotonic() - begin
            assert taken < SLOWEST, f"an input took {taken:.1f} seconds"
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):
                path = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}"
                path.write_bytes(data)
                print(f"fuzz: {name}: {path} is its input", file=sys.stderr)
            raise
        count += 1
    return count


def play_guided(name: str, seconds: float, seed: int, folder: Path) -> None:
    """Inputs guided by coverage, for so long. Ends the process."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        target = make(name)
    flags = {
        "max_total_time": round(seconds),
        "seed": seed or 1,  # 0 would be drawn anew
        "timeout": SLOWEST,
        "rss_limit_mb": MEMORY >> 20,
        "artifact_prefix": f"{folder}/{name}-",
        "print_final_stats": 1,
        "max_len": 512,
        "verbosity": 1,
    }
    atheris.Setup([sys.argv[0], *(f"-{key}={value}" for key, value in flags.items())], target)
    atheris.Fuzz()


def make(name: str) -> Any:
    from targets import TARGETS, prepare

    prepare()
    return TARGETS[name]()


def limit_memory() -> None:
    """Allocations beyond the limit fail, and so become findings."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def run_one(name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One target in a process of its own."""
    command = [sys.executable, __file__, name, "--seconds", str(seconds), "--seed", str(options.seed)]
    command += ["--engine", options.engine, "--findings", str(options.findings)]
    begin = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    taken = time.monotonic() - begin
    counts = re.findall(r"^(?:stat::number_of_executed_units|inputs):\s*(\d+)", done.stdout, re.MULTILINE)
    covered = re.findall(r"cov: (\d+)", done.stdout)
    if done.returncode:
        print(done.stdout[-6000:], file=sys.stderr)
    return {
        "target": name,
        "engine": options.engine,
        "inputs": int(counts[-1]) if counts else 0,
        "seconds": round(taken, 1),
        "coverage": int(covered[-1]) if covered else None,
        "finding": done.returncode != 0,
    }


def run_each(names: list[str], options: argparse.Namespace) -> int:
    results = []
    for name in names:
        results.append(result := run_one(name, options, options.seconds / len(names)))
        rate, finding = result["inputs"] / result["seconds"], "  FINDING" * result["finding"]
        print(f"{name:20} {result['inputs']:>10,} inputs {rate:>8,.0f}/s{finding}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    return int(any(result["finding"] for result in results))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", help="`all`, `each`, or another of those in targets.py")
    parser.add_argument("files", nargs="*", type=Path, help="inputs to try once in place of fuzzing")
    parser.add_argument("--seconds", type=float, default=60, help="with `each`, of all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("auto", "atheris", "random"), default="auto")
    parser.add_argument("--findings", type=Path, default=Path(), help="folder for inputs of findings")
    parser.add_argument("--json", type=Path, help="where `each` writes what was done")
    options = parser.parse_args()
    if options.engine == "auto":
        options.engine = "atheris" if importlib.util.find_spec("atheris") else "random"
    if options.target == "each":
        from targets import TARGETS

        return run_each([name for name in TARGETS if name != "all"], options)
    if options.files:
        target = make(options.target)
        for file in options.files:
            target(file.read_bytes())
        return 0
    if options.engine == "atheris":
        play_guided(options.target, options.seconds, options.seed, options.findings)
    make(options.target)  # imports what it needs before memory is counted
    limit_memory()
    print("inputs:", play(options.target, options.seconds, options.seed, options.findings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
