"""What is kept of one block between steps, and its form in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk.distributed.packing import TensorSpec
from kfactk.errors import StateError
from kfactk.preconditioner.ahead import Ahead, Parts
from kfactk.preconditioner.damage import REMEDY, Damage, curvature_fault, number_of
from kfactk.preconditioner.gradient_mean import TURNED, TurnedGradients
from kfactk.preconditioner.pace_state import KEY, LONGEST, PaceState
from kfactk.preconditioner.schedule import NOTHING, DueWork
from kfactk.samples import Samples, Statistic
from kfactk.statistics import RunningMean, add_sums, drop_nonfinite

PREFIX = "kfactk."
"""First part of every curvature key in `Optimizer.state`."""
STEP = f"{PREFIX}step"
"""Key of the number of steps taken; every parameter's entry has it."""
OVERDUE, READY = "overdue", "ready"
"""Keys, after the prefix, of what a block is overdue with and of whether it can precondition.

What is overdue is a sum: 1 for factors, 2 for the scale, 4 for the basis, 8 for input factors."""
PACE = "pace"
"""First word, after the prefix, of the keys of when a block is due."""
PREPARED = "prepared"
"""First word, after the prefix, of the keys of what a link has prepared."""
MEANS = ("factor", "moment", "gradient", "link")
"""First words, after the prefix, of the keys of running means."""
LARGEST_WEIGHT = 2.0**53
"""Weights count updates; double precision counts no further."""
Savepoint = tuple[int, int, int]
Snapshot = tuple[bool, dict[str, dict[str, Tensor]], dict[str, RunningMean]]


@attrs.define(eq=False)
class BlockState:
    """Factors, decomposition and moments of one block, and what the current step has gathered.

    Each rank has a state for every block. The tensors are on the ranks that the placement chose.

    Args:
        factors: Running means of the curvature's factors that this rank keeps.
        decomposition: The decomposition of each matrix; empty where other ranks precondition.
        moments: Running means of the basis' moments, on the same ranks.
        gradients: The running mean of the gradient, "mean", where the recipe has a first moment,
            and "turned", the same in the coordinates of the basis, where it has such.
        links: Running means of what a link measured, of the layers that this block is the first of.
        prepared: What the link has prepared from these and from the layers' matrices.
        ahead: The decomposition that waits to be adopted, where the recipe has a lag.
        pace: When the block is due, where the recipe has a pace.
        ready: Whether the block can precondition, on this rank or another: it was decomposed from
            factors that have seen data.
        specs: Shapes and dtypes of each matrix's decomposition, where they are known.
        staged: Sums of the forward under way: "factor.NAME", "moment.NAME".
        pending: Sums of the finished forwards of this step.
        retained: Samples kept until `step()`, where the basis is refreshed first.
        input_versions: The inputs that retained samples read, each with its version then.
        overdue: What was due when the layer last did not run.
        missed: Whether the layer did not run when it was last due.
        seen: Passes that reached the layer in this step.
        turned: Gradients of this step in the coordinates of the basis.
        nonfinite: Flags on the device: whether each forward gave sums that are not finite.
    """

    factors: dict[str, RunningMean] = attrs.Factory(dict)
    decomposition: dict[str, dict[str, Tensor]] = attrs.Factory(dict)
    moments: dict[str, RunningMean] = attrs.Factory(dict)
    gradients: dict[str, RunningMean] = attrs.Factory(dict)
    links: dict[str, RunningMean] = attrs.Factory(dict)
    prepared: dict[str, Tensor] = attrs.Factory(dict)
    ahead: Ahead | None = None
    pace: PaceState = attrs.Factory(PaceState)
    ready: bool = False
    specs: dict[str, dict[str, TensorSpec]] = attrs.Factory(dict)
    staged: dict[str, Statistic] = attrs.Factory(dict)
    pending: dict[str, Statistic] = attrs.Factory(dict)
    retained: list[Samples] = attrs.Factory(list)
    input_versions: list[tuple[Tensor, int]] = attrs.Factory(list)
    overdue: DueWork = NOTHING
    missed: bool = False
    seen: int = 0
    turned: TurnedGradients = attrs.Factory(TurnedGradients)
    nonfinite: list[Tensor] = attrs.Factory(list)

    @property
    def measured(self) -> bool:
        """Whether all factors on this rank have seen data."""
        return bool(self.factors) and all(mean.weight > 0 for mean in self.factors.values())

    @property
    def allocated(self) -> bool:
        """Whether the tensors exist, with data or without."""
        return bool(self.decomposition or self.factors or self.gradients)

    @property
    def settled(self) -> bool:
        """Whether the block is ready and nothing is overdue."""
        return self.ready and self.overdue == NOTHING

    def factor_values(self) -> dict[str, Tensor]:
        """Return the factors' means by name."""
        return _values(self.factors)

    def moment_values(self) -> dict[str, Tensor]:
        """Return the means of the measured moments by name."""
        return _values({name: mean for name, mean in self.moments.items() if mean.weight > 0})

    def link_values(self) -> dict[str, Tensor]:
        """Return the means of the measured statistics of a link by name."""
        return _values({name: mean for name, mean in self.links.items() if mean.weight > 0})

    def means(self) -> dict[str, dict[str, RunningMean]]:
        """Return the running means by the first word of their keys."""
        return {
            "factor": self.factors,
            "moment": self.moments,
            "gradient": self.gradients,
            "link": self.links,
        }

    def commit(self) -> None:
        """End a forward: add its sums to those of the step, or nothing where any is not finite."""
        add_sums(self.pending, drop_nonfinite(self.staged, self.nonfinite))
        self.staged.clear()

    def savepoint(self) -> Savepoint:
        """End the last forward and return where the part of the next one begins."""
        self.commit()
        return len(self.retained), len(self.input_versions), self.seen

    def rollback(self, savepoint: Savepoint) -> None:
        """Drop what was gathered since `savepoint`."""
        self.staged.clear()
        retained, input_versions, self.seen = savepoint
        del self.retained[retained:], self.input_versions[input_versions:]

    def snapshot(self) -> Snapshot:
        """Return the decomposition and its moments, to be restored when a refresh fails."""
        return self.ready, self.decomposition, _copies(self.moments)

    def restore(self, snapshot: Snapshot) -> None:
        """Restore what `snapshot` returned."""
        self.leave_basis()
        self.ready, self.decomposition, self.moments = snapshot

    def leave_basis(self) -> None:
        """Drop what is known of gradients in the coordinates of the basis."""
        self.gradients.pop(TURNED, None)
        self.turned.clear()

    def lasting(self, *, gradients_alone: bool) -> dict[str, Any]:
        """Return what a step changes and can measure again, for `undo`.

        Args:
            gradients_alone: Whether that is the mean of the gradient only: its curvature is
                measured on samples.
        """
        gradients = {"gradients": _copies(self.gradients)}
        if gradients_alone:
            return gradients
        return gradients | {
            "factors": _copies(self.factors),
            "moments": _copies(self.moments),
            "decomposition": self.decomposition,
            "pace": self.pace.copy(),
            "ready": self.ready,
            "overdue": self.overdue,
            "missed": self.missed,
        }

    def undo(self, lasting: Mapping[str, Any]) -> None:
        """Set what `lasting` returned, or a part of it."""
        self.turned.clear()
        for name, value in lasting.items():
            setattr(self, name, value)

    def clear_pending(self) -> None:
        """Drop what the current step has gathered."""
        for gathered in (
            self.staged,
            self.pending,
            self.retained,
            self.input_versions,
            self.nonfinite,
        ):
            gathered.clear()
        self.turned.clear()
        self.seen = 0

    def flat(self, part: str = "") -> dict[str, Tensor]:
        """Return the lasting tensors, by reference, under flat keys.

        Keys read `kfactk.factor.A`, `kfactk.basis.A.eigenvectors` and so on; for a part of a
        module, `kfactk.[part].factor.A`. A decomposition that waits to be adopted is there as
        `kfactk.ahead`, once it is finished. Whether the block is ready, what is overdue, and when
        the block is due where the recipe has a pace (`kfactk.pace.due`), is there on every rank:
        messages between ranks follow from these. They are 0-dimensional, as torch wants of tensors
        that are not on the parameter's device.
        """
        prefix = _prefix(part)
        out: dict[str, Tensor] = {}
        for kind, means in self.means().items():
            for name, mean in means.items():
                if mean.value is not None:
                    weight = torch.tensor(mean.weight, dtype=torch.float64, device="cpu")
                    out[f"{prefix}{kind}.{name}"] = mean.value
                    out[f"{prefix}{kind}.{name}.weight"] = weight
        ahead = self.ahead.parts() if self.ahead is not None and self.ahead.done else {}
        for kind, decomposition in (("basis", self.decomposition), ("ahead", ahead)):
            for matrix, parts in decomposition.items():
                for name, tensor in parts.items():
                    out[f"{prefix}{kind}.{matrix}.{name}"] = tensor
        out |= {f"{prefix}{PREPARED}.{name}": each for name, each in self.prepared.items()}
        out |= {f"{prefix}{PACE}.{key}": value for key, value in self.pace.flat().items()}
        overdue = sum(flag << place for place, flag in enumerate(attrs.astuple(self.overdue)))
        out[prefix + READY] = torch.tensor(int(self.ready), dtype=torch.int64, device="cpu")
        out[prefix + OVERDUE] = torch.tensor(overdue, dtype=torch.int64, device="cpu")
        return out

    @classmethod
    def from_flat(
        cls,
        flat: Mapping[str, Tensor],
        device: torch.device,
        part: str = "",
        damage: Damage | None = None,
    ) -> BlockState:
        """Return the inverse of `flat`; tensors are copied to `device` and never cast.

        Args:
            flat: The anchor's entry; keys of other parts are skipped.
            device: Where the tensors go.
            part: The part of the module.
            damage: Receives what is found when the tensors' values are read; without it, that is
                raised here.

        Raises:
            StateError: A key is not one that `flat` writes, or a tensor is damaged.
        """
        entry, prefix = part_of(flat, part), _prefix(part)
        _check_tensors(entry, prefix)
        found = Damage() if damage is None else damage
        state = cls(ready=bool(_number(entry, READY, prefix, 1)))
        overdue = int(_number(entry, OVERDUE, prefix, 15)) if OVERDUE in entry else 0
        state.overdue = DueWork(*(bool(overdue >> place & 1) for place in range(4)))
        state.missed = state.overdue != NOTHING
        means, ahead = state.means(), Parts()
        kept = {"basis": state.decomposition, "ahead": ahead}
        numbers, values = dict[str, int](), dict[str, Tensor]()
        for key, tensor in entry.items():
            kind, _, rest = key.partition(".")
            if kind in means:
                mean = means[kind].setdefault(rest.removesuffix(".weight"), RunningMean())
                if rest.endswith(".weight"):
                    mean.weight = float(_number(entry, key, prefix, LARGEST_WEIGHT, whole=False))
                else:
                    mean.value = _copied(tensor, device)
                    found.check_values(prefix + key, mean.value)
            elif kind in kept:
                matrix, _, name = rest.partition(".")
                copied = _copied(tensor, device)
                kept[kind].setdefault(matrix, {})[name] = copied
                found.check_values(prefix + key, copied)
            elif kind == PREPARED:
                state.prepared[rest] = _copied(tensor, device)
                found.check_values(prefix + key, state.prepared[rest])
            elif kind == PACE and rest.startswith("value."):
                values[rest] = _copied(tensor, device)
                found.check_values(prefix + key, values[rest])
            elif kind == PACE:
                most = LONGEST if rest.startswith("interval") else LARGEST_WEIGHT
                numbers[rest] = int(_number(entry, key, prefix, most))
        state.pace = PaceState.from_flat(numbers, values)
        state.ahead = Ahead.of(ahead) if ahead else None
        if damage is None:
            found.refuse()
        return state


def is_ours(key: Any) -> bool:
    """Return whether a key of a state entry is the curvature's; a rule's keys may be anything.

    Example:
        >>> is_ours(STEP), is_ours("exp_avg"), is_ours(0)
        (True, False, False)
    """
    return isinstance(key, str) and key.startswith(PREFIX)


def part_of(flat: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return the curvature entries of one part, under keys without their prefix."""
    prefix = _prefix(part)
    found = {key.removeprefix(prefix): v for key, v in flat.items() if key.startswith(prefix)}
    return {key: value for key, value in found.items() if not key.startswith("[")}


def _prefix(part: str) -> str:
    return f"{PREFIX}[{part}]." if part else PREFIX


def _check_tensors(entry: Mapping[str, Any], prefix: str) -> None:
    """Check the entries of a saved block, as far as that needs no values.

    Raises:
        StateError: One is damaged or missing.
    """
    if unknown := [key for key in entry if not _known(key)]:
        raise StateError(
            f"the saved state has a key {prefix + unknown[0]!r} that this version does not know. "
            "Was it written by a newer kfactk? Load it with that version."
        )
    damage = Damage()
    for key, value in entry.items():
        if fault := curvature_fault(value):
            damage.note(f"{prefix + key} {fault}")
        elif key.partition(".")[0] in MEANS and not value.is_floating_point():
            damage.note(f"{prefix + key} has the dtype {value.dtype}, which is not floating-point")
    means = [key for key in entry if key.partition(".")[0] in MEANS]
    for key in means:
        value = key.removesuffix(".weight")
        if not {value, f"{value}.weight"} <= entry.keys():
            damage.note(f"{prefix + key} has not both its value and its weight")
    if READY not in entry:
        damage.note(f"it has curvature, but not {prefix + READY!r}")
    damage.refuse()


def _known(key: str) -> bool:
    kind, _, rest = key.partition(".")
    mean = kind in (*MEANS, PREPARED) and bool(rest)
    paced = kind == PACE and bool(KEY.fullmatch(rest))
    return key in (READY, OVERDUE) or mean or paced or (kind in ("basis", "ahead") and "." in rest)


def _number(
    entry: Mapping[str, Any], key: str, prefix: str, most: float, *, whole: bool = True
) -> float:
    """Return one of an entry's numbers.

    Raises:
        StateError: It is none, or not in [0, most].
    """
    found = number_of(entry[key], 0, most, whole=whole)
    if found is None:
        kind = "whole number" if whole else "number"
        raise StateError(
            f"the saved state is damaged: {prefix + key} is no single {kind} in [0, {most:g}]. "
            f"{REMEDY}"
        )
    return found


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)


def _copies(means: Mapping[str, RunningMean]) -> dict[str, RunningMean]:
    return {name: RunningMean(mean.value, mean.weight) for name, mean in means.items()}


def _values(means: Mapping[str, RunningMean]) -> dict[str, Tensor]:
    return {name: mean.value for name, mean in means.items() if mean.value is not None}
