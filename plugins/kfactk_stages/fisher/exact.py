"""The true Fisher without sampling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import CaptureError, Likelihood, hookimpl
from kfactk.options import whole


@attrs.frozen(kw_only=True)
class Exact:
    """The true Fisher of the model's predictive distribution, without sampling noise.

    It takes up to S C backward passes for each forward. The outer products of columns `b_{n,s,c}`
    over c sum to the Fisher information of the output at term s of example n. There is one loss for
    each position and column,

        L_{s,c} = sum_n e_n sqrt(w_{n,s}) <b_{n,s,c}, f_{n,s}>.

    Each loss covers one position, so outer products do not mix the terms of an example. The outer
    products of the per-example gradients, summed over s and c, are M F. The random signs e_n = +-1
    change nothing there. Where examples influence each other (BatchNorm in training mode, graphs,
    rows that share an example), they make the mean of their mixed products zero. Use it for one
    term in each example and few classes; otherwise use `mc`.

    Args:
        max_passes: Largest number S C of backward passes for one forward.

    Raises:
        OptionError: `max_passes` is not a whole number of at least 1.
        CaptureError: The output needs more passes than `max_passes`.

    Example:
        >>> from kfactk_stages.likelihood.gaussian import Gaussian
        >>> view = torch.zeros(3, 1, 2, requires_grad=True)
        >>> losses = Exact().losses(view, Gaussian(), None, torch.Generator())
        >>> [torch.autograd.grad(loss, view)[0][0].abs().tolist() for loss in losses]
        [[[1.0, 0.0]], [[0.0, 1.0]]]

    References:
        Martens 2020, "New insights and perspectives on the natural gradient method",
        arXiv:1412.1193, section 9.
    """

    own_pass: ClassVar[bool] = True

    max_passes: int = attrs.field(default=4096, validator=whole(hint=": it counts backward passes"))

    @property
    def seed(self) -> int:
        """0: other signs give the same outer products."""
        return 0

    def losses(
        self,
        view: Tensor,
        likelihood: Likelihood,
        weights: Tensor | None,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        """Yield one loss for each position and each column of the likelihood's root."""
        positions, width = view.shape[1], view.shape[2]
        if positions * width > self.max_passes:
            raise CaptureError(
                f'fisher="exact" would take up to {positions * width} backward passes for each '
                f"forward ({positions} terms in each example, each of width {width}), more than "
                f'max_passes={self.max_passes}. Use fisher="mc", with samples=... for less noise, '
                'or raise the limit: fisher={"name": "exact", "max_passes": ...}.'
            )
        return self._losses(view, likelihood, weights, generator)

    def _losses(
        self,
        view: Tensor,
        likelihood: Likelihood,
        weights: Tensor | None,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        root_weights = None if weights is None else weights.sqrt()
        for column in likelihood.root(view):
            for s in range(view.shape[1]):
                drawn = torch.randint(2, (len(view),), generator=generator, device=view.device)
                terms = (view[:, s] * column[:, s]).sum(-1) * (2 * drawn - 1)
                yield (terms if root_weights is None else root_weights[:, s] * terms).sum()


@hookimpl
def kfactk_fishers() -> dict[str, type[Exact]]:
    """Register the Fisher stage `exact`."""
    return {"exact": Exact}
