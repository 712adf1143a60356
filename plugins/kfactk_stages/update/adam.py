"""Adam."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import torch

from kfactk import hookimpl
from kfactk_stages.update._options import as_tuple, betas, flag, implementation, non_negative


@attrs.frozen
class Adam:
    """The step along the mean gradient, divided by its root mean square, entry by entry (equation 13 of the study).

        s <- rho1 s + (1 - rho1) p,    r <- rho2 r + (1 - rho2) p^2
        s_hat = s / (1 - rho1^t),      r_hat = r / (1 - rho2^t)
        theta <- theta - mu s_hat / (sqrt(r_hat) + delta)

    p is the preconditioned, clipped gradient, plus `weight_decay * theta`; mu the learning rate. A constant factor in p cancels, up to
    delta. Delegates to `torch.optim.Adam`.

    Args:
        betas: (rho1, rho2), decay rates of the first and second moment, each in [0, 1).
        eps: delta, in the unit of p.
        amsgrad: Whether to divide by the largest r_hat so far.
        foreach: Whether torch treats all parameters in one launch; `None` leaves it to torch.
        fused: Whether torch uses its fused kernel; `None` leaves it to torch.

    Raises:
        OptionError: A number out of its range, or both `foreach` and `fused`.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Adam().make([{"params": [w]}], lr=0.1, weight_decay=0.0)
        >>> w.grad = torch.tensor([2.0]); optimizer.step(); w.data
        tensor([0.9000])

    References:
        Kingma & Ba 2015, arXiv:1412.6980; `amsgrad`: Reddi, Kale & Kumar 2018, arXiv:1904.09237.
    """

    rule: ClassVar[type[torch.optim.Adam]] = torch.optim.Adam

    betas: tuple[float, float] = attrs.field(
        default=(0.9, 0.999), converter=as_tuple, validator=betas
    )
    eps: float = attrs.field(default=1e-8, validator=non_negative)
    amsgrad: bool = attrs.field(default=False, validator=flag)
    foreach: bool | None = attrs.field(default=None, validator=implementation)
    fused: bool | None = attrs.field(default=None, validator=implementation)

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """The torch optimiser over `groups`."""
        return self.rule(
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
def kfactk_updates() -> dict[str, type[Adam]]:
    """The update rule `adam`."""
    return {"adam": Adam}
