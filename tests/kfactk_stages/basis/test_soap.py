"""Soap: the laws; Adam in the eigenbasis against dense algebra, and how it follows a basis."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kfactk import FactorContext, OptionError
from kfactk.testing import BasisLaws
from kfactk_stages.basis.soap import Soap

F64 = torch.float64
CONTEXT = FactorContext(damping=0.0, mean_diagonal={})


class TestSoap(BasisLaws):
    stage = "soap"
    curvature: ClassVar[Any] = "gradient"


def moment(n: int, m: int = 9) -> Tensor:
    rows = torch.randn(n, m, dtype=F64)
    return rows @ rows.T


def decomposed(basis: Soap, left: Tensor, right: Tensor, last: Any = None) -> Any:
    return {
        name: basis.decompose(
            name,
            matrix,
            FactorContext(0.0, {}, last[name] if last else None),
        )
        for name, matrix in (("L", left), ("R", right))
    }


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("refresh", ["iterate", "eigh"])
def test_the_step_is_a_power_of_the_dense_matrix(power: float, refresh: str) -> None:
    basis = Soap(power=power, eps=0.01, refresh=refresh)
    left, right = moment(3), moment(4)
    parts = decomposed(basis, left, right)
    u = torch.kron(torch.linalg.eigh(right)[1], torch.linalg.eigh(left)[1])
    s = torch.zeros(12, dtype=F64)
    square = torch.zeros(3, 4, dtype=F64)
    for _ in range(5):
        v = torch.randn(3, 4, dtype=F64)
        s += (u.T @ v.T.flatten()).square() / 5
        square += basis.gradient_moments(parts, v, 7.0)["square"].total / 5
    v = torch.randn(3, 4, dtype=F64)
    found = basis.operator(parts, {"square": square}, 123.0, {}).solve(v)
    weights = (s + 0.01 ** (1 / power)) ** -power
    expected = (u @ (weights * (u.T @ v.T.flatten()))).view(4, 3).T
    torch.testing.assert_close(found, expected)


def test_without_moments_the_gradient_is_divided_by_its_size() -> None:
    v = torch.randn(3, 4, dtype=F64)
    basis = Soap(eps=0.0)
    parts = decomposed(basis, v @ v.T, v.T @ v)
    found = basis.operator(parts, {}, 0.0, {}).solve(v)
    torch.testing.assert_close(found, v / v.square().mean().sqrt())


def test_columns_keep_their_coordinates() -> None:
    basis, v = Soap(eps=0.0), torch.randn(5, 1, dtype=F64)
    parts = decomposed(basis, v.square(), v.square().sum().view(1, 1))
    square = basis.gradient_moments(parts, v, 1.0)["square"].total
    torch.testing.assert_close(square, v.square())
    torch.testing.assert_close(
        basis.operator(parts, {"square": square}, 0.0, {}).solve(v), v.sign()
    )


def test_directions_follow_and_keep_their_moments() -> None:
    basis = Soap()
    left, right = moment(4), moment(4)
    old = decomposed(basis, left, right)
    new = decomposed(basis, left + 0.1 * moment(4), right + 0.1 * moment(4), old)
    for name in ("L", "R"):
        assert float(new[name]["follows"]) == 1.0
        cosines = (old[name]["eigenvectors"] * new[name]["eigenvectors"]).sum(0)
        assert float(cosines.min()) > 0.5
    square = torch.rand(4, 4, dtype=F64)
    torch.testing.assert_close(basis.transport({"square": square}, old, new)["square"], square)


def test_blocks_follow_or_are_carried_each_by_itself() -> None:
    basis = Soap()
    sizes = {"L0": 3, "L1": 2, "R": 4}
    first, second = ({name: moment(n) for name, n in sizes.items()} for _ in range(2))
    context = FactorContext(0.0, {})
    old = {name: basis.decompose(name, matrix, context) for name, matrix in first.items()}
    new = {
        name: basis.decompose(
            name,
            first[name] + 0.1 * second[name],
            FactorContext(0.0, {}, None if name == "L1" else old[name]),
        )
        for name in sizes
    }
    assert [float(new[name]["follows"]) for name in sizes] == [1.0, 0.0, 1.0]
    square = torch.rand(5, 4, dtype=F64)
    turn = (old["L1"]["eigenvectors"].T @ new["L1"]["eigenvectors"]).square()
    found = basis.transport({"square": square}, old, new)["square"]
    torch.testing.assert_close(found[:3], square[:3])
    torch.testing.assert_close(found[3:], turn.T @ square[3:])


def test_null_directions_are_pooled_block_by_block() -> None:
    basis, context = Soap(), FactorContext(0.0, {})
    sides = {"L0": moment(3, 1), "L1": moment(2), "r": torch.rand(4, dtype=F64)}
    parts = {name: basis.decompose(name, matrix, context) for name, matrix in sides.items()}
    found = basis.gradient_moments(parts, torch.randn(5, 4, dtype=F64), 1.0)["square"].total
    assert found is not None
    null = parts["L0"]["eigenvalues"] < 1e-9
    assert int(null.sum()) == 2
    rows = found[:3][null]
    torch.testing.assert_close(rows[0], rows[1])
    assert not torch.allclose(found[3], found[4])
    assert not torch.allclose(found[:3][~null][0], rows[0])


def test_repeated_it_finds_the_eigenvectors() -> None:
    basis, left, right = Soap(), moment(5), moment(4)
    parts = decomposed(basis, moment(5), moment(4))
    for _ in range(300):
        parts = decomposed(basis, left, right, parts)
    for name, matrix in (("L", left), ("R", right)):
        u = parts[name]["eigenvectors"]
        inside = u.T @ matrix @ u
        torch.testing.assert_close(inside, torch.diag(inside.diagonal()), atol=1e-8, rtol=0)
        torch.testing.assert_close(parts[name]["eigenvalues"], inside.diagonal())


def test_anew_moments_are_carried_as_an_operator() -> None:
    basis = Soap(refresh="eigh")
    old = decomposed(basis, moment(3), moment(3))
    new = decomposed(basis, moment(3), moment(3), old)
    square = torch.rand(3, 3, dtype=F64)
    u, w = (
        torch.kron(parts["R"]["eigenvectors"], parts["L"]["eigenvectors"]) for parts in (old, new)
    )
    dense = u @ torch.diag(square.T.flatten()) @ u.T
    expected = (w.T @ dense @ w).diagonal().view(3, 3).T
    found = basis.transport({"square": square}, old, new)["square"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "option", [{"power": 0.0}, {"decay": 1.5}, {"eps": -1.0}, {"refresh": "qr"}]
)
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(option))}="):
        Soap(**option)


def test_damping_is_used_where_there_is_no_eps() -> None:
    parts = decomposed(Soap(), moment(2), moment(2))
    square, v = torch.rand(2, 2, dtype=F64), torch.randn(2, 2, dtype=F64)
    found = [
        Soap(eps=eps).operator(parts, {"square": square}, 0.04, {}).solve(v) for eps in (None, 0.2)
    ]
    torch.testing.assert_close(*found)
