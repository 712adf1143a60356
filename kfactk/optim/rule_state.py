"""What an update rule keeps of each parameter: checked when it is loaded, and made safe to change.

What torch's own rules keep is known, so that shapes, kinds and ranges can be checked. Any other
rule may keep anything: of that, tensors without data and NaN are refused, and the rule itself may
refuse more in its `load_state_dict` or `__setstate__`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfactk.distributed.sharding import is_sharded
from kfactk.preconditioner.damage import Damage, form_fault, number_of

Group = Mapping[str, Any]
Entry = Mapping[Any, Any]

STEP, RATE, SHARE = "step", "rate", "share"
"""Single numbers: of steps; of at least 0; in [0, 1]."""
MEAN, SIZE, SQUARE, ROWS, COLUMNS = "mean", "size", "square", "rows", "columns"
"""Tensors: finite; finite and of at least 0; the same, where inf may stand for an overflow, after
which a rule goes on with a step of zero. They have the parameter's shape, but for the last two:
sizes of its rows and of its columns."""
OPTIONAL = "?"
"""Ends the names of what a rule makes where it is missing."""
_ADAM = {"step": STEP, "exp_avg": MEAN, "exp_avg_sq": SQUARE}
Kept = dict[str, str]


def _adam(group: Group, parameter: Tensor) -> Kept:
    return {**_ADAM, "max_exp_avg_sq": SQUARE} if group.get("amsgrad") else _ADAM


def _rmsprop(group: Group, parameter: Tensor) -> Kept:
    momentum = {"momentum_buffer": MEAN} if group.get("momentum") else {}
    return (
        {"step": STEP, "square_avg": SQUARE}
        | momentum
        | ({"grad_avg": MEAN} if group.get("centered") else {})
    )


def _adafactor(group: Group, parameter: Tensor) -> Kept:
    if parameter.ndim > 1:
        return {"step": STEP, "row_var": ROWS, "col_var": COLUMNS}
    return {"step": STEP, "variance": SQUARE}


def _always(kept: Kept) -> Callable[[Group, Tensor], Kept]:
    return lambda group, parameter: kept


KEPT: dict[type[torch.optim.Optimizer], Callable[[Group, Tensor], Kept]] = {
    torch.optim.Adadelta: _always({"step": STEP, "square_avg": SQUARE, "acc_delta": SIZE}),
    torch.optim.Adagrad: _always({"step": STEP, "sum": SQUARE}),
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.Adamax: _always({"step": STEP, "exp_avg": MEAN, "exp_inf": SQUARE}),
    torch.optim.ASGD: _always({"step": STEP, "eta": RATE, "mu": SHARE, "ax": MEAN}),
    torch.optim.NAdam: _always({**_ADAM, "mu_product": SHARE}),
    torch.optim.RAdam: _always(_ADAM),
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Rprop: _always({"step": STEP, "prev": MEAN, "step_size": SIZE}),
    torch.optim.SGD: _always({f"momentum_buffer{OPTIONAL}": MEAN}),
}
"""What the rules of torch keep of a parameter. Classes derived from them may keep anything."""
for _name, _kept in (
    ("Adafactor", _adafactor),
    ("Muon", _always({f"momentum_buffer{OPTIONAL}": MEAN})),
):  # not in every torch
    if hasattr(torch.optim, _name):
        KEPT[getattr(torch.optim, _name)] = _kept
MADE_AT_ONCE = (torch.optim.Adagrad,)
"""Rules that make their entries when they are made, and need one of each trained parameter."""


def check_entries(
    rule: type[torch.optim.Optimizer],
    entries: Mapping[Any, Entry],
    saved: Sequence[Group],
    current: Sequence[Group],
    sparse: frozenset[int],
    damage: Damage,
) -> None:
    """Check an update rule's saved entries.

    Args:
        rule: The class of the update rule.
        entries: By the parameter's number.
        saved: The saved groups, of the sizes of the current ones.
        current: The groups they are loaded into.
        sparse: The ids of parameters whose gradients are sparse.
        damage: Receives what is wrong.
    """
    for old, new in zip(saved, current, strict=True):
        for number, parameter in zip(old["params"], new["params"], strict=True):
            entry, where = entries.get(number, {}), f"state[{number!r}]"
            kept: Kept = {}
            needed = bool(entry) or (rule in MADE_AT_ONCE and parameter.requires_grad)
            if rule in KEPT and needed:
                kept = KEPT[rule](old, parameter)
            names = {key.removesuffix(OPTIONAL) for key in kept}
            _check_anything(where, {k: v for k, v in entry.items() if k not in names}, damage)
            _check_kept(rule, where, entry, kept, parameter, id(parameter) in sparse, damage)


def _check_kept(
    rule: type[torch.optim.Optimizer],
    where: str,
    entry: Entry,
    kept: Kept,
    parameter: Tensor,
    sparse: bool,
    damage: Damage,
) -> None:
    """Check what a rule of torch keeps of one parameter."""
    for key, form in kept.items():
        name = key.removesuffix(OPTIONAL)
        place = f"{where}[{name!r}]"
        if name in entry and not (entry[name] is None and rule is torch.optim.SGD):
            _check_one(place, entry[name], form, parameter, sparse, damage)
        elif not key.endswith(OPTIONAL):
            damage.note_misfit(f"{place} is missing, which {rule.__name__} needs")


def _check_anything(where: str, value: Any, damage: Damage) -> None:
    """Refuse tensors without data, and NaN, wherever they are."""
    if isinstance(value, Tensor):
        if fault := form_fault(value):
            damage.note(f"{where} {fault}")
        elif (value.is_floating_point() or value.is_complex()) and not value.is_quantized:
            damage.check_values(where, value, infinite=True)
    elif isinstance(value, float) and math.isnan(value):
        damage.note(f"{where} is NaN")
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _check_anything(f"{where}[{key!r}]", each, damage)
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            _check_anything(f"{where}[{number}]", each, damage)


def _check_one(
    where: str, value: Any, form: str, parameter: Tensor, sparse: bool, damage: Damage
) -> None:
    """Check what a rule of torch keeps under one key."""
    if form in (STEP, RATE, SHARE):
        most = 1.0 if form == SHARE else sys.float_info.max
        exact = not isinstance(value, Tensor) or value.dtype in (torch.float32, torch.float64)
        real = not isinstance(value, Tensor) or value.is_floating_point()
        if number_of(value, 0, most) is None or not (exact if form == STEP else real):
            bounds = "in [0, 1]" if form == SHARE else "of at least 0"
            damage.note(f"{where} is no single floating-point number {bounds}")
        return
    if fault := _tensor_fault(value, parameter, sparse):
        damage.note(f"{where} {fault}")
        return
    shape = list(parameter.shape)
    if form in (ROWS, COLUMNS):
        shape[-1 if form == ROWS else -2] = 1
    if list(value.shape) != shape:
        damage.note_misfit(f"{where} has the shape {list(value.shape)}, where it must be {shape}")
        return
    damage.check_values(
        where,
        value,
        low=-math.inf if form == MEAN else 0,
        high=torch.finfo(parameter.dtype).max,
        infinite=form == SQUARE,
    )


def _tensor_fault(value: Any, parameter: Tensor, sparse: bool) -> str:
    """Return why a value cannot be a rule's tensor of a parameter; "" where it can."""
    if fault := form_fault(value):
        return fault
    if value.is_complex() != parameter.is_complex() or not (
        value.is_floating_point() or value.is_complex()
    ):
        return f"has the dtype {value.dtype}, which is not of the kind of {parameter.dtype}"
    if value.layout != torch.strided and not (sparse and value.layout == torch.sparse_coo):
        return f"is no dense tensor, but one of layout {value.layout}"
    if is_sharded(value) != is_sharded(parameter):
        return (
            f"is a {type(value).__name__}, where the parameter is a {type(parameter).__name__}: "
            "load it through torch.distributed.checkpoint.state_dict"
        )
    return ""


def owned(entries: Mapping[Any, Entry], parameters: Mapping[Any, Tensor]) -> dict[Any, Any]:
    """Return entries whose tensors a rule can change in place.

    torch does not copy tensors when it loads them. What has the parameter's shape, and shares
    memory or is not laid out as the parameter, is copied; the others stay as they are.

    Args:
        entries: By the parameter's number.
        parameters: By number.
    """
    seen: set[int] = set()
    return {
        number: {
            key: _owned(value, parameters[number], seen) if number in parameters else value
            for key, value in entry.items()
        }
        if isinstance(entry, Mapping)
        else entry
        for number, entry in entries.items()
    }


def _owned(value: Any, parameter: Tensor, seen: set[int]) -> Any:
    if not isinstance(value, Tensor) or is_sharded(value) or value.layout != torch.strided:
        return value
    if value.requires_grad:
        value = value.detach()
    if value.shape != parameter.shape or not value.numel() or value.is_meta:
        return value.contiguous() if 0 in value.stride() else value
    pointer = value.untyped_storage().data_ptr()
    odd = value.stride() != parameter.stride() and not is_sharded(parameter)
    if odd or pointer in seen or value.is_inference():
        value = torch.empty_like(parameter if odd else value, dtype=value.dtype).copy_(value)
    seen.add(pointer)
    return value
