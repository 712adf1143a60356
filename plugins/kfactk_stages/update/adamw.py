"""AdamW."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch

from kfactk import hookimpl
from kfactk_stages.update.adam import Adam


@attrs.frozen
class AdamW(Adam):
    """Shrink the parameters, then take Adam's step: the decay is not divided by the gradient.

        theta <- (1 - mu lambda) theta,    then Adam's step on p

    p is the preconditioned, clipped gradient, mu the learning rate, lambda the weight decay. It
    delegates to `torch.optim.AdamW`.

    Args:
        betas: (rho1, rho2), decay rates of the first and second moment, each in [0, 1).
        eps: delta, in the unit of p.
        amsgrad: Whether to divide by the largest second moment so far.
        foreach: Whether torch updates all parameters in one launch; `None` leaves it to torch.
        fused: Whether torch uses its fused kernel; `None` leaves it to torch.

    Raises:
        OptionError: A number is out of its range, or both `foreach` and `fused` are True.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = AdamW().make([{"params": [w]}], lr=0.1, weight_decay=0.5)
        >>> w.grad = torch.tensor([2.0]); optimizer.step(); w.data
        tensor([0.8500])

    References:
        Loshchilov & Hutter 2019, "Decoupled weight decay regularization", arXiv:1711.05101.
        Reddi, Kale & Kumar 2018, arXiv:1904.09237, for `amsgrad`.
    """

    rule: ClassVar[type[torch.optim.Adam]] = torch.optim.AdamW


@hookimpl
def kfactk_updates() -> dict[str, type[AdamW]]:
    """Register the update rule `adamw`."""
    return {"adamw": AdamW}
