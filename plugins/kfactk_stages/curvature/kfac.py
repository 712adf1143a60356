"""K-FAC of linear layers: the Fisher block as a Kronecker product of input and output factor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from kfactk import Layer, LayerCall, RowOrder, Samples, Statistic, Tensors, hookimpl
from kfactk.options import choice, whole
from kfactk.samples import DEFAULT_CHUNK_BYTES, gram, total_of
from kfactk_stages.curvature._calls import check_examples, examples_first, unfolded
from kfactk_stages.curvature._coverage import TRANSPOSED, conv1d, reason_against
from kfactk_stages.curvature._rows import JoinedSamples, LinearRows, Rows
from kfactk_stages.curvature._wide import Reader, WideSides, read


def _spatial(curvature: Kfac, attribute: attrs.Attribute[str], value: str) -> None:
    choice(*curvature.spatial_settings)(curvature, attribute, value)


@attrs.frozen(kw_only=True)
class Kfac(WideSides):
    """Kronecker-factored curvature of `nn.Linear`, inputs of any rank.

    Conv1D of transformers is covered too: a linear layer that holds its weight as `[d_in, d_out]`.

        F_l = E[(a a^T) kron (g g^T)] ~ A kron G

    With N examples, M likelihood terms and T rows an example (tokens, positions, calls of a shared
    module):

        sud:     A = (1/N) sum_n sum_t a a^T,   G = (1/(M T)) sum_n sum_t g g^T
        reduce:  A = (1/N) sum_n abar abar^T,   G = (1/M) sum_n gsum gsum^T
                 abar = mean_t a,   gsum = sum_t g

    Both are the same, and for one example exact, when T = 1. An input `[d]` is one example,
    `[N, d]` has T = 1, `[N, *, d]` has as many rows as `*` has elements.

    A side of more than `max_side` is not kept whole. With the sums above

        diagonal:  a = diag A                       A_ii alone
        blocks:    A0, A1, ...                      A_ij within a block of at most `max_side`
        identity:  a = (tr A / d_in) (1, ..., 1)

    stand for A, and likewise g = diag G or G0, G1, ... for G. Only these are ever summed, so that
    no matrix is larger than `max_side` squared. EKFAC's scale stays the exact diagonal of the
    Fisher, in the coordinates or in the eigenbases of the blocks.

    Args:
        spatial: How the rows of one example are summed: "sud" (uncorrelated derivatives, also known
            as expand) or "reduce".
        batch_dim: Which dimension of inputs of rank 3 and more counts the examples, from the front:
            1 for sequence-first models.
        chunk_bytes: Bound on temporaries, in bytes. One example is always processed whole.
        max_side: Longest side that is kept whole; `None` for no limit. "auto" follows from the
            layer: with m its other side, `256 sqrt(m)`, at least 2048 and at most 8192. A side of
            8192 takes up to 1.9 GB while it is decomposed, and 100 s on one core of a CPU, where
            1024 to 2048 suit better.
        wide: What stands for a longer side: "diagonal", "blocks" or "identity"; `None` for
            "diagonal", of which `bind` warns.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> import torch
        >>> layer = Layer("fc", nn.Linear(3, 2), ("weight", "bias"))
        >>> call = LayerCall(torch.ones(5, 3), torch.ones(5, 2))
        >>> curvature = Kfac()
        >>> samples = curvature.samples(layer, [call], num_terms=5, first=True)
        >>> {name: tuple(s.total.shape) for name, s in curvature.factors(layer, samples).items()}
        {'A': (4, 4), 'G': (2, 2)}

    References:
        Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature", arXiv:1503.05671.
        Eschenhagen et al. 2023, "Kronecker-Factored Approximate Curvature for Modern Neural Network
        Architectures", arXiv:2311.00636.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"A", "G"})
    spatial_settings: ClassVar[tuple[str, ...]] = ("sud", "reduce")
    covered: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    spatial: str = attrs.field(default="sud", validator=_spatial)
    batch_dim: int = attrs.field(
        default=0,
        validator=whole(0, hint=", counted from the front: 0 (batch first), 1 (sequence first)"),
    )
    chunk_bytes: int = attrs.field(default=DEFAULT_CHUNK_BYTES, validator=whole(hint=" (bytes)"))

    def unsupported(self, module: nn.Module) -> str | None:
        """Return why this module cannot be preconditioned exactly, or `None` when it can."""
        return reason_against(module, (*self.covered, *conv1d()))

    def matrix(self, layer: Layer, tensors: Tensors) -> Tensor:
        """Join weight and bias into `[d_out, d_in]`, bias last.

        A grouped layer has `[groups, d_out / groups, d_in]`.
        """
        groups, weight = groups_of(layer.module), tensors["weight"]
        if by_inputs(layer.module):
            weight = exchanged(weight, groups)
        rows = () if groups == 1 else (groups,)
        matrix = weight.reshape(*rows, weight.shape[0] // groups, -1)
        if not layer.bias:
            return matrix
        return torch.cat([matrix, tensors["bias"].reshape(*rows, -1, 1)], -1)

    def tensors(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        """Return the inverse of `matrix`."""
        like, groups = layer.tensors(), groups_of(layer.module)
        shape = like["weight"].shape
        weight = matrix[..., :-1] if layer.bias else matrix
        if by_inputs(layer.module):
            weight = weight.reshape(shape[1] * groups, shape[0] // groups, *shape[2:])
            weight = exchanged(weight, groups).contiguous()
        found = {"weight": weight.reshape(shape)}
        return (
            {**found, "bias": matrix[..., -1].reshape(like["bias"].shape)} if layer.bias else found
        )

    def blank(self, layer: Layer) -> LayerCall:
        """Return one row of zeros."""
        weight = layer.tensors()["weight"]
        d_out, d_in = weight.shape[:2]
        if by_inputs(layer.module):
            d_out, d_in = d_in, d_out
        zeros = partial(torch.zeros, dtype=weight.dtype, device=weight.device)
        return LayerCall(zeros(1, d_in), zeros(1, d_out))

    def samples(
        self, layer: Layer, calls: Sequence[LayerCall], *, num_terms: Tensor | float, first: bool
    ) -> Samples:
        """View the calls as samples, `[N, T, d]`; several calls concatenate along T.

        Raises:
            CaptureError: The calls do not have the same number of examples, or an input has no
                dimension `batch_dim` besides its features.
        """
        rows = [self.rows(layer, call) for call in calls]
        check_examples(layer, (row.examples for row in rows))
        return JoinedSamples(
            rows, bias=layer.bias, num_terms=num_terms, first=first, chunk_bytes=self.chunk_bytes
        )

    @property
    def tells_examples_apart(self) -> bool:
        """Whether sums are taken over the rows of each example first."""
        return self.spatial == "reduce"

    def unfold(self, layer: Layer, call: LayerCall, order: RowOrder) -> Sequence[LayerCall]:
        """Return the call with its rows as `[N, T, ...]`."""
        return unfolded(layer, call, order, 1, self.batch_dim)

    def rows(self, layer: Layer, call: LayerCall) -> Rows:
        """Return one call as rows."""
        return self.linear_rows(layer, call)

    def linear_rows(self, layer: Layer, call: LayerCall) -> LinearRows:
        """Return one call of a linear layer as rows."""
        return LinearRows(
            self._batched(layer, call.inputs), self._batched(layer, call.gradient), call.scale
        )

    def _batched(self, layer: Layer, tensor: Tensor) -> Tensor:
        """Return `[N, *, d]`, at least one dimension between examples and features."""
        batched = examples_first(layer, tensor, 1, self.batch_dim)
        return batched.unsqueeze(1) if batched.ndim == 2 else batched

    def input_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return sum and count of A, or of what stands for it."""
        whole = partial(reduced_input_moment, samples) if self.spatial == "reduce" else None
        return self.input_sums(samples, whole, self.input_reader(samples))

    def input_reader(self, samples: Samples) -> Reader:
        """Return what reads the rows that A is summed over."""
        return partial(mean_inputs, samples) if self.spatial == "reduce" else samples.inputs

    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return sum and count of G, or of what stands for it."""
        if self.spatial == "reduce":
            whole, rows = partial(reduced_grad_moment, samples), partial(summed_gradients, samples)
            return self.gradient_sums(samples, whole, rows)
        return self.gradient_sums(samples, share=1 / max(1, samples.positions))

    def factor_rows(
        self, layer: Layer, samples: Samples, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor] | None:
        """Return the rows of A and G; `None` for groups, or where a side is wide."""
        d_in, d_out = samples.d_in, samples.d_out
        if samples.groups > 1 or self.is_wide(d_in, d_out) or self.is_wide(d_out, d_in):
            return None
        if self.spatial == "reduce":
            return mean_inputs(samples, rows), summed_gradients(samples, rows)
        share = 1 / math.sqrt(max(1, samples.positions))
        return samples.inputs(rows), samples.gradients(rows) * share

    def sides(self, layer: Layer) -> tuple[int, int]:
        """Return d_out and d_in of the layer's matrix, of a group."""
        shape, groups = layer.tensors()["weight"].shape, groups_of(layer.module)
        taps = math.prod(shape[2:])
        if by_inputs(layer.module):
            return int(shape[1]), int(shape[0]) // groups * taps + layer.bias
        return int(shape[0]) // groups, int(shape[1]) * taps + layer.bias


def groups_of(module: nn.Module) -> int:
    """Return the number of groups of a convolution, 1 for other layers."""
    return int(getattr(module, "groups", 1))


def by_inputs(module: nn.Module) -> bool:
    """Return whether a layer holds its weight as inputs by outputs."""
    return isinstance(module, (*TRANSPOSED, *conv1d()))


def exchanged(weight: Tensor, groups: int) -> Tensor:
    """Return a weight held by inputs as one held by outputs, or the other way round.

    Args:
        weight: `[groups * d_1, d_2, *taps]`.
        groups: Number of groups.

    Returns:
        `[groups * d_2, d_1, *taps]`.

    Example:
        >>> exchanged(torch.tensor([[1, 2], [3, 4]]), 2)
        tensor([[1],
                [2],
                [3],
                [4]])
    """
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1)


def reduced_input_moment(samples: Samples) -> Statistic:
    """Return `sum_n abar abar^T` with `abar = mean_t a`, `[..., d_in, d_in]`, by examples."""
    if not samples.first:
        return Statistic(None, 0.0)
    means = read(samples, partial(mean_inputs, samples), samples.d_in)
    return Statistic(summed_grams(means), float(samples.examples), symmetric=True)


def reduced_grad_moment(samples: Samples) -> Statistic:
    """Return `sum_n gsum gsum^T` with `gsum = sum_t g`, `[..., d_out, d_out]`, by terms."""
    sums = read(samples, partial(summed_gradients, samples), samples.d_out)
    return Statistic(summed_grams(sums), samples.num_terms, symmetric=True)


def mean_inputs(samples: Samples, rows: slice) -> Tensor:
    """Return `mean_t a` of some examples as a row each, `[..., n, 1, d_in]`."""
    return samples.input_sums(rows).unsqueeze(-2) / max(1, samples.positions)


def summed_gradients(samples: Samples, rows: slice) -> Tensor:
    """Return `sum_t g` of some examples as a row each, `[..., n, 1, d_out]`."""
    return samples.gradients(rows).sum(-2, keepdim=True)


def summed_grams(parts: Iterable[Tensor]) -> Tensor | None:
    """Return `sum r r^T` over the rows of all parts, `[..., n, T, d]`; `None` without parts."""
    return total_of(gram(part) for part in parts)


@hookimpl
def kfactk_curvatures() -> dict[str, type[Kfac]]:
    """Provide `kfac`."""
    return {"kfac": Kfac}
