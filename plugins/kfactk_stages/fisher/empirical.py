"""The empirical Fisher: the gradients that the user's own backward computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import Likelihood, hookimpl


@attrs.frozen(kw_only=True)
class Empirical:
    """The empirical Fisher: it uses the targets of the data, and adds no backward pass.

        F_emp = (1/M) sum_n vec(D_n) vec(D_n)^T,    D_n from the user's own loss

    It listens to the user's `loss.backward()`, so it measures whatever that loss is. Two facts give
    the scale: the recipe's `reduction` ("mean" or "sum"), and the gradient scaler that `bind`
    takes, whose factor is divided out. Every other factor of the loss counts:

    - A loss multiplied by c scales G and the EKFAC scale by c^2, and A not at all, so damping has
      to follow. `mc` and `exact` never see the user's loss.
    - `loss / k` for k accumulated micro-batches divides G by k^2. Use `reduction="sum"` and a
      summed loss, or a damping k^2 times smaller.
    - Sample weights other than 0 and 1 are part of the loss and enter squared. In `mc` and `exact`
      they enter once.
    - The terms of one example (positions of a sequence or an image) enter D_n as a sum, cross
      products included. These vanish in expectation for sampled targets, not for the data's.

    F_emp equals neither the Fisher nor the Gauss-Newton matrix: it shrinks with the loss where
    those do not. It describes the curvature poorly away from a well-fitted, well-specified model.
    Choose it for its cost, not for its mathematics.

    Example:
        >>> Empirical().own_pass
        False

    References:
        Kunstner, Balles & Hennig 2019, "Limitations of the empirical Fisher approximation for
        natural gradient descent", arXiv:1905.12558.
    """

    own_pass: ClassVar[bool] = False

    @property
    def seed(self) -> int:
        """0: nothing is drawn."""
        return 0

    def losses(
        self,
        view: Tensor,
        likelihood: Likelihood,
        weights: Tensor | None,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        """Yield nothing: the framework listens to the user's backward."""
        return iter(())


@hookimpl
def kfactk_fishers() -> dict[str, type[Empirical]]:
    """Register the Fisher stage `empirical`."""
    return {"empirical": Empirical}
