"""The diagonal of the Fisher matrix, as a curvature and the basis that divides by it.

Convention: for example n, `D_n` is its part of the summed loss' gradient as a matrix `[..., d_out, d_in]`, bias last.
"""

from __future__ import annotations

from typing import ClassVar

import attrs
from kfactk import (
    Decomposition,
    DecompositionError,
    FactorContext,
    Layer,
    Samples,
    Statistic,
    Tensors,
    hookimpl,
    linalg,
)
from kfactk_stages.curvature.conv_kfac import ConvKfac
from torch import Tensor

kfactk_api = 1


@attrs.frozen(kw_only=True)
class DiagonalFisher(ConvKfac):
    """The diagonal of the Fisher matrix of linear layers and convolutions, exactly.

        V = (1/M) sum_n D_n^2,    D_n = sum_t g_{n,t} a_{n,t}^T

    entry by entry, over M likelihood terms; the rows of one example (positions, tokens) are summed before they are
    squared. Which layers are covered, how their parameters form a matrix, and how their inputs become rows does not
    depend on what is then made of the rows, and is taken over from `ConvKfac`.

    Args:
        batch_dim: Which dimension of a linear layer's inputs of rank 3 and more counts the examples.
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
        Becker & LeCun 1988, Improving the convergence of back-propagation learning with second-order methods.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"square"})
    spatial: str = attrs.field(default="sud", init=False, repr=False)  # nothing to choose here

    def factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """`{"square": sum_n D_n^2}`, `[..., d_out, d_in]`, counted by likelihood terms."""
        return {"square": samples.projected_square(None, None)}

    def assemble(self, layer: Layer, factors: Tensors) -> dict[str, Tensor]:
        """The averaged squares are all there is."""
        return {"square": factors["square"]}


@attrs.frozen
class DiagonalInverse:
    """Division by the damped diagonal.

        P V = V / (E[D^2] + tau)

    Example:
        >>> import torch
        >>> basis, context = DiagonalInverse(), FactorContext(damping=1.0, mean_diagonal={})
        >>> decomposition = {"square": basis.decompose("square", torch.tensor([[0.0, 3.0]]), context)}
        >>> basis.precondition(torch.ones(1, 2), decomposition, {}, damping=1.0)
        tensor([[1.0000, 0.2500]])

    References:
        Becker & LeCun 1988, Improving the convergence of back-propagation learning with second-order methods.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"square"})
    laws: ClassVar[frozenset[str]] = frozenset()  # rotated coordinates have another diagonal

    moments_from: ClassVar[str | None] = None
    moment_decay: ClassVar[float] = 0.0

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """The diagonal as it is, `[..., d_out, d_in]`."""
        if not matrix.isfinite().all():
            raise DecompositionError("the diagonal holds NaN or inf; it was not taken")
        return {"diagonal": matrix}

    def precondition(
        self, gradient: Tensor, decomposition: Decomposition, moments: Tensors, damping: float
    ) -> Tensor:
        """The formula above; `gradient` is `[..., d_out, d_in]`."""
        return gradient / _damped(decomposition, damping).to(gradient.dtype)

    def product(
        self, vector: Tensor, matrices: Tensors, decomposition: Decomposition, moments: Tensors
    ) -> Tensor:
        """`V * E[D^2]`, undamped."""
        return vector * matrices["square"].to(vector.dtype)

    def condition(self, decomposition: Decomposition, moments: Tensors, damping: float) -> Tensor:
        """Condition number of the damped curvature, the largest among groups."""
        damped = _damped(decomposition, damping)
        return (damped.amax((-2, -1)) / damped.amin((-2, -1))).max()

    def moments(self, decomposition: Decomposition, samples: Samples) -> dict[str, Statistic]:
        """None: the curvature has measured all there is."""
        return {}

    def gradient_moments(
        self, decomposition: Decomposition, gradient: Tensor, num_terms: Tensor | float
    ) -> dict[str, Statistic]:
        """None."""
        return {}

    def transport(
        self, moments: Tensors, old: Decomposition, new: Decomposition
    ) -> dict[str, Tensor]:
        """Nothing to carry from one diagonal to the next."""
        return {}


def _damped(decomposition: Decomposition, damping: float) -> Tensor:
    """`E[D^2] + tau`; tau never so small that dividing overflows."""
    diagonal = decomposition["square"]["diagonal"]
    floor = linalg.damping_floor(diagonal.mean((-2, -1), keepdim=True))
    return diagonal + floor.clamp(min=damping)


@hookimpl
def kfactk_curvatures() -> dict[str, type[DiagonalFisher]]:
    """Provide the curvature `diagonal`."""
    return {"diagonal": DiagonalFisher}


@hookimpl
def kfactk_bases() -> dict[str, type[DiagonalInverse]]:
    """Provide the basis `diagonal`."""
    return {"diagonal": DiagonalInverse}
