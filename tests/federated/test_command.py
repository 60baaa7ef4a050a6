"""The `ferret` command as a whole: its help, completion in shells, and how it ends."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import SMALL

from ferret_ext.federated import cli, explain, ledger, models
from ferret_ext.federated import config as configuration
from ferret_ext.federated.cli import COMMANDS, main
from ferret_ext.federated.command import Command, make_console, make_parser
from ferret_ext.federated.completion import SHELLS
from ferret_link.command import INTERRUPTED


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_names_commands_and_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help")
    for name, command in COMMANDS.items():
        assert f"  {name} " in text
        assert command.summary in text
    for status in (0, 1, 2, 3, 130):
        assert f"\n  {status} " in text.partition("exit status:")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_examples_that_it_understands(capsys: pytest.CaptureFixture[str], name: str) -> None:
    text = shown(capsys, name, "--help")
    assert "--debug" in text
    examples = [line.split("#")[0].split(">")[0].split() for line in text.splitlines() if "  ferret " in line]
    assert examples
    for program, command, *arguments in examples:
        assert (program, command) == ("ferret", name)
        COMMANDS[name].parser().parse_intermixed_args(arguments)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            OSError(28, "No space left on device"),
            2,
            "error: [Errno 28] No space left on device; --debug shows",
        ),
        (MemoryError(), 2, "error: out of memory; less is needed with a smaller"),
        (KeyError("x"), 3, "internal error: KeyError: 'x'; --debug shows where"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_take_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    line: str,
) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "fail", Command("", lambda: make_parser("fail", "", ""), fail))
    assert main(["fail"]) == status
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"ferret fail: {line}")
    with pytest.raises(type(error)):
        main(["fail", "--debug"])


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("simulat", "COMMAND: invalid choice: 'simulat' (choose from"),
        ("simulat", "did you mean simulate?; ferret --help explains"),
        (
            "simulate --rouns 3",
            "unrecognized arguments: --rouns; did you mean --rounds?; ferret simulate --help",
        ),
        ("simulate --K 3", "did you mean --ferret.K?"),
        ("simulate --ferret.k=3", "did you mean --ferret.K?"),
        (
            "simulate --learning-rate 3",
            "did you mean --training.learning-rate or --zeroth-order.learning-rate?",
        ),
        ("simulate --optim adam", "did you mean --training.optim or --server.optim?"),
        ("simulate --nothing-like-it", "unrecognized arguments: --nothing-like-it; ferret simulate --help"),
        ("simulate --preset small/gsm", "did you mean small/gsm8k?"),
        ("simulate --model", "--model: expected one argument"),
        ("eval MODEL", "required: DATA; ferret eval"),
        ("compare --seeds 0,x", "--seeds: expected different numbers, e.g. 0 or 0,1,2, got '0,x'"),
        ("join host:1 --clients 0,0", "--clients: expected different numbers"),
    ],
)
def test_what_is_not_understood_takes_one_line(
    capsys: pytest.CaptureFixture[str], typed: str, said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(typed.split())
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys) == shown(capsys, "--help")


def test_each_setting_is_in_the_help_once(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "simulate", "--help")
    for leaf in configuration.leaves():
        assert text.count(f"  --{leaf.key} ") == 1
    assert "--num-clients" not in text
    options = COMMANDS["simulate"].parser().parse_args(["--num-clients", "7"])
    assert vars(options)["num_clients"] == "7"


def test_a_reader_that_leaves_is_no_error(small_run: Path) -> None:
    """`ferret inspect RUN | head -0`"""
    ferret = [sys.executable, "-u", "-m", "ferret_ext.federated", "inspect", str(small_run)]
    with subprocess.Popen(ferret, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_ctrl_c_stops_a_run_after_what_it_has_is_saved(tmp_path: Path) -> None:
    """The signal itself, at whatever moment; the ledger then gives the last round's weights to the bit."""
    out, model = tmp_path / "run", models.TINY_LLAMA
    ferret = [sys.executable, "-m", "ferret_ext.federated"]
    command = [*ferret, "simulate", *SMALL, "--rounds=100000", f"--out={out}"]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=hears_ctrl_c, **pipes) as process:
        while process.poll() is None and len(rows(out)) < 4:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read().splitlines()
    assert process.returncode == 130, said
    assert said[-1] == "ferret simulate: interrupted"
    assert f"ferret resume {out} goes on" in said[-2]
    assert main(["replay", model, str(out), str(tmp_path / "rebuilt")]) == 0
    (newest,) = deque(ledger.read(out / "ledger"), maxlen=1)
    assert newest.round >= rows(out)[-1]["round"] >= 3


def test_ctrl_c_while_torch_is_loaded_is_no_traceback() -> None:
    program = """
import sys
from ferret_link.command import main
class CtrlC:
    def find_spec(self, name, *rest):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, CtrlC())
raise SystemExit(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "ferret: interrupted\n")


def test_the_console_script_is_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    version = [sys.executable, "-c", "from ferret_link.command import main; main()", "--version"]
    assert subprocess.run(version, capture_output=True, text=True).stdout == shown(capsys, "--version")
    assert INTERRUPTED == explain.INTERRUPTED


def hears_ctrl_c() -> None:
    """A shell's background jobs ignore the signal, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics' whole lines."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_the_hubs_retries_are_not_shown() -> None:
    huggingface_hub.utils.logging.set_verbosity_warning()
    make_console()
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)


def test_resume_wants_a_runs_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(tmp_path)]) == 2
    assert "folder: expected one of a run, with config.yaml" in capsys.readouterr().err
    (tmp_path / "fedavg" / "seed-0").mkdir(parents=True)
    assert main(["resume", str(tmp_path)]) == 2
    assert "goes on when its ferret compare command is repeated" in capsys.readouterr().err


@pytest.mark.parametrize("typed", ["simulate", "simulate --dry-run", "join host:1 --clients 0"])
def test_a_setting_that_is_needed_is_named_as_every_command_takes_it(
    typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(typed.split()) == 2
    assert "model: expected a value, got none; give model=.." in capsys.readouterr().err


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_the_shells_language(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    assert main(["completion", shell]) == 0
    script = tmp_path / "_ferret"
    script.write_text(capsys.readouterr().out)
    if (program := shutil.which(shell)) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([program, "-n", str(script)], check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["insp"], {"inspect"}),
        (["simulate", "--training.opt"], {"--training.optim"}),
        (["simulate", "--num"], {"--num_clients", "--num_threads"}),
        (["simulate", "--training.optim", "ada"], {"adam", "adamw"}),
        (["simulate", "--preset", "demo"], {"demo"}),
        (["completion", ""], set(SHELLS)),
    ],
)
def test_bash_completes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: set[str]
) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "script"
    press_tab = """
COMP_WORDS=(ferret "$@"); COMP_CWORD=$#
$(complete -p ferret | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""
    script.write_text(capsys.readouterr().out + press_tab)
    run = subprocess.run(["bash", str(script), *words], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) == expected
