"""What an optimizer keeps between steps: saved, and loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk.distributed.communicator import Communicator
from kfactk.distributed.gathering import Progress, gather_state
from kfactk.errors import KfactkError, StateError, memory_ran_out
from kfactk.optim.saved_groups import check_numbers
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.damage import REMEDY, Damage, number_of
from kfactk.preconditioner.state import STEP, BlockState, is_ours

Groups = Sequence[Mapping[str, Any]]
LAST_STEP = 2**53
"""Most steps that a state may have taken: numbers of steps stay exact in double precision."""


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


def gathered(
    blocks: Sequence[Block], communicator: Communicator, to: int | None, device: torch.device
) -> dict[int, dict[str, Tensor]]:
    """Bring what other ranks have of the curvature to one rank; a collective call.

    Args:
        blocks: The blocks.
        communicator: The ranks.
        to: The rank that gets it; `None` for all.
        device: Where tensors are for their way.

    Returns:
        What arrived on this rank, by the id of the parameter that it is saved under.

    Raises:
        OptionError: There is no such rank.
    """
    flat = {block.name: block.flat() for block in blocks}
    arrived = gather_state(flat, communicator, to, device)
    found: dict[int, dict[str, Tensor]] = {}
    for block in blocks:
        found.setdefault(id(block.layer.anchor), {}).update(arrived.get(block.name, {}))
    return found


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
            StateError: It has not the form of an optimizer's state.
        """
        damage = Damage()
        numbers = _checked_numbers(state_dict, damage)
        parameters = [parameter for group in groups for parameter in group["params"]]
        curvature = {}
        rule = {key: entry for key, entry in state_dict["state"].items() if key not in numbers}
        _check_strangers(rule, damage)
        mine = {n: state_dict["state"][n] for n in numbers if n in state_dict["state"]}
        step = _step_of(mine, damage)
        damage.refuse()
        for number, parameter in zip(numbers, parameters, strict=False):  # torch checks sizes
            entry = mine.get(number, {})
            ours = {k: v for k, v in entry.items() if is_ours(k) and k != STEP}
            theirs = {k: v for k, v in entry.items() if not is_ours(k)}
            if ours:
                curvature[id(parameter)] = on_cpu(ours)
            if theirs or (number in mine and not entry):
                rule[number] = theirs
        return cls(curvature, rule, step)


def _checked_numbers(state_dict: Any, damage: Damage) -> list[Any]:
    """Check the form that torch gives to an optimizer's state; return the parameters' numbers.

    Raises:
        StateError: It is another one.
    """
    given = state_dict if isinstance(state_dict, Mapping) else {}
    entries: Any = given.get("state")
    groups: Any = given.get("param_groups")
    good = (
        isinstance(entries, Mapping)
        and isinstance(groups, list)
        and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups)
    )
    if good:
        numbers = check_numbers(groups, damage)
        damage.refuse()
        good = all(isinstance(entries.get(number, {}), Mapping) for number in numbers)
    if not good:
        raise StateError(
            'the saved state is damaged: it must hold "state", a dict of dicts, and '
            '"param_groups", a list of dicts with "params", as Optimizer.state_dict() gives them. '
            f"{REMEDY}"
        )
    return numbers


def _check_strangers(entries: Mapping[Any, Any], damage: Damage) -> None:
    """Check what does not stand under a parameter's number: it is the rule's or the user's own."""
    for key, entry in entries.items():
        if isinstance(entry, Mapping) and any(map(is_ours, entry)):
            damage.note(
                f'state[{key!r}] holds curvature, but no parameter in "param_groups" has this '
                "number"
            )


def _step_of(entries: Mapping[Any, Mapping[Any, Any]], damage: Damage) -> int:
    """Return the number of steps taken, which all entries that tell it agree on."""
    found = {}
    for number, entry in entries.items():
        if STEP in entry:
            step = number_of(entry[STEP], 0, LAST_STEP, whole=True)
            found[step] = number
            if step is None:
                damage.note(f"state[{number!r}][{STEP!r}] is no number of steps")
    if len(found) > 1 and None not in found:
        told = ", ".join(f"{step} in state[{number!r}]" for step, number in found.items())
        damage.note(f"its entries do not agree on {STEP!r}: {told}")
    return int(next(iter(found), 0) or 0)


def on_cpu(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry whose single numbers are on the CPU; each device is waited for once."""
    elsewhere: dict[Any, dict[str, Tensor]] = {}
    for key, value in entry.items():
        single = isinstance(value, Tensor) and not value.ndim and value.layout == torch.strided
        if single and value.device.type not in ("cpu", "meta"):
            elsewhere.setdefault((value.device, value.dtype), {})[key] = value
    moved = dict(entry)
    for tensors in elsewhere.values():
        moved |= zip(tensors, torch.stack([*tensors.values()]).cpu().unbind(), strict=True)
    return moved


@contextlib.contextmanager
def all_or_nothing(*optimizers: torch.optim.Optimizer, fits: bool = True) -> Iterator[None]:
    """Surround the loading of a state: a failure leaves the optimizers' state and groups unchanged.

    Args:
        *optimizers: The optimizers.
        fits: Whether the sizes of the groups fit: torch's own error for those that do not remains.

    Raises:
        StateError: An update rule cannot take the state over.
    """
    before = [(optimizer, optimizer.state, optimizer.param_groups) for optimizer in optimizers]
    try:
        yield
    except BaseException as error:
        for optimizer, state, groups in before:
            optimizer.state, optimizer.param_groups = state, groups
        passed = KfactkError | MemoryError if fits else KfactkError | MemoryError | ValueError
        if isinstance(error, Exception) and not isinstance(error, passed):
            if memory_ran_out(error):
                raise
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
    if len(saved) != len(current):  # torch says so
        return [dict(group) for group in saved]
    completed = []
    for own, group in zip(current, saved, strict=True):
        completed.append({**{name: own[name] for name in known if name in own}, **group})
    return completed


def fit(saved: Groups, current: Groups) -> bool:
    """Return whether saved groups have the sizes of the current ones."""
    return [len(group["params"]) for group in saved] == [len(g["params"]) for g in current]


def progress_of(step: int, states: Mapping[str, BlockState]) -> Progress:
    """Return what ranks compare before they go on with these states."""
    layers = {
        n: (state.ready, attrs.astuple(state.overdue), state.pace.due)
        for n, state in states.items()
    }
    return Progress(step, layers)
