"""What changes while an optimizer runs, apart from curvature and the update rule's state."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk.capture.forward import Forward


@attrs.define(eq=False)
class UnboundRule:
    """Holds what an update rule will have, until there is one."""

    defaults: dict[str, Any] = attrs.Factory(dict)
    param_groups: list[dict[str, Any]] = attrs.Factory(list)
    state: defaultdict[Any, Any] = attrs.Factory(lambda: defaultdict(dict))


@attrs.define(eq=False)
class RunState:
    """What changes while an optimizer runs.

    It is one object, which the optimizer and its wrappers share: a method that runs on a wrapper
    (Lightning's, Fabric's) must not leave its changes there.

    Args:
        damping: What the recipe's damping was last.
        step: Number of steps taken.
        own_damping: The groups, each with whether its damping is its own.
        gathered: What came from other ranks, by the id of the parameter that it is saved under.
        waiting: A forward that waits for `observe`.
        micro_batch: Number of forwards measured in this step.
        recorded: Whether this step is recorded.
        reported_bytes: What `moved_bytes` was at the last step.
        closed: Whether the optimizer was closed.
        warned_idle: Whether it was said that many forwards came without a step.
    """

    damping: float
    step: Tensor = attrs.Factory(lambda: torch.zeros((), dtype=torch.int64, device="cpu"))
    own_damping: list[tuple[dict[str, Any], bool]] = attrs.Factory(list)
    gathered: Mapping[int, Mapping[str, Tensor]] = attrs.Factory(dict)
    waiting: Forward | None = None
    micro_batch: int = 0
    recorded: bool = False
    reported_bytes: dict[str, float] = attrs.Factory(dict)
    closed: bool = False
    warned_idle: bool = False


MOST_FRAMES = 24
"""How many callers are looked at for a scaler: wrappers of `step` stand between."""


def called_by_scaler() -> bool:
    """Return whether a `torch.amp.GradScaler` that is enabled takes the step that runs now."""
    frame, left = sys._getframe(), MOST_FRAMES
    while frame.f_back is not None and left:
        frame, left = frame.f_back, left - 1
        if frame.f_code is torch.amp.GradScaler._maybe_opt_step.__code__:
            return True
    return False
