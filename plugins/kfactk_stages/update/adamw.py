"""Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from kfactk import hookimpl
from kfactk_stages.update._options import as_tuple, betas, flag, implementation, non_negative


@attrs.frozen
class AdamW:
    """Adam's step after the parameters have been shrunk, so that the decay is not divided by the gradient's size.

        theta <- (1 - mu lambda) theta,    then Adam's step on p

    p is the preconditioned, clipped gradient; mu the learning rate, lambda the weight decay. Delegates to `torch.optim.AdamW`.

    Args:
        betas: (rho1, rho2), decay rates of the first and second moment, each in [0, 1).
        eps: delta, in the unit of p.
        amsgrad: Whether to divide by the largest second moment so far.
        foreach: Whether torch treats all parameters in one launch; `None` leaves it to torch.
        fused: Whether torch uses its fused kernel; `None` leaves it to torch.

    Raises:
        OptionError: A number out of its range, or both `foreach` and `fused`.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = AdamW().make([{"params": [w]}], lr=0.1, weight_decay=0.5)
        >>> w.grad = torch.tensor([2.0]); optimizer.step(); w.data
        tensor([0.8500])

    References:
        Loshchilov & Hutter 2019, arXiv:1711.05101; `amsgrad`: Reddi, Kale & Kumar 2018, arXiv:1904.09237.
    """

    betas: tuple[float, float] = attrs.field(default=(0.9, 0.999), converter=as_tuple, validator=betas)
    eps: float = attrs.field(default=1e-8, validator=non_negative)
    amsgrad: bool = attrs.field(default=False, validator=flag)
    foreach: bool | None = attrs.field(default=None, validator=implementation)
    fused: bool | None = attrs.field(default=None, validator=implementation)

    def make(self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """`torch.optim.AdamW` over `groups`."""
        return torch.optim.AdamW(
            groups,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=weight_decay,
            amsgrad=self.amsgrad,
            foreach=self.foreach,
            fused=self.fused,
        )


@hookimpl
def kfactk_updates() -> dict[str, type[AdamW]]:
    """The update rule `adamw`."""
    return {"adamw": AdamW}
