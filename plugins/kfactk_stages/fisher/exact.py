"""The true Fisher without sampling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import CaptureError, Likelihood, OptionError, hookimpl


def _check_passes(instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(
            f"max_passes must be a whole number of backward passes, 1 or more, not {value!r}"
        )


@attrs.frozen(kw_only=True)
class Exact:
    """The true Fisher of the model's predictive distribution, exactly: no sampling noise, at up to S C backward passes a forward.

    With columns `b_{n,s,c}` whose outer products over c sum to the Fisher information of the output at term s of example n, there
    is one loss for each position and column,

        L_{s,c} = sum_n sqrt(w_{n,s}) <b_{n,s,c}, f_{n,s}>,

    one position at a time, so that outer products do not mix the terms of one example. The outer products of the per-example gradients,
    summed over s and c, are M F. For one term an example and few classes this is affordable; else use `mc`.

    Args:
        max_passes: The most backward passes S C that one forward may take.

    Raises:
        OptionError: An option is not of its kind.
        CaptureError: The output needs more passes than `max_passes`.

    Example:
        >>> from kfactk_stages.likelihood.gaussian import Gaussian
        >>> view = torch.zeros(3, 1, 2, requires_grad=True)
        >>> losses = Exact().losses(view, Gaussian(), None, torch.Generator())
        >>> [torch.autograd.grad(loss, view)[0][0].tolist() for loss in losses]
        [[[1.0, 0.0]], [[0.0, 1.0]]]

    References:
        Martens 2020, "New insights and perspectives on the natural gradient method", arXiv:1412.1193, section 9.
    """

    own_pass: ClassVar[bool] = True

    max_passes: int = attrs.field(default=4096, validator=_check_passes)

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
        """One loss for each position and each column of the likelihood's root."""
        positions, width = view.shape[1], view.shape[2]
        if positions * width > self.max_passes:
            raise CaptureError(
                f'fisher="exact" would take up to {positions * width} backward passes a forward ({positions} terms an example, each of '
                f'width {width}), more than max_passes={self.max_passes}. Use fisher="mc", with samples=... for less noise, or raise '
                'it: fisher={"name": "exact", "max_passes": ...}.'
            )
        return self._losses(view, likelihood, weights)

    def _losses(
        self, view: Tensor, likelihood: Likelihood, weights: Tensor | None
    ) -> Iterator[Tensor]:
        root_weights = None if weights is None else weights.sqrt()
        for column in likelihood.root(view):
            for s in range(view.shape[1]):
                terms = (view[:, s] * column[:, s]).sum(-1)
                yield (terms if root_weights is None else root_weights[:, s] * terms).sum()


@hookimpl
def kfactk_fishers() -> dict[str, type[Exact]]:
    """The Fisher without sampling."""
    return {"exact": Exact}
