"""The basis of EKFAC: the Kronecker eigenbasis with the exact diagonal of the Fisher in it."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import (
    Basis,
    CurvatureOperator,
    Decomposition,
    DecompositionError,
    FactorContext,
    Samples,
    SpectralOperator,
    Statistic,
    Tensors,
    hookimpl,
    linalg,
    project,
    project_channels,
)
from kfactk.options import choice, number, whole
from kfactk.samples import product
from kfactk.sides import is_diagonal
from kfactk_stages.basis._channels import pool_channels, products, spread
from kfactk_stages.basis._operators import operator_in, worth_rounding
from kfactk_stages.basis._wide import (
    Directions,
    SidesOperator,
    directions_of,
    eigenvalues_of,
    pool_side,
    square_in_parts,
    turned,
)

INPUTS = {"full": {"A"}, "channels": {"C"}, "channels+taps": {"C", "K"}, "diagonal": {"a"}}
"""The matrices of the input side that each setting of `inputs` requires."""
PRECISIONS: dict[str, torch.dtype | None] = {"full": None, "bfloat16": torch.bfloat16}
"""What each setting of `products` rounds operands to."""


@attrs.frozen
class Ekfac(Basis):
    """Exact diagonal of the Fisher in the Kronecker-factored eigenbasis.

        A = U_A S_A U_A^T,   G = U_G S_G U_G^T,   s* = E[(U_G^T D U_A)^2]
        P V = U_G [(U_G^T V U_A) / (s* + tau)^p] U_A^T

    The eigensolver chooses at will within the numerical null space of A or G. Those directions
    share their mean scale, so that P does not depend on the choice. Before any scale is measured,
    the products of the eigenvalues stand in for it, as in K-FAC.

    The option `inputs` may replace the eigenbasis of A:

        channels:       C = U_C S_C U_C^T,                       U_A = blockdiag(U_C kron I_taps, 1)
        channels+taps:  C = U_C S_C U_C^T,  K = U_K S_K U_K^T,   U_A = blockdiag(U_C kron U_K, 1)
        diagonal:       a = diag A,                              U_A = I

    For convolutions, matrices of the size of the channels (and of the taps) are decomposed then, in
    place of one of channels times taps. The bias is a direction of its own. s* is still the exact
    diagonal of the Fisher in this basis, one entry for each channel direction *and* tap. Null
    directions of channels are pooled tap by tap, those of taps channel by channel. Before any scale
    is measured, the entry of the bias is the mean of all others. Where C has the size of A, as for
    a linear layer, there is no difference.

    "diagonal" is for inputs whose A is diagonal or too large to decompose, such as one-hot vectors.
    The coordinates are fixed, so nothing is pooled on that side.

    Where a curvature has stand-ins for a wide side, in place of A, C or G, U is the identity for a
    diagonal, and `blockdiag(U_0, U_1, ...)` for blocks. s* is the exact diagonal in that basis.

    Args:
        scale: "exact": s* from per-example gradients of the Fisher pass (equation 10). "running":
            EKFAC-ra, the square of the mini-batch mean gradient in the basis, times the number of
            likelihood terms, so that damping keeps its meaning.
        scale_decay: Decay of the running mean of the scale, in [0, 1]; each measurement
            (`scale_every`) counts once. 0: the last mini-batch's alone. 1: the plain mean of all
            measurements since the first. New eigenvectors do not restart the mean: it is carried
            into the new basis, as the diagonal of the same operator there. `None` means 0 (as in
            the thesis) for "exact" and 0.95 for "running".
        inputs: "full": the eigenbasis of A, `[d_in, d_in]`. "channels": that of C, `[c, c]`, for
            each tap. "channels+taps": that and the one of K, `[taps, taps]`. "diagonal": the
            coordinates; the curvature provides a, `[d_in]`. `conv_kfac` provides C and K; with its
            `spatial="sua"` or "stationary" A is never formed.
        products: "full": products with eigenvectors are in the precision of the factors.
            "bfloat16": large ones (`worth_rounding`) round their operands to bfloat16 and
            accumulate in float32, two to three times as fast where hardware supports it. The same
            rounded U rotates there and back, so P stays symmetric and positive definite. The
            gradient is rounded by at most 2^-8 of its norm, which P multiplies by at most 1 / tau.
            s* is measured with the same rounding. Sides of stand-ins are not rounded.
        iterate_from: From this size on, one step of orthogonal iteration from the last eigenvectors
            replaces a new decomposition, at less cost (`kfactk.linalg.orthogonal_iteration`);
            `None` for never. s* is exact in whatever orthonormal basis results.
        power: p, in (0, 1]. 1: the natural gradient. 0.5: as Adam, in the eigenbasis; with
            `scale="running"` and curvature `gradient` that is SOAP's step.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> import torch
        >>> basis = Ekfac()
        >>> matrices = {"A": torch.diag(torch.tensor([1.0, 4.0])), "G": torch.eye(1)}
        >>> context = FactorContext(damping=0.0, mean_diagonal={})
        >>> parts = {name: basis.decompose(name, m, context) for name, m in matrices.items()}
        >>> operator = basis.operator(parts, {"scale": torch.tensor([[1.0, 3.0]])}, 1.0, matrices)
        >>> operator.solve(torch.ones(1, 2)), operator.multiply(torch.ones(1, 2))
        (tensor([[0.5000, 0.2500]]), tensor([[1., 3.]]))

    References:
        George et al. 2018, arXiv:1806.03884, algorithm 1 and section 4.2.
        Grosse & Martens 2016, arXiv:1602.01407, for uncorrelated activations: "channels" takes
        their basis, not their values.
    """

    takes_stand_ins: ClassVar[bool] = True

    scale: str = attrs.field(default="exact", validator=choice("exact", "running"))
    scale_decay: float | None = attrs.field(default=None, validator=number(0, 1, optional=True))
    inputs: str = attrs.field(default="full", validator=choice(*INPUTS))
    products: str = attrs.field(default="full", validator=choice(*PRECISIONS))
    iterate_from: int | None = attrs.field(default=None, validator=whole(optional=True))
    power: float = attrs.field(default=1.0, validator=number(0, 1, low_open=True))

    @property
    def requires(self) -> frozenset[str]:
        """G, and of the input side what `inputs` says."""
        return frozenset({*INPUTS[self.inputs], "G"})

    @property
    def laws(self) -> frozenset[str]:
        """The laws it claims, which depend on `scale` and `inputs`.

        The exact scale is at least as close to the Fisher matrix as K-FAC; the running one need not
        be. Only the full eigenbasis turns with the coordinates and contains every single example.
        """
        found = {"null-space-independent"}
        if self.scale == "exact":
            found.add("closer-than-kfac")
        if self.inputs == "full":
            found |= {"rotation-equivariant", "exact-when-kronecker"}
        return frozenset(found)

    @property
    def waives(self) -> frozenset[str]:
        """A power other than 1 is no inverse."""
        return frozenset() if self.power == 1 else frozenset({"damped-inverse"})

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

    @property
    def forms(self) -> dict[str, str]:
        """What is kept are eigenvalues, eigenvectors and the scale."""
        return {
            "eigenvalues": "eigenvalues",
            "eigenvectors": "eigenvectors",
            "scale": "diagonal",
        }

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Return `{"eigenvalues": [..., n], "eigenvectors": [..., n, n]}`, vectors in columns.

        Of a and g, which are diagonals, there are eigenvalues only.

        Raises:
            DecompositionError: The matrix holds NaN or inf, or the eigensolver failed.
        """
        if is_diagonal(name):
            if not bool(torch.isfinite(matrix).all()):
                raise DecompositionError(
                    "a factor holds NaN or inf; raise damping, or look for extreme values"
                )
            return {"eigenvalues": matrix.clamp(min=0)}
        last = context.previous
        large = self.iterate_from is not None and matrix.shape[-1] >= self.iterate_from
        if large and last is not None and last["eigenvectors"].shape == matrix.shape:
            values, vectors = linalg.orthogonal_iteration(
                matrix, last["eigenvectors"], last["eigenvalues"]
            )
        else:
            values, vectors = linalg.eigh(matrix)
        return {"eigenvalues": values, "eigenvectors": vectors}

    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> CurvatureOperator:
        """Return equation 11 as an operator, which holds `1 / (s* + tau)`."""
        if "scale" in moments:
            return self.operator_of(decomposition, moments["scale"], damping)
        if "C" in decomposition:
            return UnmeasuredOperator(self, decomposition, damping)
        return self.operator_of(decomposition, eigenvalue_products(decomposition), damping)

    def operator_of(
        self, decomposition: Decomposition, scale: Tensor, damping: float
    ) -> SpectralOperator:
        """Return the operator of a scale `[..., d_out, d_in]`."""
        precision = PRECISIONS[self.products]
        left, right, taps = _vectors(decomposition)
        if not isinstance(left, Tensor) or isinstance(right, tuple):
            return SidesOperator(scale, damping, left, right, taps, power=self.power)
        return operator_in(
            left,
            right,
            taps,
            spectrum=scale,
            damping=damping,
            precision=precision,
            power=self.power,
        )

    def moments(self, decomposition: Decomposition, samples: Samples) -> dict[str, Statistic]:
        """Return `{"scale": sum_n (U_G^T D_n U_A)^2}`, null directions pooled."""
        left, right, taps = _vectors(decomposition)
        if not isinstance(left, Tensor) or isinstance(right, tuple):
            square = square_in_parts(samples, left, right, taps)
        elif right is not None and right.shape[-1] < samples.d_in:
            square = samples.projected_square_of_channels(left, right, taps)
        else:
            widest = left if right is None else right
            rows = samples.positions, samples.d_in if right is None else samples.d_out
            precision = self._rounded(samples.examples * min(rows), widest)
            options = {} if precision is None else {"precision": precision}
            square = samples.projected_square(left, right, **options)
        total = None if square.total is None else _pooled(square.total, decomposition)
        return {"scale": Statistic(total, square.count)}

    def gradient_moments(
        self, decomposition: Decomposition, gradient: Tensor, num_terms: Tensor | float
    ) -> dict[str, Statistic]:
        """Return `{"scale": M (U_G^T D U_A)^2}` of the mini-batch mean gradient D.

        The exact scale takes nothing from there.
        """
        if self.scale == "exact":
            return {}
        rotated = _projected(gradient, *_vectors(decomposition))
        return {"scale": Statistic(_pooled(rotated.square() * num_terms, decomposition), 1.0)}

    def transport(
        self, moments: Tensors, old: Decomposition, new: Decomposition
    ) -> dict[str, Tensor]:
        """Return the diagonal, in the new basis, of the operator that is `diag(scale)` in the old.

        Null directions of the new basis are pooled.
        """
        if "scale" not in moments:
            return {}
        left, right, taps = (
            self._overlap(u, v) for u, v in zip(_vectors(old), _vectors(new), strict=True)
        )
        assert not isinstance(taps, tuple)
        return {"scale": _pooled(_projected(moments["scale"], left, right, taps), new)}

    def _overlap(self, old: Directions, new: Directions) -> Directions:
        """Return the squares of `U_old^T U_new`."""
        if isinstance(old, tuple) and isinstance(new, tuple):
            return tuple((u.mT @ v).square() for u, v in zip(old, new, strict=True))
        if not isinstance(old, Tensor) or not isinstance(new, Tensor):
            return None
        return product(old.mT, new, new.dtype, self._rounded(old.shape[-1], new)).square()

    def _rounded(self, rows: int, right: Tensor) -> torch.dtype | None:
        """Return the precision that a product of so many rows with `right` rounds to."""
        precision = PRECISIONS[self.products]
        return precision if precision is not None and worth_rounding(rows, right) else None


@attrs.define(eq=False)
class UnmeasuredOperator(CurvatureOperator):
    """F in a basis of channels before any scale is measured: products of eigenvalues are s.

    How many columns a layer has is known from its gradient only, so nothing is kept between calls.

    Args:
        basis: The stage.
        decomposition: What it made of each matrix.
        damping: tau.
    """

    basis: Ekfac
    decomposition: Decomposition
    damping: float

    def solve(self, v: Tensor) -> Tensor:
        """Return `(F + damping I)^-1 v`."""
        return self._of_columns(v.shape[-1]).solve(v)

    def multiply(self, v: Tensor) -> Tensor:
        """Return `F v`."""
        return self._of_columns(v.shape[-1]).multiply(v)

    def condition(self) -> Tensor:
        """Return the condition number; the bias, a mean of others, does not change it."""
        return SpectralOperator(eigenvalue_products(self.decomposition), self.damping).condition()

    def _of_columns(self, d_in: int) -> SpectralOperator:
        scale = eigenvalue_products(self.decomposition, d_in)
        return self.basis.operator_of(self.decomposition, scale, self.damping)


def eigenvalue_products(decomposition: Decomposition, d_in: int | None = None) -> Tensor:
    """Return the products of eigenvalues of both sides, `[..., d_out, d_in]`.

    Args:
        decomposition: What `decompose` made of each matrix.
        d_in: Number of columns. Without it there is a column for each eigenvalue of the input side:
            the extremes and the mean are the same.
    """
    values, taps = _eigenvalues(decomposition)
    if d_in not in (None, values.shape[-1]):
        values = spread(values, taps, d_in)
    elif taps is not None:
        values = products(values, taps)
    return eigenvalues_of("G", decomposition).unsqueeze(-1) * values.unsqueeze(-2)


def _eigenvalues(decomposition: Decomposition) -> tuple[Tensor, Tensor | None]:
    """Return the eigenvalues of A, of what stands for it, or of C; and those of K if rotated."""
    if "C" not in decomposition:
        return eigenvalues_of("A", decomposition), None
    return decomposition["C"]["eigenvalues"], _of_taps(decomposition, "eigenvalues")


def _vectors(decomposition: Decomposition) -> tuple[Directions, Directions, Tensor | None]:
    """Return the directions of outputs and of inputs (U_A or U_C), and U_K if taps are rotated."""
    left = directions_of("G", decomposition)
    if "C" not in decomposition:
        return left, directions_of("A", decomposition), None
    right = decomposition["C"]["eigenvectors"]
    return left, right, _of_taps(decomposition, "eigenvectors")


def _of_taps(decomposition: Decomposition, part: str) -> Tensor | None:
    """Return a part of the decomposition of K; `None` where there is one tap or no K."""
    taps = decomposition["K"][part] if "K" in decomposition else None
    return None if taps is None or taps.shape[-1] == 1 else taps


def _projected(matrix: Tensor, left: Directions, right: Directions, taps: Tensor | None) -> Tensor:
    """Return `left^T M right`; for `right` of channels `left^T M blockdiag(right kron taps, 1)`."""
    if isinstance(left, tuple) or isinstance(right, tuple):
        return turned(matrix, left, right, taps)
    whole = right is None or right.shape[-1] == matrix.shape[-1]
    return project(matrix, left, right) if whole else project_channels(matrix, left, right, taps)


def _pooled(scale: Tensor, decomposition: Decomposition) -> Tensor:
    """Give directions among which the eigensolver chose at will their mean scale."""
    if "C" not in decomposition:
        scale = pool_side(scale, "A", decomposition)
    else:
        values, taps = _eigenvalues(decomposition)
        null = linalg.null_mask(values)
        null_taps = None if taps is None else linalg.null_mask(taps)
        if null.shape[-1] == scale.shape[-1]:
            scale = linalg.pool_null(scale, null, -1)
        else:
            scale = pool_channels(scale, null, null_taps)
    return pool_side(scale, "G", decomposition)


@hookimpl
def kfactk_bases() -> dict[str, type[Ekfac]]:
    """Provide `ekfac`."""
    return {"ekfac": Ekfac}
