"""Counts."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from kfactk import hookimpl
from kfactk_stages.likelihood._misfit import slope_between
from kfactk_stages.likelihood.layout import IndependentEntries, missing_terms


@attrs.frozen(kw_only=True)
class Poisson(IndependentEntries):
    """C independent counts for each term; the output is the logarithm of their rates.

        R(y | f) = prod_c lambda_c^{y_c} exp(-lambda_c) / y_c!,    lambda = exp(f)
        Fisher of the output = diag(lambda)

    This is the likelihood of `F.poisson_nll_loss` with `log_input=True`. Its mean divides by all
    N C counts: choose `divisor="entries"` for it where C > 1.

    Args:
        class_axis: Dimension of the C counts for outputs of more than two dimensions. An output
            `[N]` is one count in each example.
        targets: Name of the argument of the forward, or keyword of `Optimizer.observe`, with the
            counts, of the terms' shape or the output's. NaN marks missing terms.
        weights: Name of the one with sample weights or a padding mask, `[N]` or the terms' shape.
        shift: By how many positions the counts are ahead of the output.

        divisor: "terms": a term is the vector of C counts, whose losses add up. "entries": each
            count is a term, and `class_axis` plays no part.

    Raises:
        OptionError: An option has a value that cannot work.
        CaptureError: The output cannot be logarithms of rates.

    Example:
        >>> view = Poisson().view(torch.zeros(4, requires_grad=True))
        >>> next(Poisson().root(view))[0], Poisson().nll(view, torch.ones(4, 1, 1))[0]
        (tensor([[1.]]), tensor([1.], grad_fn=<SelectBackward0>))

    References:
        McCullagh & Nelder 1989, "Generalized Linear Models", chapter 6.
    """

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        """Draw counts `[N, S, C]`, in the precision of `view`."""
        return torch.poisson(view.detach().exp(), generator)

    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log-probability, `[N, S]`, of counts `[N, S, C]`."""
        targets = targets.to(view.dtype)
        losses = F.poisson_nll_loss(view, targets, log_input=True, reduction="none")
        return (losses + torch.lgamma(targets + 1)).sum(-1)

    def root(self, view: Tensor) -> Iterator[Tensor]:
        """Yield C columns `sqrt(lambda_c) e_c`, `[N, S, C]`."""
        sizes = (0.5 * view.detach()).exp()
        for c in range(view.shape[-1]):
            column = torch.zeros_like(sizes)
            column[..., c] = sizes[..., c]
            yield column

    def loss_factor(
        self, output: Tensor, gradient: Tensor, later: tuple[Tensor, Tensor] | None
    ) -> float | None:
        """Return by what this loss of counts with this gradient is multiplied, where certain.

        It takes two gradients to tell, with the same counts.
        """
        if later is None:
            return None
        return slope_between((output.exp(), later[0].exp()), (gradient, later[1]))

    def _has_label(self, labels: Tensor, view: Tensor) -> Tensor:
        return ~missing_terms(labels.isnan(), view, self.class_axis, str(self.targets))


@hookimpl
def kfactk_likelihoods() -> dict[str, type[Poisson]]:
    """Register the likelihood `poisson`."""
    return {"poisson": Poisson}
