"""Options of recipes and stages: validators for attrs fields, and numbers that depend on the step.

A validator names the option, its value and what it must be. Stages and recipes share these:

    @attrs.frozen
    class Norm:
        limit: float = attrs.field(default=1.0, validator=number(low=0, low_open=True))
"""

from __future__ import annotations

import math
import numbers
import reprlib
import sys
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk.errors import OptionError, near_names
from kfactk.sides import AUTO

LARGEST = torch.finfo(torch.float32).max
"""Largest learning rate, damping or weight decay: float32 overflows above."""
USUAL_LR = 0.003
"""The learning rate of a recipe that names none."""
USUAL_DAMPING = 0.001
"""tau where neither the user nor the update rule says another: that of EKFACadam in the thesis."""
Number = float | Callable[[int], float]
"""A number, or a function of the step (from 0) that gives one."""
Period = int | Callable[[int], int]
"""A number of steps, or a function of the step that gives one."""
Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]
"""What attrs calls with the instance, the attribute and the value."""


def shortened(written: Any) -> Any:
    """Return a written stage by its name alone where it has no options.

    Example:
        >>> shortened({"name": "kfac"}), shortened({"name": "kfac", "solver": "eigh"})
        ('kfac', {'name': 'kfac', 'solver': 'eigh'})
    """
    return written["name"] if set(written) == {"name"} else written


def refusal(
    instance: object, attribute: attrs.Attribute[Any], value: object, must: str
) -> OptionError:
    """Return the error that a validator raises.

    Args:
        instance: The object whose option it is.
        attribute: The option.
        value: Its value.
        must: What the value must be, and the remedy, in words that follow "it must be".
    """
    owner = type(instance).__name__
    shown = f"{attribute.alias or attribute.name}={reprlib.repr(value)}"
    return OptionError(f"{owner}: {shown} cannot work: it must be {must}.")


def number(
    low: float = -math.inf,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
    optional: bool = False,
    hint: str = "",
) -> Validator:
    """Return a validator for a finite number in an interval.

    Args:
        low: Least value.
        high: Largest value.
        low_open: Whether `low` itself is refused.
        high_open: Whether `high` itself is refused.
        optional: Whether `None` is allowed.
        hint: What else to tell, appended to the message.
    """
    must = "a finite number" + _interval(low, high, low_open, high_open) + hint

    def check(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value is None and optional:
            return
        good = _is_number(value) and abs(value) <= sys.float_info.max and low <= value <= high
        if not good or (low_open and value == low) or (high_open and value == high):
            raise refusal(instance, attribute, value, must + (" or None" if optional else ""))

    return check


def _interval(low: float, high: float, low_open: bool, high_open: bool) -> str:
    if math.isinf(low) and math.isinf(high):
        return ""
    if math.isinf(high):
        return f" greater than {low:g}" if low_open else f" of at least {low:g}"
    left, right = "(" if low_open else "[", ")" if high_open else "]"
    return f" in {left}{low:g}, {high:g}{right}"


def whole(low: int | None = 1, *, optional: bool = False, hint: str = "") -> Validator:
    """Return a validator for a whole number of at least `low`, or, where `optional`, `None`.

    A `low` of `None` allows all whole numbers.
    """
    bound = "" if low is None else f" of at least {low}"
    must = f"a whole number{bound}{' or None' if optional else ''}{hint}"

    def check(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value is None and optional:
            return
        good = isinstance(value, int) and not isinstance(value, bool)
        if not good or (low is not None and value < low):
            raise refusal(instance, attribute, value, must)

    return check


def longest_side() -> Validator:
    """Return a validator for the longest side that is a matrix: a number, `None` or "auto"."""
    number = whole(1, optional=True, hint=', or "auto"')

    def check(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value != AUTO:
            number(instance, attribute, value)

    return check


def text(*, empty: bool = False, optional: bool = False, hint: str = "") -> Validator:
    """Return a validator for a string, `empty` only where allowed, or, where `optional`, `None`."""
    must = f"a {'' if empty else 'non-empty '}string{' or None' if optional else ''}{hint}"

    def check(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value is None and optional:
            return
        if not isinstance(value, str) or not (value or empty):
            raise refusal(instance, attribute, value, must)

    return check


def choice(*allowed: object, hint: str = "") -> Validator:
    """Return a validator for one of the `allowed` values; `hint` is appended to the message."""
    must = f"one of {', '.join(map(repr, allowed))}{hint}"
    names = [each for each in allowed if isinstance(each, str)]

    def check(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not any(
            value is each or (type(value) is type(each) and value == each) for each in allowed
        ):
            near = near_names(str(value), names)
            raise OptionError(f"{refusal(instance, attribute, value, must)}{near}")

    return check


def flag(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Check that a value is True or False."""
    if not isinstance(value, bool):
        raise refusal(instance, attribute, value, "True or False")


def function(*, optional: bool = True, hint: str = "") -> Validator:
    """Return a validator for a callable, or, where `optional`, `None`."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not callable(value) and not (optional and value is None):
            raise refusal(instance, attribute, value, f"a function{hint}")

    return check


def as_tuple(value: Any) -> Any:
    """Convert a list, as read from JSON, to a tuple; leave anything else to the validator."""
    return tuple(value) if isinstance(value, list) else value


def period_at(name: str, period: Period, step: int) -> int:
    """Return the period at `step`, checked.

    Raises:
        OptionError: It is not a whole number of at least 1.
    """
    value = python_number(period(step) if callable(period) else period)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        where = f" at step {step}" if callable(period) else ""
        raise OptionError(
            f"{name} is {value!r}{where}; it counts steps, so it must be a whole number of at "
            "least 1."
        )
    return value


def number_at(
    name: str, number: Number, step: int, *, low: float = 0.0, high: float = math.inf
) -> float:
    """Return the number at `step`, checked.

    Raises:
        OptionError: It is not a number in [low, high].
    """
    value = python_number(number(step) if callable(number) else number)
    finite = _is_number(value) and abs(value) <= LARGEST
    if not finite or not low <= value <= high:
        where = f" at step {step}" if callable(number) else ""
        bounds = _interval(low, high, False, False)
        large = _is_number(value) and LARGEST < abs(value) < math.inf
        most = f", at most {LARGEST:.1e} (float32 ends there)" if large else ""
        shown = reprlib.repr(value)
        raise OptionError(f"{name} is {shown}{where}; it must be a finite number{bounds}{most}.")
    return float(value)


def python_number(value: Any) -> Any:
    """Return a number of NumPy's as Python's own, also in a list or tuple; others unchanged.

    Example:
        >>> import numpy
        >>> python_number(numpy.float32(0.5)), python_number("adam")
        (0.5, 'adam')
    """
    if type(value) in (list, tuple):
        return type(value)(map(python_number, value))
    foreign = isinstance(value, numbers.Number) and not isinstance(value, int | float | complex)
    return value.item() if foreign and hasattr(value, "item") else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """Return a tensor of one element, as torch takes learning rates, as its number."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
