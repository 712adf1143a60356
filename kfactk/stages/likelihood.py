"""Likelihoods: what the model's output means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class Likelihood(Protocol):
    """What the model's output means: a distribution R(y | f(x)), of which F is the information.

    It may have one more member, by which the first backward is checked. `misfit(output, gradient,
    *, measured)` returns why a loss with this gradient at the model's output is not the
    likelihood's, or `None`. The gradient is that of the summed loss. `measured` says whether
    curvature is measured on it, so that its size matters.

    Where one gradient does not tell by what a loss divides, two with the same targets may.
    `divisor_misfit(output, gradient, other)` returns why the measured loss is a mean over something
    else than the likelihood's terms, or `None` where that is not certain. `other` is another output
    and its gradient. It may be the targets themselves with a gradient of 0, or have nothing to do
    with the first.

    By another one the scale of a loss is checked under a controller. `loss_factor(output, gradient,
    later)` returns c, where the gradient at the output is c times that of the summed negative
    log-likelihood, or `None` where that is not certain. `later` is an output and a gradient after a
    step, with the same targets, or `None`.

    `only_own_pass` names options that nobody reads where curvature is measured on the user's own
    gradient: they say what targets are drawn, or how large the gradients of these are.
    `read_with` pairs an option with the one without which nobody reads it.

    `beside` names the likelihood that messages propose for the other parts of an output. Without
    it they propose this one.
    """

    def view(self, output: Tensor) -> Tensor:
        """Return the output as `[N, S, C]`: examples, terms of one example, the event axis.

        The result shares its graph with `output`.

        Raises:
            CaptureError: The output cannot be this distribution's parameters. The message says what
                it looks like, and the remedy.
        """

    def term_weights(self, view: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
        """Return the weight of each term, `[N, S]`, zero for masked ones; `None` when all are 1.

        Args:
            view: What `view` returned, detached.
            batch: The arguments of the model's forward and of `Optimizer.observe`, by name.
        """

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        """Draw targets from the model's own predictive distribution, in the form `nll` takes."""

    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log-likelihood of each term, `[N, S]`."""

    def root(self, view: Tensor) -> Iterator[Tensor]:
        """Yield detached `[N, S, C]` columns.

        Their outer products over C sum to the Fisher information of the output, for each term.
        """
