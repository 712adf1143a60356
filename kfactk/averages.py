"""Exponential running mean that carries its own weight, so that it is unbiased from the first value on."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor


@attrs.define(eq=False)
class RunningMean:
    """Weighted mean of the values seen so far, value k of t weighing `decay ** (t - k)`.

        w_t = decay * w_{t-1} + 1,    m_t = m_{t-1} + (x_t - m_{t-1}) / w_t

    The mean of a constant is that constant from the first value on (no identity start, no bias). `decay=0` keeps the last value;
    `decay=1` is the plain arithmetic mean.

    Args:
        value: The mean, any shape; `None` before the first update.
        weight: w_t; 0 before the first update.

    Example:
        >>> mean = RunningMean()
        >>> mean.update(torch.tensor(3.0), decay=0.95); mean.value
        tensor(3.)
        >>> mean.update(torch.tensor(5.0), decay=1.0); mean.value
        tensor(4.)
    """

    value: Tensor | None = None
    weight: float = 0.0

    def update(self, new: Tensor, decay: float) -> None:
        """Take one more value in. `new` has the shape of the mean; `decay` lies in [0, 1]."""
        new = new.detach()
        self.weight = 1.0 if self.value is None else decay * self.weight + 1.0
        if self.value is None:
            self.value = new.clone(memory_format=torch.contiguous_format)
        elif self.weight == 1.0:  # nothing of the old mean is left, not even what is not finite
            self.value = new.to(self.value.dtype, copy=True, memory_format=torch.contiguous_format)
        else:
            self.value = torch.lerp(self.value, new.to(self.value.dtype), 1.0 / self.weight)

    def replace(self, value: Tensor) -> None:
        """Set the mean to a transformed version of itself (a change of basis), its weight unchanged."""
        self.value = value
