"""Nesterov's accelerated gradient, exact also when the learning rate changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, overload

import attrs
import torch
from torch import Tensor

from kfactk import CombinationError, StateError, hookimpl
from kfactk_stages.update._options import decay


class NAG(torch.optim.Optimizer):
    """Nesterov's accelerated gradient; the model holds the look-ahead point.

    The look-ahead point is `phi = theta + alpha v`. There, equation (12) of the thesis takes the
    gradient g. With

        v' = alpha v - mu g(phi),    theta' = theta + v'

    the next look-ahead point is

        phi' = theta' + alpha' v' = phi - alpha v + (1 + alpha') v'

    alpha' is the momentum in the group at this step, which equals alpha unless it is scheduled. The
    state is the velocity v, so the step is exact for every sequence of learning rates mu. A changed
    momentum takes effect in the next look-ahead. Weight decay is added to the gradient, as in
    `torch.optim.SGD`. The velocity has the dtype of the parameter.

    Args:
        params: Parameters or parameter groups.
        lr: mu.
        momentum: alpha, in [0, 1).
        weight_decay: Multiple of the parameter to add to its gradient.

    Raises:
        CombinationError: A gradient is sparse.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "previous_momentum": momentum,
            },
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over attributes, as torch does for a loaded state.

        Raises:
            StateError: A velocity or a momentum cannot be one.
        """
        super().__setstate__(state)
        for number, group in enumerate(self.param_groups):
            for name in ("momentum", "previous_momentum"):
                if not 0 <= group.get(name, 0) < 1:
                    raise StateError(
                        f"the saved state is damaged: param_groups[{number}][{name!r}] is "
                        f"{group[name]!r}, and not in [0, 1). Load an earlier checkpoint."
                    )
            for parameter in group["params"]:
                velocity = self.state.get(parameter, {}).get("velocity", parameter)
                if not _like(velocity, parameter):
                    raise StateError(
                        "the saved state is damaged: the velocity of a parameter of shape "
                        f"{tuple(parameter.shape)} is no finite dense tensor of this shape. Load "
                        "an earlier checkpoint."
                    )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; `closure`, if given, first computes the loss and the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        previous, momentum = group["previous_momentum"], group["momentum"]
        group["previous_momentum"] = momentum
        if not params:
            return
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        if any(grad.is_sparse for grad in grads):
            raise CombinationError(
                "update 'nag' does not take sparse gradients. Use update 'sgd', or an embedding "
                "with sparse=False."
            )
        velocities = [self._velocity(p) for p in params]
        if group["weight_decay"] != 0:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        moves = torch._foreach_mul(velocities, -previous)
        torch._foreach_mul_(velocities, previous)
        torch._foreach_add_(velocities, grads, alpha=-float(group["lr"]))
        torch._foreach_add_(moves, velocities, alpha=1 + momentum)
        torch._foreach_add_(params, moves)

    def _velocity(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        velocity: Tensor = state["velocity"]
        return velocity


def _like(velocity: Any, parameter: Tensor) -> bool:
    """Return whether a value can be a parameter's velocity; of a shard, this rank's part counts."""
    if not isinstance(velocity, Tensor) or velocity.shape != parameter.shape:
        return False
    local = velocity.to_local() if hasattr(velocity, "to_local") else velocity
    return velocity.layout == parameter.layout and bool(torch.isfinite(local).all())


@attrs.frozen
class Nag:
    """Nesterov's accelerated gradient, exact for every schedule of the learning rate.

        v <- alpha v - mu p(theta + alpha v),    theta <- theta + v

    This is equation (12) of the thesis. p is the preconditioned, clipped gradient, plus
    `weight_decay` times the parameter; mu is the learning rate. The model holds the look-ahead
    point `theta + alpha v`, where the gradient is taken; losses are those of that point.
    `torch.optim.SGD(nesterov=True)` equals it only while mu is constant. It keeps the sum of
    gradients `-v / mu`, so a drop of the learning rate shrinks the velocity too.

    Args:
        momentum: alpha, the share of the velocity that each step keeps, in [0, 1).

    Raises:
        OptionError: `momentum` is outside [0, 1).

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Nag(momentum=0.5).make([{"params": [w]}], lr=0.1, weight_decay=0.0)
        >>> w.grad = torch.tensor([2.0]); optimizer.step(); w.data, optimizer.state[w]["velocity"]
        (tensor([0.7000]), tensor([-0.2000]))

    References:
        Nesterov 1983, "A method for solving the convex programming problem with convergence rate
        O(1/k^2)".
        Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
        "Neural Network Optimization Based on K-FAC Algorithm" (the thesis), Tongji University,
        May 2021.
    """

    default_damping: ClassVar[float] = 0.03

    momentum: float = attrs.field(default=0.9, validator=decay)

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Return `NAG` over `groups`."""
        return NAG(groups, lr=lr, momentum=self.momentum, weight_decay=weight_decay)


@hookimpl
def kfactk_updates() -> dict[str, type[Nag]]:
    """Register the update rule `nag`."""
    return {"nag": Nag}
