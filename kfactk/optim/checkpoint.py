"""What an optimizer keeps between steps: saved, and loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk.distributed.gathering import Progress
from kfactk.errors import StateError
from kfactk.options import number_at, plain
from kfactk.preconditioner.state import STEP, BlockState, is_ours

Groups = Sequence[Mapping[str, Any]]


def joined(
    rule: Mapping[str, Any],
    groups: Groups,
    curvature: Mapping[int, Mapping[str, Any]],
    step: Tensor,
) -> dict[str, Any]:
    """Return an update rule's saved state with the curvature in it; entries are new dicts.

    Args:
        rule: As the rule's `state_dict` gave it.
        groups: The parameter groups.
        curvature: Entries by the id of the parameter.
        step: Number of steps taken.

    Raises:
        StateError: The rule's state has not torch's form, so that nothing can be added to it.
    """
    entries = dict(rule["state"])
    for saved, group in zip(rule["param_groups"], groups, strict=True):
        for number, parameter in zip(saved["params"], group["params"], strict=True):
            if number not in entries and not parameter.requires_grad:
                continue
            entry = entries.get(number, {})
            if not isinstance(entry, Mapping):
                raise StateError(
                    f"the update rule keeps a {type(entry).__name__} for a parameter, and "
                    "curvature can be saved beside the items of a dict only. Use an update rule "
                    "whose state of each parameter is a dict."
                )
            entries[number] = {**entry, STEP: step, **curvature.get(id(parameter), {})}
    return {**rule, "state": entries}


@attrs.frozen(eq=False)
class SavedState:
    """A saved optimizer state in its parts.

    Args:
        curvature: The curvature's entries, by the id of the parameter.
        rule: The update rule's entries, by the parameter's number.
        step: The number of steps taken.
    """

    curvature: dict[int, dict[str, Tensor]]
    rule: dict[int, dict[str, Any]]
    step: int

    @classmethod
    def split(cls, state_dict: Mapping[str, Any], groups: Groups) -> SavedState:
        """Divide a saved state.

        Args:
            state_dict: As `torch.optim.Optimizer.state_dict` gives it.
            groups: The parameter groups it is loaded into.

        Raises:
            StateError: It has not the form of an optimizer's state, or holds NaN.
        """
        _check_form(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in groups for parameter in group["params"]]
        curvature, step = {}, 0
        rule = {key: entry for key, entry in state_dict["state"].items() if key not in numbers}
        for number, parameter in zip(numbers, parameters, strict=False):  # torch checks sizes
            entry = state_dict["state"].get(number, {})
            step = int(entry.get(STEP, step))
            ours = {k: v for k, v in entry.items() if is_ours(k) and k != STEP}
            theirs = {k: v for k, v in entry.items() if not is_ours(k)}
            if ours:
                curvature[id(parameter)] = ours
            if theirs or (number in state_dict["state"] and not entry):
                rule[number] = theirs
            if wrong := sorted(str(key) for key, value in theirs.items() if _has_nan(value)):
                raise StateError(
                    f"the saved state is damaged: the update rule's {', '.join(wrong)} holds NaN. "
                    "Load an earlier checkpoint."
                )
        return cls(curvature, rule, step)


def _has_nan(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(torch.isnan(value).any())


def _check_form(state_dict: Mapping[str, Any]) -> None:
    """Check the form that torch gives to an optimizer's state, as far as it is read here.

    Raises:
        StateError: It is another one.
    """
    given = state_dict if isinstance(state_dict, Mapping) else {}
    entries, groups = given.get("state"), given.get("param_groups")
    good = (
        isinstance(entries, Mapping)
        and isinstance(groups, list)
        and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups)
    )
    if good and groups and entries:  # what stands under other keys is the rule's: anything
        numbers = {number for group in groups for number in group["params"]}
        mine = [entry for number, entry in entries.items() if number in numbers]
        good = all(isinstance(e, Mapping) and _is_count(e.get(STEP, 0)) for e in mine)
    if not good:
        raise StateError(
            'the saved state is damaged: it must hold "state", a dict of dicts, and '
            '"param_groups", a list of dicts with "params", with a number of steps in each entry, '
            "as Optimizer.state_dict() gives them. Load an earlier checkpoint."
        )


def _is_count(step: Any) -> bool:
    if isinstance(step, Tensor):
        finite = step.numel() == 1 and bool(torch.isfinite(step).all())
        return finite and bool((step >= 0).all())
    return isinstance(step, int) and step >= 0


@contextlib.contextmanager
def all_or_nothing(*optimizers: torch.optim.Optimizer) -> Iterator[None]:
    """Surround the loading of a state: a failure leaves the optimizers' state and groups unchanged.

    Raises:
        StateError: An update rule does not find in the state what it needs.
    """
    before = [(optimizer, optimizer.state, optimizer.param_groups) for optimizer in optimizers]
    try:
        yield
    except BaseException as error:
        for optimizer, state, groups in before:
            optimizer.state, optimizer.param_groups = state, groups
        if isinstance(error, AttributeError | LookupError | TypeError):
            raise StateError(
                f"the update rule cannot take over the saved state ({type(error).__name__}: "
                f"{error}): something of it is missing, or is another rule's. Bind the recipe it "
                "was saved with, or load an earlier checkpoint."
            ) from error
        raise


def completed_groups(
    saved: Groups, current: Groups, known: Mapping[str, Any], rule: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return saved parameter groups, completed by the current values of what they lack.

    Groups of a bare update rule, or of an older torch, lack some.

    Args:
        saved: From the state to be loaded.
        current: The groups it is loaded into.
        known: All hyperparameters there are.
        rule: Those of the update rule. Numbers among them have always been there: groups without
            them are another rule's.

    Raises:
        StateError: The groups are another update rule's.
        OptionError: A learning rate, damping or weight decay is no such number.
    """
    numbers = [
        name
        for name, value in rule.items()
        if isinstance(value, int | float | tuple) and not isinstance(value, bool)
    ]
    for group in saved:
        if lacking := sorted(name for name in numbers if name not in group):
            raise StateError(
                "the saved state is another update rule's: its parameter groups have no "
                f"{', '.join(lacking)}. Bind the recipe it was saved with."
            )
        for name in ("lr", "damping", "weight_decay"):
            if name in group:
                number_at(f"{name} of a saved parameter group", plain(group[name]), 0)
    if len(saved) != len(current):  # torch says so
        return [dict(group) for group in saved]
    completed = []
    for own, group in zip(current, saved, strict=True):
        completed.append({**{name: own[name] for name in known if name in own}, **group})
    return completed


def progress_of(step: int, states: Mapping[str, BlockState]) -> Progress:
    """Return what ranks compare before they go on with these states."""
    layers = {n: (state.ready, attrs.astuple(state.overdue)) for n, state in states.items()}
    return Progress(step, layers)
