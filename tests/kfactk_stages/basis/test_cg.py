"""Conjugate gradients: the laws; both polynomials against dense solves in float64."""

from typing import ClassVar

import pytest
import torch
from hypothesis import strategies as st

import kfactk
from kfactk import CombinationError, FactorContext, OptionError
from kfactk.testing import BasisLaws
from kfactk.testing._support.basis_frame import same
from kfactk.testing._support.laws import law
from kfactk.testing._support.situations import columns, named
from kfactk.testing._support.truth import dense_fisher
from kfactk_stages.basis.cg import ConjugateGradients
from tests.allocation import peak_bytes

CONTEXT = FactorContext(damping=0.0, mean_diagonal={})


class OnRows(BasisLaws):
    """The laws, where the number of examples is part of what is kept."""

    curvature: ClassVar = "rows"

    def block(self, situation):
        fisher = dense_fisher(situation.per_example, situation.num_terms)
        return fisher + situation.damping * torch.eye(fisher.shape[-1], dtype=fisher.dtype)

    def turned(self, name, matrix, left, right):
        if name == "matrices":
            return left @ matrix @ right.mT
        turn = (right if name == "inputs" else left).mT
        return (matrix.unsqueeze(-2) @ turn).squeeze(-2)

    def grouped(self):
        return st.none()  # groups are no leading dimension of rows; `block` has them apart

    @law(examples=10, situation="situations")
    def test_it_can_be_allocated_without_data(self, situation):
        """Parts, dimensions and precision are known; the number of rows is not."""
        blank = situation.blank()
        wanted, found = (
            {name: (t.ndim, t.dtype) for name, t in named(each.decomposition).items()}
            for each in (situation, blank)
        )
        assert found == wanted
        assert bool(blank.solve().isfinite().all())

    @law(examples=10, situation="situations")
    def test_many_steps_are_the_dense_solve(self, situation):
        """Both polynomials end at the inverse."""
        dense = self.block(situation)
        expected = torch.linalg.solve(dense, columns(situation.gradient))
        same(columns(situation.solve()), expected, "not the dense solve", 1e-9)


class TestCg(OnRows):
    stage: ClassVar = {"name": "cg", "iterations": 30}


class TestCgChebyshev(OnRows):
    stage: ClassVar = {"name": "cg", "iterations": 30, "polynomial": "chebyshev"}

    @law(examples=10, situation="situations")
    def test_many_steps_are_the_dense_solve(self, situation):
        """The error is below the bound of Chebyshev polynomials."""
        dense = self.block(situation)
        expected = torch.linalg.solve(dense, columns(situation.gradient)).unsqueeze(-1)
        error = columns(situation.solve()).unsqueeze(-1) - expected
        trace = dense.diagonal(dim1=-2, dim2=-1).sum(-1)
        size = dense.shape[-1]
        root = (1 + (trace - size * situation.damping) / situation.damping).sqrt()
        bound = 2 * ((root - 1) / (root + 1)) ** 30
        ratio = (error.norm(dim=(-2, -1)) / expected.norm(dim=(-2, -1))).flatten()
        assert bool((ratio <= bound.flatten() * root.flatten() * 1.01 + 1e-9).all())


def problem(n=9, d_out=3, d_in=4, *, spread=0, single=False, dtype=torch.float64):
    """Rows of n examples, and their dense F."""
    a = torch.randn(n, 1, 1, d_in, dtype=dtype) * torch.logspace(-spread, 0, d_in, dtype=dtype)
    g = torch.randn(n, 1, 1, d_out, dtype=dtype)
    d = g[:, 0].mT @ a[:, 0]
    flat = d.flatten(1)
    zeros = {"inputs": a[:0], "gradients": g[:0], "matrices": d.unsqueeze(1)}
    pairs = {"inputs": a, "gradients": g, "matrices": d[:0].unsqueeze(1)}
    return zeros if single else pairs, flat.T @ flat


def operator_of(rows, damping, **options):
    basis = ConjugateGradients(**options)
    parts = {name: basis.decompose(name, each, CONTEXT) for name, each in rows.items()}
    return basis.operator(parts, {}, damping, {})


@pytest.mark.parametrize("single", [False, True])
def test_enough_steps_are_the_solution_of_woodburys_formula(single):
    rows, fisher = problem(single=single)
    v, damping = torch.randn(3, 4, dtype=torch.float64), 0.1
    u = torch.linalg.cholesky(fisher + 1e-14 * fisher.trace() * torch.eye(12)).double()
    inside = torch.eye(12, dtype=u.dtype) + u.T @ u / damping
    woodbury = (v.flatten() - u @ torch.linalg.solve(inside, u.T @ v.flatten()) / damping) / damping
    found = operator_of(rows, damping, iterations=20).solve(v)
    torch.testing.assert_close(found.flatten(), woodbury, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sides", [(3, 4), (5, 2)])
def test_pairs_of_one_example_are_one_gradient(sides):
    """Several positions, two groups, zeros that fill up, and D_n beside: against dense algebra."""
    d_out, d_in = sides
    a = torch.randn(4, 3, 2, d_in, dtype=torch.float64)
    g = torch.randn(4, 3, 2, d_out, dtype=torch.float64)
    a[0, 2] = 0
    single = torch.randn(2, 2, d_out, d_in, dtype=torch.float64)
    operator = operator_of({"inputs": a, "gradients": g, "matrices": single}, 0.1, iterations=30)
    v = torch.randn(2, d_out, d_in, dtype=torch.float64)
    for group in range(2):
        pairs = torch.einsum("nto,nti->noi", g[:, :, group], a[:, :, group])
        d = torch.cat([pairs, single[:, group]])
        fisher = d.flatten(1).T @ d.flatten(1)
        dense = fisher + 0.1 * torch.eye(len(fisher), dtype=v.dtype)
        solved = torch.linalg.solve(dense, v[group].flatten()).view(d_out, d_in)
        torch.testing.assert_close(operator.solve(v)[group], solved, rtol=1e-9, atol=1e-10)
        product = (fisher @ v[group].flatten()).view(d_out, d_in)
        torch.testing.assert_close(operator.multiply(v)[group], product, rtol=1e-10, atol=1e-10)


def test_each_step_is_the_best_in_its_krylov_space():
    rows, fisher = problem(spread=1)
    damping, v = 0.01, torch.randn(3, 4, dtype=torch.float64)
    dense = fisher + damping * torch.eye(12, dtype=v.dtype)
    krylov = [v.flatten()]
    for steps in range(1, 6):
        space = torch.linalg.qr(torch.stack(krylov, -1)).Q
        best = space @ torch.linalg.solve(space.T @ dense @ space, space.T @ v.flatten())
        found = operator_of(rows, damping, iterations=steps).solve(v).flatten()
        torch.testing.assert_close(found, best, rtol=1e-7, atol=1e-9)
        krylov.append(dense @ krylov[-1] / (dense @ krylov[-1]).norm())


def test_chebyshev_is_the_minimax_polynomial():
    rows, fisher = problem(spread=1)
    damping, steps = 0.5, 4
    low, high = damping, float(fisher.trace()) + damping
    values, vectors = torch.linalg.eigh(fisher)
    at = (high + low - 2 * (values + damping)) / (high - low)
    outside = torch.tensor((high + low) / (high - low), dtype=torch.float64)
    left = torch.special.chebyshev_polynomial_t(at, steps)
    left = left / torch.special.chebyshev_polynomial_t(outside, steps)
    weights = (1 - left) / (values + damping)
    v = torch.randn(3, 4, dtype=torch.float64)
    expected = vectors @ (weights * (vectors.T @ v.flatten()))
    found = operator_of(rows, damping, iterations=steps, polynomial="chebyshev").solve(v)
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-10, atol=1e-12)


def test_a_tolerance_stops_the_iteration():
    rows, fisher = problem()
    v = torch.randn(3, 4, dtype=torch.float64)
    solved = operator_of(rows, 0.1, iterations=50, tolerance=0.1).solve(v)
    residual = v.flatten() - (fisher + 0.1 * torch.eye(12, dtype=v.dtype)) @ solved.flatten()
    assert 1e-3 < float(residual.norm() / v.norm()) <= 0.1


def test_a_zero_gradient_gives_zero():
    rows, _ = problem()
    for polynomial in ("residual", "chebyshev"):
        found = operator_of(rows, 0.1, polynomial=polynomial).solve(torch.zeros(3, 4))
        assert torch.equal(found, torch.zeros(3, 4))


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("polynomial", ["residual", "chebyshev"])
def test_few_matrices_of_the_gradients_shape_are_held(polynomial, single):
    """The solution, the residual, the direction, its product, and one on the way."""
    a, g = (torch.randn(2, 1, 1, side, dtype=torch.float64) for side in (200, 300))
    d = (g[:, 0].mT @ a[:, 0]).unsqueeze(1)
    rows = {"inputs": a, "gradients": g, "matrices": d[:0]}
    if single:
        rows = {"inputs": a[:0], "gradients": g[:0], "matrices": d}
    operator = operator_of(rows, 0.1, iterations=4, polynomial=polynomial)
    v = torch.randn(300, 200, dtype=torch.float64)
    assert 2 < peak_bytes(lambda: operator.solve(v)) / v.nbytes < 5.1


def test_what_is_solved_and_multiplied_stays_as_it_was():
    rows, _ = problem()
    v = torch.randn(3, 4, dtype=torch.float64)
    before = v.clone()
    for polynomial in ("residual", "chebyshev"):
        operator = operator_of(rows, 0.1, polynomial=polynomial)
        assert torch.equal(operator.solve(v), operator.solve(v))
        assert torch.equal(operator.multiply(v), operator.multiply(v))
    assert torch.equal(v, before)


def test_a_tolerance_of_a_fixed_polynomial_is_refused():
    with pytest.raises(OptionError, match="fixed degree"):
        ConjugateGradients(polynomial="chebyshev", tolerance=0.1)


@pytest.mark.parametrize("polynomial", ["residual", "chebyshev"])
def test_the_clip_kl_needs_what_is_waived(polynomial):
    basis = {"name": "cg", "polynomial": polynomial}
    with pytest.raises(CombinationError, match=r"'kl' needs .*'cg' waives"):
        kfactk.build(curvature="rows", basis=basis, clip="kl")
