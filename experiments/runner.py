"""All runs of a study, one after the other, kept and recorded at the end of every epoch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch

from experiments import algorithms, store, training
from experiments.config import Algorithm, Study
from experiments.data import Dataset
from experiments.errors import ExperimentError
from experiments.progress import Progress
from experiments.ranks import Communicator
from experiments.results import Run
from experiments.tracking import Tracking, Untracked


@attrs.frozen(eq=False)
class Job:
    """One run that is to be done."""

    study: Study
    algorithm: Algorithm
    seed: int
    settings: dict[str, Any]
    folder: store.RunFolder

    @property
    def label(self) -> str:
        """For readers."""
        return f"{self.algorithm.label}, seed {self.seed}"


def plan(
    study: Study, dataset: Dataset, device: torch.device, output: Path, ranks: Communicator
) -> list[Job]:
    """The runs of a study: all algorithms with the first seed, then with the next.

    Raises:
        ExperimentError: An algorithm's settings cannot work, or the processes cannot share its batches.
    """
    _check_parts(study.training.batch_size, ranks.size)
    for algorithm in study.algorithms.values():
        algorithms.check(algorithm)
    images, data, shared = (
        dataset.checksum(),
        attrs.asdict(study.data),
        attrs.asdict(study.training),
    )
    for key in ("seeds", "threads"):
        shared.pop(key)
    return [
        Job(
            study=study,
            algorithm=algorithm,
            seed=seed,
            settings={
                "data": {**data, "checksum": images},
                "model": study.model.name,
                "training": shared,
                "algorithm": algorithms.described(algorithm, seed=seed),
                "seed": seed,
                "device": device.type,
                "processes": ranks.size,
            },
            folder=store.folder(output, algorithm.name, seed),
        )
        for seed in study.training.seeds
        for algorithm in study.algorithms.values()
    ]


def check_resumable(jobs: list[Job]) -> None:
    """Refuse to go on from runs that were made with other settings.

    Raises:
        ExperimentError: Names the first such run and what differs.
    """
    for job in jobs:
        record = job.folder.record()
        if record is not None and (found := store.differences(record.settings, job.settings)):
            raise ExperimentError(
                f"--resume: {job.folder.path} was made with other settings ({'; '.join(found[:3])}): give the same ones, choose another "
                "--output, or leave out --resume to start afresh"
            )


@attrs.frozen(eq=False)
class Means:
    """What all runs are done with.

    Args:
        device: Where the work is done.
        ranks: Who shares it.
        tracking: Where it is recorded.
        progress: Where it is shown.
    """

    device: torch.device
    ranks: Communicator
    tracking: Tracking | Untracked
    progress: Progress


def run(jobs: list[Job], dataset: Dataset, by: Means) -> Iterator[Run]:
    """Do the runs that are not finished, and give the results of all."""
    device = by.device
    dataset = attrs.evolve(dataset, train=dataset.train.to(device), test=dataset.test.to(device))
    for job in jobs:
        record = by.ranks.lead(job.folder.record)
        if record is None or record.status == store.UNDER_WAY:
            record = _run_one(job, record, dataset, by)
        else:
            by.progress.skipped(job.label, len(record.history))
        yield Run(
            job.algorithm.name,
            job.seed,
            record.status,
            record.history,
            record.settings["algorithm"],
        )


def _run_one(
    job: Job, record: store.RecordedCall | None, dataset: Dataset, by: Means
) -> store.RecordedCall:
    trainer = training.Trainer(job.study, job.algorithm, job.seed, dataset, by.device, by.ranks)
    try:
        if record is not None and (state := by.ranks.lead(job.folder.checkpoint)) is not None:
            trainer.load_state_dict(state)
        earlier = None if record is None else record.mlflow_run_id
        run_id = by.tracking.start(
            job.algorithm.name, job.seed, job.settings, trainer.history, earlier
        )
        record = _keep(
            job,
            by.ranks,
            store.RecordedCall(job.settings, store.UNDER_WAY, run_id, tuple(trainer.history)),
        )
        steps = training.steps(job.study, dataset, by.ranks.size)
        with (
            by.tracking.recording(run_id),
            by.progress.run(job.label, steps, trainer.history) as shown,
        ):
            while not trainer.finished:
                epoch = trainer.run_epoch(shown.step)
                record = attrs.evolve(record, history=(*record.history, epoch))
                _keep(job, by.ranks, record, checkpoint=trainer.state_dict())
                by.tracking.log(run_id, [epoch], trainer.points)
                shown.epoch(epoch)
        record = attrs.evolve(record, status="diverged" if trainer.diverged else "finished")
        _keep(job, by.ranks, record, model=trainer.model.state_dict())
        by.tracking.end(run_id, record.status)
        return record
    finally:
        trainer.close()


def _keep(
    job: Job,
    ranks: Communicator,
    record: store.RecordedCall,
    *,
    checkpoint: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
) -> store.RecordedCall:
    """Write what is given, the record last, if it is on this process to write."""
    if ranks.first:
        if checkpoint is not None:
            job.folder.write_checkpoint(checkpoint)
        if model is not None:
            job.folder.write_model(model)
        job.folder.write_record(record)
    return record


def _check_parts(batch_size: int, ranks: int) -> None:
    if batch_size % ranks:
        raise ExperimentError(
            f"a batch of {batch_size} images cannot be shared equally by {ranks} processes: give a --batch-size that is a multiple of "
            f"{ranks}, or start another number of processes"
        )
