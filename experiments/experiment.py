"""An experiment, from its settings to its report."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import torch
from rich.console import Console

from experiments import claims, data, figures, lock, ranks, report, runner, store, table
from experiments.config import Experiment
from experiments.errors import ExperimentError, system_reason
from experiments.progress import Progress, say
from experiments.results import Results
from experiments.tracking import Tracking, Untracked
from kfactk.masking import mask


@attrs.frozen
class Options:
    """Options that do not change the numbers.

    Args:
        output: Folder for everything that is written.
        data_dir: Folder of the images; `None` for the default.
        device: "auto", or the name of a device of torch.
        resume: Whether to continue the runs in `output`.
        command: The command that started this experiment, for the report.
    """

    output: Path
    data_dir: Path | None
    device: str
    resume: bool
    command: str


def run(experiment: Experiment, options: Options, console: Console) -> Results:
    """Do all runs, together with other processes that torchrun has started.

    The first process writes and prints the results.

    Raises:
        ExperimentError: Something that the user can correct.
    """
    device = ranks.device(options.device)
    if experiment.training.threads:
        torch.set_num_threads(experiment.training.threads)
    with ranks.join(device) as processes:
        if not processes.first:
            console = Console(quiet=True)
        with contextlib.ExitStack() as held:
            processes.on_first(lambda: held.enter_context(_own_folder(options.output, console)))
            results, tracking = _run_all(experiment, options, device, processes, console)
            if isinstance(tracking, Tracking):
                _report(results, options, tracking, console)
    return results


@contextlib.contextmanager
def _own_folder(output: Path, console: Console) -> Iterator[None]:
    """Make the folder of all outputs, and keep other experiments out of it."""
    _make_folder(output)
    with lock.hold(output, lambda text: say(console, text)):
        yield


def _run_all(
    experiment: Experiment,
    options: Options,
    device: torch.device,
    processes: ranks.Communicator,
    console: Console,
) -> tuple[Results, Tracking | Untracked]:
    dataset = processes.in_order(
        lambda: data.load(
            experiment.data,
            options.data_dir,
            options.output / "cache",
            lambda text: say(console, text),
        )
    )
    if len(set(processes.gather(dataset.checksum()))) > 1:
        raise ExperimentError(
            "the processes have read different images: give each machine the same files in "
            "--data-dir"
        )
    jobs = runner.plan(experiment, dataset, device, options.output, processes)
    if options.resume:
        processes.on_first(lambda: runner.check_resumable(jobs))
    elif moved := processes.broadcast(lambda: store.move_earlier_runs(options.output)):
        say(
            console,
            f"earlier runs in {options.output} are now in {moved}; --resume would continue them",
        )
    tracking = (
        processes.on_first(lambda: Tracking(experiment.preset, options.output)) or Untracked()
    )
    where = device.type if processes.size == 1 else f"{processes.size} {device.type} processes"
    say(
        console,
        f"{experiment.title}: {len(experiment.algorithms)} algorithms x "
        f"{len(experiment.training.seeds)} seeds, {experiment.training.epochs} epochs on "
        f"{len(dataset.train):,} images of {dataset.name}, "
        f"on {device if processes.size == 1 else where}",
    )
    with contextlib.closing(tracking), Progress(console, len(jobs)) as progress:
        resources = runner.Resources(device, processes, tracking, progress)
        runs = list(runner.run(jobs, dataset, resources))
    return Results(experiment, dataset.name, where, runs), tracking


def _report(results: Results, options: Options, tracking: Tracking, console: Console) -> None:
    path = options.output / "report.html"
    interface = tracking.how_to_open(shlex.quote(sys.executable))
    commands: Sequence[tuple[str, str]] = (
        ("Repeat this experiment", mask(options.command)),
        ("Show the runs in MLflow's interface", interface),
        ("List the stages and their options", "python -m kfactk stages"),
    )
    report.write(path, results, figures.save_all(results, options.output / "figures"), commands)
    console.print(table.for_terminal(results))
    judged = [claim for claim in claims.check(results) if claim.verdict != claims.OPEN]
    for claim in judged:
        say(console, f"{claim.verdict:>14}: {claim.text} ({claim.evidence})")
    say(
        console,
        f"\nreport   {path.resolve()}\nfigures  {(options.output / 'figures').resolve()}\n"
        f"MLflow   {interface}",
    )
    if tracking.unsent is not None:
        say(console, f"unsent   {tracking.unsent} (see the warning above)")


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ExperimentError(
            f"--output {output} cannot be written to ({system_reason(error)})"
        ) from error
