"""Controllers: what sets lr, momentum and damping in each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import attrs


@attrs.frozen
class QuadraticModel:
    """The quadratic model of the loss h along two directions: what a controller decides by.

        M(d) - M(0) = <grad h, d> + d^T (F + eta I + lambda I) d / 2
        d = lr v_0 + momentum v_1

    v_0 is minus the preconditioned gradient, and v_1 the last step, which is zero at first. h is
    the mini-batch loss with `eta |theta|^2 / 2`, where eta is the weight decay of each group. F is
    the exact Fisher matrix of all parameters together on the mini-batch, and no approximation.

    Args:
        slopes: `<grad h, v_i>`.
        curvature: `v_i^T (F + eta I) v_j`.
        squares: `<v_i, v_j>`.

    Example:
        >>> model = QuadraticModel((-2.0, 0.0), ((3.0, 0.0), (0.0, 0.0)), ((1.0, 0.0), (0.0, 0.0)))
        >>> model.change((0.5, 0.0), damping=1.0)
        -0.5
    """

    slopes: tuple[float, float]
    curvature: tuple[tuple[float, float], tuple[float, float]]
    squares: tuple[tuple[float, float], tuple[float, float]]

    def damped(self, damping: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return `v_i^T (F + eta I + lambda I) v_j`, `[2][2]`."""
        (a, b), (c, d) = (
            tuple(one + damping * other for one, other in zip(*rows, strict=True))
            for rows in zip(self.curvature, self.squares, strict=True)
        )
        return (a, b), (c, d)

    def change(self, step: tuple[float, float], damping: float) -> float:
        """Return `M(d) - M(0)`.

        Args:
            step: lr and momentum.
            damping: lambda.
        """
        matrix = self.damped(damping)
        linear = sum(slope * size for slope, size in zip(self.slopes, step, strict=True))
        square = sum(
            matrix[i][j] * step[i] * step[j] for i in range(len(step)) for j in range(len(step))
        )
        return linear + square / 2


@attrs.frozen
class ControlRates:
    """How often a controller wants more work than a step without it.

    Args:
        tries: By number of dampings that are tried in a step, the share of such steps.
        evaluations: Share of steps after which the loss is evaluated again.

    Example:
        >>> rates = ControlRates({1: 0.75, 3: 0.25}, evaluations=0.5)
        >>> rates.mean_tries, rates.most_tries, rates.directions
        (1.5, 3, 2.5)
    """

    tries: Mapping[int, float]
    evaluations: float

    @property
    def mean_tries(self) -> float:
        """Dampings that are tried in a mean step; each but the first solves again."""
        return sum(number * share for number, share in self.tries.items())

    @property
    def most_tries(self) -> int:
        """Most dampings that are tried in a step."""
        return max(self.tries)

    @property
    def directions(self) -> float:
        """Forwards with derivatives in a mean step: one for each damping, and for the last step."""
        return self.mean_tries + 1


class Controller(Protocol):
    """Sets lr, momentum and damping in each step, by the quadratic model and the loss.

    The framework evaluates the model and the loss, and keeps the numbers in the parameter groups:
    "lr", "momentum", "damping" and those that `numbers` names. A controller sees numbers alone, the
    same on every rank.

    It needs an update rule that keeps its velocity (`Update`), and a closure in each step. It may
    have an attribute `needs`: laws that no basis of the recipe may waive (`WAIVABLE`).

    Laws: what it returns depends on the arguments alone, and is finite. A step that `decide` gives
    never raises the model above `M(0)`, and without a last step its momentum is 0.
    """

    @property
    def numbers(self) -> Mapping[str, float]:
        """Its own numbers by name, each with its first value."""

    def first_damping(self, weight_decay: float) -> float:
        """Return the damping of the blocks that a recipe has where the user gives none."""

    def dampings(self, step: int, numbers: Mapping[str, float]) -> Sequence[float]:
        """Return the dampings of the blocks to try in a step: positive, the present one first.

        Args:
            step: Index of the step, from 0.
            numbers: All numbers by name.
        """

    def decide(
        self, models: Sequence[QuadraticModel], numbers: Mapping[str, float]
    ) -> tuple[int, float, float]:
        """Return which of the dampings is taken, and lr and momentum of the step.

        Args:
            models: One for each damping.
            numbers: All numbers by name.
        """

    def evaluates(self, step: int) -> bool:
        """Return whether the loss is evaluated after a step: one more forward and backward."""

    def adapt(
        self, before: float, after: float, model: QuadraticModel, numbers: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Return the new values of its own numbers, by what a step did to the loss.

        Args:
            before: h before the step.
            after: h after it on the same mini-batch; it may be infinite or NaN.
            model: The model of the step.
            numbers: All numbers by name, lr and momentum those of the step.
        """
