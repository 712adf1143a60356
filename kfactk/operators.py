"""Curvature of one layer as a linear operator: solve with it, multiply by it, read its spectrum.

All operators act on matrices `[..., d_out, d_in]`, the form of a layer's gradient. Leading
dimensions are groups: the operator acts on each of them alone.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import attrs
from torch import Tensor

from kfactk import linalg


class CurvatureOperator(abc.ABC):
    """The curvature F of one layer in one basis, with its damping.

    Laws: `solve` is linear, self-adjoint and positive definite. `damping * solve(v) -> v` as
    damping grows. `multiply` is linear, self-adjoint and positive semi-definite.
    """

    @abc.abstractmethod
    def solve(self, v: Tensor) -> Tensor:
        """Return `(F + damping I)^-1 v`, of the shape of `v`."""

    def solve_coordinates(self, coordinates: Tensor) -> Tensor:
        """Return `solve` of the matrix that has these coordinates (`Basis.coordinates`).

        Only operators of bases that have coordinates need it.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def multiply(self, v: Tensor) -> Tensor:
        """Return `F v`, undamped, of the shape of `v`."""

    @abc.abstractmethod
    def condition(self) -> Tensor | None:
        """Return the condition number of `F + damping I`, or a lower bound of it: a scalar.

        `None` where the map is no inverse of a curvature.
        """


@attrs.define(eq=False)
class SpectralOperator(CurvatureOperator):
    """Curvature that is diagonal in an orthonormal basis: `F = U diag(s) U^T`.

    The basis is that of the coordinates unless a subclass replaces `to_basis` and `from_basis`.

    Args:
        spectrum: s, `[..., d_out, d_in]`, non-negative.
        damping: tau. It is at least a small share of the mean of s, so that division is safe.
        power: p of `solve`, which is `(F + damping I)^-p`: 1 for the inverse, 1/2 for its root.

    Example:
        >>> import torch
        >>> operator = SpectralOperator(torch.tensor([[0.0, 3.0]]), damping=1.0)
        >>> operator.solve(torch.ones(1, 2)), operator.multiply(torch.ones(1, 2))
        (tensor([[1.0000, 0.2500]]), tensor([[0., 3.]]))
        >>> operator.condition(), operator.logdet()
        (tensor(4.), tensor(1.3863))
        >>> operator.function(torch.sqrt, torch.ones(1, 2))
        tensor([[0.0000, 1.7321]])
    """

    spectrum: Tensor
    damping: float
    power: float = attrs.field(default=1.0, kw_only=True)

    def to_basis(self, v: Tensor) -> Tensor:
        """Return `U^T v`, `[..., d_out, d_in]`."""
        return v

    def from_basis(self, coefficients: Tensor) -> Tensor:
        """Return `U c`, the inverse of `to_basis`."""
        return coefficients

    def function(self, f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """Return `U f(s) U^T v`, for samples from a Gaussian, roots and influence functions.

        Args:
            f: Maps the undamped spectrum to numbers of the same shape, entry by entry.
            v: `[..., d_out, d_in]`.
        """
        return self.from_basis(f(self.spectrum).to(v.dtype) * self.to_basis(v))

    def solve(self, v: Tensor) -> Tensor:
        """Return `U [(U^T v) / (s + damping)^p]`."""
        weights = self._weights().to(v.dtype)
        return self.from_basis(weights * self.to_basis(v))

    def solve_coordinates(self, coordinates: Tensor) -> Tensor:
        """Return `U [c / (s + damping)^p]`."""
        return self.from_basis(self._weights().to(coordinates.dtype) * coordinates)

    def multiply(self, v: Tensor) -> Tensor:
        """Return `U [(U^T v) * s]`."""
        return self.function(lambda s: s, v)

    def condition(self) -> Tensor:
        """Return `(max s + damping) / (min s + damping)`, the largest among groups."""
        s, tau = self.spectrum, self._tau()
        largest, least = s.amax((-2, -1), keepdim=True), s.amin((-2, -1), keepdim=True)
        return ((largest + tau) / (least + tau)).max()

    def logdet(self) -> Tensor:
        """Return the logarithm of the determinant of `F + damping I`: a scalar."""
        return (self.spectrum + self._tau()).log().sum()

    def _weights(self) -> Tensor:
        """Return `1 / (s + damping)^p`, of the shape of s."""
        damped = self.spectrum + self._tau()
        return damped.reciprocal_() if self.power == 1 else damped.pow_(-self.power)

    def _tau(self) -> Tensor:
        """Return the damping that is used, `[..., 1, 1]`."""
        floor = linalg.damping_floor(self.spectrum.mean((-2, -1), keepdim=True))
        return floor.clamp(min=self.damping)
