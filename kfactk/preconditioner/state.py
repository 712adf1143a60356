"""What is kept of one layer between steps, and its form in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk.distributed.packing import TensorSpec
from kfactk.errors import StateError
from kfactk.preconditioner.schedule import NOTHING, DueWork
from kfactk.samples import Samples, Statistic
from kfactk.statistics import RunningMean, add_sums, drop_nonfinite

PREFIX = "kfactk."
"""First part of every key that the curvature has in `Optimizer.state`."""
STEP = f"{PREFIX}step"
"""Key of the number of steps taken, which every parameter's entry has."""
OVERDUE = f"{PREFIX}overdue"
"""Key of what a layer owes, as a sum: 1 for factors, 2 for the scale, 4 for the basis, 8 for factors of inputs alone."""
READY = f"{PREFIX}ready"
"""Key of whether a layer has been decomposed from factors that have seen data, on this rank or another."""
Kept = tuple[bool, dict[str, dict[str, Tensor]], dict[str, RunningMean]]
"""Whether there is a decomposition, its part on this rank, and the moments measured in it."""


@attrs.define(eq=False)
class BlockState:
    """Factors, decomposition and moments of one layer, and what is pending within the current step.

    Each rank has a state for every layer; the tensors lie on the ranks that its placement chose.

    Args:
        parameters: Names of the parameters its matrices are made for; other names make the state void.
        factors: Running means of the curvature's factors, those that are kept on this rank.
        decomposition: For each matrix, its decomposition; empty where other ranks precondition.
        moments: Running means of the basis' moments, likewise.
        ready: Whether it can precondition, here or elsewhere: decomposed from factors that have seen data.
        specs: Of each matrix' decomposition, the forms of its parts, where they are known.
        staged: Sums of the forward whose passes are under way: "factor.NAME", "moment.NAME".
        pending: Sums of the forwards of this step that are done.
        retained: Samples kept until `step()` because the basis is refreshed first.
        input_versions: The inputs that they read, each with its version then.
        overdue: What was due when it last did not run, and still is.
        missed: Whether it did not run when it was last due.
        seen: Passes that reached the layer in this step, whatever their worth.
        bad: How many of them were not finite, on the device.
    """

    parameters: tuple[str, ...]
    factors: dict[str, RunningMean] = attrs.Factory(dict)
    decomposition: dict[str, dict[str, Tensor]] = attrs.Factory(dict)
    moments: dict[str, RunningMean] = attrs.Factory(dict)
    ready: bool = False
    specs: dict[str, dict[str, TensorSpec]] = attrs.Factory(dict)
    staged: dict[str, Statistic] = attrs.Factory(dict)
    pending: dict[str, Statistic] = attrs.Factory(dict)
    retained: list[Samples] = attrs.Factory(list)
    input_versions: list[tuple[Tensor, int]] = attrs.Factory(list)
    overdue: DueWork = NOTHING
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
        add_sums(self.pending, drop_nonfinite(self.staged, self.bad))
        self.staged.clear()

    def mark(self) -> tuple[int, int, int]:
        """Before a forward: end the last one, and note where this one's part will begin."""
        self.settle()
        return len(self.retained), len(self.input_versions), self.seen

    @property
    def settled(self) -> bool:
        """Whether it has a decomposition, or what stands for one, and owes nothing."""
        return self.ready and self.overdue == NOTHING

    def rollback(self, mark: tuple[int, int, int]) -> None:
        """Forget what was gathered since `mark`."""
        self.staged.clear()
        retained, input_versions, self.seen = mark
        del self.retained[retained:], self.input_versions[input_versions:]

    def keep(self) -> Kept:
        """The decomposition and the moments measured in it, to be put back when a refresh fails."""
        return (
            self.ready,
            self.decomposition,
            {name: attrs.evolve(mean) for name, mean in self.moments.items()},
        )

    def put_back(self, kept: Kept) -> None:
        """Take over again what `keep` gave."""
        self.ready, self.decomposition, self.moments = kept

    def clear_pending(self) -> None:
        """Forget what this step gathered."""
        self.staged.clear()
        self.pending.clear()
        self.retained.clear()
        self.input_versions.clear()
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
                    out[f"{PREFIX}{kind}.{name}.weight"] = torch.tensor(
                        mean.weight, dtype=torch.float64
                    )
        for factor, parts in self.decomposition.items():
            for name, tensor in parts.items():
                out[f"{PREFIX}basis.{factor}.{name}"] = tensor
        out[READY] = torch.tensor(int(self.ready), dtype=torch.int64)
        out[OVERDUE] = torch.tensor(
            sum(flag << place for place, flag in enumerate(attrs.astuple(self.overdue))),
            dtype=torch.int64,
        )
        return out

    @classmethod
    def from_flat(
        cls, parameters: tuple[str, ...], flat: Mapping[str, Tensor], device: torch.device
    ) -> BlockState:
        """Inverse of `flat`; tensors are copied to `device`, never cast.

        Raises:
            StateError: A key is not one that `flat` writes.
        """
        state = cls(parameters)
        if wrong := sorted(
            key
            for key, value in flat.items()
            if not isinstance(value, Tensor) or not bool(torch.isfinite(value).all())
        ):
            raise StateError(
                f"the saved state is damaged: {', '.join(wrong)} is no tensor, or holds NaN or inf. Load an earlier one."
            )
        if lacking := sorted(
            key
            for key in flat
            if key.split(".")[1] in ("factor", "moment") and not _whole(key, flat)
        ):
            raise StateError(
                f"the saved state is damaged: {', '.join(lacking)} has not both its value and its weight. Load an earlier one."
            )
        if READY not in flat:
            raise StateError(
                f"the saved state is damaged: it has curvature, but not {READY!r}. Load an earlier one."
            )
        for key, tensor in flat.items():
            kind, _, rest = key.removeprefix(PREFIX).partition(".")
            if key == OVERDUE and tensor.numel() == 1 and 0 <= int(tensor) < 16:
                state.overdue = DueWork(*(bool(int(tensor) >> place & 1) for place in range(4)))
                state.missed = state.overdue != NOTHING
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
                raise StateError(
                    f"the saved state has a key {key!r} that this version does not know; was it written by a newer kfactk?"
                )
        return state


def _whole(key: str, flat: Mapping[str, Any]) -> bool:
    """Whether a mean's value and weight are both there, and the weight is one number that can be one."""
    value = key.removesuffix(".weight")
    weight = flat.get(f"{value}.weight")
    return (
        value in flat
        and isinstance(weight, Tensor)
        and weight.numel() == 1
        and bool((weight >= 0).all())
    )


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)


def _values(means: Mapping[str, RunningMean]) -> dict[str, Tensor]:
    return {name: mean.value for name, mean in means.items() if mean.value is not None}
