"""Independent binary labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from kfactk import hookimpl
from kfactk.options import number
from kfactk_stages.likelihood._misfit import (
    NONE,
    certain_factor,
    factor_between,
    scale_fault,
    single_term,
    slope_between,
    summed_share,
)
from kfactk_stages.likelihood.layout import IndependentEntries, arranged, missing_terms


@attrs.frozen(kw_only=True)
class Bernoulli(IndependentEntries):
    """C independent binary labels for each term; the output is logits.

        R(y | f) = prod_c p_c^{y_c} (1 - p_c)^{1 - y_c},    p = sigmoid(f)
        Fisher of the output = diag(p (1 - p))

    This is the likelihood of `F.binary_cross_entropy_with_logits`. With N terms of C labels and
    their cross entropies l, `divisor` tells the two losses apart that average:

        divisor="terms":    loss = (1/M) sum_nc l_nc,    M = N
        divisor="entries":  loss = (1/M) sum_nc l_nc,    M = N C
        F = (1/M) sum_nc p_nc (1 - p_nc) J_nc J_nc^T

    J_nc is the gradient of logit c of term n; F is the Gauss-Newton matrix of the loss. torch's
    function with its mean is the second: choose "entries" for it. With "terms", F is C times that
    loss' curvature, and damping acts as if divided by C. For C = 1 the two are the same.

    Args:
        class_axis: Dimension of the C labels for outputs of more than two dimensions: 1 for masks
            `[N, C, H, W]`. An output `[N]` is one label in each example.
        ignore_index: The label of masked terms; read where `targets` is given. A term is masked as
            a whole.
        targets: Name of the argument of the forward, or keyword of `Optimizer.observe`, with the
            labels, of the terms' shape or the output's.
        weights: Name of the one with sample weights or a padding mask, `[N]` or the terms' shape.
        shift: By how many positions the labels are ahead of the output: 1 for a causal language
            model that shifts its labels itself.

        divisor: "terms": a term is the vector of C labels, whose losses add up. "entries": each
            label is a term, with a mask of its own, and `class_axis` plays no part; `targets` and
            `weights` have the output's shape, or `[N]`.

    Raises:
        OptionError: An option has a value that cannot work.
        CaptureError: The output cannot be logits.

    Example:
        >>> likelihood = Bernoulli()
        >>> view = likelihood.view(torch.zeros(4, requires_grad=True))
        >>> view.shape, next(likelihood.root(view))[0]
        (torch.Size([4, 1, 1]), tensor([[0.5000]]))

    References:
        Martens 2020, "New insights and perspectives on the natural gradient method",
        arXiv:1412.1193.
    """

    read_with: ClassVar[tuple[tuple[str, str], ...]] = (("ignore_index", "targets"),)

    ignore_index: float = attrs.field(
        default=-100, validator=number(hint=", the label that marks terms without one")
    )

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        """Draw labels 0 and 1, `[N, S, C]`, in the precision of `view`."""
        uniform = torch.empty_like(view, requires_grad=False).uniform_(generator=generator)
        return (uniform < view.detach().sigmoid()).to(view.dtype)

    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        """Return the binary cross entropies of targets `[N, S, C]`, summed over C: `[N, S]`."""
        targets = targets.to(view.dtype)
        return F.binary_cross_entropy_with_logits(view, targets, reduction="none").sum(-1)

    def root(self, view: Tensor) -> Iterator[Tensor]:
        """Yield C columns `sqrt(p_c (1 - p_c)) e_c`, `[N, S, C]`."""
        logits = view.detach()
        sizes = (0.5 * (F.logsigmoid(logits) + F.logsigmoid(-logits))).exp()
        for c in range(view.shape[-1]):
            column = torch.zeros_like(sizes)
            column[..., c] = sizes[..., c]
            yield column

    def misfit(self, output: Tensor, gradient: Tensor, *, measured: bool) -> str | None:
        """Return why a loss with this gradient at the output is no binary cross entropy."""
        entries = arranged(output, self.class_axis).shape[-1] if self.divisor == "terms" else 1
        k = factor_between(output.double().sigmoid(), gradient.double())
        if measured:  # on the gradient of the loss itself, whatever it is
            whole = self.divisor == "terms"
            terms = arranged(gradient, self.class_axis) if whole else gradient.unsqueeze(-1)
            if single_term(terms):
                return None  # it may be the term's own weight
            return scale_fault(k, "the binary cross entropy", output.shape, entries)
        if (
            k is None
            and entries > 1
            and summed_share(arranged(gradient, self.class_axis), -1) < NONE
        ):
            return (
                f"the gradient of your loss at the output (shape {list(output.shape)}) sums to "
                f"zero over its {entries} entries, so your loss is a softmax cross entropy, and "
                "the curvature of likelihood='bernoulli' is not that of your loss. Give "
                "likelihood='categorical'"
            )
        return None

    def loss_factor(
        self, output: Tensor, gradient: Tensor, later: tuple[Tensor, Tensor] | None
    ) -> float | None:
        """Return by what a binary cross entropy with this gradient is multiplied, where certain.

        It is for labels of 0 and 1; after a step, for any.
        """
        p = output.double().sigmoid()
        if later is None:
            return certain_factor(p, gradient)
        return slope_between((p, later[0].double().sigmoid()), (gradient, later[1]))

    def _has_label(self, labels: Tensor, view: Tensor) -> Tensor:
        return ~missing_terms(labels == self.ignore_index, view, self.class_axis, str(self.targets))


@hookimpl
def kfactk_likelihoods() -> dict[str, type[Bernoulli]]:
    """Register the likelihood `bernoulli`."""
    return {"bernoulli": Bernoulli}
