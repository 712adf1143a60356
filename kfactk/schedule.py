"""When factors, scales and decompositions are due, and numbers that may be functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
from torch import Tensor

from kfactk.errors import OptionError

Number = float | Callable[[int], float]
"""A number, or a function of the step (from 0) that gives one."""
Period = int | Callable[[int], int]
"""A number of steps, or a function of the step that gives one."""


@attrs.frozen
class Due:
    """What is due at one step."""

    factors: bool
    scale: bool
    basis: bool


NOTHING = Due(False, False, False)


def due_at(step: int, factor_every: Period, scale_every: Period, basis_every: Period) -> Due:
    """What is due at `step`: each period on its own, everything at step 0. A refreshed basis measures its scale anew.

    Example:
        >>> due_at(20, 10, 10, 100)
        Due(factors=True, scale=True, basis=False)
    """
    factors, scale, basis = (
        step % period_at(name, every, step) == 0
        for name, every in (("factor_every", factor_every), ("scale_every", scale_every), ("basis_every", basis_every))
    )
    return Due(factors, scale or basis, basis)


@attrs.frozen
class Calendar:
    """What is due when, and whose turn it is where decompositions take turns.

    Staggered, layers are decomposed in turns spread over `basis_every` steps, instead of all in one. Turns fall on steps where factors
    and scale are due, `stride = lcm(factor_every, scale_every)` apart, so that no further pass is needed; each layer still waits
    `basis_every` steps from one refresh to the next. At the first step every layer is due.

    Args:
        factor_every: Steps between refreshes of the factors, as `due_at` takes it; so are the next two.
        scale_every: Steps between refreshes of the scale.
        basis_every: Steps between decompositions.
        stagger: Whether layers take turns; periods must be whole numbers then.

    Raises:
        OptionError: Layers are to take turns, and a period is a function.

    Example:
        >>> calendar = Calendar(10, 10, 100, stagger=True)
        >>> calendar.turns, calendar.turn(130), calendar.turn(131)
        (10, 3, None)
    """

    factor_every: Period
    scale_every: Period
    basis_every: Period
    stagger: bool = False

    def __attrs_post_init__(self) -> None:
        if self.stagger and any(callable(period) for period in (self.factor_every, self.scale_every, self.basis_every)):
            raise OptionError(
                "stagger=True needs factor_every, scale_every and basis_every as whole numbers: turns are laid out over one period. "
                "Give numbers, or leave stagger out."
            )

    def at(self, step: int) -> Due:
        """What is due at `step`, for the layers whose turn it is."""
        due = due_at(step, self.factor_every, self.scale_every, self.basis_every)
        return Due(due.factors, due.scale, self.turn(step) is not None) if self.stagger else due

    def periods(self, step: int) -> tuple[int, int, int]:
        """The periods of factors, scale and basis, as they are at `step`."""
        named = {"factor_every": self.factor_every, "scale_every": self.scale_every, "basis_every": self.basis_every}
        factors, scale, basis = (period_at(name, period, step) for name, period in named.items())
        return factors, scale, basis

    @property
    def turns(self) -> int:
        """Number of turns in a period; 1 when all layers are decomposed together."""
        factors, scale, basis = self.periods(0)
        return max(1, basis // math.lcm(factors, scale)) if self.stagger else 1

    def turn(self, step: int) -> int | None:
        """Whose turn it is at `step`; `None` when it is nobody's."""
        factors, scale, basis = self.periods(step)
        if not self.stagger:
            return 0 if step % basis == 0 else None
        number, rest = divmod(step % basis, math.lcm(factors, scale))
        return number if rest == 0 and number < self.turns else None


def period_at(name: str, period: Period, step: int) -> int:
    """The period at `step`, checked.

    Raises:
        OptionError: It is not a whole number of at least 1.
    """
    value = period(step) if callable(period) else period
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        where = f" at step {step}" if callable(period) else ""
        raise OptionError(f"{name} is {value!r}{where}; it counts steps, so it must be a whole number of at least 1.")
    return value


def number_at(name: str, number: Number, step: int, *, low: float = 0.0, high: float = float("inf")) -> float:
    """The number at `step`, checked.

    Raises:
        OptionError: It is not a number in [low, high].
    """
    value = number(step) if callable(number) else number
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or math.isinf(value):
        where = f" at step {step}" if callable(number) else ""
        bounds = f"of at least {low:g}, and finite" if high == float("inf") else f"between {low:g} and {high:g}"
        raise OptionError(f"{name} is {value!r}{where}; it must be a number {bounds}.")
    return float(value)


def plain(value: Any) -> Any:
    """A tensor of one element, as torch takes learning rates, as its number; anything else as it is."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
