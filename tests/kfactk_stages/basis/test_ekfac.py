"""EKFAC against dense float64 algebra: the scale by loops over examples, the block as a matrix."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from kfactk import Coupling, OptionError, Samples
from kfactk.testing.truth import dense_fisher, dense_kron, solve, vec
from kfactk_stages.basis.ekfac import Ekfac
from tests.kfactk.dense import ekfac_block, exact_scale

F64 = torch.float64
Parts = dict[str, dict[str, Tensor]]
law = settings(max_examples=40)


@attrs.frozen(eq=False)
class Drawn:
    """Rows of one mini-batch, with its factors as `reduce` (or else `sud`) makes them, a gradient and a damping.

    With `reduce` a direction in A's null space can carry gradient: the mean over rows is zero there, the rows are not.
    """

    inputs: Tensor
    gradients: Tensor
    gradient: Tensor
    tau: float
    reduce: bool

    @property
    def examples(self) -> int:
        return self.inputs.shape[-3]

    @property
    def factors(self) -> dict[str, Tensor]:
        a, g, positions = self.inputs, self.gradients, self.inputs.shape[-2]
        if self.reduce:
            a, g, positions = a.mean(-2, keepdim=True), g.sum(-2, keepdim=True), 1
        a, g = a.flatten(-3, -2), g.flatten(-3, -2)
        return {"A": a.mT @ a / self.examples, "G": g.mT @ g / (self.examples * positions)}

    @property
    def samples(self) -> Samples:
        return Samples(self.inputs, self.gradients, terms=self.examples)

    @property
    def products(self) -> Tensor:
        """D, `[N, d_out, d_in]`."""
        return torch.stack(
            [sum(torch.outer(g, a) for g, a in zip(gs, as_, strict=True)) for gs, as_ in zip(self.gradients, self.inputs, strict=True)]
        )


@st.composite
def drawn(draw: st.DrawFn, groups: int = 1) -> Drawn:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    n, t, d_in, d_out = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    shapes = [(groups, n, t, d_in), (groups, n, t, d_out), (groups, d_out, d_in)]
    tensors = [torch.randn(shape, generator=generator, dtype=F64) for shape in shapes]
    return Drawn(*(tensors if groups > 1 else [each[0] for each in tensors]), 10.0 ** draw(st.integers(-3, 1)), draw(st.booleans()))


def decomposed(factors: dict[str, Tensor]) -> Parts:
    return {name: Ekfac().decompose(name, matrix, Coupling(0.1, {})) for name, matrix in factors.items()}


def measured(parts: Parts, samples: Samples) -> dict[str, Tensor]:
    return {name: statistic.total / statistic.count for name, statistic in Ekfac().moments(parts, samples).items()}


def bases(parts: Parts) -> tuple[Tensor, Tensor]:
    return parts["A"]["eigenvectors"], parts["G"]["eigenvectors"]


def orthogonal(n: int, seed: int) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(seed)))
    return q


def turned_in_null_space(parts: Parts, seed: int) -> Parts:
    """The same decomposition with other eigenvectors in the null space of each matrix."""
    out = {}
    for name, each in parts.items():
        values, vectors = each["eigenvalues"], each["eigenvectors"].clone()
        null = [i for i, value in enumerate(values.tolist()) if value <= 1e-10 * float(values.max())]
        vectors[:, null] = vectors[:, null] @ orthogonal(len(null), seed)
        out[name] = {"eigenvalues": values, "eigenvectors": vectors}
    return out


@law
@given(drawn())
def test_it_is_the_dense_damped_inverse(x: Drawn) -> None:
    parts = decomposed(x.factors)
    u_a, u_g = bases(parts)
    scale = torch.rand(x.gradient.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    result = Ekfac().precondition(x.gradient, parts, {"scale": scale}, x.tau)
    torch.testing.assert_close(result, solve(ekfac_block(u_a, u_g, scale, x.tau), x.gradient), rtol=1e-9, atol=1e-11)
    back = Ekfac().product(result, x.factors, parts, {"scale": scale}) + x.tau * result
    torch.testing.assert_close(back, x.gradient, rtol=1e-9, atol=1e-11)


@law
@given(drawn())
def test_the_basis_diagonalises_the_factors(x: Drawn) -> None:
    for matrix, parts in zip(x.factors.values(), decomposed(x.factors).values(), strict=True):
        values, vectors = parts["eigenvalues"], parts["eigenvectors"]
        torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, matrix, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(vectors), dtype=F64), rtol=1e-10, atol=1e-11)


@law
@given(drawn())
def test_the_scale_is_the_mean_square_of_projected_gradients(x: Drawn) -> None:
    """Equation 10, with explicit loops; sud alone, whose null directions carry no gradient to be pooled."""
    x = attrs.evolve(x, reduce=False)
    parts = decomposed(x.factors)
    truth = exact_scale([x.products], *bases(parts), x.examples)
    torch.testing.assert_close(measured(parts, x.samples)["scale"], truth, rtol=1e-9, atol=1e-11)


@law
@given(drawn())
def test_it_is_at_least_as_close_to_the_fisher_as_kfac(x: Drawn) -> None:
    parts = decomposed(x.factors)
    fisher = dense_fisher(x.products, x.examples)
    ekfac = ekfac_block(*bases(parts), measured(parts, x.samples)["scale"], 0.0)
    kfac = dense_kron(x.factors["A"], x.factors["G"])
    assert float((fisher - ekfac).norm()) <= float((fisher - kfac).norm()) * (1 + 1e-9) + 1e-9


@law
@given(drawn())
def test_before_any_scale_the_eigenvalues_stand_in(x: Drawn) -> None:
    block = dense_kron(x.factors["A"], x.factors["G"]) + x.tau * torch.eye(x.gradient.numel(), dtype=F64)
    torch.testing.assert_close(
        Ekfac().precondition(x.gradient, decomposed(x.factors), {}, x.tau), solve(block, x.gradient), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("scale", ["exact", "running"])
@law
@given(drawn(), st.integers(0, 99))
def test_the_choice_of_eigenvectors_in_the_null_space_does_not_matter(scale: str, x: Drawn, seed: int) -> None:
    basis, first = Ekfac(scale=scale), decomposed(x.factors)
    results = []
    for parts in (first, turned_in_null_space(first, seed)):
        made = measured(parts, x.samples)
        if scale == "running":
            made = {name: s.total / s.count for name, s in basis.gradient_moments(parts, x.gradient, x.examples).items()}
        results.append(basis.precondition(x.gradient, parts, made, x.tau))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


@law
@given(drawn(), st.integers(0, 99))
def test_that_choice_does_not_matter_after_transport_either(x: Drawn, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, gradients = (torch.randn(each.shape, generator=generator, dtype=F64) for each in (x.inputs, x.gradients))
    before = attrs.evolve(x, inputs=inputs, gradients=gradients)
    old, new = decomposed(before.factors), decomposed(x.factors)
    scale = measured(old, before.samples)
    results = []
    for parts in (new, turned_in_null_space(new, seed)):
        results.append(Ekfac().precondition(x.gradient, parts, Ekfac().transport(scale, old, parts), x.tau))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


@law
@given(drawn(), st.integers(0, 99))
def test_it_is_equivariant_under_rotations_of_inputs_and_outputs(x: Drawn, seed: int) -> None:
    r, s = orthogonal(x.inputs.shape[-1], seed), orthogonal(x.gradients.shape[-1], seed + 1)
    turned = attrs.evolve(x, inputs=x.inputs @ r.T, gradients=x.gradients @ s.T, gradient=s @ x.gradient @ r.T)
    results = []
    for each in (x, turned):
        parts = decomposed(each.factors)
        results.append(Ekfac().precondition(each.gradient, parts, measured(parts, each.samples), x.tau))
    torch.testing.assert_close(results[1], s @ results[0] @ r.T, rtol=1e-5, atol=1e-6)


@law
@given(drawn(), st.integers(0, 99))
def test_transport_is_the_diagonal_of_the_old_operator_in_the_new_basis(x: Drawn, seed: int) -> None:
    d_out, d_in = x.gradient.shape
    old, new = (
        {
            "A": {"eigenvalues": torch.ones(d_in, dtype=F64), "eigenvectors": orthogonal(d_in, seed + k)},
            "G": {"eigenvalues": torch.ones(d_out, dtype=F64), "eigenvectors": orthogonal(d_out, seed + k + 1)},
        }
        for k in (0, 7)
    )
    scale = x.gradient.square()
    operator = ekfac_block(*bases(old), scale, 0.0)
    carried = Ekfac().transport({"scale": scale}, old, new)["scale"]
    q = dense_kron(*bases(new))
    torch.testing.assert_close(vec(carried), (q.T @ operator @ q).diagonal(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(Ekfac().transport({"scale": scale}, old, old)["scale"], scale, rtol=1e-9, atol=1e-11)
    assert Ekfac().transport({}, old, new) == {}


@law
@given(drawn())
def test_the_running_scale_is_the_squared_mean_gradient_times_its_terms(x: Drawn) -> None:
    """In a basis without null space. The exact scale has no moments of the gradient, and the running one is measured there alone."""
    parts = decomposed({name: matrix + torch.eye(len(matrix), dtype=F64) for name, matrix in x.factors.items()})
    u_a, u_g = bases(parts)
    statistic = Ekfac(scale="running").gradient_moments(parts, x.gradient, 7.0)["scale"]
    torch.testing.assert_close(statistic.total / statistic.count, 7.0 * (u_g.T @ x.gradient @ u_a) ** 2, rtol=1e-9, atol=1e-11)
    assert Ekfac().gradient_moments(parts, x.gradient, 7.0) == {}
    assert (Ekfac(scale="running").moments_from, Ekfac().moments_from) == ("gradient", "samples")
    assert (Ekfac(scale="running").moment_decay, Ekfac().moment_decay, Ekfac(scale_decay=0.5).moment_decay) == (0.95, 0.0, 0.5)


@law
@given(drawn(groups=2))
def test_every_group_stands_alone(x: Drawn) -> None:
    parts = decomposed(x.factors)
    together = Ekfac().precondition(x.gradient, parts, measured(parts, x.samples), x.tau)
    for k in range(2):
        one = Drawn(x.inputs[k], x.gradients[k], x.gradient[k], x.tau, x.reduce)
        own = {name: {key: tensor[k] for key, tensor in each.items()} for name, each in parts.items()}
        alone = Ekfac().precondition(one.gradient, own, measured(own, one.samples), x.tau)
        torch.testing.assert_close(together[k], alone, rtol=1e-9, atol=1e-11)


@law
@given(drawn(), st.floats(-3, 3))
def test_it_is_linear_selfadjoint_and_positive_definite(x: Drawn, c: float) -> None:
    parts = decomposed(x.factors)
    scale = measured(parts, x.samples)
    v = torch.randn(x.gradient.shape, dtype=F64, generator=torch.Generator().manual_seed(3))

    def p(gradient: Tensor) -> Tensor:
        return Ekfac().precondition(gradient, parts, scale, x.tau)

    torch.testing.assert_close(p(c * x.gradient + v), c * p(x.gradient) + p(v), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close((v * p(x.gradient)).sum(), (p(v) * x.gradient).sum(), rtol=1e-8, atol=1e-9)
    assert float((v * p(v)).sum()) > 0


@law
@given(drawn())
def test_with_much_damping_it_divides_by_it(x: Drawn) -> None:
    parts, tau = decomposed(x.factors), 1e12
    result = Ekfac().precondition(x.gradient, parts, measured(parts, x.samples), tau)
    torch.testing.assert_close(tau * result, x.gradient, rtol=1e-6, atol=1e-8)


@law
@given(drawn(), st.booleans())
def test_without_damping_it_stays_finite(x: Drawn, zero: bool) -> None:
    """Rank-deficient and zero curvature included."""
    x = attrs.evolve(x, inputs=x.inputs * 0) if zero else x
    parts = decomposed(x.factors)
    assert bool(torch.isfinite(Ekfac().precondition(x.gradient, parts, measured(parts, x.samples), 0.0)).all())
    assert bool(torch.isfinite(Ekfac().precondition(x.gradient, parts, {}, 0.0)).all())


@law
@given(drawn())
def test_the_condition_is_that_of_the_dense_block(x: Drawn) -> None:
    parts = decomposed(x.factors)
    scale = measured(parts, x.samples)
    values = torch.linalg.eigvalsh(ekfac_block(*bases(parts), scale["scale"], x.tau))
    assert float(Ekfac().condition(parts, scale, x.tau)) == pytest.approx(float(values[-1] / values[0]), rel=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scale": "mean"}, "scale='mean'"), ({"scale_decay": 1.5}, "scale_decay=1.5"), ({"scale_decay": -0.1}, "scale_decay=-0.1")],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Ekfac(**options)
