"""All runs and trials of a study, in one process or several, saved at the end of every epoch."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import queue
import signal
import subprocess
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import multiprocessing

import kfactk
from experiments import algorithms, store, training
from experiments.algorithms import Point
from experiments.data import Dataset
from experiments.errors import ExperimentError, from_system, system_reason
from experiments.ranks import Communicator
from experiments.settings import Algorithm, Study
from experiments.store import Epoch, Run
from kfactk.errors import memory_ran_out
from kfactk.masking import mask_settings

PACKAGES = ("kfactk", "torch", "torchvision", "numpy", "scipy", "pytorch_optimizer", "mnist1d")
"""Packages that numbers depend on."""


@attrs.frozen(eq=False)
class Job:
    """One run, or one trial of a search.

    Args:
        study: The settings that it shares with others.
        algorithm: Its algorithm.
        seed: Its seed.
        settings: Everything that its numbers depend on, as nested plain values.
        folder: Where it is saved; `None` for a trial, which is short.
        dataset: The examples; of several jobs with the same, each process has one copy.
        trial: What the search has to know of a trial.
    """

    study: Study
    algorithm: Algorithm
    seed: int
    settings: dict[str, Any]
    folder: store.RunFolder | None
    dataset: Dataset
    trial: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def key(self) -> str:
        """Its name in folders and in MLflow."""
        number = f"-{self.trial['stage']}{self.trial['number']}" if self.trial else ""
        return f"{self.algorithm.name}{number}-seed{self.seed}"

    @property
    def label(self) -> str:
        """Its name for readers."""
        number = f", {self.trial['stage']} {self.trial['number']}" if self.trial else ""
        return f"{self.algorithm.label}{number}, seed {self.seed}"

    @property
    def steps(self) -> int:
        """Number of its steps in one process."""
        return training.steps(self.study, self.dataset)


class Listener:
    """Follows jobs. One process calls it, for the jobs of all. By default it does nothing."""

    def begin(self, job: Job, history: Sequence[Epoch]) -> None:
        """Follow a job, of which `history` is done."""

    def epoch(self, job: Job, epoch: Epoch, points: Sequence[Point]) -> None:
        """Follow an epoch, with the recorded metrics of its steps."""

    def end(self, job: Job, run: Run) -> None:
        """Follow the end of a job; also of one that had ended before."""


def plan(study: Study, dataset: Dataset, where: Mapping[str, Any], output: Path) -> list[list[Job]]:
    """Return the runs of a study, as groups that one process does.

    Args:
        study: The settings.
        dataset: The examples.
        where: Device and number of processes.
        output: Folder of the runs.
    """
    images = dataset.checksum()
    jobs = [
        [
            Job(
                study=study,
                algorithm=algorithm,
                seed=seed,
                settings=effective(study, algorithm, seed, images, where),
                folder=store.folder(output, algorithm.name, seed),
                dataset=dataset,
            )
            for algorithm in study.algorithms.values()
        ]
        for seed in study.training.seeds
    ]
    return jobs if study.training.alternate else [[job] for group in jobs for job in group]


def effective(
    study: Study, algorithm: Algorithm, seed: int, checksum: int, where: Mapping[str, Any]
) -> dict[str, Any]:
    """Return everything that the numbers of a run depend on."""
    shared = attrs.asdict(study.training)
    for key in ("seeds", "threads", "alternate", "target", "overview", "rivals"):
        shared.pop(key)
    settings = {
        "data": {**attrs.asdict(study.data), "checksum": checksum},
        "model": attrs.asdict(study.model),
        "training": shared,
        "algorithm": algorithms.describe(algorithm, seed=seed),
        "seed": seed,
        **where,
    }
    masked: dict[str, Any] = mask_settings(settings)
    return masked


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """Return commit, versions and hardware: what numbers depend on besides settings."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).partition(":")[2]
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "commit": _commit(),
        "system": platform.system(),
        "processor": name.strip(),
        "cores": os.cpu_count(),
        "threads": threads,
        **({"gpu": gpu} if gpu else {}),
        "versions": versions,
    }


@functools.cache
def _commit() -> str:
    """Return the commit of this code, with "+" where files have changed since."""
    command = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12")
    with contextlib.suppress(OSError):
        found = subprocess.run(
            (*command, "--exclude=*", "--dirty=+"), capture_output=True, text=True, check=False
        )
        if found.returncode == 0:
            return found.stdout.strip()
    return "unknown"


def check_resumable(groups: Iterable[Sequence[Job]]) -> None:
    """Check that earlier runs have the same settings.

    Raises:
        ExperimentError: Some differ. The message names the first such run and the differences.
    """
    for group in groups:
        for job in group:
            earlier(job)


def earlier(job: Job) -> Run | None:
    """Return what an earlier study has saved of a run, if its settings are the same."""
    run = None if job.folder is None else job.folder.run()
    if job.folder is None or run is None:
        return None
    if found := store.differences(run.settings, store.as_read(job.settings)):
        raise ExperimentError(
            f"--resume: {job.folder.path} has other settings ({'; '.join(found[:3])}): give "
            "the same ones, choose another --output, or leave out --resume to start again"
        )
    return run


def run_all(
    groups: Sequence[Sequence[Job]],
    listener: Listener,
    *,
    device: torch.device,
    ranks: Communicator,
    workers: int = 1,
) -> None:
    """Do all jobs that are not done.

    Args:
        groups: The jobs; those of a group train in turn, an epoch each.
        listener: Follows them.
        device: Device of this process, or of all workers.
        ranks: The processes that share every job.
        workers: Number of processes that share the groups.
    """
    workers = min(workers, len(groups))
    if workers > 1:
        _run_in_workers(groups, listener, device, workers)
        return
    copies = _Copies(device)
    for group in groups:
        _run_group(group, listener, copies, ranks)


class _Copies:
    """Copies of data sets on a device, the last one kept."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: tuple[Dataset, Dataset] | None = None

    def of(self, dataset: Dataset) -> Dataset:
        if self._last is None or self._last[0] is not dataset:
            self._last = dataset, dataset.to(self.device)
        return self._last[1]


def _run_group(
    group: Sequence[Job], listener: Listener, copies: _Copies, ranks: Communicator
) -> None:
    """Train the jobs of a group in turn, an epoch each."""
    with contextlib.ExitStack() as opened:
        active: list[tuple[Job, training.Trainer, dict[str, Any]]] = []
        for job in group:
            before = ranks.broadcast(lambda job=job: earlier(job))  # type: ignore[misc]
            if before is not None and before.status != store.RUNNING:
                listener.begin(job, before.history)
                listener.end(job, before)
                continue
            with _told_as_one_line(job):
                trainer = training.Trainer(
                    job.study, job.algorithm, job.seed, copies.of(job.dataset), copies.device, ranks
                )
                opened.callback(trainer.close)
                if before is not None and job.folder is not None:
                    _load(trainer, ranks.broadcast(job.folder.checkpoint), job)
            listener.begin(job, trainer.history)
            threads = torch.get_num_threads()
            active.append((job, trainer, environment(copies.device, threads)))
        while active:
            for each in list(active):
                if _advance(*each, listener, ranks):
                    active.remove(each)


def _advance(
    job: Job,
    trainer: training.Trainer,
    where: dict[str, Any],
    listener: Listener,
    ranks: Communicator,
) -> bool:
    """Train for an epoch and save it; return whether the run is over."""
    if not trainer.finished:
        with _told_as_one_line(job):
            epoch = trainer.run_epoch()
        state = trainer.state_dict() if job.folder is not None else None
        if state is not None and job.folder is not None and ranks.first:
            job.folder.write_checkpoint(state)
        listener.epoch(job, epoch, trainer.points)
    over = trainer.finished
    status = store.RUNNING if not over else "diverged" if trainer.diverged else "finished"
    run = Run(job.algorithm.name, job.seed, status, job.settings, where, tuple(trainer.history))
    if job.folder is not None and ranks.first:
        if over:
            job.folder.write_model(trainer.model.state_dict())
        job.folder.write_run(run)
    if over:
        listener.end(job, run)
        trainer.close()
    return over


def _load(trainer: training.Trainer, state: Any, job: Job) -> None:
    if state is None or job.folder is None:
        return
    try:
        trainer.load_state_dict(state)
    # A damaged or foreign state may lack anything, or hold anything.
    except (
        *(KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError),
        kfactk.KfactkError,
    ) as error:
        raise ExperimentError(
            f"{job.folder.path / 'checkpoint.pt'} does not fit this run "
            f"({type(error).__name__}: {system_reason(error)}): delete it to start that run again"
        ) from error


@contextlib.contextmanager
def _told_as_one_line(job: Job) -> Iterator[None]:
    """Raise what kfactk refuses, and memory that runs out, as errors that the user can correct."""
    try:
        yield
    except (kfactk.KfactkError, RuntimeError, MemoryError) as error:
        if memory_ran_out(error) or isinstance(error, torch.OutOfMemoryError):
            raise ExperimentError(
                f"{job.label}: memory ran out ({system_reason(error)}): give a smaller "
                "--batch-size, or test_batch_size in the settings"
            ) from error
        if isinstance(error, kfactk.KfactkError):
            raise ExperimentError(f"{job.label}: {error}") from error
        raise


class _Sender(Listener):
    """The listener of a worker: sends what it hears to the first process."""

    def __init__(self, events: Any, group: int, jobs: Sequence[Job]) -> None:
        self._events, self._group, self._jobs = events, group, list(jobs)

    def _send(self, name: str, job: Job, *values: Any) -> None:
        number = next(i for i, each in enumerate(self._jobs) if each is job)
        self._events.put((name, self._group, number, values))

    def begin(self, job: Job, history: Sequence[Epoch]) -> None:
        self._send("begin", job, tuple(history))

    def epoch(self, job: Job, epoch: Epoch, points: Sequence[Point]) -> None:
        self._send("epoch", job, epoch, list(points))

    def end(self, job: Job, run: Run) -> None:
        self._send("end", job, run)


def _work(
    groups: Sequence[Sequence[Job]], device: torch.device, threads: int, taken: Any, events: Any
) -> None:
    """Do groups that no other worker has taken; report errors as events."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    copies = _Copies(device)
    try:
        while True:
            with taken.get_lock():
                number = taken.value
                taken.value += 1
            if number >= len(groups):
                return
            sender = _Sender(events, number, groups[number])
            _run_group(groups[number], sender, copies, Communicator())
    except (ExperimentError, OSError) as raised:
        told = from_system(raised) if isinstance(raised, OSError) else raised
        events.put(("error", 0, 0, (str(told),)))
    except Exception:  # told by the first process, and raised there
        events.put(("crash", 0, 0, (traceback.format_exc(),)))


def _end_with_parent() -> None:
    """End this process where the first one was killed: another may take its folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_in_workers(
    groups: Sequence[Sequence[Job]], listener: Listener, device: torch.device, workers: int
) -> None:
    context = multiprocessing.get_context("spawn")
    events, taken = context.Queue(), context.Value("i", 0)
    threads = groups[0][0].study.training.threads or max(1, (os.cpu_count() or 1) // workers)
    processes = [
        context.Process(target=_work, args=(groups, device, threads, taken, events), daemon=True)
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        while True:
            alive = [process for process in processes if process.is_alive()]
            try:
                name, group, number, values = events.get(timeout=0.5 if alive else 0.1)
            except queue.Empty:
                if alive:
                    continue
                break
            if name == "error":
                raise ExperimentError(values[0])
            if name == "crash":
                raise RuntimeError(f"a worker failed:\n{values[0]}")
            getattr(listener, name)(groups[group][number], *values)
        if codes := [process.exitcode for process in processes if process.exitcode]:
            raise ExperimentError(
                f"a worker ended with code {codes[0]}: what it finished is kept; run the same "
                "command with --resume"
            )
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
