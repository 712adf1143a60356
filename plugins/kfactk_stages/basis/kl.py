"""The basis of KL-Shampoo: roots of both sides, each measured in the metric of the other."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import attrs
from torch import Tensor

from kfactk import (
    Basis,
    CurvatureOperator,
    Decomposition,
    FactorContext,
    Tensors,
    hookimpl,
    linalg,
)
from kfactk.options import number
from kfactk_stages.basis import _kl
from kfactk_stages.basis._root_operator import RootOperator
from kfactk_stages.basis._sides import check_column, from_both_sides, is_whole


@attrs.frozen
class Kl(Basis):
    """Shampoo whose two sides weigh each other, as the closest Kronecker product wants it.

        L = E[V S_R^-1 V^T] / d_in,    R = E[V^T S_L^-1 V] / d_out
        P V = S_L^-1/2  V  S_R^-1/2

    `R kron L` is where the Kullback-Leibler divergence of normal distributions from that of
    gradients has no slope. `shampoo` measures each side as if the other were the identity. Here P V
    has the scale of Adam's step, and no other scale is needed.

    S_L is what a refresh makes of L, and S_R likewise of R:

        S_L = (1 - f_k) L + f_k s I + eps m_L m_R tr(S_R^-1) / d_in I,    f_k = fade^k

    s is the root of the mean square of the first gradient that is not zero, k counts refreshes, and
    m is a mean diagonal. So the few directions of the first gradients weigh no more than others.
    With `basis_every=1` and `fade` the recipe's `factor_decay`, S without eps is the running mean
    that starts at `s I`. The last term is the damping of the whole product, on this side: without
    it a direction that gradients never had would be divided by nothing.

    A side of which there is the diagonal alone is weighed and divided row by row. Where blocks
    stand for a side that is too wide, L and S_L are block-diagonal; s, m and f_k are those of the
    whole side. Refresh often: between refreshes L is weighed by an old S_R.

    Args:
        fade: Share of the start that each refresh leaves, in [0, 1).
        eps: What is added to the product of both sides, as a share of the mean square of gradients.
            The recipe's damping has no effect.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> import torch
        >>> basis, v = Kl(fade=0.0, eps=0.0), torch.tensor([[3.0, 4.0]])
        >>> rows = basis.weighed({}, v)
        >>> sides = {"L": rows["L"] @ rows["L"].mT, "R": torch.diag(rows["R"].square()[0])}
        >>> parts = {}
        >>> for name, beside in basis.beside.items():
        ...     others = {each: sides[each] for each in beside}
        ...     context = FactorContext(damping=0.0, mean_diagonal={}, beside=others)
        ...     parts[name] = basis.decompose(name, sides[name], context)
        >>> basis.operator(parts, {}, 0.0, sides).solve(v)
        tensor([[1., 1.]])

    References:
        Lin et al. 2025, "Understanding and Improving Shampoo and SOAP via Kullback-Leibler
        Minimization", arXiv:2509.03378.

    The formulas were compared with the authors' public code and with summaries of the paper, not
    with its whole text.
    """

    takes_stand_ins: ClassVar[bool] = True

    requires = frozenset({"L", "R"})
    beside = _kl.BESIDE
    laws = frozenset({"rotation-equivariant", "null-space-independent"})
    waives = frozenset({"damped-inverse"})
    damped_at = "never"
    forms = MappingProxyType({"eigenvalues": "eigenvalues"})

    fade: float = attrs.field(default=0.95, validator=number(0, 1, high_open=True))
    eps: float = attrs.field(default=1e-6, validator=number(0))

    def weighed(self, decomposition: Decomposition, gradient: Tensor) -> Tensors:
        """Return `V S_R^-1/2 / sqrt(d_in)` for L, and `S_L^-1/2 V / sqrt(d_out)` for R."""
        return _kl.weighed(decomposition, gradient)

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Return the eigenvalues of S, `S^-1/2`, and how S started.

        "eigenvalues" are `[..., n]` and "root" is `[..., n, n]`; of a diagonal both have its shape.
        "start" is s and "share" is f_k, `[..., 1]`.

        Raises:
            DecompositionError: A matrix holds NaN or inf, or cannot be decomposed.
        """
        if not is_whole(name, matrix):
            values, vectors = check_column(matrix), None
        else:
            values, vectors = linalg.eigh(matrix)
        values, start = _kl.started(values, name, matrix, context, self.fade, self.eps)
        root = values.rsqrt()
        if vectors is not None:
            root = (vectors * root.unsqueeze(-2)) @ vectors.mT
        return {"eigenvalues": values, "root": root, **start}

    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> CurvatureOperator:
        """Return `R kron L`, which solves with the inverse roots of the refresh."""
        return KlOperator(decomposition, matrices)


@attrs.define(eq=False)
class KlOperator(RootOperator):
    """`F vec(V) = vec(L V R)`, with a step of the root of its inverse, `S_L^-1/2 V S_R^-1/2`."""

    def multiply(self, v: Tensor) -> Tensor:
        """Return `L v R`."""
        return from_both_sides(self.own_matrices(), v)

    def condition(self) -> Tensor:
        """Return the condition number of `S_R kron S_L`, the largest among groups."""
        return self.spread().max()


@hookimpl
def kfactk_bases() -> dict[str, type[Kl]]:
    """Provide `kl`."""
    return {"kl": Kl}
