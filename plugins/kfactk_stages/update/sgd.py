"""Plain gradient descent."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import torch

from kfactk import hookimpl
from kfactk_stages.update._options import implementation


@attrs.frozen
class Sgd:
    """Step along the preconditioned gradient.

        theta <- theta - mu p

    p is the preconditioned, clipped gradient, plus `weight_decay * theta`; mu is the learning rate.
    It delegates to `torch.optim.SGD`.

    Args:
        foreach: Whether torch updates all parameters in one launch; `None` leaves it to torch.
        fused: Whether torch uses its fused kernel; `None` leaves it to torch.

    Raises:
        OptionError: Both `foreach` and `fused` are True.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Sgd().make([{"params": [w]}], lr=0.1, weight_decay=0.0)
        >>> w.grad = torch.tensor([2.0]); optimizer.step(); w.data
        tensor([0.8000])

    References:
        Robbins & Monro 1951, "A stochastic approximation method".
    """

    default_damping: ClassVar[float] = 0.01

    foreach: bool | None = attrs.field(default=None, validator=implementation)
    fused: bool | None = attrs.field(default=None, validator=implementation)

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Return `torch.optim.SGD` over `groups`."""
        return torch.optim.SGD(
            groups, lr=lr, weight_decay=weight_decay, foreach=self.foreach, fused=self.fused
        )


@hookimpl
def kfactk_updates() -> dict[str, type[Sgd]]:
    """Register the update rule `sgd`."""
    return {"sgd": Sgd}
