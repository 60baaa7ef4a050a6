"""The `ferret` command: a table of subcommands, each with its flags and what it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args, get_type_hints

from ferret_ext import __version__
from ferret_ext.federated import completion, deploy, presets, tools
from ferret_ext.federated import config as configuration
from ferret_ext.federated.command import (
    Command,
    Parser,
    add_settings,
    make_console,
    make_parser,
    numbers,
    perform,
    read_settings,
    settings_parser,
    with_saved,
)
from ferret_ext.federated.explain import REFUSED, STATUSES, explain
from ferret_ext.federated.settings import ConfigError, Setting, closest

COMPARISON_WIDTH = 160  # of a table where the output is no terminal

EXAMPLES = """examples:
  ferret doctor                                        # is this machine fit for it?
  ferret simulate --preset demo --out runs/demo        # a first run, half a minute
  ferret resume runs/demo                              # goes on with a run that was interrupted
  ferret report runs/demo                              # one page about it
"""
SIMULATE_EXAMPLES = """examples:
  ferret simulate --preset demo --out runs/demo
  ferret simulate --preset small/gsm8k --model MODEL --data gsm8k/ --out runs/gsm8k rounds=20 ferret.K=8192
  ferret simulate --config run.yaml --out runs/second training.learning_rate=0.05
  ferret simulate --preset paper/gsm8k-7b --dry-run
"""
RESUME_EXAMPLES = """examples:
  ferret resume runs/gsm8k
"""
EVAL_EXAMPLES = """examples:
  ferret eval runs/gsm8k/model gsm8k/ evaluation.scores=gsm8k-exact-match,rouge-l
  ferret eval runs/gsm8k/model gsm8k/ --config runs/gsm8k/config.yaml --out runs/gsm8k-scores
"""
REPLAY_EXAMPLES = """examples:
  ferret replay MODEL runs/gsm8k rebuilt/
  ferret replay MODEL gsm8k.ledger rebuilt/ --round 5
"""
COMPARE_EXAMPLES = """examples:
  ferret compare --preset small/gsm8k --model MODEL --data gsm8k/ --out runs/gsm8k --seeds 0,1,2
  ferret compare --preset small/gsm8k --model MODEL --data gsm8k/ --out runs/two --variants fedavg,ferret
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, see `explain.STATUSES`."""
    width = max(map(len, COMMANDS))
    table = "".join(f"  {name:{width}}  {command.summary}\n" for name, command in COMMANDS.items())
    parser = Parser(
        prog="ferret",
        usage="ferret [--help] [--version] COMMAND ..",
        description="Federated full-parameter tuning with kilobytes.",
        epilog=f"commands, each with a --help of its own:\n{table}\n{EXAMPLES}\n{STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ferret {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=list(COMMANDS), help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else list(arguments)
    chosen = parser.parse_args(given or ["--help"])
    command = COMMANDS[chosen.command]
    options = command.parser().parse_intermixed_args(chosen.arguments)
    try:
        return command.run(options)
    except (Exception, KeyboardInterrupt) as error:
        if options.debug:
            raise
        return explain(chosen.command, error)


def simulate_parser() -> argparse.ArgumentParser:
    parser = settings_parser(
        "simulate",
        "Federated rounds in this process. A run that was interrupted or killed goes on with ferret resume.",
        SIMULATE_EXAMPLES,
        "[--out FOLDER] [--dry-run]",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run that --out has part of, to the same bits"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print plan, memory and traffic; no weights or data are loaded"
    )
    add_settings(parser, list(configuration.leaves()))
    return parser


def resume_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "resume",
        "Goes on with a run that was interrupted or killed, with the settings in its folder, to the same "
        "bits as if it had not been. A comparison goes on when its command is repeated.",
        RESUME_EXAMPLES,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of the run")
    return parser


def compare_parser() -> argparse.ArgumentParser:
    parser = settings_parser(
        "compare",
        "Runs several variants on one task, each in a process of its own, and writes their table and plots. "
        "A comparison that was interrupted goes on where it stood when the command is repeated. A variant is "
        f"an algorithm, {presets.REFERENCE_CODE} or {presets.SHARED_ROUND}; settings of the command line "
        "hold for all of them.",
        COMPARE_EXAMPLES,
        "[--out FOLDER] [--variants A,B ..] [--seeds 0,1 ..]",
    )
    parser.add_argument("--variants", type=_names, help="what is compared; by default the preset's variants")
    parser.add_argument(
        "--seeds", type=numbers, default=[0], help="of each variant's runs, e.g. 0,1,2; default 0"
    )
    parser.add_argument(
        "--target-loss", type=float, help="loss that rounds are counted to; by default half way to the best"
    )
    shared = [leaf for leaf in configuration.leaves() if leaf.key not in ("algorithm", "seed")]
    add_settings(parser, shared)
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def eval_parser() -> argparse.ArgumentParser:
    parser = settings_parser(
        "eval",
        "Evaluates a model: its loss on held-out records, and scores of the text that it generates. A file "
        "is evaluated whole, of anything else the split dataset.eval_split. With a run's config.yaml the "
        "records are those that the run evaluated.",
        EVAL_EXAMPLES,
        "MODEL DATA",
    )
    sections = ("out", *configuration.EVALUATION_SETTINGS)
    model, data, *rest = (leaf for leaf in configuration.leaves() if leaf.key.partition(".")[0] in sections)
    parser.add_argument(model.key, metavar="MODEL", help=model.help)
    parser.add_argument(data.key, metavar="DATA", help=data.help)
    add_settings(parser, rest)
    return parser


def replay_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "replay",
        "Rebuilds a run's model from its base and its ledger, to the bit, and saves it as a folder for "
        "transformers. No data and no training is needed.",
        REPLAY_EXAMPLES,
    )
    parser.add_argument(
        "base", metavar="BASE", help="folder or hub name of the model that the run began with"
    )
    parser.add_argument("ledger", metavar="LEDGER", type=Path, help="a ledger, or the folder of a run")
    parser.add_argument("out", metavar="OUT", help="folder for the model")
    parser.add_argument("--round", type=int, help="as the model stood after this round; default the last")
    parser.add_argument("--head", metavar="SHA256", help="the last record's, if known from elsewhere")
    parser.add_argument("--overwrite", action="store_true", help="replace a former model in OUT")
    return parser


def run_simulation(options: argparse.Namespace) -> int:
    """One run from its folder to its table."""
    from ferret_ext.federated.engines.in_process import simulate
    from ferret_ext.federated.report import RunFolder

    if options.dry_run:
        return _dry_run(options)
    config = configuration.build(with_saved(options, read_settings(options)))
    folder = RunFolder(config, options.overwrite, options.resume)
    try:
        perform(make_console(), config, folder, simulate)
    except KeyboardInterrupt:
        if folder.begun:
            print(
                f"ferret simulate: {folder.metrics} holds the rounds so far; ferret resume {folder.path} "
                "goes on from there",
                file=sys.stderr,
            )
        raise
    return 0


def run_resumption(options: argparse.Namespace) -> int:
    """The rest of a run."""
    saved = options.folder / "config.yaml"
    if not saved.is_file():
        if any(options.folder.glob("*/seed-*")):
            raise ConfigError(
                f"folder: expected one of a run, got {str(options.folder)!r}, which is a comparison's; it "
                "goes on when its ferret compare command is repeated"
            )
        raise ConfigError(f"folder: expected one of a run, with config.yaml, got {str(options.folder)!r}")
    arguments = ["--config", str(saved), "--out", str(options.folder), "--resume"]
    return run_simulation(simulate_parser().parse_args(arguments))


def _dry_run(options: argparse.Namespace) -> int:
    """What the run would be and take."""
    from ferret_ext.federated import dry_run
    from ferret_ext.federated.console import Lines

    config = configuration.build(with_saved(options, read_settings(options)), required=["model"])
    lines = Lines(make_console())
    for line in dry_run.describe(config):
        lines.say(line)
    return 0


def run_comparison(options: argparse.Namespace) -> int:
    """Every variant with every seed, then their table and plots."""
    from ferret_ext.federated import compare, trackers
    from ferret_ext.federated.console import Lines, show_comparison

    variants = options.variants or presets.variants_of(options.preset)
    if not variants:
        raise ConfigError("variants: expected some, got none; give --variants or a --preset that has them")
    _check_variants(variants)
    own = read_settings(options, with_preset=False)

    def settings_of(variant: str) -> list[Setting]:
        first = presets.settings_of(options.preset, variant) if options.preset else []
        return [*first, *own, *presets.choice_of(variant)]

    first = configuration.build(settings_of(variants[0]))
    out = Path(first.out).expanduser()
    trackers.check_installed(first.trackers)
    runs = compare.plan(settings_of, variants, options.seeds, out)
    console = make_console(COMPARISON_WIDTH)
    say = Lines(console).say
    done = [run.finished(options.overwrite) for run in runs]
    failed = {}
    for number, (run, before) in enumerate(zip(runs, done, strict=True), start=1):
        name = f"run {number} of {len(runs)}: {run.variant}, seed {run.seed}"
        say(f"{name}: finished before" if before else name)
        if not before and (reason := compare.carry_out(run)):
            failed[run.variant, run.seed] = reason
    results = [compare.read_run(run) for run in runs if (run.variant, run.seed) not in failed]
    for (variant, seed), reason in failed.items():
        say(f"left out: {variant}, seed {seed}: the run failed; {reason}")
    if not results:
        raise ConfigError("variants: expected at least one run that ends well, got none")
    target = compare.default_target(results) if options.target_loss is None else options.target_loss
    rows = compare.tabulate(results, target)
    compare.write(results, rows, target, out)
    show_comparison(console, compare.table(rows, target))
    say(f"results: {out}")
    return REFUSED if failed else 0


def _check_variants(variants: Sequence[str]) -> None:
    algorithms = get_args(get_type_hints(configuration.SimulationConfig)["algorithm"])
    known = [*algorithms, presets.REFERENCE_CODE, presets.SHARED_ROUND]
    for variant in variants:
        if variant not in known:
            near = "".join(f"; did you mean {name}?" for name in closest(variant, known))
            raise ConfigError(f"variants: expected some of {', '.join(known)}, got {variant!r}{near}")


def run_evaluation(options: argparse.Namespace) -> int:
    """One model's loss and scores, shown and, where a folder is named, written."""
    from ferret_ext.federated.console import Lines, show_evaluation
    from ferret_ext.federated.report import EvaluationFolder
    from ferret_ext.federated.standalone import evaluate, whole_file

    settings = [*whole_file(options.data), *read_settings(options, not_from_file=["out"])]
    config = configuration.build(settings, required=["model", "data"])
    folder = EvaluationFolder(config, options.overwrite) if config.out else None
    console = make_console()
    evaluation = evaluate(config, Lines(console))
    show_evaluation(console, evaluation)
    if folder:
        folder.write(evaluation)
        console.print(f"results: {folder.path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def run_replay(options: argparse.Namespace) -> int:
    """One model rebuilt and saved."""
    from ferret_ext.federated import adapters
    from ferret_ext.federated.console import Lines
    from ferret_ext.federated.replay import replay
    from ferret_ext.federated.report import ModelFolder

    folder = ModelFolder(configuration.SimulationConfig(out=options.out), options.overwrite)
    console = make_console()
    replayed = replay(options.base, options.ledger, options.round, options.head)
    folder.begin()
    with folder.writing():
        adapters.save(replayed.model, replayed.tokenizer, folder.path)
    verdict = "its weights are the run's to the bit" if replayed.verified else "the ledger has no digests"
    Lines(console).say(f"round {replayed.round}: {verdict}\nresults: {folder.path}")
    return 0


COMMANDS = {
    "simulate": Command("run all clients in this process", simulate_parser, run_simulation),
    "resume": Command("go on with a run that was interrupted", resume_parser, run_resumption),
    "compare": Command("run several algorithms on one task", compare_parser, run_comparison),
    "eval": Command("evaluate a model", eval_parser, run_evaluation),
    "replay": Command("rebuild a model from its base and a ledger", replay_parser, run_replay),
    **deploy.COMMANDS,
    **tools.COMMANDS,
}
COMMANDS["completion"] = completion.command(COMMANDS)
