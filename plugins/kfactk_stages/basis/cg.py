"""Conjugate gradients: solve with F + tau I by products with F, without any decomposition."""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from kfactk import (
    Basis,
    CurvatureOperator,
    Decomposition,
    FactorContext,
    OptionError,
    Tensors,
    hookimpl,
    linalg,
)
from kfactk.options import choice, number, whole

LEAST_WIDTH = 1e-3
"""Least half width of the interval of Chebyshev polynomials, as a share of its centre."""


@attrs.frozen
class ConjugateGradients(Basis):
    """Solve `(F + tau I) x = V` by k steps of an iteration that multiplies by F alone.

        x_j = p_j(F + tau I) V,    p_j a polynomial of degree j - 1,    j = 1, ..., k

    "residual": conjugate gradients from x = 0. Among all polynomials p_k is the one for which x_k
    is closest to the solution in the norm of F + tau I. With e_j the error in that norm and kappa
    the condition number,

        e_k <= 2 ((sqrt(kappa) - 1) / (sqrt(kappa) + 1))^k e_0

    and x_k is the solution where k is at least the number of examples, plus one. As p_k depends on
    V, the map from V to x_k is not linear: stages that need that, such as the clip `kl`, are
    refused.

    "chebyshev": p_k is the same for all V, so that the map is linear, self-adjoint and positive
    definite. It is the polynomial with the least largest error on `[tau, tr F + tau]`, which holds
    all eigenvalues. That is a wide interval, and k should be larger than with "residual".

    There is nothing to decompose. What is kept are the rows of the last refresh, scaled such that
    none overflows. A product with F costs about as much as a forward and a backward of the layer on
    the examples: `4 N T d_in d_out` operations for inputs and gradients, `4 N d_in d_out` for D_n.
    While it solves, the iteration holds five matrices of the gradient's shape at most.

    Args:
        iterations: k.
        polynomial: "residual" or "chebyshev".
        tolerance: With "residual", stop where the norm of the residual is at most this share of V's
            norm. It makes a GPU wait at each step; 0 for k steps always.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> basis = ConjugateGradients(iterations=2)
        >>> rows = {  # one example, D = [[3, 0]]
        ...     "inputs": torch.tensor([3.0, 0.0]).view(1, 1, 1, 2),
        ...     "gradients": torch.ones(1, 1, 1, 1),
        ...     "matrices": torch.zeros(0, 1, 1, 2),
        ... }
        >>> context = FactorContext(damping=1.0, mean_diagonal={})
        >>> parts = {name: basis.decompose(name, each, context) for name, each in rows.items()}
        >>> solved = basis.operator(parts, {}, 1.0, {}).solve(torch.tensor([[10.0, 2.0]]))
        >>> solved.round(decimals=4)
        tensor([[1., 2.]])

    References:
        Chen 2021, "An iterative K-FAC algorithm for Deep Learning", arXiv:2101.00218.
        Hestenes & Stiefel 1952, "Methods of Conjugate Gradients for Solving Linear Systems".
        Saad 2003, "Iterative Methods for Sparse Linear Systems", sections 6.7 and 12.3.2.
    """

    requires = frozenset({"inputs", "gradients", "matrices"})
    laws = frozenset({"rotation-equivariant", "exact-when-kronecker"})

    iterations: int = attrs.field(default=10, validator=whole())
    polynomial: str = attrs.field(default="residual", validator=choice("residual", "chebyshev"))
    tolerance: float = attrs.field(default=0.0, validator=number(0, 1, high_open=True))

    def __attrs_post_init__(self) -> None:
        if self.tolerance and self.polynomial == "chebyshev":
            raise OptionError(
                f"basis cg has tolerance={self.tolerance:g}, and the polynomial 'chebyshev' has a "
                "fixed degree. Leave tolerance out, or use polynomial='residual'."
            )

    @property
    def waives(self) -> frozenset[str]:
        """The laws of an exact inverse; with "residual" also those of a linear map."""
        waived = frozenset({"damped-inverse"})
        return waived if self.polynomial == "chebyshev" else waived | {"linear", "self-adjoint"}

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Return rows by group, over the largest number of a group, and that number.

        They are `{"rows": [groups, N, x, y], "scale": [groups]}`, with x and y as T and d, or as
        d_out and d_in.
        """
        linalg.check_finite(matrix)
        rows = matrix.movedim(-2 if name != "matrices" else 1, 0)
        scale = rows.new_zeros(len(rows))
        if rows.numel():
            scale = torch.maximum(rows.amax((1, 2, 3)), -rows.amin((1, 2, 3)))
        divisor = torch.where(scale > 0, scale, 1.0)[:, None, None, None]
        return {"rows": rows / divisor, "scale": scale}

    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> CurvatureOperator:
        """Return F of the rows, and the iteration."""
        return RowsOperator(self, decomposition, damping)


@attrs.define(eq=False)
class RowsOperator(CurvatureOperator):
    """F as a sum over examples.

    With c = tr F + tau, the solution of `(F / c + tau / c I) y = V / |V|` gives `x = |V| / c y`:
    all numbers on the way are as large as float32 can hold.

    Args:
        basis: The stage.
        decomposition: The rows.
        damping: tau.
    """

    basis: ConjugateGradients
    decomposition: Decomposition
    damping: float
    strengths: tuple[Tensor, Tensor] = attrs.field(init=False)
    scale: Tensor = attrs.field(init=False)
    shift: Tensor = attrs.field(init=False)
    largest: Tensor = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        scales = {name: parts["scale"].double() for name, parts in self.decomposition.items()}
        pairs = (scales["inputs"] * scales["gradients"]).square()
        single = scales["matrices"].square()
        inputs, gradients, matrices = self._rows(self.decomposition["inputs"]["rows"].dtype)
        crossed = (inputs @ inputs.mT) * (gradients @ gradients.mT)
        squares = torch.cat(
            [
                crossed.sum((-2, -1)).clamp(min=0).double() * pairs[:, None],
                matrices.square().sum((-2, -1)).double() * single[:, None],
            ],
            -1,
        )  # |D_n|^2 / M, [groups, N]
        trace, size = squares.sum(-1), matrices.shape[-2] * matrices.shape[-1]
        floor = linalg.damping_floor((trace / size).to(matrices.dtype)).double()
        tau = floor.clamp(min=self.damping)
        self.scale = trace + tau
        self.shift = tau / self.scale
        self.strengths = pairs / self.scale, single / self.scale
        padded = torch.cat([squares, squares.new_zeros(len(squares), 1)], -1)
        self.largest = padded.amax(-1)

    def _rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        found = (self.decomposition[n]["rows"] for n in ("inputs", "gradients", "matrices"))
        inputs, gradients, matrices = (rows.to(dtype) for rows in found)
        return inputs, gradients, matrices

    def _multiply(self, v: Tensor) -> Tensor:
        """Return `F v / c` of `[groups, d_out, d_in]`, a new tensor."""
        inputs, gradients, matrices = self._rows(v.dtype)
        pairs, single = (each.to(v.dtype)[:, None, None] for each in self.strengths)
        found: list[Tensor] = []
        if inputs.shape[1]:
            a, g = inputs.flatten(1, 2), gradients.flatten(1, 2)
            by_inputs = a.shape[-1] <= g.shape[-1]
            dots = ((g @ v) * a if by_inputs else (a @ v.mT) * g).sum(-1)
            of_example = dots.view(inputs.shape[:3]).sum(-1, keepdim=True)
            weight = of_example.expand(inputs.shape[:3]).flatten(1).unsqueeze(-1)
            product = g.mT @ (a * weight) if by_inputs else (g * weight).mT @ a
            found.append(product.mul_(pairs))
        if matrices.shape[1]:
            flat = matrices.flatten(2)
            of_example = flat @ v.reshape(len(v), -1, 1)
            found.append((of_example.mT @ flat).mul_(single).view(v.shape))
        if len(found) == 2:
            found[0].add_(found[1])
        return found[0] if found else torch.zeros_like(v)

    def _damped(self, v: Tensor) -> Tensor:
        """Return `(F + tau I) v / c`."""
        return self._multiply(v).addcmul_(self._of_group(self.shift, v), v)

    def solve(self, v: Tensor) -> Tensor:
        """Return x_k."""
        grouped = v if v.ndim > 2 else v.unsqueeze(0)
        size = torch.linalg.vector_norm(grouped, math.inf, (-2, -1), keepdim=True)
        start = grouped / torch.where(size > 0, size, 1.0)
        chebyshev = self.basis.polynomial == "chebyshev"
        found = self._by_chebyshev(start) if chebyshev else self._by_residuals(start)
        root = (size.double() / self.scale[:, None, None]).sqrt().to(v.dtype)
        return found.mul_(root).mul_(root).view(v.shape)

    def _by_residuals(self, b: Tensor) -> Tensor:
        """Return x_k of conjugate gradients, for each group; `b` becomes the residual."""
        x, residual, direction = torch.zeros_like(b), b, b.clone()
        square = first = _inner(b, b)
        for _ in range(self.basis.iterations):
            if self.basis.tolerance and bool((square <= self.basis.tolerance**2 * first).all()):
                break
            product = self._damped(direction)
            step = _ratio(square, _inner(direction, product))
            x.addcmul_(step, direction)
            residual.addcmul_(-step, product)
            del product  # the next one takes its place
            last, square = square, _inner(residual, residual)
            direction.mul_(_ratio(square, last)).add_(residual)
        return x

    def _by_chebyshev(self, b: Tensor) -> Tensor:
        """Return x_k of the polynomial on `[tau / c, 1]`, for each group; `b` is overwritten."""
        shift = self._of_group(self.shift, b)
        centre = (1 + shift) / 2
        width = torch.maximum((1 - shift) / 2, LEAST_WIDTH * centre)
        slope = centre / width
        x, residual, ratio = torch.zeros_like(b), b, 1 / slope
        change = residual / centre
        for step in range(self.basis.iterations):
            x += change
            if step + 1 == self.basis.iterations:
                break
            residual -= self._damped(change)
            last, ratio = ratio, 1 / (2 * slope - ratio)
            change.mul_(ratio * last).addcmul_(2 * ratio / width, residual)
        return x

    def multiply(self, v: Tensor) -> Tensor:
        """Return `F v`, undamped."""
        grouped = v if v.ndim > 2 else v.unsqueeze(0)
        root = self._of_group(self.scale.sqrt(), v)
        return self._multiply(grouped).mul_(root).mul_(root).view(v.shape)

    def condition(self) -> Tensor:
        """Return a lower bound, of the largest |D_n|^2 / M and zero or the mean eigenvalue."""
        rows = {name: parts["rows"] for name, parts in self.decomposition.items()}
        size = rows["matrices"].shape[-2:].numel()
        tau = self.shift * self.scale
        fewer = rows["inputs"].shape[1] + rows["matrices"].shape[1] < size
        least = tau if fewer else tau + (self.scale - tau) / size
        return ((self.largest + tau) / least).clamp(min=1).max()

    def _of_group(self, numbers: Tensor, like: Tensor) -> Tensor:
        return numbers.to(like.dtype)[:, None, None]


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Return `<x, y>` of each group, `[groups, 1, 1]`."""
    return (x * y).sum((-2, -1), keepdim=True)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """Return x / y; zero where y is: the solution is reached."""
    return torch.where(y > 0, x / torch.where(y > 0, y, 1.0), 0.0)


@hookimpl
def kfactk_bases() -> dict[str, type[ConjugateGradients]]:
    """Provide `cg`."""
    return {"cg": ConjugateGradients}
