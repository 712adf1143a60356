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
from experiments.results import Epoch, Run
from experiments.tracking import Tracking


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


def plan(study: Study, dataset: Dataset, device: torch.device, output: Path) -> list[Job]:
    """The runs of a study: all algorithms with the first seed, then with the next.

    Raises:
        ExperimentError: An algorithm's settings cannot work.
    """
    for algorithm in study.algorithms.values():
        algorithms.check(algorithm)
    images, data, shared = dataset.checksum(), attrs.asdict(study.data), attrs.asdict(study.training)
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


def run(jobs: list[Job], dataset: Dataset, device: torch.device, tracking: Tracking, progress: Progress) -> Iterator[Run]:
    """Do the runs that are not finished, and give the results of all."""
    dataset = attrs.evolve(dataset, train=dataset.train.to(device), test=dataset.test.to(device))
    for job in jobs:
        record = job.folder.record()
        if record is None or record.status == store.UNDER_WAY:
            record = _run_one(job, record, dataset, device, tracking, progress)
        else:
            progress.skipped(job.label, len(record.history))
        yield Run(job.algorithm.name, job.seed, record.status, record.history, record.settings["algorithm"])


def _run_one(
    job: Job, record: store.Record | None, dataset: Dataset, device: torch.device, tracking: Tracking, progress: Progress
) -> store.Record:
    trainer = training.Trainer(job.study, job.algorithm, job.seed, dataset, device)
    try:
        if record is not None and (state := job.folder.checkpoint()) is not None:
            trainer.load_state_dict(state)
        earlier = None if record is None else record.mlflow_run_id
        run_id = tracking.start(job.algorithm.name, job.seed, job.settings, trainer.history, earlier)
        record = store.Record(job.settings, store.UNDER_WAY, run_id, tuple(trainer.history))
        job.folder.write_record(record)
        with tracking.recording(run_id), progress.run(job.label, training.steps(job.study, dataset), trainer.history) as shown:
            while not trainer.finished:
                epoch = trainer.run_epoch(shown.step)
                record = _keep(job, record, trainer, epoch)
                tracking.log(run_id, [epoch], trainer.points)
                shown.epoch(epoch)
        record = attrs.evolve(record, status="diverged" if trainer.diverged else "finished")
        job.folder.write_model(trainer.model.state_dict())
        job.folder.write_record(record)
        tracking.end(run_id, record.status)
        return record
    finally:
        trainer.close()


def _keep(job: Job, record: store.Record, trainer: training.Trainer, epoch: Epoch) -> store.Record:
    job.folder.write_checkpoint(trainer.state_dict())
    record = attrs.evolve(record, history=(*record.history, epoch))
    job.folder.write_record(record)
    return record
