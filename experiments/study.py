"""A study from its settings to its report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import attrs
import torch
from rich.console import Console

from experiments import claims, data, figures, ranks, report, runner, store, table
from experiments.config import Study
from experiments.errors import ExperimentError
from experiments.progress import Progress, say
from experiments.results import Results
from experiments.tracking import Tracking, Untracked


@attrs.frozen
class Options:
    """What does not change the numbers.

    Args:
        output: Folder for everything that is written.
        data_dir: Where the images are; `None` for the usual place.
        device: "auto", or a name torch knows.
        resume: Whether to go on with the runs in `output`.
        command: How this study was started, for the report.
    """

    output: Path
    data_dir: Path | None
    device: str
    resume: bool
    command: str


def conduct(study: Study, options: Options, console: Console) -> Results:
    """Do all runs, together with the processes that torchrun has started besides this one; the first of them writes and shows what came
    out.

    Raises:
        ExperimentError: Something the user can put right.
    """
    device = ranks.device(options.device)
    if study.training.threads:
        torch.set_num_threads(study.training.threads)
    with ranks.joined(device) as processes:
        if not processes.first:
            console = Console(quiet=True)
        results, tracking = _run(study, options, device, processes, console)
    if isinstance(tracking, Tracking):
        _present(results, options, tracking, console)
    return results


def _run(
    study: Study,
    options: Options,
    device: torch.device,
    processes: ranks.Communicator,
    console: Console,
) -> tuple[Results, Tracking | Untracked]:
    processes.first_only(lambda: _make_folder(options.output))
    dataset = processes.in_turns(
        lambda: data.load(
            study.data, options.data_dir, options.output / "cache", lambda text: say(console, text)
        )
    )
    if len(set(processes.gather(dataset.checksum()))) > 1:
        raise ExperimentError(
            "the processes have read different images: give each machine the same files in --data-dir"
        )
    jobs = runner.plan(study, dataset, device, options.output, processes)
    if options.resume:
        processes.first_only(lambda: runner.check_resumable(jobs))
    elif moved := processes.lead(lambda: store.set_aside(options.output)):
        say(
            console,
            f"earlier runs in {options.output} are now in {moved}; --resume would have gone on with them",
        )
    tracking = processes.first_only(lambda: Tracking(study.preset, options.output)) or Untracked()
    where = device.type if processes.size == 1 else f"{processes.size} {device.type} processes"
    say(
        console,
        f"{study.title}: {len(study.algorithms)} algorithms x {len(study.training.seeds)} seeds, {study.training.epochs} epochs on "
        f"{len(dataset.train):,} images of {dataset.name}, on {device if processes.size == 1 else where}",
    )
    with Progress(console, len(jobs)) as progress:
        runs = list(runner.run(jobs, dataset, runner.Means(device, processes, tracking, progress)))
    return Results(study, dataset.name, where, runs), tracking


def _present(results: Results, options: Options, tracking: Tracking, console: Console) -> None:
    path = options.output / "report.html"
    interface = tracking.how_to_open(shlex.quote(sys.executable))
    commands: Sequence[tuple[str, str]] = (
        ("This study again", options.command),
        ("The runs in MLflow's interface", interface),
        ("What the stages are and what their options mean", "python -m kfactk stages"),
    )
    report.write(path, results, figures.save_all(results, options.output / "figures"), commands)
    console.print(table.for_terminal(results))
    judged = [claim for claim in claims.check(results) if claim.verdict != claims.OPEN]
    for claim in judged:
        say(console, f"{claim.verdict:>14}: {claim.text} ({claim.evidence})")
    say(
        console,
        f"\nreport   {path.resolve()}\nfigures  {(options.output / 'figures').resolve()}\nMLflow   {interface}",
    )


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ExperimentError(
            f"--output {output} cannot be written to ({error.strerror})"
        ) from error
