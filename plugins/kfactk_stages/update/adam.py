"""Adam."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import torch

from kfactk import hookimpl
from kfactk.options import as_tuple, flag, number
from kfactk_stages.update._options import decay_pair, implementation


@attrs.frozen
class Adam:
    """Step along the mean gradient, divided entry by entry by its root mean square.

        s <- rho1 s + (1 - rho1) p,    r <- rho2 r + (1 - rho2) p^2
        s_hat = s / (1 - rho1^t),      r_hat = r / (1 - rho2^t)
        theta <- theta - mu s_hat / (sqrt(r_hat) + delta)

    p is the preconditioned, clipped gradient, plus `weight_decay * theta`; mu is the learning rate.
    A constant factor in p cancels, up to delta. This is equation (13) of the thesis. It delegates
    to `torch.optim.Adam`.

    Args:
        betas: (rho1, rho2), decay rates of the first and second moment, each in [0, 1).
        eps: delta, in the unit of p.
        amsgrad: Whether to divide by the largest r_hat so far.
        foreach: Whether torch updates all parameters in one launch; `None` leaves it to torch.
        fused: Whether torch uses its fused kernel; `None` leaves it to torch.

    Raises:
        OptionError: A number is out of its range, or both `foreach` and `fused` are True.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Adam().make([{"params": [w]}], lr=0.1, weight_decay=0.0)
        >>> w.grad = torch.tensor([2.0]); optimizer.step(); w.data
        tensor([0.9000])

    References:
        Kingma & Ba 2015, "Adam: A method for stochastic optimization", arXiv:1412.6980.
        Reddi, Kale & Kumar 2018, "On the convergence of Adam and beyond", arXiv:1904.09237, for
        `amsgrad`.
    """

    rule: ClassVar[type[torch.optim.Adam]] = torch.optim.Adam

    betas: tuple[float, float] = attrs.field(
        default=(0.9, 0.999), converter=as_tuple, validator=decay_pair
    )
    eps: float = attrs.field(default=1e-8, validator=number(low=0))
    amsgrad: bool = attrs.field(default=False, validator=flag)
    foreach: bool | None = attrs.field(default=None, validator=implementation)
    fused: bool | None = attrs.field(default=None, validator=implementation)

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Return the torch optimizer over `groups`."""
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
    """Register the update rule `adam`."""
    return {"adam": Adam}
