"""EKFAC with rounded products, and with bases that follow their matrices, against float64."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import FactorContext, OptionError, Samples
from kfactk.testing import BasisLaws
from kfactk_stages.basis._operators import EigenbasisOperator, worth_rounding
from kfactk_stages.basis.ekfac import Ekfac

UNIT = 2.0**-8
"""The relative rounding error of bfloat16."""
D_OUT, D_IN = 128, 256  # large enough that both sides are rounded


class TestIterated(BasisLaws):
    """Its basis depends on where it began, in a null space at the eigensolver's choice.

    So ranks that differ there go apart.
    """

    stage = {"name": "ekfac", "iterate_from": 1}  # noqa: RUF012
    test_two_ranks_are_one_process = None


class TestRounded(BasisLaws):
    """Small matrices are left alone, so that every law holds as it is."""

    stage = {"name": "ekfac", "products": "bfloat16"}  # noqa: RUF012


def decomposed(
    seed: int, d_out: int = D_OUT, d_in: int = D_IN
) -> tuple[dict[str, dict[str, Tensor]], Tensor, torch.Generator]:
    """Return random bases with eigenvalues over six decades, and a scale like their product."""
    generator = torch.Generator().manual_seed(seed)
    found, values = {}, {}
    for name, n in (("G", d_out), ("A", d_in)):
        vectors = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
        values[name] = (
            10 ** (-6 * torch.rand(n, dtype=torch.float64, generator=generator)).sort().values
        )
        found[name] = {"eigenvalues": values[name], "eigenvectors": vectors}
    scale = (
        values["G"][:, None]
        * values["A"]
        * (0.5 + torch.rand(d_out, d_in, dtype=torch.float64, generator=generator))
    )
    return found, scale, generator


def exact(
    decomposition: dict[str, dict[str, Tensor]], scale: Tensor, gradient: Tensor, tau: float
) -> Tensor:
    left, right = decomposition["G"]["eigenvectors"], decomposition["A"]["eigenvectors"]
    return left @ ((left.T @ gradient @ right) / (scale + tau)) @ right.T


def single(decomposition: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {part: tensor.float() for part, tensor in parts.items()}
        for name, parts in decomposition.items()
    }


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), tau=st.sampled_from([1e-3, 0.03, 1.0]))
def test_the_error_of_rounded_products_is_bounded(seed: int, tau: float) -> None:
    """|P' g - P g| <= 4 u |g| / tau, along large and along small curvature."""
    decomposition, scale, generator = decomposed(seed)
    basis, lower = Ekfac(products="bfloat16"), single(decomposition)
    noise = torch.randn(D_OUT, D_IN, dtype=torch.float64, generator=generator)
    sizes = scale.sqrt() * noise
    left, right = decomposition["G"]["eigenvectors"], decomposition["A"]["eigenvectors"]
    for gradient in (noise, left @ sizes @ right.T):
        operator = basis.operator(lower, {"scale": scale.float()}, tau, {})
        found = operator.solve(gradient.float())
        assert found.dtype == torch.float32
        error = (found.double() - exact(decomposition, scale, gradient, tau)).norm()
        assert float(error) <= 4 * UNIT * float(gradient.norm()) / tau
        assert float(error) > 1e-6 * float(gradient.norm()), "nothing was rounded"


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_rounded_products_stay_symmetric_and_positive(seed: int) -> None:
    decomposition, scale, generator = decomposed(seed)
    solve = (
        Ekfac(products="bfloat16")
        .operator(single(decomposition), {"scale": scale.float()}, 0.01, {})
        .solve
    )
    v, w = torch.randn(2, D_OUT, D_IN, generator=generator)
    assert float((v * solve(v)).sum()) > 0
    there, back = float((w * solve(v)).sum()), float((v * solve(w)).sum())
    assert abs(there - back) <= 4 * UNIT * float(
        v.norm() * solve(w).norm() + w.norm() * solve(v).norm()
    )


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16), t=st.sampled_from([1, 4, 300]))
def test_the_error_of_a_rounded_scale_is_bounded(seed: int, t: int) -> None:
    """|sqrt(s') - sqrt(s)| <= 7 u sqrt(sum_n m_n^2), m_n = sum_t |g| |a|, entry by entry."""
    decomposition, _, generator = decomposed(seed)
    a = torch.randn(64, t, D_IN, dtype=torch.float64, generator=generator)
    g = torch.randn(64, t, D_OUT, dtype=torch.float64, generator=generator)
    left, right = decomposition["G"]["eigenvectors"], decomposition["A"]["eigenvectors"]
    d = torch.einsum("nto,nti->noi", g @ left, a @ right)
    expected = d.square().sum(0)
    samples = Samples(a.float(), g.float(), num_terms=64)
    found = Ekfac(products="bfloat16").moments(single(decomposition), samples)["scale"].total
    assert found is not None
    bound = 7 * UNIT * (g.norm(dim=-1) * a.norm(dim=-1)).sum(-1).square().sum().sqrt()
    assert bool(((found.double().sqrt() - expected.sqrt()).abs() <= bound).all())
    plain = Ekfac().moments(single(decomposition), samples)["scale"].total
    assert plain is not None
    assert not torch.equal(plain, found), "nothing was rounded"


def test_small_products_are_not_rounded() -> None:
    decomposition, scale, generator = decomposed(0, 16, 24)
    gradient = torch.randn(16, 24, generator=generator)
    moments = {"scale": scale.float()}
    plain, rounded = (
        Ekfac(products=products).operator(single(decomposition), moments, 0.1, {}).solve(gradient)
        for products in ("full", "bfloat16")
    )
    assert torch.equal(plain, rounded)


def test_what_is_kept_is_rounded_once_and_only_solve_reads_it() -> None:
    decomposition, scale, generator = decomposed(1)
    parts, moments = single(decomposition), {"scale": scale.float()}
    operator = Ekfac(products="bfloat16").operator(parts, moments, 0.1, {})
    assert isinstance(operator, EigenbasisOperator)
    assert [each.dtype for each in operator.rounded] == [torch.bfloat16, torch.bfloat16]
    assert worth_rounding(D_OUT, operator.right)
    v = torch.randn(D_OUT, D_IN, generator=generator)
    plain = Ekfac().operator(parts, moments, 0.1, {})
    assert torch.equal(operator.multiply(v), plain.multiply(v))
    assert not torch.equal(operator.solve(v), plain.solve(v))


def test_an_operator_keeps_its_weights_and_nothing_else_of_its_own() -> None:
    """Rotations and spectrum are the tensors of the state: they cost no further memory."""
    decomposition, scale, _ = decomposed(1)
    operator = Ekfac().operator(decomposition, {"scale": scale}, 0.1, {})
    assert isinstance(operator, EigenbasisOperator)
    left, right = (decomposition[name]["eigenvectors"] for name in ("G", "A"))
    assert operator.spectrum is scale
    assert operator.left is operator.rounded[0] is left
    assert operator.right is operator.rounded[1] is right
    assert operator.weights.data_ptr() != scale.data_ptr()


@pytest.mark.parametrize(
    "options",
    [{"products": "float8"}, {"iterate_from": 0}, {"iterate_from": True}, {"iterate_from": 2.5}],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        Ekfac(**options)


def test_matrices_below_the_size_are_decomposed_anew() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    turned = {"eigenvalues": torch.ones(3), "eigenvectors": torch.linalg.qr(torch.randn(3, 3))[0]}
    context = FactorContext(damping=0.1, mean_diagonal={}, previous=turned)
    anew = Ekfac(iterate_from=4).decompose("A", matrix, context)
    torch.testing.assert_close(anew["eigenvalues"], torch.tensor([1.0, 2.0, 3.0]))
    followed = Ekfac(iterate_from=3).decompose("A", matrix, context)
    assert not torch.equal(followed["eigenvectors"], anew["eigenvectors"])
    for first in (attrs.evolve(context, previous=None), corner(context)):
        found = Ekfac(iterate_from=3).decompose("A", matrix, first)
        assert torch.equal(found["eigenvectors"], anew["eigenvectors"])


def corner(context: FactorContext) -> FactorContext:
    """What is left of a smaller matrix, such as that of a layer which has been replaced."""
    parts = {"eigenvalues": torch.ones(2), "eigenvectors": torch.eye(2)}
    return attrs.evolve(context, previous=parts)


def test_a_basis_that_follows_comes_close_to_the_eigenbasis_and_resumes_bit_for_bit() -> None:
    torch.manual_seed(0)
    recipe = kfactk.build(
        basis={"name": "ekfac", "iterate_from": 1},
        fisher="exact",
        clip="none",
        update="sgd",
        lr=0.0,
        basis_every=1,
        factor_every=1,
    )

    def made() -> tuple[nn.Module, kfactk.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        return model, recipe.bind(model)

    def train(model: nn.Module, optimizer: kfactk.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(
                40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
            )
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.arange(40) % 3).backward()
            optimizer.step()

    model, optimizer = made()
    train(model, optimizer, range(60))
    for view in optimizer.layers.values():
        for name, matrix in view.factors.items():
            u = view.decomposition[name]["eigenvectors"]
            torch.testing.assert_close(u.T @ u, torch.eye(len(u), dtype=torch.float64))
            turned = u.T @ matrix @ u
            assert float((turned - torch.diag(turned.diagonal())).norm()) < 0.05 * float(
                matrix.norm()
            )
    other, resumed = made()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for each, run in ((model, optimizer), (other, resumed)):
        train(each, run, range(60, 63))
    for one, two in zip(optimizer.layers.values(), resumed.layers.values(), strict=True):
        for name, parts in one.decomposition.items():
            assert torch.equal(parts["eigenvectors"], two.decomposition[name]["eigenvectors"])
