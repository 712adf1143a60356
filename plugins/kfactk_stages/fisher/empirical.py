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
    """The empirical Fisher: targets are the data's, and no backward pass is added.

        F_emp = (1/M) sum_n vec(D_n) vec(D_n)^T,    D_n from the user's own loss

    It rides on the user's `loss.backward()`, so it sees whatever that loss is. Two facts tell the scale: the recipe's
    `reduction` ("mean" or "sum", how the loss joins its terms), and the gradient scaler handed to `bind`, whose factor is divided out. What
    is left is the user's: a loss multiplied by c scales G and the EKFAC scale by c^2, A not at all, so damping has to follow; `mc` and
    `exact` never see the user's loss. So `loss / k` for k accumulated micro-batches divides G by k^2: give
    `reduction="sum"` and a summed loss, or a damping k^2 times smaller. Sample weights other than 0 and 1 are part of that loss and enter
    squared, where `mc` and `exact` take them once. Terms that belong to one example (positions of a sequence or an image) enter D_n summed,
    cross products included: they vanish in expectation for sampled targets, not for the data's.

    It equals neither the Fisher nor the Gauss-Newton matrix: it shrinks with the loss where those do not, and models the curvature
    poorly away from a well-fitted, well-specified model. Choose it for its price, not for its mathematics.

    Example:
        >>> Empirical().own_pass
        False

    References:
        Kunstner, Balles & Hennig 2019, "Limitations of the empirical Fisher approximation", arXiv:1905.12558.
    """

    own_pass: ClassVar[bool] = False

    @property
    def seed(self) -> int:
        """Nothing is drawn: 0."""
        return 0

    def losses(
        self,
        view: Tensor,
        likelihood: Likelihood,
        weights: Tensor | None,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        """None: the user's backward is listened to."""
        return iter(())


@hookimpl
def kfactk_fishers() -> dict[str, type[Empirical]]:
    """The Fisher of the data's own targets."""
    return {"empirical": Empirical}
