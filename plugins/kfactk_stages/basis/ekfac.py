"""The basis of EKFAC: the Kronecker eigenbasis with the exact diagonal of the Fisher in it."""

from __future__ import annotations

from typing import ClassVar

import attrs
from torch import Tensor

from kfactk import Coupling, Decomposition, Operator, OptionError, Samples, Statistic, Tensors, hookimpl, linalg, project


def _decay(instance: object, attribute: attrs.Attribute[float | None], value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise OptionError(
            f"basis 'ekfac' has scale_decay={value!r}, which is not in [0, 1]. 0 keeps the last mini-batch's scale, 1 the plain mean "
            "since the last change of basis; choose between."
        )


def _scale(instance: object, attribute: attrs.Attribute[str], value: str) -> None:
    if value not in ("exact", "running"):
        raise OptionError(
            f"basis 'ekfac' has scale={value!r}; it is 'exact' (per-example second moment, equation 10) or 'running' (running average of "
            "the mini-batch gradient's square, EKFAC-ra)."
        )


@attrs.frozen
class Ekfac:
    """Exact diagonal of the Fisher in the Kronecker-factored eigenbasis.

        A = U_A S_A U_A^T,   G = U_G S_G U_G^T,   s* = E[(U_G^T D U_A)^2],   P V = U_G [(U_G^T V U_A) / (s* + tau)] U_A^T

    Directions in the numerical null space of A or G, among which the eigensolver chooses at will, share their mean scale, so that P does
    not depend on that choice. Before any scale has been measured, the product of the eigenvalues stands in for it (K-FAC's own).

    Args:
        scale: "exact": s* from per-example gradients of the Fisher pass (equation 10). "running": EKFAC-ra, the squared mini-batch mean
            gradient in the basis, times the number of likelihood terms so that damping keeps its meaning.
        scale_decay: Decay of the running mean of the scale between refreshes of the basis, in [0, 1]; `None` means 0 (the last
            mini-batch's alone, as in the study) for "exact", and 0.95 for "running". On a refresh the running mean is carried into
            the new basis.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> import torch
        >>> basis = Ekfac()
        >>> matrices = {"A": torch.diag(torch.tensor([1.0, 4.0])), "G": torch.eye(1)}
        >>> coupling = Coupling(damping=0.0, mean_diagonal={})
        >>> decomposition = {name: basis.decompose(name, matrix, coupling) for name, matrix in matrices.items()}
        >>> basis.precondition(torch.ones(1, 2), decomposition, {"scale": torch.tensor([[1.0, 3.0]])}, 1.0)
        tensor([[0.5000, 0.2500]])

    References:
        George et al. 2018, arXiv:1806.03884, algorithm 1 and section 4.2.
    """

    scale: str = attrs.field(default="exact", validator=_scale)
    scale_decay: float | None = attrs.field(default=None, validator=_decay)

    requires: ClassVar[frozenset[str]] = frozenset({"A", "G"})

    @property
    def laws(self) -> frozenset[str]:
        """The exact scale is also at least as close to the Fisher matrix as K-FAC; the running one need not be."""
        every = frozenset({"rotation-equivariant", "null-space-independent", "exact-when-kronecker"})
        return every | {"closer-than-kfac"} if self.scale == "exact" else every

    @property
    def moments_from(self) -> str | None:
        """Per-example gradients for the exact scale, the user's gradient for the running one."""
        return "samples" if self.scale == "exact" else "gradient"

    @property
    def moment_decay(self) -> float:
        """Decay of the scale's running mean."""
        if self.scale_decay is not None:
            return self.scale_decay
        return 0.0 if self.scale == "exact" else 0.95

    def decompose(self, name: str, matrix: Tensor, coupling: Coupling) -> dict[str, Tensor]:
        """`{"eigenvalues": [..., n], "eigenvectors": [..., n, n]}`, eigenvectors in columns."""
        values, vectors = linalg.eigh(matrix)
        return {"eigenvalues": values, "eigenvectors": vectors}

    def moments(self, decomposition: Decomposition, samples: Samples) -> dict[str, Statistic]:
        """`{"scale": sum_n (U_G^T D_n U_A)^2}`, `[..., d_out, d_in]`, null directions pooled."""
        square = samples.projected_square(decomposition["G"]["eigenvectors"], decomposition["A"]["eigenvectors"])
        total = None if square.total is None else _pooled(square.total, decomposition)
        return {"scale": Statistic(total, square.count)}

    def gradient_moments(self, decomposition: Decomposition, gradient: Tensor, terms: Tensor | float) -> dict[str, Statistic]:
        """`{"scale": M (U_G^T D U_A)^2}` of the mini-batch mean gradient D over M terms; nothing for the exact scale."""
        if self.scale == "exact":
            return {}
        rotated = project(gradient, decomposition["G"]["eigenvectors"], decomposition["A"]["eigenvectors"])
        return {"scale": Statistic(_pooled(rotated.square() * terms, decomposition), 1.0)}

    def transport(self, moments: Tensors, old: Decomposition, new: Decomposition) -> dict[str, Tensor]:
        """The diagonal, in the new basis, of the operator that is `diag(scale)` in the old one; null directions pooled."""
        if "scale" not in moments:
            return {}
        turn = {name: (old[name]["eigenvectors"].transpose(-1, -2) @ new[name]["eigenvectors"]).square() for name in ("A", "G")}
        return {"scale": _pooled(turn["G"].transpose(-1, -2) @ moments["scale"] @ turn["A"], new)}

    def precondition(self, gradient: Tensor, decomposition: Decomposition, moments: Tensors, damping: float) -> Tensor:
        """Equation 11; `gradient` is `[..., d_out, d_in]`."""
        return self.operator(decomposition, moments, damping)(gradient)

    def operator(self, decomposition: Decomposition, moments: Tensors, damping: float) -> Operator:
        """Equation 11 but for the gradient; holds `1 / (s* + tau)`."""
        scale = _scale_of(decomposition, moments)
        floor = linalg.damping_floor(scale.mean((-2, -1), keepdim=True))
        inverse = (scale + floor.clamp(min=damping)).reciprocal_()
        return Diagonal(decomposition["G"]["eigenvectors"], decomposition["A"]["eigenvectors"], inverse)

    def product(self, vector: Tensor, matrices: Tensors, decomposition: Decomposition, moments: Tensors) -> Tensor:
        """`U_G [(U_G^T V U_A) * s*] U_A^T`, undamped."""
        scale = _scale_of(decomposition, moments)
        return Diagonal(decomposition["G"]["eigenvectors"], decomposition["A"]["eigenvectors"], scale)(vector)

    def condition(self, decomposition: Decomposition, moments: Tensors, damping: float) -> Tensor:
        """Condition number of the damped curvature, `(max s* + tau) / (min s* + tau)`; the largest among groups."""
        scale = _scale_of(decomposition, moments)
        tau = linalg.damping_floor(scale.mean((-2, -1))).clamp(min=damping)
        return ((scale.amax((-2, -1)) + tau) / (scale.amin((-2, -1)) + tau)).max()


def _scale_of(decomposition: Decomposition, moments: Tensors) -> Tensor:
    if "scale" in moments:
        return moments["scale"]
    return decomposition["G"]["eigenvalues"].unsqueeze(-1) * decomposition["A"]["eigenvalues"].unsqueeze(-2)


def _pooled(scale: Tensor, decomposition: Decomposition) -> Tensor:
    for name, dim in (("A", -1), ("G", -2)):
        scale = linalg.pool_null(scale, linalg.null_mask(decomposition[name]["eigenvalues"]), dim)
    return scale


@attrs.frozen(eq=False)
class Diagonal:
    """`V -> U_G [(U_G^T V U_A) * d] U_A^T`.

    Args:
        left: U_G, `[..., d_out, d_out]`.
        right: U_A, `[..., d_in, d_in]`.
        diagonal: d, `[..., d_out, d_in]`.
    """

    left: Tensor
    right: Tensor
    diagonal: Tensor

    def __call__(self, vector: Tensor) -> Tensor:
        """Apply it to `[..., d_out, d_in]`."""
        rotated = project(vector, self.left, self.right).mul_(self.diagonal)
        return project(rotated, self.left.transpose(-1, -2), self.right.transpose(-1, -2))


@hookimpl
def kfactk_bases() -> dict[str, type[Ekfac]]:
    """Provide `ekfac`."""
    return {"ekfac": Ekfac}
