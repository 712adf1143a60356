"""The running mean of a block's gradient, in its own coordinates and in those of its basis."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from kfactk.preconditioner.first_moment import FirstMoment
from kfactk.statistics import RunningMean

MEAN, TURNED = "mean", "turned"
"""Names of the running mean of the gradient, and of the same in the coordinates of the basis."""


@attrs.define(eq=False)
class TurnedGradients:
    """What a step knows of gradients in the coordinates of the basis.

    A basis whose operator is diagonal in coordinates turns the gradient into these to measure its
    moments. The mean is linear, so it is averaged there as well, and need not be turned again until
    the basis changes.

    Args:
        measured: The gradient of the step, and its coordinates.
        averaged: What is preconditioned, and its coordinates.
    """

    measured: tuple[Tensor, Tensor] | None = None
    averaged: tuple[Tensor, Tensor] | None = None

    def coordinates(self, gradient: Tensor) -> Tensor | None:
        """Return the coordinates of what is preconditioned; `None` where they are not known."""
        if self.averaged is None or self.averaged[0] is not gradient:
            return None
        return self.averaged[1]

    def clear(self) -> None:
        """Drop what the step knows."""
        self.measured = self.averaged = None

    def average(
        self,
        means: dict[str, RunningMean],
        gradient: Tensor,
        moment: FirstMoment,
        turn: Callable[[Tensor], Tensor | None],
    ) -> Tensor:
        """Take a gradient into its running means, and return what is preconditioned.

        A gradient that is not finite, or whose sum is not, leaves the means as they are.

        Args:
            means: Changed: "mean", and "turned" where the basis has coordinates.
            gradient: `[..., d_out, d_in]`.
            moment: How gradients are averaged.
            turn: Gives the coordinates of a matrix, where there are some; called where the basis is
                new, and for a gradient that was not measured.
        """
        mean = means.setdefault(MEAN, RunningMean())
        known, self.measured = self.measured, None
        turned = means.pop(TURNED, None)
        good = torch.isfinite(gradient.sum())
        told = known[1] if known is not None and known[0] is gradient else None
        if mean.value is not None and mean.weight > 0:
            gradient = _unless(good, gradient, mean.value)
        elif not bool(good):
            return gradient
        mean.update(gradient, moment.decay)
        found = moment.of(mean, gradient)
        told = turn(gradient) if told is None else told
        if told is not None and mean.value is not None:
            if turned is None or turned.value is None or turned.weight == 0:
                turned = RunningMean(turn(mean.value), mean.weight)
                told = _unless(good, told, turned.value)
            else:
                told = _unless(good, told, turned.value)
                turned.update(told, moment.decay)
            means[TURNED] = turned
            self.averaged = found, moment.of(turned, told)
        return found


def _unless(good: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    """Return `new` where it is good, else `old`; no device but a CPU is waited for."""
    assert old is not None
    if good.device.type == "cpu":
        return new if good else old
    return torch.where(good, new, old)
