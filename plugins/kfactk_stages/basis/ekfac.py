"""The basis of EKFAC: the Kronecker eigenbasis with the exact diagonal of the Fisher in it."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from kfactk import (
    Decomposition,
    FactorContext,
    Operator,
    OptionError,
    Samples,
    Statistic,
    Tensors,
    hookimpl,
    linalg,
    project,
    project_channels,
)
from kfactk.samples import product
from kfactk_stages.basis._channels import pool_channels, products, spread
from kfactk_stages.basis._diagonal import diagonal, worth_rounding


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


def _products(instance: object, attribute: attrs.Attribute[str], value: str) -> None:
    if value not in PRECISIONS:
        raise OptionError(
            f"basis 'ekfac' has products={value!r}; it is 'full' (the precision of the factors) or 'bfloat16' (large products with "
            "eigenvectors round their operands to bfloat16)."
        )


def _iterated(instance: object, attribute: attrs.Attribute[int | None], value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise OptionError(
            f"basis 'ekfac' has iterate_from={value!r}; it is the size of a matrix from which on one orthogonal iteration takes the place "
            "of a new eigendecomposition: a positive whole number, or None for never."
        )


def _inputs(instance: object, attribute: attrs.Attribute[str], value: str) -> None:
    if value not in INPUTS:
        raise OptionError(
            f"basis 'ekfac' has inputs={value!r}; it is 'full' (the eigenbasis of A), 'channels' (that of the channels, each tap of a "
            "kernel being a direction of its own) or 'channels+taps' (those of both)."
        )


INPUTS = {"full": {"A"}, "channels": {"C"}, "channels+taps": {"C", "K"}}
"""The matrices that each setting of `inputs` decomposes."""
PRECISIONS: dict[str, torch.dtype | None] = {"full": None, "bfloat16": torch.bfloat16}
"""What each setting of `products` rounds operands to."""


@attrs.frozen
class Ekfac:
    """Exact diagonal of the Fisher in the Kronecker-factored eigenbasis.

        A = U_A S_A U_A^T,   G = U_G S_G U_G^T,   s* = E[(U_G^T D U_A)^2],   P V = U_G [(U_G^T V U_A) / (s* + tau)] U_A^T

    Directions in the numerical null space of A or G, among which the eigensolver chooses at will, share their mean scale, so that P does
    not depend on that choice. Before any scale has been measured, the product of the eigenvalues stands in for it (K-FAC's own).

    The eigenbasis of a convolution's A can be replaced by a product of one of its channels and one of its taps, the positions within the
    kernel, the bias being a direction of its own:

        channels:       C = U_C S_C U_C^T,                          U_A = blockdiag(U_C kron I_taps, 1)
        channels+taps:  C = U_C S_C U_C^T,   K = U_K S_K U_K^T,     U_A = blockdiag(U_C kron U_K, 1)

    So c x c matrices are decomposed and multiplied by, in place of those of c times taps, and s* is still the exact diagonal of the
    Fisher in this basis, an entry for each channel direction *and* tap. Null directions of channels are pooled tap by tap, those of taps
    channel by channel. Before any scale has been measured, the products of eigenvalues stand in for it, and for the bias their mean.
    Where C has the size of A, as for a linear layer, there is no difference.

    Args:
        scale: "exact": s* from per-example gradients of the Fisher pass (equation 10). "running": EKFAC-ra, the squared mini-batch mean
            gradient in the basis, times the number of likelihood terms so that damping keeps its meaning.
        scale_decay: Decay of the running mean of the scale between refreshes of the basis, in [0, 1]; `None` means 0 (the last
            mini-batch's alone, as in the study) for "exact", and 0.95 for "running". On a refresh the running mean is carried into
            the new basis.
        inputs: "full": the eigenbasis of A, `[d_in, d_in]`. "channels": that of C, `[c, c]`, for each tap. "channels+taps": that and the
            one of K, `[taps, taps]`. The curvature has to provide C and K: `conv_kfac` does, and with `spatial="sua"` or "stationary" A
            is never formed.

        products: "full": products with eigenvectors are taken in the precision of the factors. "bfloat16": large ones (`worth_rounding`)
            round their operands to bfloat16 and accumulate in float32, two to three times as fast where the hardware has such products.
            One and the same rounded U turns there and back, so that P stays symmetric and positive definite for that U; the gradient is
            rounded too, by at most 2^-8 of its norm, which P may multiply by at most 1 / tau. s* is measured with the same rounding.
        iterate_from: Matrices of this size and more are decomposed by one step of orthogonal iteration from their last eigenvectors
            (`kfactk.linalg.orthogonal_iteration`), at less than the price of a new decomposition; `None` for never. s* is exact in
            whatever orthonormal basis comes out.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> import torch
        >>> basis = Ekfac()
        >>> matrices = {"A": torch.diag(torch.tensor([1.0, 4.0])), "G": torch.eye(1)}
        >>> context = FactorContext(damping=0.0, mean_diagonal={})
        >>> decomposition = {name: basis.decompose(name, matrix, context) for name, matrix in matrices.items()}
        >>> basis.precondition(torch.ones(1, 2), decomposition, {"scale": torch.tensor([[1.0, 3.0]])}, 1.0)
        tensor([[0.5000, 0.2500]])

    References:
        George et al. 2018, arXiv:1806.03884, algorithm 1 and section 4.2.
        Grosse & Martens 2016, arXiv:1602.01407, for uncorrelated activations, of which "channels" takes the basis and not the values.
    """

    scale: str = attrs.field(default="exact", validator=_scale)
    scale_decay: float | None = attrs.field(default=None, validator=_decay)
    inputs: str = attrs.field(default="full", validator=_inputs)
    products: str = attrs.field(default="full", validator=_products)
    iterate_from: int | None = attrs.field(default=None, validator=_iterated)

    @property
    def requires(self) -> frozenset[str]:
        """G, and A, or C, or C and K."""
        return frozenset({*INPUTS[self.inputs], "G"})

    @property
    def laws(self) -> frozenset[str]:
        """The exact scale is also at least as close to the Fisher matrix as K-FAC; the running one need not be.

        A product of channels and taps turns with no coordinates that mix the two, and is exact for no example that does.
        """
        every = {"null-space-independent"} | (
            {"closer-than-kfac"} if self.scale == "exact" else set()
        )
        return frozenset(
            every | {"rotation-equivariant", "exact-when-kronecker"}
            if self.inputs == "full"
            else every
        )

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

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """`{"eigenvalues": [..., n], "eigenvectors": [..., n, n]}`, eigenvectors in columns."""
        values, vectors = linalg.eigh(matrix)
        return {"eigenvalues": values, "eigenvectors": vectors}

    def redecompose(
        self, name: str, matrix: Tensor, context: FactorContext, last: Tensors
    ) -> dict[str, Tensor]:
        """`decompose`, or from the size `iterate_from` on one orthogonal iteration from the last eigenvectors."""
        if (
            self.iterate_from is None
            or matrix.shape[-1] < self.iterate_from
            or matrix.shape != last["eigenvectors"].shape
        ):
            return self.decompose(name, matrix, context)
        values, vectors = linalg.orthogonal_iteration(matrix, last["eigenvectors"])
        return {"eigenvalues": values, "eigenvectors": vectors}

    def moments(self, decomposition: Decomposition, samples: Samples) -> dict[str, Statistic]:
        """`{"scale": sum_n (U_G^T D_n U_A)^2}`, `[..., d_out, d_in]`, null directions pooled."""
        left, right, taps = _vectors(decomposition)
        whole = right.shape[-1] == samples.d_in
        if whole:
            precision = self._rounded(
                samples.examples * min(samples.positions, samples.d_out), right
            )
            options = {} if precision is None else {"precision": precision}
            square = samples.projected_square(left, right, **options)
        else:
            square = samples.projected_square_of_channels(left, right, taps)
        total = None if square.total is None else _pooled(square.total, decomposition)
        return {"scale": Statistic(total, square.count)}

    def gradient_moments(
        self, decomposition: Decomposition, gradient: Tensor, num_terms: Tensor | float
    ) -> dict[str, Statistic]:
        """`{"scale": M (U_G^T D U_A)^2}` of the mini-batch mean gradient D over M terms; nothing for the exact scale."""
        if self.scale == "exact":
            return {}
        rotated = _projected(gradient, *_vectors(decomposition))
        return {"scale": Statistic(_pooled(rotated.square() * num_terms, decomposition), 1.0)}

    def transport(
        self, moments: Tensors, old: Decomposition, new: Decomposition
    ) -> dict[str, Tensor]:
        """The diagonal, in the new basis, of the operator that is `diag(scale)` in the old one; null directions pooled."""
        if "scale" not in moments:
            return {}
        left, right, taps = (
            None
            if u is None or v is None
            else product(u.transpose(-1, -2), v, v.dtype, self._rounded(u.shape[-1], v)).square()
            for u, v in zip(_vectors(old), _vectors(new), strict=True)
        )
        return {"scale": _pooled(_projected(moments["scale"], left, right, taps), new)}

    def precondition(
        self, gradient: Tensor, decomposition: Decomposition, moments: Tensors, damping: float
    ) -> Tensor:
        """Equation 11; `gradient` is `[..., d_out, d_in]`."""
        return self.operator(decomposition, moments, damping)(gradient)

    def operator(self, decomposition: Decomposition, moments: Tensors, damping: float) -> Operator:
        """Equation 11 but for the gradient; holds `1 / (s* + tau)`."""
        if "scale" not in moments:  # its shape is the gradient's
            return lambda gradient: self._diagonal(
                decomposition, _scale_of(decomposition, moments, gradient.shape[-1]), damping
            )(gradient)
        return self._diagonal(decomposition, moments["scale"], damping)

    def _diagonal(self, decomposition: Decomposition, scale: Tensor, damping: float) -> Operator:
        floor = linalg.damping_floor(scale.mean((-2, -1), keepdim=True))
        weights = (scale + floor.clamp(min=damping)).reciprocal_()
        return diagonal(*_vectors(decomposition), weights, PRECISIONS[self.products])

    def _rounded(self, rows: int, right: Tensor) -> torch.dtype | None:
        """The precision that a product of so many rows with `right` rounds its operands to."""
        precision = PRECISIONS[self.products]
        return precision if precision is not None and worth_rounding(rows, right) else None

    def product(
        self, vector: Tensor, matrices: Tensors, decomposition: Decomposition, moments: Tensors
    ) -> Tensor:
        """`U_G [(U_G^T V U_A) * s*] U_A^T`, undamped."""
        return diagonal(
            *_vectors(decomposition), _scale_of(decomposition, moments, vector.shape[-1]), None
        )(vector)

    def condition(self, decomposition: Decomposition, moments: Tensors, damping: float) -> Tensor:
        """Condition number of the damped curvature, `(max s* + tau) / (min s* + tau)`; the largest among groups."""
        scale = _scale_of(decomposition, moments)
        tau = linalg.damping_floor(scale.mean((-2, -1))).clamp(min=damping)
        return ((scale.amax((-2, -1)) + tau) / (scale.amin((-2, -1)) + tau)).max()


def _inputs_of(decomposition: Decomposition, part: str) -> tuple[Tensor, Tensor | None]:
    """The eigenvalues, or eigenvectors, of A or C, and those of K where there are taps to rotate."""
    if "A" in decomposition:
        return decomposition["A"][part], None
    taps = decomposition["K"][part] if "K" in decomposition else None
    return decomposition["C"][part], None if taps is None or taps.shape[-1] == 1 else taps


def _vectors(decomposition: Decomposition) -> tuple[Tensor, Tensor, Tensor | None]:
    """U_G, U_A or U_C, and U_K."""
    return decomposition["G"]["eigenvectors"], *_inputs_of(decomposition, "eigenvectors")


def _projected(
    matrix: Tensor, left: Tensor | None, right: Tensor | None, taps: Tensor | None
) -> Tensor:
    """`left^T M right`, or, where `right` is of channels, `left^T M blockdiag(right kron taps, 1)`."""
    whole = right is None or right.shape[-1] == matrix.shape[-1]
    return project(matrix, left, right) if whole else project_channels(matrix, left, right, taps)


def _scale_of(decomposition: Decomposition, moments: Tensors, d_in: int | None = None) -> Tensor:
    """`[..., d_out, d_in]`; where it was not measured and `d_in` is not told, an entry an eigenvalue, of the same extremes and mean."""
    if "scale" in moments:
        return moments["scale"]
    values, taps = _inputs_of(decomposition, "eigenvalues")
    if d_in not in (None, values.shape[-1]):
        values = spread(values, taps, d_in)
    elif taps is not None:
        values = products(values, taps)
    return decomposition["G"]["eigenvalues"].unsqueeze(-1) * values.unsqueeze(-2)


def _pooled(scale: Tensor, decomposition: Decomposition) -> Tensor:
    values, taps = _inputs_of(decomposition, "eigenvalues")
    null, null_taps = linalg.null_mask(values), None if taps is None else linalg.null_mask(taps)
    scale = (
        linalg.pool_null(scale, null, -1)
        if null.shape[-1] == scale.shape[-1]
        else pool_channels(scale, null, null_taps)
    )
    return linalg.pool_null(scale, linalg.null_mask(decomposition["G"]["eigenvalues"]), -2)


@hookimpl
def kfactk_bases() -> dict[str, type[Ekfac]]:
    """Provide `ekfac`."""
    return {"ekfac": Ekfac}
