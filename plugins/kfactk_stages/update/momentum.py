"""Gradient descent with heavy-ball momentum."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import torch

from kfactk import OptionError, hookimpl
from kfactk.options import number
from kfactk_stages.update._options import decay, implementation


@attrs.frozen
class Momentum:
    """Step along a decaying sum of gradients.

        b <- alpha b + (1 - dampening) p,    theta <- theta - mu b

    p is the preconditioned, clipped gradient, plus `weight_decay * theta`; mu is the learning rate.
    b starts as the first p, without dampening. It delegates to `torch.optim.SGD`, which keeps the
    sum b of gradients, not the velocity `v = -mu b`. A changed learning rate therefore acts on the
    whole sum at once.

    Args:
        momentum: alpha, the share of the sum that each step keeps, in [0, 1).
        dampening: Share of each new gradient that is left out, in [0, 1].
        foreach: Whether torch updates all parameters in one launch; `None` leaves it to torch.
        fused: Whether torch uses its fused kernel; `None` leaves it to torch.

    Raises:
        OptionError: A number is out of its range, or both `foreach` and `fused` are True.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Momentum(momentum=0.5).make([{"params": [w]}], lr=0.1, weight_decay=0.0)
        >>> w.grad = torch.tensor([2.0]); optimizer.step(); optimizer.step(); w.data
        tensor([0.5000])

    References:
        Polyak 1964, "Some methods of speeding up the convergence of iteration methods".
    """

    default_damping: ClassVar[float] = 0.03

    momentum: float = attrs.field(default=0.9, validator=decay)
    dampening: float = attrs.field(default=0.0, validator=number(low=0, high=1))
    foreach: bool | None = attrs.field(default=None, validator=implementation)
    fused: bool | None = attrs.field(default=None, validator=implementation)

    def __attrs_post_init__(self) -> None:
        if self.dampening and not self.momentum:
            raise OptionError(
                f"update rule momentum has dampening={self.dampening:g}, and momentum=0, with "
                "which no sum is kept, so that it has no effect. Give a momentum, or leave out "
                "dampening."
            )

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Return `torch.optim.SGD` with momentum over `groups`."""
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
    """Register the update rule `momentum`."""
    return {"momentum": Momentum}
