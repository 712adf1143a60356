"""Gradient descent with (heavy-ball) momentum."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from kfactk import hookimpl
from kfactk_stages.update._options import decay, fraction, implementation


@attrs.frozen
class Momentum:
    """The step along a decaying sum of gradients.

        b <- alpha b + (1 - dampening) p,    theta <- theta - mu b

    p is the preconditioned, clipped gradient, plus `weight_decay * theta`; mu the learning rate; b starts as the first p, undamped.
    Delegates to `torch.optim.SGD`, which keeps the sum b of gradients, not the velocity `v = -mu b`: a changed learning rate acts on
    the whole sum at once.

    Args:
        momentum: alpha, the share of the sum that is kept from step to step, in [0, 1).
        dampening: Share of each new gradient that is left out, in [0, 1].
        foreach: Whether torch treats all parameters in one launch; `None` leaves it to torch.
        fused: Whether torch uses its fused kernel; `None` leaves it to torch.

    Raises:
        OptionError: A number out of its range, or both `foreach` and `fused`.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Momentum(momentum=0.5).make([{"params": [w]}], lr=0.1, weight_decay=0.0)
        >>> w.grad = torch.tensor([2.0]); optimizer.step(); optimizer.step(); w.data
        tensor([0.5000])

    References:
        Polyak 1964, Some methods of speeding up the convergence of iteration methods.
    """

    momentum: float = attrs.field(default=0.9, validator=decay)
    dampening: float = attrs.field(default=0.0, validator=fraction)
    foreach: bool | None = attrs.field(default=None, validator=implementation)
    fused: bool | None = attrs.field(default=None, validator=implementation)

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """`torch.optim.SGD` with momentum over `groups`."""
        return torch.optim.SGD(
            groups,
            lr=lr,
            momentum=self.momentum,
            dampening=self.dampening,
            weight_decay=weight_decay,
            foreach=self.foreach,
            fused=self.fused,
        )


@hookimpl
def kfactk_updates() -> dict[str, type[Momentum]]:
    """The update rule `momentum`."""
    return {"momentum": Momentum}
