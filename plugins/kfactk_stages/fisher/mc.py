"""The true Fisher by sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import Likelihood, OptionError, hookimpl
from kfactk.options import function, whole


@attrs.frozen(kw_only=True)
class MonteCarlo:
    """The true Fisher, with targets drawn from the model's own predictive distribution.

    With K draws `y_k ~ R(y | f(x))`, independent over examples and terms, loss k of one forward is

        L_k = K^{-1/2} sum_{n,s} sqrt(w_{n,s}) (-log R(y_{k,n,s} | f_{n,s})).

    The outer products of the per-example gradients, summed over k, are M F in expectation. Scores
    of different terms have zero mean and are independent, so their cross products vanish in
    expectation.

    Args:
        samples: K, the number of draws, and of backward passes, for each forward. The variance
            falls as 1/K.
        seed: Every draw derives from it, the step, the micro-batch and the rank. The global random
            state does not change.
        draw: A function from the detached output `[N, S, C]` to targets in the form that the
            likelihood's `nll` takes. It replaces sampling, and is called once for each draw.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> from kfactk_stages.likelihood.gaussian import Gaussian
        >>> view = torch.zeros(3, 1, 2, requires_grad=True)
        >>> fisher = MonteCarlo(draw=lambda output: output + 1)
        >>> [loss] = fisher.losses(view, Gaussian(), None, torch.Generator())
        >>> torch.autograd.grad(loss, view)[0][0]
        tensor([[-1., -1.]])

    References:
        Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
        curvature", arXiv:1503.05671, section 5.
    """

    own_pass: ClassVar[bool] = True

    samples: int = attrs.field(
        default=1, validator=whole(hint=": each draw costs one backward pass")
    )
    seed: int = attrs.field(default=0, validator=whole(0))
    draw: Callable[[Tensor], Tensor] | None = attrs.field(
        default=None,
        validator=function(hint=" from the detached output [N, S, C] to targets, or None"),
    )

    def __attrs_post_init__(self) -> None:
        if self.seed and self.draw is not None:
            raise OptionError(
                f"MonteCarlo: seed={self.seed} cannot have an effect, since draw gives the "
                "targets. Leave seed out, and seed what draw draws with."
            )

    def losses(
        self,
        view: Tensor,
        likelihood: Likelihood,
        weights: Tensor | None,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        """Yield one loss for each draw."""
        root_weights = None if weights is None else weights.sqrt()
        for _ in range(self.samples):
            output = view.detach()
            if self.draw is None:
                targets = likelihood.sample(output, generator)
            else:
                targets = self.draw(output)
            terms = likelihood.nll(view, targets)
            weighted = terms if root_weights is None else root_weights * terms
            yield weighted.sum() / math.sqrt(self.samples)


@hookimpl
def kfactk_fishers() -> dict[str, type[MonteCarlo]]:
    """Register the Fisher stage `mc`."""
    return {"mc": MonteCarlo}
