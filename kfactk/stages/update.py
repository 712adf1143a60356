"""Updates: what makes the torch.optim optimiser that takes the step."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Update(Protocol):
    """Makes the torch.optim optimiser that takes the step.

    It may have an attribute `default_damping`: tau where the recipe gives none. Rules that do not
    divide by the size of their gradients want a larger one than 0.001.

    A rule whose step is `momentum * d - lr * p`, where d is its last step, has "momentum" in its
    groups, and an attribute `velocity_key`: the key of d in the state of each parameter. A
    controller needs such a rule.
    """

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Return the optimiser over `groups`.

        Groups are dicts with "params". Their own "lr" and "weight_decay" must be kept.
        """
