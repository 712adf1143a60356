"""The basis of Muon: the gradient's nearest orthogonal matrix, without any statistics."""

from __future__ import annotations

import math
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk import (
    Basis,
    CurvatureOperator,
    Decomposition,
    FactorContext,
    KfactkError,
    OptionError,
    Tensors,
    hookimpl,
)
from kfactk.options import as_tuple, choice, flag, number, refusal, whole

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration of Muon's authors: the slope at zero is as large as can be, and
singular values end between about 0.7 and 1.2."""


def _three(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    good = isinstance(value, tuple) and len(value) == 3
    if not good or not all(isinstance(each, float) and math.isfinite(each) for each in value):
        raise refusal(instance, attribute, value, "three finite floating-point numbers a, b, c")


@attrs.frozen
class Muon(Basis):
    """Set all singular values of the gradient to about 1.

        V = U S W^T,    P(V) = c U W^T

    Newton-Schulz steps on `X = V / ||V||` make U W^T by products alone:

        X <- a X + b (X X^T) X + c (X X^T)^2 X

    There is nothing to measure and to keep. P is not linear in V, so nothing that needs a linear
    operator, such as the clip `kl`, works with it. The momentum of Muon is the recipe's
    `first_moment={"decay": 0.95, "corrected": False, "nesterov": True}`. Vectors go to other
    blocks, or to the update rule.

    Args:
        steps: Newton-Schulz steps; 0 takes U W^T from a singular value decomposition.
        coefficients: a, b and c.
        precision: Of the products: "bfloat16", or "full" for that of the gradient.
        scale: c for a matrix `[d_out, d_in]`. "original": `sqrt(max(1, d_out / d_in))`.
            "spectral": `sqrt(d_out / d_in)`. "match_rms": `0.2 sqrt(max(d_out, d_in))`, the size of
            Adam's updates. "none": 1.
        factor: A further factor of c: how far these blocks move, relative to others with their lr.
        even: Whether all rows of a tall matrix, and all columns of a wide one, get the same length,
            and U W^T keeps its norm. Otherwise they have any length up to 1: a unit whose gradient
            is small in all directions hardly moves.
        eps: Least norm that is divided by.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> operator = Muon(steps=0).operator({}, {}, 0.0, {})
        >>> operator.solve(torch.diag(torch.tensor([5.0, -0.1]))).round(decimals=4)
        tensor([[ 1.,  0.],
                [ 0., -1.]])

    References:
        Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
        kellerjordan.github.io/posts/muon.
        Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv:2502.16982, for "match_rms".
        Bernstein 2025, "Deriving Muon", for "spectral".
        Li et al. 2025, "NorMuon: Making Muon more efficient and scalable", arXiv:2510.05491, which
        divides rows by a running mean of their size. "Muon+: Towards Better Muon via One Additional
        Normalization Step", 2026, arXiv:2602.21545, which divides by the size now, as `even`. Of
        both we have read the abstracts.
    """

    requires = frozenset()
    waives = frozenset({"linear", "self-adjoint", "damped-inverse", "fisher"})
    damped_at = "never"

    steps: int = attrs.field(default=5, validator=whole(0))
    coefficients: tuple[float, float, float] = attrs.field(
        default=QUINTIC, converter=as_tuple, validator=_three
    )
    precision: str = attrs.field(default="bfloat16", validator=choice("bfloat16", "full"))
    scale: str = attrs.field(
        default="original", validator=choice("original", "spectral", "match_rms", "none")
    )
    factor: float = attrs.field(default=1.0, validator=number(0, low_open=True))
    even: bool = attrs.field(default=False, validator=flag)
    eps: float = attrs.field(default=1e-7, validator=number(0, low_open=True))

    def __attrs_post_init__(self) -> None:
        if self.steps:
            return
        usual: dict[str, Any] = {"coefficients": QUINTIC, "precision": "bfloat16"}
        usual |= {} if self.even else {"eps": attrs.fields(Muon).eps.default}
        if idle := [name for name, value in usual.items() if getattr(self, name) != value]:
            raise OptionError(
                f"{type(self).__name__}: {' and '.join(idle)} of Newton-Schulz steps cannot have "
                "an effect with steps=0, which takes a singular value decomposition. Leave "
                f"{'it' if len(idle) == 1 else 'them'} out, or give steps=5."
            )

    def unsupported(self, shape: tuple[int, ...]) -> str | None:
        """Return why it does not treat vectors."""
        if min(shape[-2:]) < 2:
            return "basis muon orthogonalises matrices, and this is a vector"
        return None

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Return nothing: no matrix is required."""
        return {}

    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> CurvatureOperator:
        """Return the map V -> c U W^T."""
        return MuonOperator(self)


@attrs.define(eq=False)
class MuonOperator(CurvatureOperator):
    """The map `V -> c U W^T`, which is not linear.

    Args:
        basis: The stage.
    """

    basis: Muon

    def solve(self, v: Tensor) -> Tensor:
        """Return c U W^T; zero for zero."""
        basis = self.basis
        if basis.steps:
            found = newton_schulz(v, basis)
        else:
            left, values, right = torch.linalg.svd(v, full_matrices=False)
            least = values.amax(-1, keepdim=True) * torch.finfo(v.dtype).eps * max(v.shape[-2:])
            found = (left * (values > least).to(v.dtype).unsqueeze(-2)) @ right
        found = found.to(v.dtype) * (basis.factor * _scale(basis.scale, *v.shape[-2:]))
        return evened(found, basis.eps) if basis.even else found

    def multiply(self, v: Tensor) -> Tensor:
        """Refuse: there is no F.

        Raises:
            KfactkError: Always.
        """
        raise KfactkError(NO_FISHER)

    def condition(self) -> None:
        """Return `None`: there is no F."""


NO_FISHER = (
    "this basis orthogonalises, and is no inverse of a curvature, so there is no F to multiply by. "
    "Ask blocks with another basis."
)


def newton_schulz(v: Tensor, basis: Muon) -> Tensor:
    """Return about U W^T of `[..., d_out, d_in]`, in the precision of the basis' products."""
    a, b, c = basis.coefficients
    x = v.bfloat16() if basis.precision == "bfloat16" else v
    tall = v.shape[-2] > v.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=basis.eps)
    for _ in range(basis.steps):
        gram = x @ x.mT
        x = _added(x, _added(gram, gram, gram, b, c), x, a, 1.0)
    return x.mT if tall else x


def evened(matrix: Tensor, eps: float) -> Tensor:
    """Return a matrix of equally long rows, or columns where it is wide, with the norm it had.

    Of a square matrix nothing changes.
    """
    rows, columns = matrix.shape[-2:]
    if rows == columns:
        return matrix
    across = -1 if rows > columns else -2
    lengths = torch.linalg.vector_norm(matrix, dim=across, keepdim=True)
    common = lengths.square().mean((-2, -1), keepdim=True).sqrt()
    evener: Tensor = common / lengths.clamp(min=eps)
    return matrix * evener


def _added(matrix: Tensor, left: Tensor, right: Tensor, share: float, factor: float) -> Tensor:
    """Return `share M + factor left right`, rounded once."""
    if matrix.ndim == 2:
        return torch.addmm(matrix, left, right, beta=share, alpha=factor)
    return torch.baddbmm(matrix, left, right, beta=share, alpha=factor)


def _scale(name: str, d_out: int, d_in: int) -> float:
    ratio = d_out / d_in
    scales = {
        "original": math.sqrt(max(1.0, ratio)),
        "spectral": math.sqrt(ratio),
        "match_rms": 0.2 * math.sqrt(max(d_out, d_in)),
        "none": 1.0,
    }
    return scales[name]


@hookimpl
def kfactk_bases() -> dict[str, type[Muon]]:
    """Provide `muon`."""
    return {"muon": Muon}
