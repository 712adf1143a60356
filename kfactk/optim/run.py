"""What changes while an optimizer runs, apart from curvature and the update rule's state."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor


@attrs.define(eq=False)
class RunState:
    """What changes while an optimizer runs.

    It is one object, which the optimizer and its wrappers share: a method that runs on a wrapper
    (Lightning's, Fabric's) must not leave its changes there.

    Args:
        step: Number of steps taken.
        gathered: What came from other ranks, by the id of the parameter that it is saved under.
        recorded: Whether this step is recorded.
        reported_bytes: What `moved_bytes` was at the last step.
        closed: Whether the optimizer was closed.
    """

    step: Tensor = attrs.Factory(lambda: torch.zeros((), dtype=torch.int64, device="cpu"))
    gathered: Mapping[int, Mapping[str, Tensor]] = attrs.Factory(dict)
    recorded: bool = False
    reported_bytes: dict[str, float] = attrs.Factory(dict)
    closed: bool = False


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
