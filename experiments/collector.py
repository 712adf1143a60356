"""A tracker that holds a second-order optimiser's figures until the epoch is over, so that an interrupted epoch leaves none behind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor


@attrs.frozen
class Point:
    """The figures of one step."""

    step: int
    metrics: dict[str, float]


class Collector:
    """A kfactk tracker, handed to `kfactk.build` as an instance.

    Args:
        every: Record one step in so many.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._held: list[tuple[int, dict[str, Tensor | float]]] = []

    @property
    def every(self) -> int:
        """Record one step in so many."""
        return self._every

    def start(self, recipe: Mapping[str, Any]) -> None:
        """Nothing is to be prepared."""

    def record(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Hold the figures of one step; tensors stay on their device."""
        self._held.append((step, dict(metrics)))

    def flush(self) -> None:
        """Nothing is written here."""

    def close(self) -> None:
        """Nothing is to be let go of."""

    def take(self) -> list[Point]:
        """All that is held, which is then forgotten."""
        held, self._held = self._held, []
        return [
            Point(step, {name: float(value) for name, value in metrics.items()})
            for step, metrics in held
        ]


def means(points: list[Point]) -> dict[str, float]:
    """Mean of each figure over the points in which it is finite."""
    values: dict[str, list[float]] = {}
    for point in points:
        for name, value in point.metrics.items():
            if math.isfinite(value):
                values.setdefault(name, []).append(value)
    return {name: sum(known) / len(known) for name, known in values.items()}
