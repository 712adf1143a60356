"""K-FAC for embeddings: the input factor is diagonal, and only rows that occur cost anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import attrs
import torch
from torch import Tensor, nn

from kfactk import (
    CaptureError,
    Curvature,
    Layer,
    LayerCall,
    RowOrder,
    Samples,
    Statistic,
    Tensors,
    hookimpl,
)
from kfactk.options import whole
from kfactk.samples import DEFAULT_CHUNK_BYTES
from kfactk_stages.curvature._bags import BagCall, BagSamples
from kfactk_stages.curvature._calls import check_examples, examples_first
from kfactk_stages.curvature._coverage import plain_class, reason_against
from kfactk_stages.curvature._rows import LinearRows
from kfactk_stages.curvature._tables import EmbeddingCall, EmbeddingSamples
from kfactk_stages.curvature._tied import TiedSamples

BIAS = "bias"
"""The parameter, and the part, that is the bias of a tied output layer."""


@attrs.frozen(kw_only=True)
class Embedding(Curvature):
    """Kronecker-factored curvature of `nn.Embedding` and `nn.EmbeddingBag`, tied or not.

    An embedding is a linear layer whose input is a row of the identity, `a = e_x`. Its matrix is
    the transposed table, `[d, V]`. With N examples, M likelihood terms and T positions an example
    in the mean,

        D_n = sum_t g_t e_{x_t}^T,    A = diag(a)
        a = (1/N) sum_n sum_t e_{x_t},    G = (1/(M T)) sum_n sum_t g g^T

    as in `kfac` with `spatial="sud"`. A itself is never formed: the factor is its diagonal a, the
    mean number of times that an example holds each index. Positions of `padding_idx` are in none of
    these sums, since autograd gives its row no gradient. Nor do they count in T, so that it does
    not matter to which length examples are padded.

    A bag of an `nn.EmbeddingBag` of mode "sum" or "mean" is an example with T = 1. Its input is the
    weighted sum of its units, `a = sum_i w_i e_{x_i}`, of whose A only the diagonal is kept:

        D_n = g a^T,    a = (1/N) sum_n a^2,    G = (1/M) sum_n g g^T

    Where plain linear layers have the same weight (a tied output layer, with inputs h and gradients
    gamma `[V]` of its outputs), both make one layer:

        D_n = sum_t g_t e_{x_t}^T + sum_s h_s gamma_s^T
        a = (1/M) sum_n [sum_t |g|^2 e_x + sum_s |h|^2 gamma^2]
        G = (1/M) sum_n [sum_t g g^T + sum_s |gamma|^2 h h^T] / sum_v a_v

    These are the diagonal of E[D^T D], and E[D D^T] divided by its trace, where positions do not
    correlate. The exact scale of `ekfac` contains all products of positions, and of both kinds of
    calls. A bias of the output layer is a layer of its own, whose matrix is `[1, V]`:

        D_n = sum_s gamma_s^T,    a = (1/M) sum_n sum_s gamma^2,    G = 1

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
        reason = reason_against(module, (nn.Embedding, nn.EmbeddingBag))
        if reason is not None:
            return reason
        if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
            return (
                "the maximum over a bag (mode='max') is no linear layer of what is in it; use "
                "mode='sum' or mode='mean'"
            )
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

    def same_call(self, module: nn.Module, other: nn.Module) -> bool:
        """Return whether they are alike, or `other` is a linear layer beside an embedding."""
        if _is_head(other) and plain_class(module) is nn.Embedding:
            return reason_against(other, (nn.Linear,)) is None
        return super().same_call(module, other)

    def parts(self, module: nn.Module) -> Mapping[str, tuple[str, ...]]:
        """Return the table as one part, "", and of a tied output layer the bias alone."""
        if not _is_head(module):
            return super().parts(module)
        return {BIAS: (BIAS,)} if module._parameters.get(BIAS) is not None else {}

    def matrix(self, layer: Layer, tensors: Tensors) -> Tensor:
        """Return the transposed table, `[d, V]`, or the bias of an output layer, `[1, V]`."""
        return tensors[BIAS].unsqueeze(0) if layer.part == BIAS else tensors["weight"].mT

    def tensors(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        """Return the inverse of `matrix`."""
        return {BIAS: matrix.squeeze(0)} if layer.part == BIAS else {"weight": matrix.mT}

    def blank(self, layer: Layer) -> LayerCall:
        """Return a call on one index, on one bag of one index, or on one row of an output layer."""
        if layer.part == BIAS:
            bias = layer.tensors()[BIAS]
            zeros = torch.zeros(1, len(bias), dtype=bias.dtype, device=bias.device)
            return LayerCall(zeros[:, :0], zeros)
        weight = layer.tensors()["weight"]
        shape = (1, 1) if isinstance(layer.module, nn.EmbeddingBag) else (1,)
        index = torch.zeros(shape, dtype=torch.long, device=weight.device)
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
        table, options = cast("nn.Embedding", layer.module), self._options(num_terms, first=first)
        if isinstance(layer.module, nn.EmbeddingBag):
            bags = [BagCall.of(layer.module, call) for call in calls]
            check_examples(layer, (len(bag.gradient) for bag in bags))
            return BagSamples(bags, rows=table.num_embeddings, **options)
        heads = [self._head(layer, call) for call in calls if _of_head(layer, call)]
        found = [self._call(layer, call) for call in calls if not _of_head(layer, call)]
        gradients = [*(call.gradient for call in found), *(call.gradient for call in heads)]
        _check_heads(layer, found, heads)
        check_examples(layer, map(len, gradients))
        lookups = None
        if found:
            lookups = EmbeddingSamples(
                found, rows=table.num_embeddings, padding=table.padding_idx, **options
            )
            if not _is_tied(layer):
                return lookups
        sides = self.matrix(layer, layer.tensors()).shape
        return TiedSamples(lookups, heads, sides, **options)

    def unfold(self, layer: Layer, call: LayerCall, order: RowOrder) -> Sequence[LayerCall]:
        """Return the call with its rows as `[N, T, ...]`; none for bags."""
        if isinstance(layer.module, nn.EmbeddingBag):
            return ()
        batched = partial(examples_first, layer, batch_dim=self.batch_dim)
        inputs = batched(call.inputs, features=int(_of_head(layer, call)))
        pair = (order.unfold(each) for each in (inputs, batched(call.gradient, features=1)))
        inputs, gradient = (each.movedim(0, self.batch_dim) for each in pair)
        return [attrs.evolve(call, inputs=inputs, gradient=gradient)]

    def _options(self, num_terms: Tensor | float, *, first: bool) -> dict[str, Any]:
        return {"num_terms": num_terms, "first": first, "chunk_bytes": self.chunk_bytes}

    def input_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return sum and count of a; none where it is made of gradients too."""
        if isinstance(samples, TiedSamples):
            return {}
        assert isinstance(samples, EmbeddingSamples | BagSamples)
        return {
            "a": samples.counts() if isinstance(samples, EmbeddingSamples) else samples.squares()
        }

    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return sum and count of G, and of a where it is made of gradients too."""
        if isinstance(samples, TiedSamples):
            return dict(zip(("a", "G"), samples.moments(), strict=True))
        found = samples.grad_moment()
        if isinstance(samples, EmbeddingSamples):
            return {"G": attrs.evolve(found, count=found.count * samples.mean_positions())}
        return {"G": found}

    def assemble(self, layer: Layer, factors: Tensors) -> Tensors:
        """Return a and G; the sums of a tied layer have the same trace, of which G is freed."""
        found = dict(super().assemble(layer, factors))
        if _is_tied(layer) and "G" in found:
            trace = found["G"].diagonal().sum()
            found["G"] = found["G"] / trace.where(trace > 0, 1)
        return found

    def _call(self, layer: Layer, call: LayerCall) -> EmbeddingCall:
        batched = partial(examples_first, layer, batch_dim=self.batch_dim)
        tokens, gradient = batched(call.inputs, features=0), batched(call.gradient, features=1)
        n, t = len(tokens), math.prod(tokens.shape[1:])
        return EmbeddingCall(
            tokens.reshape(n, t), gradient.reshape(n, t, gradient.shape[-1]), call.scale
        )

    def _head(self, layer: Layer, call: LayerCall) -> LinearRows:
        batched = partial(examples_first, layer, features=1, batch_dim=self.batch_dim)
        hidden, gradient = batched(call.inputs), batched(call.gradient)
        if layer.part == BIAS:
            hidden = gradient.new_ones(()).expand(*gradient.shape[:-1], 1)
        if hidden.ndim == 2:
            hidden, gradient = hidden.unsqueeze(1), gradient.unsqueeze(1)
        return LinearRows(hidden, gradient, call.scale)


def _is_head(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _of_head(layer: Layer, call: LayerCall) -> bool:
    return _is_head(layer.module if call.module is None else call.module)


def _is_tied(layer: Layer) -> bool:
    """Return whether linear layers have the table too."""
    return any(map(_is_head, layer.sites))


def _check_heads(layer: Layer, found: Sequence[EmbeddingCall], heads: Sequence[LinearRows]) -> None:
    """Check that a tied output layer has the examples of its table.

    Raises:
        CaptureError: It has not: as one that sees the rows of masked positions alone.
    """
    examples = {len(call.gradient) for call in found}
    outputs = {len(call.gradient) for call in heads}
    if len(examples) == len(outputs) == 1 and examples != outputs:
        raise CaptureError(
            f"layer '{layer.name}' is tied: its table sees {examples.pop()} examples, and its "
            f"output layer {outputs.pop()} rows, as where logits are computed for masked positions "
            "alone (sparse_prediction). Both give a part of each example's gradient, and which "
            "rows are whose is not known. Give the output layer all positions of each example, "
            "[N, T, d] (sparse_prediction=False), and name the labels by the likelihood's "
            "targets=, so that the other positions do not count; or train the layer by its plain "
            f"gradient: exclude=[{layer.path!r}]."
        )


@hookimpl
def kfactk_curvatures() -> dict[str, type[Embedding]]:
    """Provide `embedding`."""
    return {"embedding": Embedding}
