"""Rows: the data of single examples in place of matrices, so that F can be multiplied by alone.

The private module `_rows` is another thing: the views of a call that all curvatures here read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from kfactk import Curvature, Layer, LayerCall, RowOrder, Samples, Statistic, Tensors, hookimpl
from kfactk.options import whole
from kfactk.samples import DEFAULT_CHUNK_BYTES
from kfactk_stages.curvature.conv_kfac import ConvKfac

PAIRS, SINGLE = 4, 2
"""Degree of F in inputs and output gradients, and in the D_n."""


@attrs.frozen(kw_only=True)
class RowsCurvature(Curvature):
    """The exact Fisher block of a layer as an operator: nothing is summed, no side is a matrix.

        F vec(V) = (1/M) sum_n vec(D_n) <D_n, V>,    D_n = sum_t g_{n,t} a_{n,t}^T

    Of each example of the last mini-batch with statistics the smaller of two forms is kept: the T
    pairs of a (d_in numbers) and g (d_out numbers), or D_n itself (d_out * d_in). So memory is
    linear in the sides, and in the examples. The layers are those of `conv_kfac`, and rows are the
    same: positions of a convolution, tokens, calls of a shared module.

    F is that of one mini-batch. Running means are not taken of rows, so `factor_decay` has no
    effect here. Micro-batches of one step, and ranks, are joined: on several ranks, each rank that
    preconditions the layer keeps the rows of all.

    Chen multiplies by the Kronecker product A kron G. Here F is the Fisher block of the mini-batch
    itself, since rows allow it at the same cost.

    Args:
        batch_dim: Which dimension of a linear layer's inputs of rank 3 and more counts the
            examples, from the front.
        chunk_bytes: Bound on temporaries, in bytes. One example is always processed whole.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> layer = Layer("fc", nn.Linear(3, 2), ("weight", "bias"))
        >>> call = LayerCall(torch.ones(5, 3), torch.ones(5, 2))
        >>> curvature = RowsCurvature()
        >>> samples = curvature.samples(layer, [call], num_terms=5, first=True)
        >>> {name: tuple(s.total.shape) for name, s in curvature.factors(layer, samples).items()}
        {'inputs': (5, 1, 1, 4), 'gradients': (5, 1, 1, 2), 'matrices': (0, 1, 2, 4)}

    References:
        Chen 2021, "An iterative K-FAC algorithm for Deep Learning", arXiv:2101.00218.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"inputs", "gradients", "matrices"})
    row_factors: ClassVar[frozenset[str]] = provides
    default_basis: ClassVar[str | Mapping[str, Any] | None] = "cg"

    batch_dim: int = attrs.field(
        default=0,
        validator=whole(0, hint=", counted from the front: 0 (batch first), 1 (sequence first)"),
    )
    chunk_bytes: int = attrs.field(default=DEFAULT_CHUNK_BYTES, validator=whole(hint=" (bytes)"))

    @property
    def _layers(self) -> ConvKfac:
        """What knows the layers: their matrices and their samples."""
        return ConvKfac(batch_dim=self.batch_dim, chunk_bytes=self.chunk_bytes)

    def unsupported(self, module: nn.Module) -> str | None:
        """Return why this module cannot be preconditioned exactly, or `None` when it can."""
        return self._layers.unsupported(module)

    def matrix(self, layer: Layer, tensors: Tensors) -> Tensor:
        """Join weight and bias into `[(groups,) d_out, d_in]`, bias last."""
        return self._layers.matrix(layer, tensors)

    def tensors(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        """Return the inverse of `matrix`."""
        return self._layers.tensors(layer, matrix)

    def blank(self, layer: Layer) -> LayerCall:
        """Return zeros, of the smallest valid size."""
        return self._layers.blank(layer)

    def samples(
        self, layer: Layer, calls: Sequence[LayerCall], *, num_terms: Tensor | float, first: bool
    ) -> Samples:
        """View the calls as samples, `[(groups,) N, T, d]`; several calls concatenate along T.

        Raises:
            CaptureError: The calls do not have the same number of examples, or an input has no
                dimension `batch_dim` besides its features.
        """
        return self._layers.samples(layer, calls, num_terms=num_terms, first=first)

    def unfold(self, layer: Layer, call: LayerCall, order: RowOrder) -> Sequence[LayerCall]:
        """Return the call with its rows as `[N, T, ...]`; images as T calls."""
        return self._layers.unfold(layer, call, order)

    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return the rows of all examples, in the smaller form; the other one is empty.

        - "inputs": a, `[N, T, groups, d_in]`;
        - "gradients": g, `[N, T, groups, d_out]`;
        - "matrices": D_n, `[N, groups, d_out, d_in]`.
        """
        d_out, d_in, t = samples.d_out, samples.d_in, samples.positions
        none, every = slice(0, 0), slice(None)
        pairs = t * (d_in + d_out) <= d_in * d_out
        chosen = every if pairs else none
        matrices = [samples.per_example_gradients(none)]
        if not pairs:
            size = t * (d_in + d_out) + d_in * d_out
            matrices += [samples.per_example_gradients(rows) for rows in samples.chunks(size)]
        terms = samples.num_terms
        return {
            "inputs": Statistic(_by_group(samples.inputs(chosen), 2), terms, rows=PAIRS),
            "gradients": Statistic(_by_group(samples.gradients(chosen), 2), terms, rows=PAIRS),
            "matrices": Statistic(_by_group(torch.cat(matrices, -3), 1), terms, rows=SINGLE),
        }


def _by_group(rows: Tensor, place: int) -> Tensor:
    """Return `[(groups,) N, x, y]` as a copy with the groups, at least one, at a place."""
    grouped = rows if rows.ndim > 3 else rows.unsqueeze(0)
    return grouped.movedim(0, place).clone(memory_format=torch.contiguous_format)


@hookimpl
def kfactk_curvatures() -> dict[str, type[RowsCurvature]]:
    """Provide `rows`."""
    return {"rows": RowsCurvature}
