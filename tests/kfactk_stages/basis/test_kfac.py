"""The K-FAC inverse against dense float64 algebra."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from kfactk import Coupling
from kfactk.testing.truth import dense_kron, solve, vec
from kfactk_stages.basis.kfac import KfacInverse
from tests.kfactk.dense import kfac_block

F64 = torch.float64
law = settings(max_examples=40)


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


def decomposed(a: Tensor, g: Tensor, tau: float) -> dict[str, dict[str, Tensor]]:
    means = {"A": a.diagonal(dim1=-2, dim2=-1).mean(-1), "G": g.diagonal(dim1=-2, dim2=-1).mean(-1)}
    coupling = Coupling(tau, means)
    return {name: KfacInverse().decompose(name, matrix, coupling) for name, matrix in (("A", a), ("G", g))}


def inverse(a: Tensor, g: Tensor, gradient: Tensor, tau: float) -> Tensor:
    return KfacInverse().precondition(gradient, decomposed(a, g, tau), {}, tau)


@law
@given(drawn())
def test_it_is_the_dense_inverse_with_factored_damping(x: Drawn) -> None:
    torch.testing.assert_close(inverse(x.a, x.g, x.gradient, x.tau), solve(kfac_block(x.a, x.g, x.tau), x.gradient), rtol=1e-8, atol=1e-10)


@law
@given(drawn(groups=3))
def test_every_group_has_its_own_inverse_and_pi(x: Drawn) -> None:
    alone = [inverse(a, g, v, x.tau) for a, g, v in zip(x.a, x.g, x.gradient, strict=True)]
    torch.testing.assert_close(inverse(x.a, x.g, x.gradient, x.tau), torch.stack(alone), rtol=1e-9, atol=1e-12)


@law
@given(drawn(), st.floats(1e-4, 1e4))
def test_it_does_not_matter_how_the_factors_share_a_constant(x: Drawn, c: float) -> None:
    torch.testing.assert_close(inverse(c * x.a, x.g / c, x.gradient, x.tau), inverse(x.a, x.g, x.gradient, x.tau), rtol=1e-7, atol=1e-10)


@law
@given(drawn())
def test_pi_is_one_where_a_trace_is_zero(x: Drawn) -> None:
    """A residual branch that starts at zero has G = 0."""
    root = math.sqrt(x.tau)
    eye_a, eye_g = torch.eye(len(x.a), dtype=F64), torch.eye(len(x.g), dtype=F64)
    without_g = solve(dense_kron(x.a + root * eye_a, root * eye_g), x.gradient)
    torch.testing.assert_close(inverse(x.a, 0 * x.g, x.gradient, x.tau), without_g, rtol=1e-8, atol=1e-10)
    without_a = solve(dense_kron(root * eye_a, x.g + root * eye_g), x.gradient)
    torch.testing.assert_close(inverse(0 * x.a, x.g, x.gradient, x.tau), without_a, rtol=1e-8, atol=1e-10)


@law
@given(drawn(), drawn(), st.floats(-3, 3))
def test_it_is_linear_selfadjoint_and_positive_definite(x: Drawn, other: Drawn, c: float) -> None:
    shape = x.gradient.shape
    v = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(other.gradient.numel()))
    parts = decomposed(x.a, x.g, x.tau)

    def p(gradient: Tensor) -> Tensor:
        return KfacInverse().precondition(gradient, parts, {}, x.tau)

    torch.testing.assert_close(p(c * x.gradient + v), c * p(x.gradient) + p(v), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close((v * p(x.gradient)).sum(), (p(v) * x.gradient).sum(), rtol=1e-8, atol=1e-9)
    assert float((v * p(v)).sum()) > 0


@law
@given(drawn())
def test_with_much_damping_it_divides_by_it(x: Drawn) -> None:
    tau = 1e16
    torch.testing.assert_close(tau * inverse(x.a, x.g, x.gradient, tau), x.gradient, rtol=1e-5, atol=1e-5)


@law
@given(drawn(), st.booleans())
def test_without_damping_it_stays_finite(x: Drawn, zero: bool) -> None:
    """Rank-deficient and zero factors included."""
    a = 0 * x.a if zero else x.a
    assert bool(torch.isfinite(inverse(a, x.g, x.gradient, 0.0)).all())


def test_without_damping_a_regular_block_is_inverted_plainly() -> None:
    a, g = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=F64), torch.tensor([[4.0]], dtype=F64)
    v = torch.tensor([[1.0, 2.0]], dtype=F64)
    torch.testing.assert_close(inverse(a, g, v, 0.0), solve(dense_kron(a, g), v), rtol=1e-12, atol=1e-12)


@law
@given(drawn())
def test_the_product_is_the_undamped_block(x: Drawn) -> None:
    product = KfacInverse().product(x.gradient, {"A": x.a, "G": x.g}, decomposed(x.a, x.g, x.tau), {})
    torch.testing.assert_close(vec(product), dense_kron(x.a, x.g) @ vec(x.gradient), rtol=1e-10, atol=1e-12)


@law
@given(drawn())
def test_the_condition_is_at_most_the_true_one(x: Drawn) -> None:
    values = torch.linalg.eigvalsh(kfac_block(x.a, x.g, x.tau))
    told = KfacInverse().condition(decomposed(x.a, x.g, x.tau), {}, x.tau)
    assert 1 <= float(told) <= float(values[-1] / values[0]) * (1 + 1e-9)


def test_a_changed_damping_is_seen_at_the_next_refresh_only() -> None:
    a, g, v = torch.eye(2, dtype=F64), torch.eye(1, dtype=F64), torch.ones(1, 2, dtype=F64)
    parts = decomposed(a, g, 0.04)
    assert torch.equal(KfacInverse().precondition(v, parts, {}, 0.04), KfacInverse().precondition(v, parts, {}, 4.0))
    torch.testing.assert_close(inverse(a, g, v, 4.0), v / 9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_narrower_decomposition_serves_a_wider_gradient(dtype: torch.dtype) -> None:
    """Curvature in float32 under float64 parameters, after a load: the result has the gradient's precision."""
    parts = decomposed(torch.eye(2), torch.eye(1), 0.04)
    assert KfacInverse().precondition(torch.ones(1, 2, dtype=dtype), parts, {}, 0.04).dtype == dtype


def test_it_has_no_moments() -> None:
    basis, parts = KfacInverse(), decomposed(torch.eye(2, dtype=F64), torch.eye(1, dtype=F64), 0.1)
    assert basis.moments_from is None
    assert basis.gradient_moments(parts, torch.ones(1, 2), 3.0) == {}
    assert basis.transport({}, parts, parts) == {}
