"""Whether the update rule may step on what it is given: judged by the host, which waits for it, or by the device, and read later."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk.distributed.communicator import Communicator
from kfactk.distributed.sharding import is_sharded
from kfactk.optim.gradients import BAD_DIRECTION, BAD_GRADIENT, BAD_STATISTICS, all_finite

DEVICES = frozenset({"cuda"})
"""Kinds of devices on which the host runs ahead, and where fused update rules are known to skip an update by themselves."""
SKIPPING = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
"""Classes whose fused kernels leave parameters and state as they are where `found_inf` is 1. Subclasses may do more than that in `step`."""


@attrs.frozen(eq=False)
class Verdict:
    """What is to be done with one batch.

    Args:
        stepping: Whether the update rule is to step.
        fault: Why the batch counts as skipped; empty where it does not, or where that is not known yet.
        recorded: Whether the step is recorded by any rank.
        around: A context for the update rule's step.
    """

    stepping: bool
    fault: str
    recorded: bool
    around: AbstractContextManager[None] = attrs.field(factory=nullcontext)


class NonFiniteGuard:
    """Judges updates.

    Where the device skips an update by itself, the update rule is given `found_inf`, as `torch.amp.GradScaler` gives it, which is 1 where
    a gradient or what goes in its place holds NaN or inf. How often that was so is counted there until the host asks.

    Args:
        rule: The update rule.
        ranks: Those that share the work.
        skipped: Told, when the host asks, how many updates were not taken, by the reason why.

    Example:
        >>> parameter = torch.nn.Parameter(torch.ones(1))
        >>> verdicts = NonFiniteGuard(torch.optim.SGD([parameter], lr=0.1), Communicator(), print)
        >>> verdict = verdicts.on([torch.tensor([float("inf")])], [], reading=True, recorded=False, spoiled=lambda: False)
        >>> verdict.stepping, verdict.fault
        (False, 'a batch gave NaN or inf in its gradient, and its step was not taken; such batches are skipped and counted')
    """

    def __init__(
        self,
        rule: torch.optim.Optimizer,
        ranks: Communicator,
        skipped: Callable[[Mapping[str, int]], None],
    ) -> None:
        self._rule, self._ranks, self._skipped = rule, ranks, skipped
        self._counts: Tensor | None = None

    def on(
        self,
        gradients: Sequence[Tensor],
        replacing: Sequence[Tensor],
        *,
        reading: bool,
        recorded: bool,
        spoiled: Callable[[], bool],
    ) -> Verdict:
        """Judge an update; a collective call.

        Args:
            gradients: Those that the user's backward left.
            replacing: What takes the place of some of them.
            reading: Whether the host waits for the device in this step anyway.
            recorded: Whether this rank records the step.
            spoiled: Tells whether this rank's statistics were not finite; asked where the host reads.
        """
        if not reading and self._ranks.size == 1 and self._left_to_device():
            return Verdict(True, "", recorded, self._skipping(gradients, replacing))
        self.read()
        device = gradients[0].device if gradients else None
        mine = [not all_finite([*gradients, *replacing]), recorded, spoiled()]
        bad, recorded, worse = map(
            bool, self._ranks.total([float(each) for each in mine], device)
        )  # the same for all ranks
        if bad:
            fault = (
                BAD_GRADIENT
                if self._ranks.any(not all_finite(gradients), device)
                else BAD_DIRECTION
            )
            return Verdict(False, fault, recorded)
        return Verdict(True, BAD_STATISTICS if worse else "", recorded)

    def _left_to_device(self) -> bool:
        """Whether the update rule can skip the update it is about to take by itself; not one for which it has to make its state first."""
        groups = self._rule.param_groups
        if type(self._rule) not in SKIPPING or not all(group.get("fused") for group in groups):
            return False
        taking = [
            (group, parameter)
            for group in groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
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
        """A momentum buffer that is made in a skipped update is never filled: torch takes it for the last step's from then on."""
        without = isinstance(self._rule, torch.optim.SGD) and not group["momentum"]
        return without or any(
            value is not None for value in self._rule.state.get(parameter, {}).values()
        )

    @contextlib.contextmanager
    def _skipping(self, gradients: Sequence[Tensor], replacing: Sequence[Tensor]) -> Iterator[None]:
        """Around the update rule's step, which the device skips where any of these tensors holds NaN or inf."""
        gradients, replacing = (
            [tensor for tensor in tensors if tensor.numel()] for tensors in (gradients, replacing)
        )
        finite = torch.stack(torch._foreach_norm([*gradients, *replacing], float("inf"))).isfinite()
        sound, every = finite[: len(gradients)].all(), finite.all()
        self._rule.found_inf = (~every).float()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del self._rule.found_inf  # type: ignore[attr-defined]
        found = torch.stack([~sound, sound & ~every])
        self._counts = found.long() if self._counts is None else self._counts + found

    def read(self) -> None:
        """Wait for the device, if anything was left to it since the last call, and tell what was skipped."""
        if self._counts is None:
            return
        counts = zip((BAD_GRADIENT, BAD_DIRECTION), self._counts.tolist(), strict=True)
        self._counts = None
        if found := {reason: int(times) for reason, times in counts if times}:
            self._skipped(found)
