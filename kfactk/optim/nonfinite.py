"""Whether the update rule may take a step: judged by the host, or by the device and read later."""

from __future__ import annotations

import cmath
import contextlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk.distributed.sharding import is_sharded, local_shard, true_on_all_ranks
from kfactk.errors import KfactkError
from kfactk.preconditioner.preconditioner import Preconditioner

BAD_GRADIENT = (
    "a batch gave NaN or inf in its gradient, and its step was not taken. Such batches are skipped "
    "and counted"
)
BAD_STATISTICS = (
    "a batch gave NaN or inf in its curvature statistics. Such batches are skipped and counted"
)
BAD_DIRECTION = (
    "the gradient is finite, and its preconditioned or clipped form holds NaN or inf in the "
    "parameter's precision. The step was not taken, and was counted. Raise damping, or load an "
    "earlier state"
)
SMALL = 2**16
"""Number of elements up to which copying a tensor is faster than a call of its own."""
DEVICES = frozenset({"cuda"})
"""Devices on which the host runs ahead, and where fused update rules can skip an update."""
SKIPPING = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
"""Classes whose fused kernels change nothing where `found_inf` is 1; subclasses may do more."""


@attrs.frozen(eq=False)
class Verdict:
    """What to do with one batch.

    Args:
        stepping: Whether the update rule steps.
        fault: Why the batch counts as skipped; empty where it does not, or where it is not known.
        recorded: Whether any rank records the step.
        around: A context for the update rule's step.
    """

    stepping: bool
    fault: str
    recorded: bool
    around: AbstractContextManager[None] = attrs.field(factory=nullcontext)


class NonFiniteGuard:
    """Judges updates.

    Where the device can skip an update by itself, the update rule is given `found_inf`, as
    `torch.amp.GradScaler` gives it: 1 where a gradient or its replacement holds NaN or inf. The
    device counts how often that happens until the host asks.

    Args:
        rule: The update rule.
        preconditioner: Counts the batches that were skipped.
        max_skipped: How many batches in a row may be skipped; `None` for any number.
    """

    def __init__(
        self,
        rule: torch.optim.Optimizer,
        preconditioner: Preconditioner,
        max_skipped: int | None = None,
    ) -> None:
        self._rule, self._preconditioner, self._limit = rule, preconditioner, max_skipped
        self._counts: Tensor | None = None
        self._unread = 0
        self._in_a_row = {"step": 0, "statistics": 0}

    def judge(
        self, gradients: Sequence[Tensor], replacing: Sequence[Tensor], *, recorded: bool
    ) -> Verdict:
        """Judge an update; a collective call.

        Args:
            gradients: Those that the user's backward left.
            replacing: What takes the place of some of them.
            recorded: Whether this rank records the step.
        """
        communicator = self._preconditioner.communicator
        reading = self._preconditioner.due
        self._unread += 1
        waits = self._limit is not None and self._unread >= self._limit
        if not reading and not waits and communicator.size == 1 and self._left_to_device():
            return Verdict(True, "", recorded, self._skipping(gradients, replacing))
        self.read()
        device = gradients[0].device if gradients else None
        finite = all_finite([*gradients, *replacing])
        mine = [float(not finite), float(recorded), float(self._preconditioner.nonfinite())]
        bad, recorded, worse = map(bool, communicator.total(mine, device))  # equal on all ranks
        self._count("step", bad)
        if reading:
            self._count("statistics", worse)
        if bad:
            by_gradient = communicator.any(not all_finite(gradients), device)
            return Verdict(False, BAD_GRADIENT if by_gradient else BAD_DIRECTION, recorded)
        return Verdict(True, BAD_STATISTICS if worse else "", recorded)

    def _left_to_device(self) -> bool:
        """Return whether the update rule can skip the next update by itself.

        It cannot where it still has to make its state.
        """
        groups = self._rule.param_groups
        if type(self._rule) not in SKIPPING or not all(group.get("fused") for group in groups):
            return False
        taking = [(g, p) for g in groups for p in g["params"] if p.grad is not None]
        devices = {parameter.device for _, parameter in taking}
        return (
            len(devices) == 1
            and next(iter(devices)).type in DEVICES
            and any(parameter.numel() for _, parameter in taking)
            and all(
                not is_sharded(p) and p.grad.layout is torch.strided and self._has_state(group, p)
                for group, p in taking
            )
        )

    def _has_state(self, group: Mapping[str, Any], parameter: Tensor) -> bool:
        """Return whether the rule's state of a parameter is there.

        A momentum buffer made in a skipped update is never filled: torch takes it for that of the
        last step from then on.
        """
        without = isinstance(self._rule, torch.optim.SGD) and not group["momentum"]
        state = self._rule.state.get(parameter, {})
        return without or any(value is not None for value in state.values())

    @contextlib.contextmanager
    def _skipping(self, gradients: Sequence[Tensor], replacing: Sequence[Tensor]) -> Iterator[None]:
        """Surround the update rule's step, which the device skips where a tensor is not finite."""
        gradients = [tensor for tensor in gradients if tensor.numel()]
        replacing = [tensor for tensor in replacing if tensor.numel()]
        norms = torch._foreach_norm([*gradients, *replacing], float("inf"))
        finite = torch.stack(norms).isfinite()
        sound, every = finite[: len(gradients)].all(), finite.all()
        self._rule.found_inf = (~every).float()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del self._rule.found_inf  # type: ignore[attr-defined]
        found = torch.stack([~sound, sound & ~every]).long()
        if self._counts is None:
            counts, in_a_row = found, found.sum() * (self._in_a_row["step"] + 1)
        else:
            counts, in_a_row = self._counts[:2] + found, found.sum() * (self._counts[2] + 1)
        self._counts = torch.cat([counts, in_a_row.unsqueeze(0)])

    def _count(self, what: str, bad: bool) -> None:
        self._in_a_row[what] = self._in_a_row[what] + 1 if bad else 0

    def check(self, parameters: Iterable[Tensor]) -> None:
        """Check that not too many batches in a row were skipped; at the end of a step.

        Where the device skips by itself, the host knows after `max_skipped` steps at the latest. A
        collective call where any parameter is sharded.

        Args:
            parameters: Those that are trained, to tell whether they are finite themselves.

        Raises:
            KfactkError: Too many were.
        """
        waiting = self._counts is not None  # for the device: the host does not know yet
        if self._limit is None or waiting or max(self._in_a_row.values()) < self._limit:
            return
        if not all_finite([parameter.detach() for parameter in parameters]):
            why = (
                "The model's parameters hold NaN or inf themselves: load an earlier state, and go "
                "on with a lower lr or a higher damping."
            )
        else:
            why = (
                "The model's parameters are finite. Likely causes: a loss or a layer that "
                "overflows, in half precision above all (use bfloat16, or torch.amp.GradScaler and "
                "its step); NaN or inf in the data; a damping that is too low."
            )
        if self._in_a_row["step"] >= self._limit:
            what = f"{self._in_a_row['step']} steps in a row were not taken"
        else:
            what = f"the curvature of {self._in_a_row['statistics']} batches in a row was skipped"
        raise KfactkError(
            f"{what}, because each batch gave NaN or inf. {why} To go on all the same, raise "
            f"max_skipped={self._limit} of kfactk.build, or set it to None."
        )

    def read(self) -> None:
        """Wait for the device, and count what it skipped since the last call."""
        self._unread = 0
        if self._counts is None:
            return
        *numbers, self._in_a_row["step"] = self._counts.tolist()
        counts = zip((BAD_GRADIENT, BAD_DIRECTION), numbers, strict=True)
        self._counts = None
        if skipped := {reason: int(times) for reason, times in counts if times}:
            self._preconditioner.skip(skipped)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether no tensor, dense, sparse or sharded, holds NaN or inf.

    There is one transfer from each device. It is a collective call where any tensor is sharded:
    ranks that share a tensor get the same answer, also where only one rank's part, or a plain
    tensor of one rank, is not finite.

    Example:
        >>> all_finite([torch.ones(2), torch.tensor([1.0, float("nan")])])
        False
    """
    values = [t.coalesce().values() if t.is_sparse else local_shard(t) for t in tensors]
    return true_on_all_ranks(_finite(values), tensors)


def _finite(tensors: list[Tensor]) -> bool:
    alike: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.numel() and not tensor.is_meta:
            alike[tensor.device, tensor.dtype].append(tensor)
    gathered = [_gathered(same) for same in alike.values()]
    # Sums of squares are the fastest, and may overflow where the numbers do not.
    squares = ([torch.dot(flat, flat) for flat in flats] for flats in gathered)
    if all(map(_read, squares)):
        return True
    return all(_read([torch.linalg.vector_norm(f, math.inf) for f in flats]) for flats in gathered)


def _read(numbers: Sequence[Tensor]) -> bool:
    """Return whether numbers on one device are finite, by one transfer."""
    values = [numbers[0].item()] if len(numbers) == 1 else torch.stack(list(numbers)).tolist()
    return all(map(cmath.isfinite, values))


def _gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the same numbers in fewer tensors `[n]`: small ones are joined."""
    found, room = [], 0
    runs: list[list[Tensor]] = []
    for tensor in tensors:
        flat, count = tensor.reshape(-1), tensor.numel()
        if count > SMALL:
            found.append(flat)
            continue
        if count > room:
            runs.append([])
            room = 16 * SMALL
        runs[-1].append(flat)
        room -= count
    return found + [torch.cat(run) for run in runs]
