"""K-FAC of linear layers in networks whose derivatives in the inputs are part of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import Layer, LayerCall, Samples, hookimpl
from kfactk_stages.curvature._calls import check_examples
from kfactk_stages.curvature._rows import JoinedSamples, LinearRows
from kfactk_stages.curvature.kfac import Kfac


@attrs.frozen(kw_only=True)
class Taylor(Kfac):
    """Kronecker-factored curvature of `nn.Linear`, called with jets or with tensors.

    A jet (`kfactk.jet`) carries the value of a hidden state and its derivatives in the points, as
    T = 1 + m + K rows a of each point. A layer maps all of them by one weight, and its bias is
    added to the value alone. So the input of the bias is 1 in the row of the value and 0 in the
    others. With g the gradients of the loss with respect to the rows of the output, N points and
    M likelihood terms

        D_n = sum_t g_{n,t} (a_{n,t}, 1 if t = 0 else 0)^T
        A = (1/N) sum_n sum_t a a^T,    G = (1/(M T)) sum_n sum_t g g^T

    D_n is the gradient of the residual of point n, and F of a squared residual is its Gauss-Newton
    matrix. A kron G takes rows of one point for uncorrelated, and as many as all others. The scale
    of `ekfac` assumes neither: it is the exact diagonal of F.

    Called with a tensor it is `kfac`. Sides that are too wide, and the sums, are those of `kfac`.

    Args:
        spatial: "sud": rows of one point are summed as uncorrelated.
        batch_dim: As for `kfac`, for tensors. Points of a jet are always in front.
        chunk_bytes: See `kfac`.
        max_side: See `kfac`.
        wide: See `kfac`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = Layer("fc", nn.Linear(2, 3), ("weight", "bias"))
        >>> ones = torch.tensor([1.0, 0, 0, 0])
        >>> call = LayerCall(torch.ones(5, 4, 2), torch.ones(5, 4, 3), ones=ones)
        >>> samples = Taylor().samples(layer, [call], num_terms=5, first=True)
        >>> Taylor().factors(layer, samples)["A"].total / 5
        tensor([[4., 4., 1.],
                [4., 4., 1.],
                [1., 1., 1.]])

    References:
        Dangel, Mueller & Zeinhofer 2024, "Kronecker-Factored Approximate Curvature for
        Physics-Informed Neural Networks", arXiv:2405.15603.
    """

    reads_ones: ClassVar[bool] = True
    spatial_settings: ClassVar[tuple[str, ...]] = ("sud",)

    def samples(
        self, layer: Layer, calls: Sequence[LayerCall], *, num_terms: Tensor | float, first: bool
    ) -> Samples:
        """View the calls as samples, `[N, T, d]`; several calls concatenate along T.

        Raises:
            CaptureError: The calls do not have the same number of examples, or the input of one
                has no dimension `batch_dim` besides its features.
        """
        if all(call.ones is None for call in calls):
            return super().samples(layer, calls, num_terms=num_terms, first=first)
        rows = [self.rows(layer, call) for call in calls]
        check_examples(layer, (row.examples for row in rows))
        if layer.bias:
            pairs = zip(rows, calls, strict=True)
            rows = [with_bias(row, call.ones) for row, call in pairs]
        return JoinedSamples(
            rows, bias=False, num_terms=num_terms, first=first, chunk_bytes=self.chunk_bytes
        )

    def rows(self, layer: Layer, call: LayerCall) -> LinearRows:
        """Return one call as rows; those of a jet are `[N, T, d]` already."""
        if call.ones is None:
            return self.linear_rows(layer, call)
        return LinearRows(call.inputs, call.gradient, call.scale)


def with_bias(rows: LinearRows, ones: Tensor | None) -> LinearRows:
    """Return rows with the input of the bias as the last column.

    Args:
        rows: Inputs `[N, *, d]`.
        ones: What it is in each row, `[T]`, where `*` is T; `None` for 1.
    """
    column = rows.inputs.new_ones(1) if ones is None else ones.to(rows.inputs).unsqueeze(-1)
    column = column.expand(*rows.inputs.shape[:-1], 1)
    return attrs.evolve(rows, inputs=torch.cat([rows.inputs, column], -1))


@hookimpl
def kfactk_curvatures() -> dict[str, type[Taylor]]:
    """Provide `taylor`."""
    return {"taylor": Taylor}
