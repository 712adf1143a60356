"""The command line: `python -m experiments`, also through `nox -s experiments -- OPTIONS`, and in several processes through
`torchrun --nproc-per-node N -m experiments OPTIONS`: the first process of each machine tells of mistakes, the first of all of the rest."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from experiments import config
from experiments.errors import ExperimentError

USAGE, INTERRUPTED = 2, 130
"""Exit codes."""
GRACE = 5.0
"""Seconds that other processes leave the first one to tell of a mistake: torchrun ends all when one has ended."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ExperimentError(f"{message} (--help shows all options)")


def _names(text: str) -> list[str]:
    return [name for name in text.replace(",", " ").split() if name]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="experiments",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The study: optimisers race on images, and a table, four figures and a report come out.",
        epilog="presets:\n"
        + "\n".join(
            f"  {name:18}{config.read(path).title}" for name, path in config.presets().items()
        ),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset", metavar="NAME", help=f"{', '.join(config.presets())}; digits if left out"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings of your own, as in experiments/configs/digits.toml",
    )
    parser.add_argument(
        "--algorithms",
        nargs="+",
        metavar="NAME",
        help="only these, as sgd ekfacadam; all of the preset if left out",
    )
    parser.add_argument(
        "--seeds", nargs="+", metavar="N", help="one run of every algorithm for each, as 0 1 2"
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the training images")
    parser.add_argument("--batch-size", type=int, metavar="N", help="training images in one step")
    parser.add_argument(
        "--max-steps",
        type=int,
        metavar="N",
        help="stop every run after so many steps, and test on as many batches",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="CIFAR-10: a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, or where torchvision has put it or is to put it (runs/data)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1, ...; a GPU if there is one, if left out",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where everything is written; runs/PRESET if left out",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with an interrupted study; finished runs are kept as they are",
    )
    return parser


def _conduct(arguments: argparse.Namespace, command: str) -> None:
    if arguments.preset is not None and arguments.config is not None:
        raise ExperimentError("--preset and --config both name the settings: give one of them")
    study = (
        config.load(arguments.preset or "digits")
        if arguments.config is None
        else config.read(arguments.config)
    )
    study = config.chosen(
        study,
        algorithms=_names(" ".join(arguments.algorithms)) if arguments.algorithms else None,
        seeds=_seeds(arguments.seeds),
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        max_steps=arguments.max_steps,
    )
    from rich.console import (
        Console,  # imported late, like torch and MLflow below: mistakes above are told at once
    )

    from experiments.study import Options, conduct

    options = Options(
        output=arguments.output or Path("runs") / study.preset,
        data_dir=arguments.data_dir,
        device=arguments.device,
        resume=arguments.resume or _number("TORCHELASTIC_RESTART_COUNT") > 0,
        command=command,
    )
    conduct(study, options, Console())


def _seeds(words: Sequence[str] | None) -> tuple[int, ...] | None:
    if words is None:
        return None
    try:
        return tuple(int(word) for word in _names(" ".join(words)))
    except ValueError as error:
        raise ExperimentError(
            f"--seeds must be whole numbers such as 0 1 2, not {' '.join(words)!r}"
        ) from error


def _number(variable: str) -> int:
    return int(os.environ.get(variable, "0"))


def _command(arguments: Sequence[str]) -> str:
    start = (
        "nox -s experiments --" if "NOX_CURRENT_SESSION" in os.environ else "python -m experiments"
    )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        alone = _number("WORLD_SIZE") == _number("LOCAL_WORLD_SIZE")
        start = f"torchrun {'--standalone' if alone else '...'} --nproc-per-node {_number('LOCAL_WORLD_SIZE')} -m experiments"
    return shlex.join([*start.split(), *arguments])


def _on_signal(farewell: str) -> None:
    """The first Ctrl-C (or kill) ends the run in order; the second ends the process at once. Files are whole either way."""

    def second(*_: object) -> None:
        os.write(2, f"\n{farewell}\n".encode())
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
    farewell = f"interrupted: finished epochs are kept; go on with: {resume}"
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _on_signal(farewell)
    try:
        _conduct(_parser().parse_args(arguments), command)
    except ExperimentError as error:
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
            print(f"\n{farewell}", file=sys.stderr)
        return INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
