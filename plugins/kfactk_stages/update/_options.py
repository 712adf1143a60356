"""Validators of options that several update rules have."""

from __future__ import annotations

from typing import Any

import attrs

from kfactk import OptionError
from kfactk.options import choice, number, refusal

decay = number(low=0, high=1, high_open=True, hint=", such as 0.9")
"""Check a decay rate, in [0, 1)."""
_flag_or_none = choice(True, False, None, hint="; None leaves the choice to torch")


def decay_pair(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Check two decay rates, each in [0, 1)."""
    if not (isinstance(value, tuple) and len(value) == 2):
        raise refusal(instance, attribute, value, "two numbers in [0, 1), such as (0.9, 0.999)")
    for rate in value:
        decay(instance, attribute, rate)


def implementation(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Check `foreach` and `fused`: each True, False or None, and not both True."""
    _flag_or_none(instance, attribute, value)
    if value and attribute.name == "fused" and instance.foreach:
        raise OptionError(
            f"{type(instance).__name__}: foreach=True and fused=True exclude each other. "
            "Leave one of them None."
        )
