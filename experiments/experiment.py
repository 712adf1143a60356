"""A study, from its settings to its report."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.console import Console

from experiments import (
    algorithms,
    claims,
    data,
    models,
    ranks,
    report,
    runner,
    statistics,
    store,
    tables,
)
from experiments.algorithms import Point
from experiments.data import Dataset
from experiments.errors import ExperimentError
from experiments.progress import Progress, say
from experiments.results import Results
from experiments.runner import Job, Listener
from experiments.search import Rows, Search, participants
from experiments.settings import Study
from experiments.store import Epoch, Run
from experiments.tasks import TASKS
from experiments.tracking import Tracking
from kfactk.masking import mask

MOST_WORKERS = 8


@attrs.frozen
class Options:
    """Options that do not change the numbers.

    Args:
        output: Folder for everything that is written.
        data_dir: Folder of the examples; `None` for the default.
        device: "auto", or the name of a device of torch.
        resume: Whether to continue the runs in `output`.
        command: The command that started this study, for the report.
        search: The protocol of a search before the runs, or `None`.
        trials: A folder of results with the trials of that search, or `None`.
        workers: Processes that share the runs; 0 for as many as cores allow.
        results: Another folder for the compact results, or `None`.
    """

    output: Path
    data_dir: Path | None
    device: str
    resume: bool
    command: str
    search: str | None = None
    trials: Path | None = None
    workers: int = 0
    results: Path | None = None


@attrs.frozen(eq=False)
class Together(Listener):
    """A listener that tells several others."""

    others: Sequence[Listener]

    def begin(self, job: Job, history: Sequence[Epoch]) -> None:
        """Tell all."""
        for each in self.others:
            each.begin(job, history)

    def epoch(self, job: Job, epoch: Epoch, points: Sequence[Point]) -> None:
        """Tell all."""
        for each in self.others:
            each.epoch(job, epoch, points)

    def end(self, job: Job, run: Run) -> None:
        """Tell all."""
        for each in self.others:
            each.end(job, run)


class Finished(Listener):
    """A listener that keeps what has ended."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}

    def end(self, job: Job, run: Run) -> None:
        """Keep the run."""
        self.runs[job.key] = run


def run(study: Study, options: Options, console: Console) -> Results:
    """Do the search and all runs, together with other processes that torchrun has started.

    The first process writes and prints the results.

    Raises:
        ExperimentError: Something that the user can correct.
    """
    device = ranks.device(options.device)
    if study.training.threads:
        torch.set_num_threads(study.training.threads)
    with ranks.join(device) as processes:
        if not processes.first:
            console = Console(quiet=True)
        with contextlib.ExitStack() as held:
            processes.on_first(
                lambda: held.enter_context(store.hold(options.output, lambda t: say(console, t)))
            )
            return _Conductor(study, options, device, processes, console).run()


class _Conductor:
    def __init__(
        self,
        study: Study,
        options: Options,
        device: torch.device,
        processes: ranks.Communicator,
        console: Console,
    ) -> None:
        self._study, self._options, self._device = study, options, device
        self._ranks, self._console = processes, console
        self._where: dict[str, Any] = {"device": device.type, "processes": processes.size}
        self._workers = _workers(study, options, device, processes.size)
        self._tracking: Tracking | None = None

    def run(self) -> Results:
        options, study = self._options, self._study
        if study.training.batch_size % self._ranks.size:
            raise ExperimentError(
                f"a batch of {study.training.batch_size} examples cannot be shared equally by "
                f"{self._ranks.size} processes: give a --batch-size that is a multiple of "
                f"{self._ranks.size}, or start another number of processes"
            )
        if options.search is not None and self._ranks.size > 1:
            raise ExperimentError("--search runs in one process, with --workers: start no torchrun")
        if options.search is not None:
            participants(study, options.search)
        algorithms.check(study.algorithms.values())
        dataset = self._load()
        models.check(
            study.model,
            dataset.train.inputs[:2],
            classes=TASKS[study.training.loss].outputs(dataset),
            trusted=study.trusted,
        )
        self._begin_folder()
        self._tracking = self._ranks.on_first(
            lambda: Tracking(study.preset, options.output, resume=options.resume)
        )
        interrupted = True
        try:
            searches: dict[str, Any] = {}
            if options.search is not None:
                study, searches = self._searched(options.search, dataset)
            results = self._runs(study, dataset, searches)
            if self._ranks.first:
                self._report(results)
            interrupted = False
        finally:
            if self._tracking is not None:
                self._tracking.close(interrupted=interrupted)
        return results

    def _say(self, text: str) -> None:
        say(self._console, text)

    def _load(self) -> Dataset:
        options, study = self._options, self._study
        dataset = self._ranks.in_order(
            lambda: data.load(
                *(study.data, options.data_dir, options.output / "cache", self._say),
                trusted=study.trusted,
            )
        )
        if len(set(self._ranks.gather(dataset.checksum()))) > 1:
            raise ExperimentError(
                "the processes have read different examples: give each machine the same files in "
                "--data-dir"
            )
        return dataset

    def _begin_folder(self) -> None:
        output = self._options.output
        if self._options.resume:
            return
        if moved := self._ranks.broadcast(lambda: store.move_earlier_runs(output)):
            self._say(f"earlier runs in {output} are now in {moved}; --resume would continue them")

    def _searched(self, protocol: str, dataset: Dataset) -> tuple[Study, dict[str, Any]]:
        """Search, and return the study with what was found, and the summary of the search."""
        search = Search(
            self._study, protocol, dataset, self._options.output / "search", self._where
        )
        if self._options.trials is not None:
            search.take(self._options.trials)
        for groups in search.stages():
            if groups:
                stage = groups[0][0].trial["stage"]
                self._say(f"{protocol} protocol: {len(groups)} trials ({stage})")
                self._do(groups, Rows(search))
        summary = search.summary()
        for name, chosen in summary["chosen"].items():
            written = ", ".join(f"{key} {value:g}" for key, value in chosen.items())
            self._say(f"chosen for {self._study.algorithms[name].label}: {written}")
        path = self._options.output / "search" / f"{protocol}.json"
        store.write_json(path, summary)
        if self._tracking is not None:
            for stage in sorted({trial["stage"] for trial in summary["trials"]}):
                self._tracking.open(stage, {"kind": "search"})
                count = len(summary["trials"])
                self._tracking.finish(stage, {"trials": float(count)}, [path], count=count)
        return search.tuned(), {protocol: summary}

    def _runs(self, study: Study, dataset: Dataset, searches: Mapping[str, Any]) -> Results:
        groups = runner.plan(study, dataset, self._where, self._options.output)
        if self._options.resume:
            self._ranks.on_first(lambda: runner.check_resumable(groups))
        count = self._ranks.size if self._ranks.size > 1 else min(self._workers, len(groups))
        where = self._device.type if count == 1 else f"{count} {self._device.type} processes"
        self._say(
            f"{study.title}: {len(study.algorithms)} algorithms x "
            f"{len(study.training.seeds)} seeds, {study.training.epochs} epochs on "
            f"{len(dataset.train):,} examples of {dataset.name}, on {where}"
        )
        finished = self._do(groups)
        runs = [finished.runs[job.key] for group in groups for job in group]
        return Results(
            study=study,
            dataset=dataset.name,
            device=where,
            command=mask(self._options.command),
            runs=runs,
            searches=searches,
        )

    def _do(self, groups: Sequence[Sequence[Job]], *first: Listener) -> Finished:
        finished = Finished()
        with Progress(self._console, [job for group in groups for job in group]) as progress:
            others: list[Listener] = [*first, finished, progress]
            if self._tracking is not None:
                others.append(self._tracking)
            runner.run_all(
                groups,
                Together(others),
                device=self._device,
                ranks=self._ranks,
                workers=self._workers,
            )
        return finished

    def _report(self, results: Results) -> None:
        options, tracking = self._options, self._tracking
        results.write(options.output / "results")
        if options.results is not None:
            results.write(options.results)
        written = report.write(options.output, results)
        self._console.print(tables.for_terminal(results))
        for claim in claims.check(results):
            if claim.verdict != claims.OPEN:
                self._say(f"{claim.verdict:>16}: {claim.text}. {claim.evidence}")
        self._say(f"\nreport   {written.report.resolve()}")
        self._say(f"results  {(options.results or options.output / 'results').resolve()}")
        if tracking is None:
            return
        tracking.open("report", {"kind": "report"})
        medians = {
            f"report/{each.name}_{metric}": statistics.final(results, each.name, metric).median
            for each in results.algorithms
            for metric in results.metrics
        }
        files = [
            written.report,
            *sorted(written.figures.glob("*.png")),
            options.output / "results" / "study.json",
        ]
        tracking.finish("report", medians, files, count=len(results.runs))
        start, address = tracking.how_to_open(shlex.quote(sys.executable))
        if start:
            self._say(f"MLflow   start it with: {start}\n         then open {address}")
        else:
            self._say(f"MLflow   {address}")
        if tracking.unsent is not None:
            self._say(
                f"unsent   {tracking.unsent}; to send it later, run the same command with "
                "--import-records"
            )


def _workers(study: Study, options: Options, device: torch.device, size: int) -> int:
    """Return the number of processes that share the runs of this one."""
    if size > 1:
        return 1
    if options.workers:
        return options.workers
    if device.type != "cpu" or not study.training.threads:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min((cores or 1) // study.training.threads, MOST_WORKERS))
