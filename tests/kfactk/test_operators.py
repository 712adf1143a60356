"""A spectral operator equals dense algebra with U diag(s) U^T."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from kfactk import CurvatureOperator, SpectralOperator
from kfactk.testing import effort

F64 = torch.float64


@attrs.define(eq=False)
class Turned(SpectralOperator):
    """F in the basis of orthonormal matrices U_G, U_A: `v -> U_G^T v U_A`."""

    left: Tensor
    right: Tensor

    def to_basis(self, v: Tensor) -> Tensor:
        return self.left.mT @ v @ self.right

    def from_basis(self, coefficients: Tensor) -> Tensor:
        return self.left @ coefficients @ self.right.mT


def orthonormal(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=F64))[0]


def case(rows: int, columns: int, damping: float) -> tuple[Turned, Tensor]:
    """Return an operator with its dense, undamped matrix on vectors stacked by rows."""
    left, right = orthonormal(rows), orthonormal(columns)
    spectrum = torch.rand(rows, columns, dtype=F64)
    turn = torch.kron(left, right)
    dense = turn @ torch.diag(spectrum.reshape(-1)) @ turn.T
    return Turned(spectrum, damping, left, right), dense


@settings(max_examples=effort(20))
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1e-3, 0.1, 10.0]), st.integers(0, 99))
def test_spectral_operator_equals_dense_algebra(
    rows: int, columns: int, damping: float, seed: int
) -> None:
    torch.manual_seed(seed)
    operator, dense = case(rows, columns, damping)
    v, identity = torch.randn(rows, columns, dtype=F64), torch.eye(rows * columns, dtype=F64)
    damped = dense + damping * identity

    def flat(result: Tensor) -> Tensor:
        return result.reshape(-1)

    torch.testing.assert_close(flat(operator.multiply(v)), dense @ flat(v))
    torch.testing.assert_close(flat(operator.solve(v)), torch.linalg.solve(damped, flat(v)))
    torch.testing.assert_close(operator.condition(), torch.linalg.cond(damped))
    torch.testing.assert_close(operator.logdet(), torch.logdet(damped))
    root = operator.function(torch.sqrt, operator.function(torch.sqrt, v))
    torch.testing.assert_close(root, operator.multiply(v))


def test_groups_are_treated_each_alone() -> None:
    spectrum, v = torch.rand(3, 2, 4, dtype=F64), torch.randn(3, 2, 4, dtype=F64)
    operator = SpectralOperator(spectrum, 0.1)
    alone = [SpectralOperator(each, 0.1) for each in spectrum]
    solved = [one.solve(part) for one, part in zip(alone, v, strict=True)]
    torch.testing.assert_close(operator.solve(v), torch.stack(solved))
    assert operator.condition() == max(one.condition() for one in alone)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_division_is_safe_without_damping(dtype: torch.dtype) -> None:
    for spectrum in (torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [2.0, 3.0]])):
        operator = SpectralOperator(spectrum.to(dtype), 0.0)
        assert bool(operator.solve(torch.ones(2, 2, dtype=dtype)).isfinite().all())
        assert bool(operator.condition().isfinite())


def test_an_operator_defines_all_three_products() -> None:
    with pytest.raises(TypeError, match=r"condition.*multiply.*solve"):
        CurvatureOperator()  # type: ignore[abstract]


@pytest.mark.parametrize("power", [0.5, 0.25])
def test_a_power_of_the_damped_matrix_is_solved_with(power: float) -> None:
    spectrum, v = torch.rand(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    operator = SpectralOperator(spectrum, 0.3, power=power)
    torch.testing.assert_close(operator.solve(v), v * (spectrum + 0.3) ** -power)
    assert torch.equal(operator.multiply(v), v * spectrum)
    again = SpectralOperator(spectrum, 0.3)
    assert torch.equal(again.solve(v), v * (1 / (spectrum + 0.3)))
