"""The command line of the experiments.

    python -m experiments OPTIONS
    nox -s experiments -- OPTIONS
    torchrun --nproc-per-node N -m experiments OPTIONS

Of several processes, the first on each machine reports errors; the first of all prints the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from experiments import settings
from experiments.errors import ExperimentError, from_system

USAGE, INTERRUPTED = 2, 130
"""Exit codes."""
GRACE = 5.0
"""Seconds that other processes wait, so that the first one can report an error: torchrun ends all
processes once one has ended."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ExperimentError(f"{message} (--help shows all options)")


def _names(text: str) -> list[str]:
    return [name for name in text.replace(",", " ").split() if name]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="experiments",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train several optimizers on the same examples; write a table, figures, the "
        "verdicts on the thesis' claims, and a report.",
        epilog="presets:\n"
        + "\n".join(
            f"  {name:18}{settings.title(path)}" for name, path in settings.presets().items()
        ),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help=f"{', '.join(settings.presets())}; default: {settings.DEFAULT}",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="your own settings, as in experiments/presets/digits.toml",
    )
    parser.add_argument(
        "--trust-config",
        action="store_true",
        help="let import paths in FILE run code: stages and functions of your own",
    )
    parser.add_argument(
        "--algorithms",
        nargs="+",
        metavar="NAME",
        help="only these, such as sgd ekfacadam; default: all of the preset",
    )
    parser.add_argument(
        "--seeds", nargs="+", metavar="N", help="run every algorithm with each, such as 0 1 2"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, such as algorithms.ekfacadam.lr=0.01; may be repeated",
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the training examples")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="training examples in each step"
    )
    parser.add_argument(
        "--max-steps",
        type=int,
        metavar="N",
        help="stop every run after N steps, and test on N batches",
    )
    _add_searches(parser)
    _add_places(parser)
    return parser


def _add_searches(parser: argparse.ArgumentParser) -> None:
    """Add the options of studies with many runs."""
    parser.add_argument(
        "--search",
        nargs="?",
        const=settings.PROTOCOLS[0],
        choices=settings.PROTOCOLS,
        metavar="PROTOCOL",
        help="find the settings first: thesis (its grids, by training loss; the default) or fair "
        "(equal trials for all, by validation loss); writes to runs/PRESET-PROTOCOL",
    )
    parser.add_argument(
        "--trials",
        type=Path,
        metavar="DIR",
        help="a folder of results, such as results/cifar10-small/fair: take the trials of its "
        "search, and train only those it lacks",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that share the runs; default: one for each core, where a preset sets the "
        "threads of a process",
    )
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        metavar="N",
        help="a study for each of these sizes, with a search of its own if --search is given",
    )


def _add_places(parser: argparse.ArgumentParser) -> None:
    """Add the options that do not change the numbers."""
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="CIFAR-10: a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, or the folder for "
        "torchvision's download; default: runs/data",
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1, ...; default: a GPU if there is one",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where everything is written; default: runs/PRESET",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted experiment; finished runs and trials stay as they are",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="write the compact results there too; nox -s report makes figures and pages of them",
    )
    parser.add_argument(
        "--import-records",
        action="store_true",
        help="send what MLflow's store had not confirmed, and run nothing",
    )


def _run(arguments: argparse.Namespace, command: str) -> None:
    if arguments.workers < 0:
        raise ExperimentError("--workers must be at least 1, or 0 for the default")
    if arguments.preset is not None and arguments.config is not None:
        raise ExperimentError("--preset and --config both name the settings: give one of them")
    if arguments.trials is not None and (arguments.search is None or arguments.batch_sizes):
        raise ExperimentError(
            "--trials takes the trials of one search: give --search and its protocol too, and no "
            "--batch-sizes"
        )
    changes = [*_changes(arguments), *arguments.set]
    study = (
        settings.load(arguments.preset or settings.DEFAULT, changes)
        if arguments.config is None
        else settings.read(arguments.config, changes, trusted=arguments.trust_config)
    )
    if arguments.algorithms:
        study = study.only(_names(" ".join(arguments.algorithms)))
    suffix = f"-{arguments.search}" if arguments.search else ""
    output = arguments.output or Path("runs") / f"{study.preset}{suffix}"
    if arguments.import_records:
        _import_records(output)
        return
    # Imported late, with torch and MLflow: errors in the options above are then reported at once.
    import attrs
    from rich.console import Console

    from experiments.experiment import Options, run

    options = Options(
        output=output,
        data_dir=arguments.data_dir,
        device=arguments.device,
        resume=arguments.resume or _number("TORCHELASTIC_RESTART_COUNT") > 0,
        command=command,
        search=arguments.search,
        trials=arguments.trials,
        workers=arguments.workers,
        results=arguments.results,
    )
    if arguments.batch_sizes is None:
        run(study, options, Console())
        return
    for size in _wholes("--batch-sizes", arguments.batch_sizes) or ():
        training = attrs.evolve(study.training, batch_size=size)
        part = f"batch-{size}"
        results = None if options.results is None else options.results / part
        run(
            attrs.evolve(study, training=training, title=f"{study.title}, batches of {size}"),
            attrs.evolve(options, output=output / part, results=results),
            Console(),
        )


def _changes(arguments: argparse.Namespace) -> list[str]:
    """Return the changes of settings that have an option of their own."""
    short = {name: getattr(arguments, name) for name in ("epochs", "batch_size", "max_steps")}
    for name, value in short.items():
        if value is not None and value < 1 + (name == "batch_size"):
            raise ExperimentError(
                f"--{name.replace('_', '-')} must be at least {1 + (name == 'batch_size')}"
            )
    seeds = _wholes("--seeds", arguments.seeds)
    changes = [f"training.{name}={value}" for name, value in short.items() if value is not None]
    return changes if seeds is None else [*changes, f"training.seeds={list(seeds)}"]


def _import_records(output: Path) -> None:
    from experiments.tracking import UNSENT, store_of
    from kfactk.errors import OptionError
    from kfactk_stages.tracker.mlflow_store import import_file

    try:
        print(import_file(output / UNSENT, store_of(output)))
    except OptionError as error:
        raise ExperimentError(str(error)) from error


def _wholes(option: str, words: Sequence[str] | None) -> tuple[int, ...] | None:
    if words is None:
        return None
    try:
        found = tuple(int(word) for word in _names(" ".join(words)))
    except ValueError as error:
        raise ExperimentError(
            f"{option} must be whole numbers such as 0 1 2, not {' '.join(words)!r}"
        ) from error
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise ExperimentError(f"{option} must be different whole numbers from 0 on")
    return found


def _number(variable: str) -> int:
    return int(os.environ.get(variable, "0"))


def _command(arguments: Sequence[str]) -> str:
    start = (
        "nox -s experiments --" if "NOX_CURRENT_SESSION" in os.environ else "python -m experiments"
    )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here = _number("LOCAL_WORLD_SIZE")
        how = "--standalone" if _number("WORLD_SIZE") == here else "..."
        start = f"torchrun {how} --nproc-per-node {here} -m experiments"
    return shlex.join([*start.split(), *arguments])


def _handle_signals(message: str) -> None:
    """Let the first Ctrl-C (or kill) end the run cleanly, and the second end the process at once.

    Files are complete in both cases.
    """

    def second(*_: object) -> None:
        os.write(2, f"\n{message}\n".encode())
        os._exit(INTERRUPTED)

    def first(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, second)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, first)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = _command(arguments)
    resume = command if "--resume" in arguments else _command([*arguments, "--resume"])
    message = f"interrupted: finished epochs are kept; to continue, run: {resume}"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # paths may hold what a terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _handle_signals(message)
    try:
        _run(_parser().parse_args(arguments), command)
    except (ExperimentError, OSError) as raised:
        error = from_system(raised) if isinstance(raised, OSError) else raised
        if _number("LOCAL_RANK"):
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(GRACE)
        else:
            print(f"experiments: error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        if not _number("RANK"):
            print(f"\n{message}", file=sys.stderr)
        return INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
