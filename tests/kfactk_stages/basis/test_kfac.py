"""The K-FAC inverse: the laws of bases, against a dense block of its own, and what is its own."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from kfactk import FactorContext
from kfactk.testing import BasisLaws, effort
from kfactk.testing._support.situations import Situation
from kfactk.testing._support.truth import dense_kron, solve
from kfactk_stages.basis.kfac import KfacInverse
from tests.kfactk.dense import each_group, kfac_block

F64 = torch.float64
law = settings(max_examples=effort(40))


class TestKfac(BasisLaws):
    """Its block is `(A + pi sqrt(tau) I) kron (G + sqrt(tau) / pi I)`."""

    stage = "kfac"

    def block(self, situation: Situation) -> Tensor:
        a, g = situation.matrices["A"].double(), situation.matrices["G"].double()
        return each_group(situation.groups, lambda k: kfac_block(a[k], g[k], situation.damping))


class TestKfacInverse(TestKfac):
    """The same, by explicit inverses."""

    stage = {"name": "kfac", "solver": "inverse"}  # noqa: RUF012


class TestKfacEigen(TestKfac):
    """The same, by eigenvectors."""

    stage = {"name": "kfac", "solver": "eigh"}  # noqa: RUF012


@attrs.frozen(eq=False)
class Drawn:
    """Factors, a gradient, and a damping."""

    a: Tensor
    g: Tensor
    gradient: Tensor
    tau: float


def moment(rank: int, n: int, generator: torch.Generator, groups: int) -> Tensor:
    rows = torch.randn(groups, rank, n, generator=generator, dtype=F64)
    return rows.transpose(-1, -2) @ rows / rank


@st.composite
def drawn(draw: st.DrawFn, groups: int = 1) -> Drawn:
    """Second moments of any rank, one pair for each group."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    d_in, d_out = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    a, g = (moment(draw(st.integers(1, 6)), n, generator, groups) for n in (d_in, d_out))
    gradient = torch.randn(groups, d_out, d_in, generator=generator, dtype=F64)
    tau = 10.0 ** draw(st.integers(-4, 2))
    return Drawn(*((a, g, gradient) if groups > 1 else (a[0], g[0], gradient[0])), tau)


def decomposed(
    a: Tensor, g: Tensor, tau: float, solver: str = "cholesky"
) -> dict[str, dict[str, Tensor]]:
    means = {"A": a.diagonal(dim1=-2, dim2=-1).mean(-1), "G": g.diagonal(dim1=-2, dim2=-1).mean(-1)}
    context = FactorContext(tau, means)
    return {
        name: KfacInverse(solver=solver).decompose(name, matrix, context)
        for name, matrix in (("A", a), ("G", g))
    }


def inverse(a: Tensor, g: Tensor, gradient: Tensor, tau: float) -> Tensor:
    return KfacInverse().operator(decomposed(a, g, tau), {}, tau, {}).solve(gradient)


@law
@given(drawn(), st.floats(1e-4, 1e4))
def test_it_does_not_matter_how_the_factors_share_a_constant(x: Drawn, c: float) -> None:
    torch.testing.assert_close(
        inverse(c * x.a, x.g / c, x.gradient, x.tau),
        inverse(x.a, x.g, x.gradient, x.tau),
        rtol=1e-7,
        atol=1e-10,
    )


@law
@given(drawn())
def test_pi_is_one_where_a_trace_is_zero(x: Drawn) -> None:
    """A residual branch that starts at zero has G = 0."""
    root = math.sqrt(x.tau)
    eye_a, eye_g = torch.eye(len(x.a), dtype=F64), torch.eye(len(x.g), dtype=F64)
    without_g = solve(dense_kron(x.a + root * eye_a, root * eye_g), x.gradient)
    torch.testing.assert_close(
        inverse(x.a, 0 * x.g, x.gradient, x.tau), without_g, rtol=1e-8, atol=1e-10
    )
    without_a = solve(dense_kron(root * eye_a, x.g + root * eye_g), x.gradient)
    torch.testing.assert_close(
        inverse(0 * x.a, x.g, x.gradient, x.tau), without_a, rtol=1e-8, atol=1e-10
    )


def test_without_damping_a_regular_block_is_inverted_plainly() -> None:
    a, g = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=F64), torch.tensor([[4.0]], dtype=F64)
    v = torch.tensor([[1.0, 2.0]], dtype=F64)
    torch.testing.assert_close(
        inverse(a, g, v, 0.0), solve(dense_kron(a, g), v), rtol=1e-12, atol=1e-12
    )


def test_a_changed_damping_is_seen_at_the_next_refresh_only() -> None:
    a, g, v = torch.eye(2, dtype=F64), torch.eye(1, dtype=F64), torch.ones(1, 2, dtype=F64)
    parts = decomposed(a, g, 0.04)
    solved = [KfacInverse().operator(parts, {}, tau, {}).solve(v) for tau in (0.04, 4.0)]
    assert torch.equal(*solved)
    torch.testing.assert_close(inverse(a, g, v, 4.0), v / 9)


def test_with_eigenvectors_a_changed_damping_is_seen_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    a, g = moment(3, 4, generator, 1)[0], moment(5, 3, generator, 1)[0]
    v, parts = torch.ones(3, 4, dtype=F64), decomposed(a, g, 0.04, "eigh")
    for tau in (0.04, 4.0, 0.001):
        found = KfacInverse(solver="eigh").operator(parts, {}, tau, {}).solve(v)
        torch.testing.assert_close(found, inverse(a, g, v, tau), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", ["inverse", "eigh"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_every_solver_has_the_same_step(solver: str, dtype: torch.dtype) -> None:
    """The explicit inverse loses digits in proportion to the condition number, and no more."""
    generator = torch.Generator().manual_seed(0)
    a, g = moment(3, 6, generator, 2).to(dtype), moment(9, 5, generator, 2).to(dtype)
    v = torch.randn(2, 5, 6, generator=generator, dtype=F64)
    for tau in (1e-4, 1e-2, 1.0):
        parts = decomposed(a, g, tau, solver)
        found = KfacInverse(solver=solver).operator(parts, {}, tau, {}).solve(v.to(dtype))
        expected = inverse(a.double(), g.double(), v, tau)
        size = 1e3 * torch.finfo(dtype).eps / tau**0.5
        assert (found - expected).norm() <= size * expected.norm()


def test_multiplying_reads_the_matrices_when_it_is_asked_only() -> None:
    """Matrices that are made on demand cost `solve` nothing, and `multiply` needs nothing else."""
    a, g = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=F64), torch.tensor([[4.0]], dtype=F64)
    v, read = torch.tensor([[1.0, 2.0]], dtype=F64), []

    class Noting(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    operator = KfacInverse().operator(decomposed(a, g, 0.1), {}, 0.1, Noting(A=a, G=g))
    operator.solve(v)
    operator.condition()
    assert not read
    torch.testing.assert_close(operator.multiply(v), g @ v @ a)
    assert sorted(read) == ["A", "G"]
    bare = KfacInverse().operator({}, {}, 0.1, {"A": a, "G": g})
    torch.testing.assert_close(bare.multiply(v), g @ v @ a)


@pytest.mark.parametrize("power", [0, 6, 9, 12, 17, -6, -9, -12, -17])
def test_float32_holds_whatever_size_moves_between_the_factors(power: int) -> None:
    """Inputs times s, gradients over s: F stays the same. Truth is the dense solve in float64."""
    generator, size = torch.Generator().manual_seed(0), 10.0**power
    a, g = moment(40, 6, generator, 1)[0], moment(40, 5, generator, 1)[0]
    gradient, tau = torch.randn(5, 6, generator=generator, dtype=F64), 1e-3
    expected = solve(kfac_block(a, g, tau), gradient)
    matrices = {"A": (a * size**2).float(), "G": (g / size**2).float()}
    diagonals = {name: matrix.diagonal().mean() for name, matrix in matrices.items()}
    context, basis = FactorContext(tau, diagonals), KfacInverse()
    parts = {name: basis.decompose(name, m, context) for name, m in matrices.items()}
    found = basis.operator(parts, {}, tau, matrices).solve(gradient.float())
    assert float((found - expected).norm() / expected.norm()) < 1e-5
