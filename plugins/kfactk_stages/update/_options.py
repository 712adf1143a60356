"""Checks that the update rules' options share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kfactk import OptionError

if TYPE_CHECKING:
    import attrs


def _refuse(instance: Any, attribute: attrs.Attribute[Any], value: Any, must: str) -> OptionError:
    return OptionError(
        f"{type(instance).__name__}: {attribute.name}={value!r} cannot work: it must be {must}."
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def decay(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Attrs validator: a number in [0, 1)."""
    if not (_number(value) and 0 <= value < 1):
        raise _refuse(
            instance,
            attribute,
            value,
            "a number in [0, 1), such as 0.9; 0 keeps nothing of the past",
        )


def fraction(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Attrs validator: a number in [0, 1]."""
    if not (_number(value) and 0 <= value <= 1):
        raise _refuse(instance, attribute, value, "a number in [0, 1]")


def non_negative(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Attrs validator: a finite number, zero or more."""
    if not (_number(value) and value >= 0):
        raise _refuse(instance, attribute, value, "a finite number, zero or more, such as 1e-8")


def betas(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Attrs validator: two numbers in [0, 1)."""
    pair = isinstance(value, tuple) and len(value) == 2
    if not (pair and all(_number(beta) and 0 <= beta < 1 for beta in value)):
        raise _refuse(instance, attribute, value, "two numbers in [0, 1), such as (0.9, 0.999)")


def as_tuple(value: Any) -> Any:
    """Attrs converter: a list, as read from JSON, becomes a tuple; anything else is left to the validator."""
    return tuple(value) if isinstance(value, list) else value


def flag(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Attrs validator: True or False."""
    if not isinstance(value, bool):
        raise _refuse(instance, attribute, value, "True or False")


def implementation(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Attrs validator for `foreach` and `fused`: True, False or None, and not both True."""
    if not (value is None or isinstance(value, bool)):
        raise _refuse(
            instance, attribute, value, "True, False or None; None leaves the choice to torch"
        )
    if value and attribute.name == "fused" and instance.foreach:
        raise OptionError(
            f"{type(instance).__name__}: foreach=True and fused=True exclude each other. Leave one of them None."
        )
