"""Shampoo: the laws; the roots of both sides against dense algebra."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kfactk import FactorContext, OptionError
from kfactk.testing import BasisLaws
from kfactk_stages.basis.shampoo import Shampoo

F64 = torch.float64
CONTEXT = FactorContext(damping=0.0, mean_diagonal={})


class TestShampoo(BasisLaws):
    stage = "shampoo"
    curvature: ClassVar[Any] = {"name": "gradient", "vectors": False}  # columns do not turn

    def turned(self, name: str, matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
        rotation = left if name == "L" else right
        return rotation @ matrix @ rotation.mT


def sides(*lead: int) -> dict[str, Tensor]:
    rows = {"L": torch.randn(*lead, 3, 9, dtype=F64), "R": torch.randn(*lead, 4, 9, dtype=F64)}
    return {name: each @ each.mT for name, each in rows.items()}


def operator(basis: Shampoo, matrices: dict[str, Tensor]) -> Any:
    parts = {name: basis.decompose(name, m, CONTEXT) for name, m in matrices.items()}
    return basis.operator(parts, {}, 1e9, matrices)


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_the_step_is_a_power_of_the_dense_matrix(p: float) -> None:
    matrices, v = sides(), torch.randn(3, 4, dtype=F64)
    made = operator(Shampoo(power=p, eps=0.0), matrices)
    dense = torch.kron(power(matrices["R"], 0.5), power(matrices["L"], 0.5))
    found = [made.solve(v), made.multiply(v)]
    for each, exponent in zip(found, (-p, 1.0), strict=True):
        expected = (power(dense, exponent) @ v.T.flatten()).view(4, 3).T
        torch.testing.assert_close(each, expected)
    torch.testing.assert_close(made.condition(), torch.linalg.cond(dense))


def test_eps_is_a_share_of_the_largest_eigenvalue() -> None:
    matrices, v = sides(), torch.randn(3, 4, dtype=F64)
    found = operator(Shampoo(eps=0.1), matrices).solve(v)
    damped = {
        name: m + 0.1 * torch.linalg.eigvalsh(m).max() * torch.eye(len(m), dtype=F64)
        for name, m in matrices.items()
    }
    expected = power(damped["L"], -0.25) @ v @ power(damped["R"], -0.25)
    torch.testing.assert_close(found, expected)


def test_columns_are_divided_row_by_row() -> None:
    column, right = torch.rand(3, 1, dtype=F64) + 0.1, sides()["R"]
    v = torch.randn(3, 4, dtype=F64)
    made = operator(Shampoo(eps=0.0), {"L": column, "R": right})
    torch.testing.assert_close(made.solve(v), column**-0.25 * (v @ power(right, -0.25)))
    torch.testing.assert_close(made.multiply(v), column.sqrt() * (v @ power(right, 0.5)))


def test_groups_stand_alone() -> None:
    matrices, v = sides(2), torch.randn(2, 3, 4, dtype=F64)
    found = operator(Shampoo(), matrices)
    for k in range(2):
        alone = operator(Shampoo(), {name: m[k] for name, m in matrices.items()})
        torch.testing.assert_close(found.solve(v)[k], alone.solve(v[k]))


@pytest.mark.parametrize("option", [{"power": 2.0}, {"eps": -1.0}])
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(option))}="):
        Shampoo(**option)
