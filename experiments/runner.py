"""All runs of an experiment, one after the other, saved and tracked at the end of every epoch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch

import kfactk
from experiments import algorithms, store, training
from experiments.config import Algorithm, Experiment
from experiments.data import Dataset
from experiments.errors import ExperimentError, system_reason
from experiments.progress import Progress
from experiments.ranks import Communicator
from experiments.results import Run
from experiments.tracking import Tracking, Untracked
from kfactk.errors import memory_ran_out
from kfactk.masking import mask_settings


@attrs.frozen(eq=False)
class Job:
    """One run to do."""

    experiment: Experiment
    algorithm: Algorithm
    seed: int
    settings: dict[str, Any]
    folder: store.RunFolder

    @property
    def label(self) -> str:
        """Its name for readers."""
        return f"{self.algorithm.label}, seed {self.seed}"


def plan(
    experiment: Experiment,
    dataset: Dataset,
    device: torch.device,
    output: Path,
    ranks: Communicator,
) -> list[Job]:
    """Return the runs of an experiment: all algorithms with the first seed, then with the next.

    Raises:
        ExperimentError: The settings of an algorithm cannot work, or the processes cannot share its
            batches.
    """
    _check_batch_size(experiment.training.batch_size, ranks.size)
    for algorithm in experiment.algorithms.values():
        algorithms.check(algorithm)
    images, data, shared = (
        dataset.checksum(),
        attrs.asdict(experiment.data),
        attrs.asdict(experiment.training),
    )
    for key in ("seeds", "threads"):
        shared.pop(key)
    return [
        Job(
            experiment=experiment,
            algorithm=algorithm,
            seed=seed,
            settings=mask_settings(
                {
                    "data": {**data, "checksum": images},
                    "model": experiment.model.name,
                    "training": shared,
                    "algorithm": algorithms.describe(algorithm, seed=seed),
                    "seed": seed,
                    "device": device.type,
                    "processes": ranks.size,
                }
            ),
            folder=store.folder(output, algorithm.name, seed),
        )
        for seed in experiment.training.seeds
        for algorithm in experiment.algorithms.values()
    ]


def check_resumable(jobs: list[Job]) -> None:
    """Check that earlier runs have the same settings.

    Raises:
        ExperimentError: Some differ. The message names the first such run and the differences.
    """
    for job in jobs:
        _own_record(job)


def _own_record(job: Job) -> store.RunRecord | None:
    """Return what an earlier experiment has recorded of a run, if its settings are the same."""
    record = job.folder.record()
    if record is not None and (found := store.differences(record.settings, job.settings)):
        raise ExperimentError(
            f"--resume: {job.folder.path} has other settings ({'; '.join(found[:3])}): give "
            "the same ones, choose another --output, or leave out --resume to start again"
        )
    return record


@attrs.frozen(eq=False)
class Resources:
    """What all runs use.

    Args:
        device: Device of this process.
        ranks: The processes that share the work.
        tracking: Where the runs are recorded.
        progress: Where they are shown.
    """

    device: torch.device
    ranks: Communicator
    tracking: Tracking | Untracked
    progress: Progress


def run(jobs: list[Job], dataset: Dataset, resources: Resources) -> Iterator[Run]:
    """Do the runs that are not finished, and yield the results of all."""
    device = resources.device
    dataset = attrs.evolve(dataset, train=dataset.train.to(device), test=dataset.test.to(device))
    for job in jobs:
        record = resources.ranks.broadcast(partial(_own_record, job))
        if record is None or record.status == store.RUNNING:
            with _told_as_one_line(job):
                record = _run_one(job, record, dataset, resources)
        else:
            resources.progress.skip(job.label, len(record.history))
        yield Run(
            job.algorithm.name,
            job.seed,
            record.status,
            record.history,
            record.settings["algorithm"],
        )


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


def _load(trainer: training.Trainer, state: Any, job: Job) -> None:
    try:
        trainer.load_state_dict(state)
    # A damaged or foreign state may lack anything, or hold anything.
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise ExperimentError(
            f"{job.folder.path / 'checkpoint.pt'} does not fit this run "
            f"({type(error).__name__}: {system_reason(error)}): delete it to start that run again"
        ) from error
    except kfactk.KfactkError as error:
        raise ExperimentError(
            f"{job.folder.path / 'checkpoint.pt'} does not fit this run ({error}): delete it to "
            "start that run again"
        ) from error


def _run_one(
    job: Job, record: store.RunRecord | None, dataset: Dataset, resources: Resources
) -> store.RunRecord:
    ranks, tracking = resources.ranks, resources.tracking
    trainer = training.Trainer(
        job.experiment, job.algorithm, job.seed, dataset, resources.device, ranks
    )
    try:
        if record is not None and (state := ranks.broadcast(job.folder.checkpoint)) is not None:
            _load(trainer, state, job)
        earlier = None if record is None else record.mlflow_run_id
        run_id = tracking.start(
            job.algorithm.name, job.seed, job.settings, trainer.history, earlier
        )
        record = store.RunRecord(job.settings, store.RUNNING, run_id, tuple(trainer.history))
        _write(job, ranks, record)
        steps = training.steps(job.experiment, dataset, ranks.size)
        with (
            tracking.recording(run_id),
            resources.progress.run(job.label, steps, trainer.history) as progress,
        ):
            while not trainer.finished:
                epoch = trainer.run_epoch(progress.step)
                record = attrs.evolve(record, history=(*record.history, epoch))
                _write(job, ranks, record, checkpoint=trainer.state_dict())
                tracking.log(run_id, [epoch], trainer.points)
                progress.epoch(epoch)
        record = attrs.evolve(record, status="diverged" if trainer.diverged else "finished")
        _write(job, ranks, record, model=trainer.model.state_dict())
        tracking.end(run_id, record.status)
        return record
    finally:
        trainer.close()


def _write(
    job: Job,
    ranks: Communicator,
    record: store.RunRecord,
    *,
    checkpoint: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
) -> None:
    """Write what is given, the record last, on the first process."""
    if ranks.first:
        if checkpoint is not None:
            job.folder.write_checkpoint(checkpoint)
        if model is not None:
            job.folder.write_model(model)
        job.folder.write_record(record)


def _check_batch_size(batch_size: int, ranks: int) -> None:
    if batch_size % ranks:
        raise ExperimentError(
            f"a batch of {batch_size} images cannot be shared equally by {ranks} processes: give a "
            f"--batch-size that is a multiple of {ranks}, or start another number of processes"
        )
