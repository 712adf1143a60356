"""The basis of Newton-Muon: Muon on a gradient that is whitened by the layer's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import CurvatureOperator, Decomposition, FactorContext, Tensors, hookimpl, linalg
from kfactk.options import number
from kfactk.sides import is_diagonal, names_of, slices_of
from kfactk_stages.basis.muon import Muon, MuonOperator


@attrs.frozen
class NewtonMuon(Muon):
    """Orthogonalise the gradient after its input side was divided by the inputs' second moment.

        P(V) = c U W^T,    V (A + r mean(diag A) I)^-p = U S W^T

    A is the factor of the inputs, as in K-FAC: with the inputs' second moment divided out, a step
    changes the outputs of a layer alike in all directions in which its inputs vary. Without it
    (r large) this is `muon`, whose options it shares. A is all that is measured: there is no Fisher
    pass, no likelihood is read, and any loss is right. The recipe's damping has no part in it.

    Use it on hidden layers, as Muon, with `first_moment={"decay": 0.95, "nesterov": True}`. The
    paper averages gradients after they were divided, `first_moment` before: the same, while A is.

    Args:
        power: p, in (0, 1]. 1, as in the paper, or a part of it: 0.5 is the root.
        ridge: r, in units of the mean eigenvalue of A.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> import kfactk
        >>> basis = {"name": "newton_muon", "scale": "match_rms"}
        >>> kfactk.build(curvature="kfac", basis=basis, update="sgd", lr=0.01).lr
        0.01

    References:
        Du & Su 2026, "The Newton-Muon Optimizer", arXiv:2604.01472.
        Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
        kellerjordan.github.io/posts/muon.
        Benzing 2022, "Gradient Descent on Neurons and its Link to Approximate Second-Order
        Optimization", arXiv:2201.12250, on A alone without orthogonalising.
    """

    takes_stand_ins: ClassVar[bool] = True

    requires = frozenset({"A"})
    forms = MappingProxyType({"root": "inverse", "eigenvalues": "eigenvalues"})

    power: float = attrs.field(default=1.0, validator=number(0, 1, low_open=True), kw_only=True)
    ridge: float = attrs.field(default=0.01, validator=number(0, low_open=True), kw_only=True)

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Return `(A / m + r I)^-p` as "root", m = mean(diag A); of a diagonal, "eigenvalues".

        The size of A has no part in the step. Inputs that are all zeros divide by nothing.

        Raises:
            DecompositionError: The matrix holds NaN or inf, or cannot be decomposed.
        """
        mean = context.mean_diagonal["A"]
        mean = torch.where(mean > 0, mean, 1.0)
        shift = linalg.damping_floor(torch.ones_like(mean)).clamp(min=self.ridge)
        if is_diagonal(name):
            linalg.check_finite(matrix)
            values = matrix.clamp(min=0) / mean[..., None]
            return {"eigenvalues": (values + shift[..., None]) ** -self.power}
        matrix = matrix / mean[..., None, None]
        if self.power == 1:
            return {"root": torch.cholesky_inverse(linalg.cholesky(matrix, shift))}
        values, vectors = linalg.eigh(matrix)
        root = (values + shift[..., None]) ** (-self.power)
        return {"root": (vectors * root.unsqueeze(-2)) @ vectors.mT}

    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> CurvatureOperator:
        """Return the map V -> c U W^T of V with its input side divided."""
        return NewtonMuonOperator(self, decomposition)


@attrs.define(eq=False)
class NewtonMuonOperator(MuonOperator):
    """The map `V -> c U W^T` of `V A^-p`, which is not linear.

    Args:
        decomposition: The powers of A, or of what stands for it.
    """

    decomposition: Decomposition

    def solve(self, v: Tensor) -> Tensor:
        """Return c U W^T; zero for zero."""
        return super().solve(self._whitened(v))

    def _whitened(self, v: Tensor) -> Tensor:
        """Return `V (A + shift I)^-p`, block by block where A is blocks."""
        names = names_of("A", self.decomposition)
        if len(names) == 1:
            return _times(v, self.decomposition[names[0]])
        parts = [self.decomposition[name] for name in names]
        columns = slices_of([next(iter(each.values())).shape[-1] for each in parts])
        found = [_times(v[..., s], each) for s, each in zip(columns, parts, strict=True)]
        return torch.cat(found, -1)


def _times(v: Tensor, part: Mapping[str, Tensor]) -> Tensor:
    """Return `v M`, M symmetric, or a diagonal."""
    if "root" in part:
        return v @ part["root"].to(v.dtype)
    return v * part["eigenvalues"].to(v.dtype).unsqueeze(-2)


@hookimpl
def kfactk_bases() -> dict[str, type[NewtonMuon]]:
    """Provide `newton_muon`."""
    return {"newton_muon": NewtonMuon}
