"""Parameter groups of a saved state: checked against the update rule that is to take them over."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfactk.errors import OptionError
from kfactk.optim.rule_state import KEPT
from kfactk.options import number_at, python_number
from kfactk.preconditioner.damage import Damage

Group = Mapping[str, Any]
COMMON = ("lr", "damping", "weight_decay")
"""Numbers that every group has."""
SWITCHES = ("foreach", "fused")
"""Options of torch's rules that are `None` until torch chooses, and otherwise flags."""


def check_groups(
    saved: Sequence[Group],
    current: Sequence[Group],
    rule: type[torch.optim.Optimizer],
    options: Group,
    damage: Damage,
    controlled: frozenset[str] = frozenset(),
) -> None:
    """Check saved parameter groups.

    Args:
        saved: The saved groups.
        current: Those they are loaded into; of other sizes, which torch refuses, it may be.
        rule: The class of the update rule.
        options: The rule's options, with the values that a new optimizer has.
        damage: Receives what is wrong.
        controlled: Numbers that a controller sets, which may have any sign.
    """
    for number, group in enumerate(saved):
        where = f"param_groups[{number}]"
        names = group.get("param_names")
        if names is not None and not _are_names(names, len(group["params"])):
            damage.note(f"{where}['param_names'] is no list of one name for each parameter")
        faults = {
            name: fault
            for name, value in group.items()
            if (fault := _fault(f"{where}[{name!r}]", name, value, options, controlled))
        }
        for fault in faults.values():
            damage.note(fault)
        own = current[number]["params"] if number < len(current) else ()
        if not faults and rule in KEPT and (fault := _refused(rule, group, own)):
            damage.note(f"{where} is refused by {rule.__name__}: {fault}")


def check_numbers(saved: Sequence[Group], damage: Damage) -> list[Any]:
    """Check the parameters' numbers, which may be texts, and return them."""
    found = [number for group in saved for number in group["params"]]
    odd = [number for number in found if not isinstance(number, int | str)]
    for number in odd:
        damage.note(f"'params' holds {_shown(number)}, which is no number of a parameter")
    if not odd:
        twice = [number for number, times in Counter(found).items() if times > 1]
        if twice:
            damage.note(f"'params' holds {_shown(twice[0])} more than once")
    return found


def _fault(where: str, name: str, value: Any, options: Group, controlled: frozenset[str]) -> str:
    """Return why a value cannot be that of an option; "" where it can."""
    value = _plain(value)
    if name in COMMON:
        given: Any = repr(value) if callable(value) else value
        low = -math.inf if name in controlled else 0.0
        try:
            number_at(where, given, 0, low=low)
        except OptionError as error:
            return str(error).removesuffix(".")
    elif name in options:
        fault = _unlike(value, options[name], switch=name in SWITCHES)
        return f"{where} {fault}" if fault else ""
    return ""


def _unlike(value: Any, default: Any, *, switch: bool = False) -> str:
    """Return why a value is not of the kind of an option's default; "" where it is."""
    if isinstance(default, bool) or switch:
        flag = isinstance(value, bool) or (switch and value is None)
        return "" if flag else f"is {_shown(value)}, where it must be True or False"
    if isinstance(default, int | float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and (math.isfinite(value) or not math.isfinite(default)):
            return "" if not math.isnan(value) else "is NaN"
        return f"is {_shown(value)}, where it must be a finite number"
    if isinstance(default, tuple):
        if not isinstance(value, tuple | list) or len(value) != len(default):
            return f"is {_shown(value)}, where it must hold {len(default)} values"
        faults = (_unlike(_plain(v), d) for v, d in zip(value, default, strict=True))
        return next(filter(None, faults), "")
    if isinstance(default, str) and not isinstance(value, str):
        return f"is {_shown(value)}, where it must be a text"
    return ""


def _refused(rule: type[torch.optim.Optimizer], group: Group, parameters: Sequence[Tensor]) -> str:
    """Return why a rule of torch refuses a group's options; "" where it takes them."""
    like = parameters[0] if len(parameters) else torch.zeros(())
    probe = torch.zeros((1, 1), dtype=like.dtype, device=like.device)
    taken = inspect.signature(rule).parameters
    options = {name: value for name, value in group.items() if name in taken and name != "params"}
    try:
        rule([probe], **options)
    except (ValueError, TypeError, RuntimeError) as error:
        return str(error)
    return ""


def _plain(value: Any) -> Any:
    """Return a number in a tensor or of NumPy's as Python's own; anything else unchanged."""
    if isinstance(value, Tensor):
        readable = value.numel() == 1 and not value.is_meta and value.layout == torch.strided
        return value.item() if readable else value
    return python_number(value)


def _are_names(names: Any, number: int) -> bool:
    good = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return good and len(names) == number


def _shown(value: Any) -> str:
    return reprlib.repr(value) if not isinstance(value, Tensor) else f"a tensor {list(value.shape)}"
