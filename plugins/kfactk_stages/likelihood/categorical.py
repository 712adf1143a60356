"""Softmax classification."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from kfactk import CaptureError, OptionError, hookimpl
from kfactk_stages.likelihood.layout import Layout, spread


def _check_index(instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError(
            f"{attribute.alias} must be an integer, not {value!r}: it is the label that marks terms without one"
        )


@attrs.frozen(kw_only=True)
class Categorical(Layout):
    """One class out of C for each term, the output being logits: the likelihood of `F.cross_entropy`.

        R(y | f) = p_y,    p = softmax(f),    -log R = logsumexp(f) - f_y,    Fisher of the output = diag(p) - p p^T

    The root used for exact Fisher passes breaks the stick: with tails `q_c = sum_{j >= c} p_j`, column c = 1 .. C-1 is

        sqrt(p_c q_{c+1} / q_c) (e_c - sum_{j > c} (p_j / q_{c+1}) e_j),

    one column (one backward pass) fewer than `sqrt(p_c) (e_c - p)`, half of them for two classes.

    Args:
        class_axis: Dimension of the classes for outputs of more than two dimensions: 1 for images, -1 for language models.
        ignore_index: The label of masked terms, as in `F.cross_entropy`; read where `targets` is given.
        targets: Name of the forward's argument (or keyword of `Optimizer.observe`) with the labels: those equal to `ignore_index` get
            weight 0. They must be aligned with the output but for `shift`.
        weights: Name of the one with sample weights or a padding mask, `[N]` or the terms' shape.
        shift: How many positions ahead of the output the labels are: 1 for a causal language model that shifts its labels itself.

    Raises:
        OptionError: An option is not of its kind.
        CaptureError: The output cannot be logits over classes.

    Example:
        >>> logits = torch.zeros(2, 3, 5, requires_grad=True)
        >>> mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        >>> likelihood = Categorical(class_axis=-1, weights="attention_mask")
        >>> view = likelihood.view(logits)
        >>> view.shape, likelihood.term_weights(view, {"attention_mask": mask}).sum()
        (torch.Size([2, 3, 5]), tensor(3.))

    References:
        Martens 2020, "New insights and perspectives on the natural gradient method", arXiv:1412.1193.
    """

    ignore_index: int = attrs.field(default=-100, validator=_check_index)

    def view(self, output: Tensor) -> Tensor:
        """Logits `[N, S, C]`, float32 at least."""
        if output.ndim == 1 and output.is_floating_point():
            raise CaptureError(
                f"the model's output has shape {list(output.shape)}: one number an example is no choice between classes. Give "
                'likelihood="gaussian" for regression or likelihood="bernoulli" for binary labels.'
            )
        view = super().view(output)
        if view.shape[-1] == 1:
            raise CaptureError(
                f"the model's output (shape {list(output.shape)}) has a single class, whose probability is always 1. Give "
                'likelihood="gaussian" for regression or likelihood="bernoulli" for binary labels.'
            )
        return view

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        """Classes `[N, S]`, drawn from the softmax by the exponential race (Gumbel's trick): no host transfer, and no crash on NaN."""
        noise = torch.empty_like(view, requires_grad=False).exponential_(generator=generator)
        noise.clamp_(
            min=torch.finfo(noise.dtype).eps / 2
        )  # an exact zero would make a hopeless class win
        return (view.detach() - noise.log_()).argmax(-1)

    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, `[N, S]`, of targets `[N, S]`; 0 where the target is an `ignore_index` that is not a class."""
        classes = view.shape[-1]
        ignored = -100 if 0 <= self.ignore_index < classes else self.ignore_index
        losses = F.cross_entropy(
            view.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=ignored
        )
        return losses.reshape(view.shape[:2])

    def root(self, view: Tensor) -> Iterator[Tensor]:
        """C - 1 columns `[N, S, C]` whose outer products sum to `diag(p) - p p^T`."""
        log_p = view.detach().log_softmax(-1)
        log_q = log_p.flip(-1).logcumsumexp(-1).flip(-1)
        for c in range(view.shape[-1] - 1):
            ahead = log_q[..., c + 1]
            size = (0.5 * (log_p[..., c] + ahead - log_q[..., c])).exp()
            size = torch.where(torch.isneginf(log_p[..., c]) | torch.isneginf(ahead), 0.0, size)
            share = (log_p[..., c + 1 :] - ahead.unsqueeze(-1)).exp()
            column = torch.zeros_like(log_p)
            column[..., c] = size
            column[..., c + 1 :] = torch.where(
                size.unsqueeze(-1) > 0, -size.unsqueeze(-1) * share, 0.0
            )
            yield column

    def _present(self, labels: Tensor, view: Tensor) -> Tensor:
        return spread(labels, view, "targets", str(self.targets)) != self.ignore_index


@hookimpl
def kfactk_likelihoods() -> dict[str, type[Categorical]]:
    """The softmax likelihood."""
    return {"categorical": Categorical}
