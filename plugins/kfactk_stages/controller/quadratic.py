"""The controller of K-FAC: lr and momentum minimise the quadratic model, the loss sets damping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs

from kfactk import OptionError, QuadraticModel, hookimpl
from kfactk.options import flag, number, whole

LAMBDA = "model_damping"
"""The name of lambda among the numbers of a parameter group."""
PARALLEL = 1e-6
"""Squared sine of the angle between two directions below which rounding decides between them."""
GOOD, BAD = 0.75, 0.25
"""Reduction ratios above and below which lambda changes."""


@attrs.frozen
class Quadratic:
    """Minimise the quadratic model over lr and momentum; adapt both dampings as K-FAC does.

        (alpha, mu) = argmin M(alpha D + mu d_0),    M(d) = h + <grad h, d> + d^T B d / 2
        B = F + (lambda + eta) I

    D is minus the preconditioned gradient and d_0 the last step. alpha is written to "lr" and mu to
    "momentum". F is the exact Fisher matrix on the mini-batch, eta the weight decay. Either number
    may be negative.

    lambda, in "model_damping", follows Levenberg and Marquardt. Every T1 steps

        rho = (h(theta + d) - h(theta)) / (M(d) - M(0))
        lambda <- omega^T1 lambda    where rho > 3/4,    lambda / omega^T1    where rho < 1/4

    A loss that is not finite counts as rho < 1/4. The blocks have a damping of their own, gamma^2,
    in "damping": it is what "kfac" divides between both factors. It starts as `lambda + eta`. Every
    T2 steps gamma, omega_2 gamma and gamma / omega_2 are tried, and the one with the lowest M is
    taken; `omega_2 = omega^(T2 / 2)`.

    Args:
        model_damping: The first lambda.
        adapt_every: T1, steps between evaluations of the loss after a step.
        search_every: T2, steps between trials of gamma.
        omega: The factor of lambda for each step, below 1.
        least: Lower bound of lambda and of gamma^2.
        most: Upper bound of both.
        damped_ratio: Whether M in rho has lambda in it. Without, rho is 1 where the loss is
            quadratic, whatever lambda.

    Raises:
        OptionError: An option has a value that cannot work, or `least` is above `most`.

    Example:
        >>> model = QuadraticModel((-2.0, 0.0), ((3.0, 0.0), (0.0, 0.0)), ((1.0, 0.0), (0.0, 0.0)))
        >>> numbers = {"lr": 0.0, "momentum": 0.0, "damping": 1.0, "model_damping": 1.0}
        >>> Quadratic().decide([model], numbers)
        (0, 0.5, 0.0)

    References:
        Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
        curvature", arXiv:1503.05671, sections 6.4 to 7.
        Moré 1978, "The Levenberg-Marquardt algorithm: implementation and theory".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"damped-inverse"})
    """Otherwise a changed damping need not make another direction."""

    model_damping: float = attrs.field(default=150.0, validator=number(low=0, low_open=True))
    adapt_every: int = attrs.field(default=5, validator=whole())
    search_every: int = attrs.field(default=20, validator=whole())
    omega: float = attrs.field(
        default=19 / 20, validator=number(low=0, high=1, low_open=True, high_open=True)
    )
    least: float = attrs.field(default=1e-8, validator=number(low=0, low_open=True))
    most: float = attrs.field(default=1e8, validator=number(low=0, low_open=True))
    damped_ratio: bool = attrs.field(default=True, validator=flag)

    def __attrs_post_init__(self) -> None:
        if not self.least <= self.model_damping <= self.most:
            raise OptionError(
                f"Quadratic: model_damping={self.model_damping} is not between least={self.least} "
                f"and most={self.most}. Give bounds that it lies between."
            )

    @property
    def numbers(self) -> Mapping[str, float]:
        """The damping lambda of the model."""
        return {LAMBDA: self.model_damping}

    def first_damping(self, weight_decay: float) -> float:
        """Return `gamma^2 = lambda + eta`."""
        return self._bounded(self.model_damping + weight_decay)

    def dampings(self, step: int, numbers: Mapping[str, float]) -> Sequence[float]:
        """Return gamma^2, every T2 steps with two neighbours."""
        now = numbers["damping"]
        if (step + 1) % self.search_every:
            return [now]
        factor = self.omega**self.search_every
        tried = [now, self._bounded(factor * now), self._bounded(now / factor)]
        return list(dict.fromkeys(tried))

    def decide(
        self, models: Sequence[QuadraticModel], numbers: Mapping[str, float]
    ) -> tuple[int, float, float]:
        """Return the damping whose minimum is the lowest, and that minimum."""
        damping = numbers[LAMBDA]
        found = [minimum(model, damping) for model in models]
        changes = [model.change(step, damping) for model, step in zip(models, found, strict=True)]
        best = changes.index(min(changes))
        return best, *found[best]

    def evaluates(self, step: int) -> bool:
        """Return whether `step + 1` is a multiple of T1."""
        return (step + 1) % self.adapt_every == 0

    def adapt(
        self, before: float, after: float, model: QuadraticModel, numbers: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Return the next lambda."""
        damping = numbers[LAMBDA]
        ratio = self.reduction_ratio(before, after, model, numbers)
        factor = self.omega**self.adapt_every
        if ratio > GOOD:
            damping *= factor
        elif ratio < BAD:
            damping /= factor
        return {LAMBDA: self._bounded(damping)}

    def reduction_ratio(
        self, before: float, after: float, model: QuadraticModel, numbers: Mapping[str, float]
    ) -> float:
        """Return rho; -inf where the loss is not finite, and 1/2 where nothing was predicted.

        Args:
            before: As for `adapt`, like the other arguments.
            after: Likewise.
            model: Likewise.
            numbers: Likewise.
        """
        if not math.isfinite(after):
            return -math.inf
        step = numbers["lr"], numbers["momentum"]
        predicted = model.change(step, numbers[LAMBDA] if self.damped_ratio else 0.0)
        return (after - before) / predicted if predicted else 0.5

    def _bounded(self, damping: float) -> float:
        return min(max(damping, self.least), self.most)


def minimum(model: QuadraticModel, damping: float) -> tuple[float, float]:
    """Return lr and momentum with which a model is lowest.

    Where one direction is zero, or the two are parallel, a single one is used: the first that is
    not zero.

    Args:
        model: The model.
        damping: lambda.

    Example:
        >>> both = QuadraticModel((-1.0, -1.0), ((2.0, 0.0), (0.0, 4.0)), ((1.0, 0.0), (0.0, 1.0)))
        >>> minimum(both, 0.0)
        (0.5, 0.25)
    """
    (a, b), (_, d) = model.damped(damping)
    first, second = model.slopes
    determinant = a * d - b * b
    if determinant > PARALLEL * a * d:
        return (b * second - d * first) / determinant, (b * first - a * second) / determinant
    if a > 0:
        return -first / a, 0.0
    return 0.0, -second / d if d > 0 else 0.0


@hookimpl
def kfactk_controllers() -> dict[str, type[Quadratic]]:
    """Register the controller `quadratic`."""
    return {"quadratic": Quadratic}
