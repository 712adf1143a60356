"""Rectified Adam."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from kfactk import hookimpl
from kfactk_stages.update._options import as_tuple, betas, flag, implementation, non_negative


@attrs.frozen
class RAdam:
    """Adam whose division waits until the second moment rests on enough steps, and is then tempered.

        rho_inf = 2 / (1 - rho2) - 1,    rho_t = rho_inf - 2 t rho2^t / (1 - rho2^t)
        theta <- theta - mu s_hat                                       while rho_t is small
        theta <- theta - mu l_t s_hat / (sqrt(r_hat) + delta)           after,
        l_t = sqrt( (rho_t - 4)(rho_t - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho_t) )

    with Adam's s_hat, r_hat; p is the preconditioned, clipped gradient, mu the learning rate. The paper divides from rho_t > 4 on;
    `torch.optim.RAdam`, to which this delegates, from rho_t > 5 on (step 6 rather than 5 at rho2 = 0.999), and adds delta before the
    bias correction of r, `sqrt(r) + delta`.

    Args:
        betas: (rho1, rho2), decay rates of the first and second moment, each in [0, 1).
        eps: delta, in the unit of p.
        decoupled_weight_decay: Whether weight decay shrinks the parameters, as in AdamW; else it is added to p.
        foreach: Whether torch treats all parameters in one launch; `None` leaves it to torch.

    Raises:
        OptionError: A number out of its range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = RAdam().make([{"params": [w]}], lr=0.1, weight_decay=0.0)
        >>> w.grad = torch.tensor([2.0]); optimizer.step(); w.data
        tensor([0.8000])

    References:
        Liu et al. 2020, arXiv:1908.03265.
    """

    betas: tuple[float, float] = attrs.field(
        default=(0.9, 0.999), converter=as_tuple, validator=betas
    )
    eps: float = attrs.field(default=1e-8, validator=non_negative)
    decoupled_weight_decay: bool = attrs.field(default=False, validator=flag)
    foreach: bool | None = attrs.field(default=None, validator=implementation)

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """`torch.optim.RAdam` over `groups`."""
        return torch.optim.RAdam(
            groups,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=self.decoupled_weight_decay,
            foreach=self.foreach,
        )


@hookimpl
def kfactk_updates() -> dict[str, type[RAdam]]:
    """The update rule `radam`."""
    return {"radam": RAdam}
