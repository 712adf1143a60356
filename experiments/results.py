"""What the runs gave: plain numbers, on which table, figures, claims and report are built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from experiments.config import Algorithm, Study

METRICS = {
    "train_loss": "training loss",
    "train_accuracy": "training accuracy",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
}
"""The four figures of the study: key to name. Training figures are means over the epoch's steps, as training goes on; test figures are
measured after it."""


@attrs.frozen
class Epoch:
    """One pass over the training images.

    Args:
        epoch: Its number, from 1.
        steps: Optimiser steps in it.
        seconds: Time of its training steps, without evaluation.
        train_loss: Mean cross-entropy, in nats.
        train_accuracy: In per cent.
        test_loss: Mean cross-entropy, in nats.
        test_accuracy: In per cent.
        curvature: Figures of the second-order stages, meaned over the epoch.
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
        """The four figures."""
        return {key: getattr(self, key) for key in METRICS}


@attrs.frozen
class Run:
    """One algorithm with one seed.

    Args:
        algorithm: The algorithm's name.
        seed: The seed.
        status: "finished" or "diverged" (the loss became infinite or not a number, and the run was stopped).
        history: Its epochs.
        settings: All settings of the optimiser, defaults included.
    """

    algorithm: str
    seed: int
    status: str
    history: tuple[Epoch, ...]
    settings: dict[str, Any]


@attrs.frozen
class Spread:
    """Mean, smallest and largest over so many seeds."""

    seeds: int
    mean: float
    low: float
    high: float

    def text(self, digits: int) -> str:
        """As `mean±half the range`, with so many digits after the point, or as powers of ten where they would show little; one seed has
        no range."""
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
    """All runs of a study."""

    study: Study
    dataset: str
    device: str
    runs: Sequence[Run]

    @property
    def algorithms(self) -> list[Algorithm]:
        """Algorithms that have runs, in the study's order."""
        names = {run.algorithm for run in self.runs}
        return [algorithm for name, algorithm in self.study.algorithms.items() if name in names]

    def of(self, algorithm: str) -> list[Run]:
        """The runs of one algorithm."""
        return [run for run in self.runs if run.algorithm == algorithm]

    @property
    def epochs(self) -> int:
        """Epochs of the longest run."""
        return max(len(run.history) for run in self.runs)

    def curves(self, algorithm: str, metric: str) -> np.ndarray[Any, Any]:
        """One row a seed, one column an epoch; not a number where a run diverged or had stopped."""
        rows = np.full((len(self.of(algorithm)), self.epochs), np.nan)
        for row, run in zip(rows, self.of(algorithm), strict=True):
            values = np.array([getattr(epoch, metric) for epoch in run.history])
            row[: len(values)] = np.where(np.isfinite(values), values, np.nan)
        return rows

    def final(self, algorithm: str, metric: str) -> Spread:
        """The last epoch's value over seeds; not finite when a seed diverged."""
        last = self.curves(algorithm, metric)[:, -1]
        return Spread(len(last), float(last.mean()), float(last.min()), float(last.max()))

    def seconds(self, algorithm: str) -> float:
        """Median seconds of an epoch over epochs and seeds."""
        return float(
            np.median([epoch.seconds for run in self.of(algorithm) for epoch in run.history])
        )

    def relative_seconds(self, algorithm: str) -> float | None:
        """Seconds of an epoch, as a multiple of SGD's; `None` when SGD did not run."""
        return self.seconds(algorithm) / self.seconds("sgd") if self.of("sgd") else None
