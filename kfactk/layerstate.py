"""What is kept of one layer between steps, and its form in a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk.averages import RunningMean
from kfactk.errors import StateError
from kfactk.packing import Form
from kfactk.samples import Samples, Statistic
from kfactk.schedule import NOTHING, Due, number_at, plain
from kfactk.sums import add, guarded

PREFIX = "kfactk."
"""First part of every key that the curvature has in `Optimizer.state`."""
STEP = f"{PREFIX}step"
"""Key of the number of steps taken, which every parameter's entry has."""
OWED = f"{PREFIX}owed"
"""Key of what a layer owes, as a sum: 1 for factors, 2 for the scale, 4 for the basis, 8 for factors of inputs alone."""
Groups = Sequence[Mapping[str, Any]]
READY = f"{PREFIX}ready"
"""Key of whether a layer has been decomposed from factors that have seen data, on this rank or another."""
Kept = tuple[bool, dict[str, dict[str, Tensor]], dict[str, RunningMean]]
"""Whether there is a decomposition, its part on this rank, and the moments measured in it."""


@attrs.define(eq=False)
class LayerState:
    """Factors, decomposition and moments of one layer, and what is pending within the current step.

    Each rank has a state for every layer; the tensors lie on the ranks that its placement chose.

    Args:
        parameters: Names of the parameters its matrices are made for; other names make the state void.
        factors: Running means of the curvature's factors, those that are kept on this rank.
        decomposition: For each matrix, its decomposition; empty where other ranks precondition.
        moments: Running means of the basis' moments, likewise.
        ready: Whether it can precondition, here or elsewhere: decomposed from factors that have seen data.
        forms: Of each matrix' decomposition, the forms of its parts, where they are known.
        staged: Sums of the forward whose passes are under way: "factor.NAME", "moment.NAME".
        pending: Sums of the forwards of this step that are done.
        retained: Samples kept until `step()` because the basis is refreshed first.
        borrowed: The inputs that they read, each with its version then.
        owed: What was due when it last did not run, and still is.
        missed: Whether it did not run when it was last due.
        seen: Passes that reached the layer in this step, whatever their worth.
        bad: How many of them were not finite, on the device.
    """

    parameters: tuple[str, ...]
    factors: dict[str, RunningMean] = attrs.Factory(dict)
    decomposition: dict[str, dict[str, Tensor]] = attrs.Factory(dict)
    moments: dict[str, RunningMean] = attrs.Factory(dict)
    ready: bool = False
    forms: dict[str, dict[str, Form]] = attrs.Factory(dict)
    staged: dict[str, Statistic] = attrs.Factory(dict)
    pending: dict[str, Statistic] = attrs.Factory(dict)
    retained: list[Samples] = attrs.Factory(list)
    borrowed: list[tuple[Tensor, int]] = attrs.Factory(list)
    owed: Due = NOTHING
    missed: bool = False
    seen: int = 0
    bad: list[Tensor] = attrs.Factory(list)

    @property
    def measured(self) -> bool:
        """Whether all its factors on this rank have seen data."""
        return bool(self.factors) and all(mean.weight > 0 for mean in self.factors.values())

    @property
    def allocated(self) -> bool:
        """Whether its tensors exist, with data or without."""
        return bool(self.decomposition or self.factors)

    def factor_values(self) -> dict[str, Tensor]:
        """The factors' means by name."""
        return _values(self.factors)

    def moment_values(self) -> dict[str, Tensor]:
        """The measured moments' means by name."""
        return _values({name: mean for name, mean in self.moments.items() if mean.weight > 0})

    def settle(self) -> None:
        """End a forward: what it gave joins the sums of the step, all of it or, where any of it is not finite, nothing."""
        add(self.pending, guarded(self.staged, self.bad))
        self.staged.clear()

    def mark(self) -> tuple[int, int, int]:
        """Before a forward: end the last one, and note where this one's part will begin."""
        self.settle()
        return len(self.retained), len(self.borrowed), self.seen

    @property
    def settled(self) -> bool:
        """Whether it has a decomposition, or what stands for one, and owes nothing."""
        return self.ready and self.owed == NOTHING

    def back_to(self, mark: tuple[int, int, int]) -> None:
        """Forget what was gathered since `mark`."""
        self.staged.clear()
        retained, borrowed, self.seen = mark
        del self.retained[retained:], self.borrowed[borrowed:]

    def keep(self) -> Kept:
        """The decomposition and the moments measured in it, to be put back when a refresh fails."""
        return self.ready, self.decomposition, {name: attrs.evolve(mean) for name, mean in self.moments.items()}

    def put_back(self, kept: Kept) -> None:
        """Take over again what `keep` gave."""
        self.ready, self.decomposition, self.moments = kept

    def clear_pending(self) -> None:
        """Forget what this step gathered."""
        self.staged.clear()
        self.pending.clear()
        self.retained.clear()
        self.borrowed.clear()
        self.bad.clear()
        self.seen = 0

    def flat(self) -> dict[str, Tensor]:
        """The lasting part under flat keys, by reference: `kfactk.factor.A`, `kfactk.basis.A.eigenvectors`, ...

        Whether it is ready and what it owes is always there, on every rank: what ranks send each other follows from these. They are
        0-dimensional, as torch wants of whatever is not on the parameters' device.
        """
        out: dict[str, Tensor] = {}
        for kind, means in (("factor", self.factors), ("moment", self.moments)):
            for name, mean in means.items():
                if mean.value is not None:
                    out[f"{PREFIX}{kind}.{name}"] = mean.value
                    out[f"{PREFIX}{kind}.{name}.weight"] = torch.tensor(mean.weight, dtype=torch.float64)
        for factor, parts in self.decomposition.items():
            for name, tensor in parts.items():
                out[f"{PREFIX}basis.{factor}.{name}"] = tensor
        out[READY] = torch.tensor(int(self.ready), dtype=torch.int64)
        out[OWED] = torch.tensor(sum(flag << place for place, flag in enumerate(attrs.astuple(self.owed))), dtype=torch.int64)
        return out

    @classmethod
    def from_flat(cls, parameters: tuple[str, ...], flat: Mapping[str, Tensor], device: torch.device) -> LayerState:
        """Inverse of `flat`; tensors are copied to `device`, never cast.

        Raises:
            StateError: A key is not one that `flat` writes.
        """
        state = cls(parameters)
        if wrong := sorted(key for key, value in flat.items() if not isinstance(value, Tensor) or not bool(torch.isfinite(value).all())):
            raise StateError(f"the saved state is damaged: {', '.join(wrong)} is no tensor, or holds NaN or inf. Load an earlier one.")
        if lacking := sorted(key for key in flat if key.split(".")[1] in ("factor", "moment") and not _whole(key, flat)):
            raise StateError(
                f"the saved state is damaged: {', '.join(lacking)} has not both its value and its weight. Load an earlier one."
            )
        if READY not in flat:
            raise StateError(f"the saved state is damaged: it has curvature, but not {READY!r}. Load an earlier one.")
        for key, tensor in flat.items():
            kind, _, rest = key.removeprefix(PREFIX).partition(".")
            if key == OWED and tensor.numel() == 1 and 0 <= int(tensor) < 16:
                state.owed = Due(*(bool(int(tensor) >> place & 1) for place in range(4)))
                state.missed = state.owed != NOTHING
            elif key == READY and tensor.numel() == 1:
                state.ready = bool(tensor)
            elif kind in ("factor", "moment"):
                means = state.factors if kind == "factor" else state.moments
                name = rest.removesuffix(".weight")
                mean = means.setdefault(name, RunningMean())
                if rest.endswith(".weight"):
                    mean.weight = float(tensor)
                else:
                    mean.value = _copied(tensor, device)
            elif kind == "basis" and "." in rest:
                factor, _, name = rest.partition(".")
                state.decomposition.setdefault(factor, {})[name] = _copied(tensor, device)
            else:
                raise StateError(f"the saved state has a key {key!r} that this version does not know; was it written by a newer kfactk?")
        return state


def split_entries(state_dict: Mapping[str, Any], groups: Groups) -> tuple[dict[int, dict[str, Tensor]], dict[int, dict[str, Any]], int]:
    """Divide a saved optimizer state.

    Args:
        state_dict: As `torch.optim.Optimizer.state_dict` gives it.
        groups: The parameter groups it is to be loaded into.

    Returns:
        The curvature's entries by parameter id, the update rule's by parameter number, and the number of steps taken.

    Raises:
        StateError: It has not the form of an optimizer's state.
    """
    _check_form(state_dict)
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    ours, theirs, step = {}, {}, 0
    for number, parameter in zip(numbers, parameters, strict=False):  # torch refuses groups of other sizes
        entry = state_dict["state"].get(number, {})
        step = int(entry.get(STEP, step))
        if flat := {key: value for key, value in entry.items() if key.startswith(PREFIX) and key != STEP}:
            ours[id(parameter)] = flat
        if rest := {key: value for key, value in entry.items() if not key.startswith(PREFIX)}:
            theirs[number] = rest
            if wrong := sorted(key for key, value in rest.items() if isinstance(value, Tensor) and bool(torch.isnan(value).any())):
                raise StateError(f"the saved state is damaged: the update rule's {', '.join(wrong)} holds NaN. Load an earlier one.")
    return ours, theirs, step


def _check_form(state_dict: Mapping[str, Any]) -> None:
    """Hold the form that torch gives to an optimizer's state, as far as it is read here."""
    entries, groups = (state_dict.get(name) if isinstance(state_dict, Mapping) else None for name in ("state", "param_groups"))
    steps = [e.get(STEP, 0) for e in entries.values() if isinstance(e, Mapping)] if isinstance(entries, Mapping) else []
    good = isinstance(entries, Mapping) and all(isinstance(entry, Mapping) for entry in entries.values())
    good = good and isinstance(groups, list) and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups)
    if not good or not all(_is_count(step) for step in steps):
        raise StateError(
            'the saved state is damaged: it must hold "state", a dict of dicts, and "param_groups", a list of dicts with "params", with a '
            "number of steps in each entry, as Optimizer.state_dict() gives them. Load an earlier one."
        )


def _is_count(step: Any) -> bool:
    if isinstance(step, Tensor):
        return step.numel() == 1 and bool(torch.isfinite(step).all()) and bool((step >= 0).all())
    return isinstance(step, int) and step >= 0


@contextlib.contextmanager
def all_or_nothing(*optimizers: torch.optim.Optimizer) -> Iterator[None]:
    """Around the taking over of a saved state: when it fails, the optimizers have the state and groups they had.

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
                f"the update rule cannot take over the saved state ({type(error).__name__}: {error}): something of it is missing or is "
                "another rule's. Bind the recipe it was saved with, or load an earlier one."
            ) from error
        raise


def completed_groups(saved: Groups, current: Groups, known: Mapping[str, Any], rule: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Saved parameter groups, with the current values of what a bare update rule's, or an older torch's, do not have.

    Args:
        saved: From the state to be loaded.
        current: The groups it is loaded into.
        known: All hyperparameters there are.
        rule: Those of the update rule. Numbers among them have always been there, so that groups without them are another rule's.

    Raises:
        StateError: The groups are another update rule's.
        OptionError: A learning rate, damping or weight decay is no such number.
    """
    numbers = [name for name, value in rule.items() if isinstance(value, (int, float, tuple)) and not isinstance(value, bool)]
    for group in saved:
        if lacking := sorted(name for name in numbers if name not in group):
            raise StateError(
                f"the saved state is another update rule's: its parameter groups have no {', '.join(lacking)}. Bind the recipe it was "
                "saved with."
            )
        for name in ("lr", "damping", "weight_decay"):
            if name in group:
                number_at(f"{name} of a saved parameter group", plain(group[name]), 0)
    if len(saved) != len(current):  # torch says so
        return [dict(group) for group in saved]
    return [{**{name: own[name] for name in known if name in own}, **group} for own, group in zip(current, saved, strict=True)]


def _whole(key: str, flat: Mapping[str, Any]) -> bool:
    """Whether a mean's value and weight are both there, and the weight is one number that can be one."""
    value = key.removesuffix(".weight")
    weight = flat.get(f"{value}.weight")
    return value in flat and isinstance(weight, Tensor) and weight.numel() == 1 and bool((weight >= 0).all())


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)


def _values(means: Mapping[str, RunningMean]) -> dict[str, Tensor]:
    return {name: mean.value for name, mean in means.items() if mean.value is not None}
