"""Gradient descent with a velocity: the last step, of which a share is taken again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import attrs
import torch

from kfactk import hookimpl
from kfactk_stages.update._options import decay

KEY = "velocity"
"""The key of the last step in the state of a parameter."""


class VelocityOptimizer(torch.optim.Optimizer):
    """The rule of `Velocity` as a torch optimizer; the state of a parameter is its "velocity"."""

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Take one step; `closure` evaluates the loss, with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [each for each in group["params"] if each.grad is not None]
            if not parameters:
                continue
            gradients = [each.grad for each in parameters]
            if group["weight_decay"]:
                decay = float(group["weight_decay"])
                gradients = [*torch._foreach_add(gradients, parameters, alpha=decay)]
            velocities = []
            for each in parameters:
                if KEY not in self.state[each]:
                    self.state[each][KEY] = torch.zeros_like(each)
                velocities.append(self.state[each][KEY])
            torch._foreach_mul_(velocities, float(group["momentum"]))
            torch._foreach_add_(velocities, gradients, alpha=-float(group["lr"]))
            torch._foreach_add_(parameters, velocities)
        return loss


@attrs.frozen
class Velocity:
    """Step along the gradient and the last step.

        v <- alpha v - mu p,    theta <- theta + v

    p is the preconditioned, clipped gradient, plus `weight_decay * theta`; mu is the learning rate.
    v starts as 0, and is the step itself: a changed learning rate acts on the new gradient only.
    With constant numbers these are the steps of `momentum` without dampening. A controller needs
    this rule: it sets mu and alpha in each step.

    Args:
        momentum: alpha, the share of the last step that is taken again, in [0, 1).

    Raises:
        OptionError: `momentum` is out of its range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Velocity(momentum=0.5).make([{"params": [w]}], lr=0.1, weight_decay=0.0)
        >>> w.grad = torch.tensor([2.0]); optimizer.step(); optimizer.step(); w.data
        tensor([0.5000])

    References:
        Polyak 1964, "Some methods of speeding up the convergence of iteration methods".
        Martens & Grosse 2015, arXiv:1503.05671, section 7.
    """

    default_damping: ClassVar[float] = 0.03
    velocity_key: ClassVar[str] = KEY

    momentum: float = attrs.field(default=0.9, validator=decay)

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Return a `VelocityOptimizer` over `groups`."""
        return VelocityOptimizer(groups, lr=lr, momentum=self.momentum, weight_decay=weight_decay)


@hookimpl
def kfactk_updates() -> dict[str, type[Velocity]]:
    """Register the update rule `velocity`."""
    return {"velocity": Velocity}
