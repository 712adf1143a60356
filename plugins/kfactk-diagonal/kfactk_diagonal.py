"""The diagonal of the Fisher matrix, as a curvature and the basis that divides by it.

For example n, `D_n` is its part of the summed loss' gradient as a matrix `[..., d_out, d_in]`, bias
last.
"""

from __future__ import annotations

import attrs
from kfactk import (
    Basis,
    Decomposition,
    DecompositionError,
    FactorContext,
    Layer,
    Samples,
    SpectralOperator,
    Statistic,
    Tensors,
    hookimpl,
)
from kfactk_stages.curvature.conv_kfac import ConvKfac
from torch import Tensor

kfactk_api = 1


@attrs.frozen(kw_only=True)
class DiagonalFisher(ConvKfac):
    """The diagonal of the Fisher matrix of linear layers and convolutions, exactly.

        V = (1/M) sum_n D_n^2,    D_n = sum_t g_{n,t} a_{n,t}^T

    The square is entry by entry, M counts likelihood terms. The rows of one example (positions,
    tokens) are summed before they are squared. `ConvKfac` says which layers are covered, how their
    parameters form a matrix, and how their inputs become rows.

    Args:
        batch_dim: Which dimension of a linear layer's inputs of rank 3 and more counts the
            examples.
        chunk_bytes: Bound on temporaries, in bytes. One example is always processed whole.

    Example:
        >>> import torch
        >>> from kfactk import LayerCall
        >>> layer = Layer("fc", torch.nn.Linear(1, 1), ("weight", "bias"))
        >>> call = LayerCall(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [2.0]]))
        >>> samples = DiagonalFisher().samples(layer, [call], num_terms=2, first=True)
        >>> square = DiagonalFisher().factors(layer, samples)["square"]
        >>> square.total / square.count
        tensor([[18.5000,  2.5000]])

    References:
        Becker & LeCun 1988, Improving the convergence of back-propagation learning with
        second-order methods.
    """

    provides = frozenset({"square"})
    default_basis = "diagonal"
    spatial: str = attrs.field(default="sud", init=False, repr=False)  # nothing to choose here
    max_side: int | None = attrs.field(default=None, init=False, repr=False)  # nor here
    wide: str | None = attrs.field(default=None, init=False, repr=False)

    def input_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return nothing: no factor is made of inputs alone."""
        return {}

    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return `{"square": sum_n D_n^2}`, `[..., d_out, d_in]`, counted by likelihood terms."""
        return {"square": samples.projected_square(None, None)}

    def assemble(self, layer: Layer, factors: Tensors) -> Tensors:
        """Return the averaged squares as they are."""
        return {"square": factors["square"]}


@attrs.frozen
class DiagonalInverse(Basis):
    """Division by the damped diagonal.

        P V = V / (E[D^2] + tau)

    Example:
        >>> import torch
        >>> basis, context = DiagonalInverse(), FactorContext(damping=1.0, mean_diagonal={})
        >>> parts = {"square": basis.decompose("square", torch.tensor([[0.0, 3.0]]), context)}
        >>> basis.operator(parts, {}, damping=1.0, matrices={}).solve(torch.ones(1, 2))
        tensor([[1.0000, 0.2500]])

    References:
        Becker & LeCun 1988, Improving the convergence of back-propagation learning with
        second-order methods.
    """

    requires = frozenset({"square"})

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Return the diagonal as it is, `[..., d_out, d_in]`."""
        if not matrix.isfinite().all():
            raise DecompositionError("the diagonal holds NaN or inf; it was not taken")
        return {"diagonal": matrix}

    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> SpectralOperator:
        """Return the diagonal as an operator: its basis is that of the coordinates."""
        return SpectralOperator(decomposition["square"]["diagonal"], damping)


@hookimpl
def kfactk_curvatures() -> dict[str, type[DiagonalFisher]]:
    """Provide the curvature `diagonal`."""
    return {"diagonal": DiagonalFisher}


@hookimpl
def kfactk_bases() -> dict[str, type[DiagonalInverse]]:
    """Provide the basis `diagonal`."""
    return {"diagonal": DiagonalInverse}
