"""A tracker that keeps metrics until the end of an epoch: an interrupted epoch records none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor


@attrs.frozen
class Point:
    """The metrics of one step."""

    step: int
    metrics: dict[str, float]


class Collector:
    """A kfactk tracker, passed to `kfactk.build` as an instance.

    Args:
        every: Record one step in so many.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._steps: list[tuple[int, dict[str, Tensor | float]]] = []

    @property
    def every(self) -> int:
        """Record one step in so many."""
        return self._every

    def start(self, recipe: Mapping[str, Any]) -> None:
        """Do nothing."""

    def record(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Keep the metrics of one step; tensors stay on their device."""
        self._steps.append((step, dict(metrics)))

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def take(self) -> list[Point]:
        """Return all metrics, and forget them."""
        steps, self._steps = self._steps, []
        return [
            Point(step, {name: float(value) for name, value in metrics.items()})
            for step, metrics in steps
        ]


def means(points: list[Point]) -> dict[str, float]:
    """Return the mean of each metric over the points where it is finite."""
    values: dict[str, list[float]] = {}
    for point in points:
        for name, value in point.metrics.items():
            if math.isfinite(value):
                values.setdefault(name, []).append(value)
    return {name: sum(known) / len(known) for name, known in values.items()}
