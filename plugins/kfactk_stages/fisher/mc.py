"""The true Fisher by sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import Likelihood, OptionError, hookimpl


def _check_samples(instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(
            f"samples must be a whole number of draws, 1 or more, not {value!r}: each costs one backward pass"
        )


def _check_seed(instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise OptionError(
            f"seed must be a whole number, 0 or more, not {value!r}: every draw derives from it, the step and the rank"
        )


def _check_draw(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and not callable(value):
        raise OptionError(
            f"draw must be a function from the detached output [N, S, C] to targets, or None, not {value!r}"
        )


@attrs.frozen(kw_only=True)
class MonteCarlo:
    """The true Fisher, its targets drawn from the model's own predictive distribution.

    With K draws `y_k ~ R(y | f(x))` independent over examples and terms, loss k of one forward is

        L_k = K^{-1/2} sum_{n,s} sqrt(w_{n,s}) (-log R(y_{k,n,s} | f_{n,s}))

    so that the outer products of the per-example gradients, summed over k, are M F in expectation: scores of different terms have zero mean
    and are independent, and their cross products vanish in expectation.

    Args:
        samples: K, the draws (and backward passes) for each forward. The variance falls as 1/K.
        seed: Every draw derives from it, the step, the micro-batch and the rank. The global random state is left alone.
        draw: A function from the detached output `[N, S, C]` to targets in the form the likelihood's `nll` takes, called once a
            draw in place of sampling; for tests and for other sources of targets.

    Raises:
        OptionError: An option is not of its kind.

    Example:
        >>> from kfactk_stages.likelihood.gaussian import Gaussian
        >>> view = torch.zeros(3, 1, 2, requires_grad=True)
        >>> [loss] = MonteCarlo(draw=lambda output: output + 1).losses(view, Gaussian(), None, torch.Generator())
        >>> torch.autograd.grad(loss, view)[0][0]
        tensor([[-1., -1.]])

    References:
        Martens & Grosse 2015, arXiv:1503.05671, section 5.
    """

    own_pass: ClassVar[bool] = True

    samples: int = attrs.field(default=1, validator=_check_samples)
    seed: int = attrs.field(default=0, validator=_check_seed)
    draw: Callable[[Tensor], Tensor] | None = attrs.field(default=None, validator=_check_draw)

    def losses(
        self,
        view: Tensor,
        likelihood: Likelihood,
        weights: Tensor | None,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        """One loss a draw."""
        root_weights = None if weights is None else weights.sqrt()
        for _ in range(self.samples):
            targets = (
                likelihood.sample(view.detach(), generator)
                if self.draw is None
                else self.draw(view.detach())
            )
            terms = likelihood.nll(view, targets)
            yield (terms if root_weights is None else root_weights * terms).sum() / math.sqrt(
                self.samples
            )


@hookimpl
def kfactk_fishers() -> dict[str, type[MonteCarlo]]:
    """The sampled Fisher."""
    return {"mc": MonteCarlo}
