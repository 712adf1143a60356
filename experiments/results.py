"""The results of the runs as plain numbers, for table, figures, claims and report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from experiments.config import Algorithm, Experiment

METRICS = {
    "train_loss": "training loss",
    "train_accuracy": "training accuracy",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
}
"""The four metrics: key to name. Training metrics are means over the steps of an epoch; test
metrics are measured after it."""


@attrs.frozen
class Epoch:
    """One pass over the training images.

    Args:
        epoch: Its number, from 1.
        steps: Number of optimizer steps.
        seconds: Time of the training steps, without evaluation.
        train_loss: Mean cross-entropy, in nats.
        train_accuracy: In per cent.
        test_loss: Mean cross-entropy, in nats.
        test_accuracy: In per cent.
        curvature: Metrics of the second-order stages: means over the epoch.
    """

    epoch: int
    steps: int
    seconds: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    curvature: dict[str, float] = attrs.field(factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """The four metrics."""
        return {key: getattr(self, key) for key in METRICS}


@attrs.frozen
class Run:
    """One algorithm with one seed.

    Args:
        algorithm: The algorithm's name.
        seed: The seed.
        status: "finished", or "diverged": the loss became infinite or NaN, and the run stopped.
        history: Its epochs.
        settings: All settings of the optimizer, with defaults.
    """

    algorithm: str
    seed: int
    status: str
    history: tuple[Epoch, ...]
    settings: dict[str, Any]


@attrs.frozen
class Spread:
    """Mean, smallest and largest value over seeds."""

    seeds: int
    mean: float
    low: float
    high: float

    def text(self, digits: int) -> str:
        """Return `mean±half the range` with `digits` decimals; one seed has no range.

        Small means are written with powers of ten.
        """
        if not math.isfinite(self.mean):
            return "diverged"
        form = ".1e" if 0 < self.mean < 10 ** (1 - digits) else f".{digits}f"
        return (
            f"{self.mean:{form}}"
            if self.seeds == 1
            else f"{self.mean:{form}}±{(self.high - self.low) / 2:{form}}"
        )


@attrs.frozen(eq=False)
class Results:
    """All runs of an experiment."""

    experiment: Experiment
    dataset: str
    device: str
    runs: Sequence[Run]

    @property
    def algorithms(self) -> list[Algorithm]:
        """Algorithms that have runs, in the experiment's order."""
        names = {run.algorithm for run in self.runs}
        return [
            algorithm for name, algorithm in self.experiment.algorithms.items() if name in names
        ]

    def of(self, algorithm: str) -> list[Run]:
        """Return the runs of one algorithm."""
        return [run for run in self.runs if run.algorithm == algorithm]

    @property
    def epochs(self) -> int:
        """Epochs of the longest run."""
        return max(len(run.history) for run in self.runs)

    def curves(self, algorithm: str, metric: str) -> np.ndarray[Any, Any]:
        """Return a row for each seed and a column for each epoch; NaN where there is no value."""
        rows = np.full((len(self.of(algorithm)), self.epochs), np.nan)
        for row, run in zip(rows, self.of(algorithm), strict=True):
            values = np.array([getattr(epoch, metric) for epoch in run.history])
            row[: len(values)] = np.where(np.isfinite(values), values, np.nan)
        return rows

    def final(self, algorithm: str, metric: str) -> Spread:
        """Return the value of the last epoch over seeds; not finite where a seed diverged."""
        last = self.curves(algorithm, metric)[:, -1]
        return Spread(len(last), float(last.mean()), float(last.min()), float(last.max()))

    def seconds(self, algorithm: str) -> float:
        """Return the median seconds of an epoch, over epochs and seeds."""
        return float(
            np.median([epoch.seconds for run in self.of(algorithm) for epoch in run.history])
        )

    def relative_seconds(self, algorithm: str) -> float | None:
        """Return the seconds of an epoch as a multiple of SGD's; `None` where SGD did not run."""
        return self.seconds(algorithm) / self.seconds("sgd") if self.of("sgd") else None
