"""Rectified Adam."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from kfactk import hookimpl
from kfactk.options import as_tuple, flag, number
from kfactk_stages.update._options import decay_pair, implementation


@attrs.frozen
class RAdam:
    """Adam that divides only once the second moment rests on enough steps, with a correction.

        rho_inf = 2 / (1 - rho2) - 1,    rho_t = rho_inf - 2 t rho2^t / (1 - rho2^t)
        theta <- theta - mu s_hat                                       while rho_t is small
        theta <- theta - mu l_t s_hat / (sqrt(r_hat) + delta)           after,
        l_t = sqrt( (rho_t - 4)(rho_t - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho_t) )

    s_hat and r_hat are those of Adam; p is the preconditioned, clipped gradient, mu the learning
    rate. It delegates to `torch.optim.RAdam`. The paper divides where rho_t > 4. torch divides
    where rho_t > 5 (at rho2 = 0.999 from step 6 rather than 5), and adds delta before the bias
    correction of r, `sqrt(r) + delta`.

    Args:
        betas: (rho1, rho2), decay rates of the first and second moment, each in [0, 1).
        eps: delta, in the unit of p.
        decoupled_weight_decay: Whether weight decay shrinks the parameters, as in AdamW. Otherwise
            it is added to p.
        foreach: Whether torch updates all parameters in one launch; `None` leaves it to torch.

    Raises:
        OptionError: A number is out of its range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = RAdam().make([{"params": [w]}], lr=0.1, weight_decay=0.0)
        >>> w.grad = torch.tensor([2.0]); optimizer.step(); w.data
        tensor([0.8000])

    References:
        Liu et al. 2020, "On the variance of the adaptive learning rate and beyond",
        arXiv:1908.03265.
    """

    betas: tuple[float, float] = attrs.field(
        default=(0.9, 0.999), converter=as_tuple, validator=decay_pair
    )
    eps: float = attrs.field(default=1e-8, validator=number(low=0))
    decoupled_weight_decay: bool = attrs.field(default=False, validator=flag)
    foreach: bool | None = attrs.field(default=None, validator=implementation)

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Return `torch.optim.RAdam` over `groups`."""
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
    """Register the update rule `radam`."""
    return {"radam": RAdam}
