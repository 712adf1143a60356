"""K-FAC for embeddings: the input factor is diagonal, and only rows that occur cost anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfactk import Curvature, Layer, LayerCall, Samples, Statistic, Tensors, hookimpl
from kfactk.options import whole
from kfactk.samples import DEFAULT_CHUNK_BYTES, product
from kfactk_stages.curvature._calls import CallSamples, check_examples, examples_first, scaled
from kfactk_stages.curvature._coverage import reason_against


@attrs.frozen(eq=False)
class EmbeddingCall:
    """One call of an embedding, examples in dimension 0.

    Args:
        tokens: Indices `[N, T]`.
        gradient: `[N, T, d]`.
        scale: What the gradient is to be multiplied by.
    """

    tokens: Tensor
    gradient: Tensor
    scale: Tensor | float


class EmbeddingSamples(CallSamples[EmbeddingCall]):
    """Samples of all calls of an embedding, joined along T: `a = e_x`, a row of the identity.

    Positions of the padding index have `a = 0` and `g = 0`: their row gets no gradient.

    Args:
        calls: The calls; all of the same number of examples.
        rows: V, the number of rows of the table.
        padding: The padding index; `None` where there is none.
        num_terms, first, chunk_bytes: See `kfactk.Samples`.
    """

    def __init__(
        self,
        calls: Sequence[EmbeddingCall],
        *,
        rows: int,
        padding: int | None,
        num_terms: Tensor | float,
        first: bool,
        chunk_bytes: int,
    ) -> None:
        gradients = [call.gradient for call in calls]
        examples, _, d_out = gradients[0].shape
        super().__init__(
            calls,
            gradients,
            (examples, sum(gradient.shape[1] for gradient in gradients)),
            rows,
            d_out,
            num_terms=num_terms,
            first=first,
            chunk_bytes=chunk_bytes,
        )
        self.padding = padding

    def tokens(self, rows: slice = slice(None)) -> Tensor:
        """Return the indices of the examples `rows`, `[n, T]`."""
        return torch.cat([call.tokens[rows] for call in self.calls], 1).long()

    def inputs(self, rows: slice = slice(None)) -> Tensor:
        """Return the rows `e_x` of the examples `rows`, `[n, T, V]`; large where V is."""
        return self.input_rotation(torch.eye(self.d_in, dtype=self.dtype, device=self.device))(rows)

    def gradients(self, rows: slice = slice(None)) -> Tensor:
        """Return the output gradients of the examples `rows`, `[n, T, d]`."""
        parts = [scaled(call.gradient[rows].to(self.dtype), call.scale) for call in self.calls]
        return self._unpadded(parts[0] if len(parts) == 1 else torch.cat(parts, 1), rows)

    def counts(self) -> Statistic:
        """Return `sum_n sum_t e_x`, `[V]`, counted by examples; nothing on later passes.

        It is the diagonal of `input_moment`.
        """
        if not self.first:
            return Statistic(None, 0.0)
        total = torch.zeros(self.d_in, dtype=self.dtype, device=self.device)
        for call in self.calls:
            tokens = call.tokens.flatten().long()
            total.index_add_(0, tokens, total.new_ones(()).expand(len(tokens)))
        if self.padding is not None:
            total[self.padding] = 0
        return Statistic(total, float(self.examples))

    def input_rotation(
        self, right: Tensor, precision: torch.dtype | None = None
    ) -> Callable[[slice], Tensor]:
        """Return what looks up rows of `right` for the examples of a slice, `[n, T, k_in]`."""
        right = right.to(precision or self.dtype)

        def looked_up(rows: slice) -> Tensor:
            return self._unpadded(F.embedding(self.tokens(rows), right).to(self.dtype), rows)

        return looked_up

    def per_example_gradients(
        self,
        rows: slice = slice(None),
        left: Tensor | None = None,
        *,
        precision: torch.dtype | None = None,
    ) -> Tensor:
        """Return `left^T D_n` of the examples `rows`, `[n, d, V]`; large where V is."""
        gradients, tokens = self._turned(rows, left, precision), self.tokens(rows)
        n, _, d = gradients.shape
        found = gradients.new_zeros(n * self.d_in, d)
        start = torch.arange(n, device=tokens.device).unsqueeze(-1) * self.d_in
        found.index_add_(0, (start + tokens).flatten(), gradients.flatten(0, 1))
        return found.view(n, self.d_in, d).mT

    def projected_square(
        self, left: Tensor | None, right: Tensor | None, *, precision: torch.dtype | None = None
    ) -> Statistic:
        """Return `sum_n (left^T D_n right)^2`, `[k_out, k_in]`, counted by likelihood terms.

        Where `right` is `None`, gradients of equal examples and indices are added, then the squares
        of equal indices. Rows that do not occur stay zero and cost nothing else.
        """
        if right is not None:
            return super().projected_square(left, right, precision=precision)
        total: Tensor | None = None
        width = self.d_out if left is None else left.shape[-1]
        for rows in self.chunks(self.positions * (2 * self.d_out + 3 * width + 4)):
            gradients, tokens = self._turned(rows, left, precision), self.tokens(rows)
            if total is None:
                total = gradients.new_zeros(self.d_in, width)
            example = torch.arange(len(tokens), device=tokens.device).unsqueeze(-1)
            pairs, order = (tokens * len(tokens) + example).flatten().sort(stable=True)
            pairs, many = torch.unique_consecutive(pairs, return_counts=True)
            squares = sums_of_runs(gradients.flatten(0, 1), many, order).square_()
            seen, many = torch.unique_consecutive(
                pairs.div(len(tokens), rounding_mode="floor"), return_counts=True
            )
            total.index_add_(0, seen, sums_of_runs(squares, many))
        return Statistic(None if total is None else total.mT, self.num_terms)

    def _turned(self, rows: slice, left: Tensor | None, precision: torch.dtype | None) -> Tensor:
        """Return `g left` of the examples `rows`, `[n, T, k_out]`."""
        gradients = self.gradients(rows)
        return gradients if left is None else product(gradients, left, self.dtype, precision)

    def _unpadded(self, found: Tensor, rows: slice) -> Tensor:
        if self.padding is None:
            return found
        return found.masked_fill((self.tokens(rows) == self.padding).unsqueeze(-1), 0)


def sums_of_runs(rows: Tensor, lengths: Tensor, order: Tensor | None = None) -> Tensor:
    """Return the sums of consecutive rows, in the same order on every run.

    Args:
        rows: `[R, k]`.
        lengths: How many rows make each sum, `[S]`; they add to R.
        order: The order in which the rows are taken, `[R]`.

    Example:
        >>> sums_of_runs(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 2]))
        tensor([[1.],
                [6.]])
    """
    order = torch.arange(len(rows), device=rows.device) if order is None else order
    return F.embedding_bag(order, rows, lengths.cumsum(0) - lengths, mode="sum")


@attrs.frozen(kw_only=True)
class Embedding(Curvature):
    """Kronecker-factored curvature of `nn.Embedding`.

    An embedding is a linear layer whose input is a row of the identity, `a = e_x`. Its matrix is
    the transposed table, `[d, V]`. With N examples, M likelihood terms and T positions an example,

        D_n = sum_t g_t e_{x_t}^T,    A = diag(a)
        a = (1/N) sum_n sum_t e_{x_t},    G = (1/(M T)) sum_n sum_t g g^T

    as in `kfac` with `spatial="sud"`. A itself is never formed: the factor is its diagonal a, the
    mean number of times that an example holds each index. Positions of `padding_idx` are in none of
    these sums, since autograd gives its row no gradient.

    Inputs `[N]` have T = 1. An input without dimensions is one example. Positions that all examples
    share, as `[1, T]`, are one example: its D is the sum over all of them.

    Args:
        batch_dim: Which dimension of inputs of rank 2 and more counts the examples, from the front:
            1 for sequence-first models.
        chunk_bytes: Bound on temporaries, in bytes. One example is always processed whole.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> layer = Layer("emb", nn.Embedding(4, 2), ("weight",))
        >>> call = LayerCall(torch.tensor([[0, 1], [1, 1]]), torch.ones(2, 2, 2))
        >>> curvature = Embedding()
        >>> samples = curvature.samples(layer, [call], num_terms=2, first=True)
        >>> factors = curvature.factors(layer, samples)
        >>> factors["a"].total / factors["a"].count, factors["G"].total.shape
        (tensor([0.5000, 1.5000, 0.0000, 0.0000]), torch.Size([2, 2]))
        >>> samples.projected_square(None, None).total
        tensor([[1., 5., 0., 0.],
                [1., 5., 0., 0.]])

    References:
        Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature", arXiv:1503.05671.
        Eschenhagen et al. 2023, "Kronecker-Factored Approximate Curvature for Modern Neural Network
        Architectures", arXiv:2311.00636.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"a", "G"})
    default_basis: ClassVar[str | Mapping[str, Any] | None] = {
        "name": "ekfac",
        "inputs": "diagonal",
    }

    batch_dim: int = attrs.field(default=0, validator=whole(0))
    chunk_bytes: int = attrs.field(default=DEFAULT_CHUNK_BYTES, validator=whole(1))

    def unsupported(self, module: nn.Module) -> str | None:
        """Return why this module cannot be preconditioned exactly, or `None` when it can."""
        if isinstance(module, nn.EmbeddingBag):
            return (
                "no curvature for EmbeddingBag; nn.Embedding, followed by a sum or mean over the "
                "bag, is covered"
            )
        reason = reason_against(module, (nn.Embedding,))
        if reason is not None:
            return reason
        table = cast("nn.Embedding", module)
        if table.sparse:
            return (
                "its gradient is sparse (sparse=True), which no matrix is made of; use sparse=False"
            )
        if table.max_norm is not None:
            return (
                "its forward shrinks rows in place (max_norm), which is no function of the weight "
                "alone; use max_norm=None, and weight decay instead"
            )
        if table.scale_grad_by_freq:
            return (
                "its gradient is divided by how often an index occurs in the batch "
                "(scale_grad_by_freq=True), so it is no sum over examples; use "
                "scale_grad_by_freq=False"
            )
        return None

    def matrix(self, layer: Layer, tensors: Tensors) -> Tensor:
        """Return the transposed table, `[d, V]`."""
        return tensors["weight"].mT

    def tensors(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        """Return the inverse of `matrix`."""
        return {"weight": matrix.mT}

    def blank(self, layer: Layer) -> LayerCall:
        """Return a call on one index."""
        weight = layer.tensors()["weight"]
        index = torch.zeros(1, dtype=torch.long, device=weight.device)
        zeros = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
        return LayerCall(index, zeros)

    def samples(
        self, layer: Layer, calls: Sequence[LayerCall], *, num_terms: Tensor | float, first: bool
    ) -> Samples:
        """View the calls as samples; several calls concatenate along T.

        Raises:
            CaptureError: The calls do not have the same number of examples, or an input has no
                dimension `batch_dim` to spare.
        """
        found = [self._call(layer, call) for call in calls]
        check_examples(layer, (len(call.tokens) for call in found))
        table = cast("nn.Embedding", layer.module)
        return EmbeddingSamples(
            found,
            rows=table.num_embeddings,
            padding=table.padding_idx,
            num_terms=num_terms,
            first=first,
            chunk_bytes=self.chunk_bytes,
        )

    def input_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return sum and count of a."""
        assert isinstance(samples, EmbeddingSamples)
        return {"a": samples.counts()}

    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return sum and count of G."""
        return {"G": samples.grad_moment().scaled(1 / max(1, samples.positions))}

    def _call(self, layer: Layer, call: LayerCall) -> EmbeddingCall:
        batched = partial(examples_first, layer, batch_dim=self.batch_dim)
        tokens, gradient = batched(call.inputs, features=0), batched(call.gradient, features=1)
        n, t = len(tokens), math.prod(tokens.shape[1:])
        return EmbeddingCall(
            tokens.reshape(n, t), gradient.reshape(n, t, gradient.shape[-1]), call.scale
        )


@hookimpl
def kfactk_curvatures() -> dict[str, type[Embedding]]:
    """Provide `embedding`."""
    return {"embedding": Embedding}
