"""Options of recipes and stages: numbers that may be functions of the step, and their validators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kfactk.errors import OptionError

Number = float | Callable[[int], float]
"""A number, or a function of the step (from 0) that gives one."""


Period = int | Callable[[int], int]
"""A number of steps, or a function of the step that gives one."""


def period_at(name: str, period: Period, step: int) -> int:
    """The period at `step`, checked.

    Raises:
        OptionError: It is not a whole number of at least 1.
    """
    value = period(step) if callable(period) else period
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        where = f" at step {step}" if callable(period) else ""
        raise OptionError(
            f"{name} is {value!r}{where}; it counts steps, so it must be a whole number of at least 1."
        )
    return value


def number_at(
    name: str, number: Number, step: int, *, low: float = 0.0, high: float = float("inf")
) -> float:
    """The number at `step`, checked.

    Raises:
        OptionError: It is not a number in [low, high].
    """
    value = number(step) if callable(number) else number
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not low <= value <= high
        or math.isinf(value)
    ):
        where = f" at step {step}" if callable(number) else ""
        bounds = (
            f"of at least {low:g}, and finite"
            if high == float("inf")
            else f"between {low:g} and {high:g}"
        )
        raise OptionError(f"{name} is {value!r}{where}; it must be a number {bounds}.")
    return float(value)


def plain(value: Any) -> Any:
    """A tensor of one element, as torch takes learning rates, as its number; anything else as it is."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
