"""EKFAC: the laws of bases, against a dense block whose scale comes from loops over examples."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import kfactk
from kfactk import FactorContext, OptionError, Samples
from kfactk.testing import BasisLaws, effort
from kfactk.testing._support.basis_traits import BasisTraitLaws
from kfactk.testing._support.situations import Situation
from kfactk.testing._support.truth import dense_kron, vec
from kfactk_stages.basis.ekfac import Ekfac
from tests.kfactk.dense import each_group, ekfac_block, exact_scale, is_eigenbasis, pooled

F64 = torch.float64
Parts = dict[str, dict[str, Tensor]]
law = settings(max_examples=effort(40))
NULL = {F64: 1e-10, torch.float32: 1e-6}
"""Eigenvalues below this fraction of the largest are zero."""
ROUNDING = {F64: 1e-9, torch.float32: 1e-4}


class TestEkfac(BasisLaws):
    """Its block is `Q diag(s* + tau) Q^T`, before any measurement `Q (S_A kron S_G + tau) Q^T`."""

    stage = "ekfac"

    def block(self, situation: Situation) -> Tensor:
        return each_group(situation.groups, lambda k: self.block_of(situation, k))

    def block_of(self, situation: Situation, k: Any) -> Tensor:
        dtype = situation.gradient.dtype
        a, g = (situation.matrices[name][k].double() for name in ("A", "G"))
        u_a, u_g = (
            situation.decomposition[name]["eigenvectors"][k].double() for name in ("A", "G")
        )
        assert is_eigenbasis(a, u_a, ROUNDING[dtype]), "the eigenvectors of A are none"
        assert is_eigenbasis(g, u_g, ROUNDING[dtype]), "the eigenvectors of G are none"
        if situation.moments:
            scale = pooled(self.scale(situation, k, u_a, u_g), a, g, u_a, u_g, NULL[dtype])
        else:
            scale = torch.outer((u_g.T @ g @ u_g).diagonal(), (u_a.T @ a @ u_a).diagonal())
        return ekfac_block(u_a, u_g, scale, situation.damping)

    def scale(self, situation: Situation, k: Any, u_a: Tensor, u_g: Tensor) -> Tensor:
        return exact_scale([situation.per_example[k]], u_a, u_g, situation.num_terms)


class TestEkfacRunning(TestEkfac):
    """Its scale is M times the square of the mini-batch's mean gradient."""

    stage: ClassVar[Any] = {"name": "ekfac", "scale": "running"}

    def scale(self, situation: Situation, k: Any, u_a: Tensor, u_g: Tensor) -> Tensor:
        return situation.num_terms * (u_g.T @ situation.mean_gradient[k].double() @ u_a) ** 2


class TestEkfacOnReduce(BasisTraitLaws):
    """With "reduce" a direction in A's null space can carry gradient.

    The mean over rows is zero there, the rows are not.
    """

    stage = "ekfac"
    curvature: ClassVar[Any] = {"name": "conv_kfac", "spatial": "reduce"}

    block, block_of, scale = TestEkfac.block, TestEkfac.block_of, TestEkfac.scale
    test_it_is_the_dense_damped_inverse = BasisLaws.test_it_is_the_dense_damped_inverse


@attrs.frozen(eq=False)
class Drawn:
    """Rows of one mini-batch, with its factors, a gradient and a damping.

    The factors are those of `reduce`, or else of `sud`. With `reduce` a direction in A's null space
    can carry gradient: the mean over rows is zero there, the rows are not.
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
        return Samples(self.inputs, self.gradients, num_terms=self.examples)

    @property
    def products(self) -> Tensor:
        """D, `[N, d_out, d_in]`."""
        return torch.stack(
            [
                sum(torch.outer(g, a) for g, a in zip(gs, as_, strict=True))
                for gs, as_ in zip(self.gradients, self.inputs, strict=True)
            ]
        )


@st.composite
def drawn(draw: st.DrawFn, groups: int = 1) -> Drawn:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    n, t, d_in, d_out = (
        draw(st.integers(1, 6)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 5)),
    )
    shapes = [(groups, n, t, d_in), (groups, n, t, d_out), (groups, d_out, d_in)]
    tensors = [torch.randn(shape, generator=generator, dtype=F64) for shape in shapes]
    return Drawn(
        *(tensors if groups > 1 else [each[0] for each in tensors]),
        10.0 ** draw(st.integers(-3, 1)),
        draw(st.booleans()),
    )


def decomposed(factors: dict[str, Tensor]) -> Parts:
    return {
        name: Ekfac().decompose(name, matrix, FactorContext(0.1, {}))
        for name, matrix in factors.items()
    }


def measured(parts: Parts, samples: Samples) -> dict[str, Tensor]:
    return {
        name: statistic.total / statistic.count
        for name, statistic in Ekfac().moments(parts, samples).items()
    }


def bases(parts: Parts) -> tuple[Tensor, Tensor]:
    return parts["A"]["eigenvectors"], parts["G"]["eigenvectors"]


def orthogonal(n: int, seed: int) -> Tensor:
    q, _ = torch.linalg.qr(
        torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    )
    return q


def turned_in_null_space(parts: Parts, seed: int) -> Parts:
    """The same decomposition with other eigenvectors in the null space of each matrix."""
    out = {}
    for name, each in parts.items():
        values, vectors = each["eigenvalues"], each["eigenvectors"].clone()
        null = [
            i for i, value in enumerate(values.tolist()) if value <= 1e-10 * float(values.max())
        ]
        vectors[:, null] = vectors[:, null] @ orthogonal(len(null), seed)
        out[name] = {"eigenvalues": values, "eigenvectors": vectors}
    return out


@law
@given(drawn(), st.integers(0, 99))
def test_that_choice_does_not_matter_after_transport_either(x: Drawn, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, gradients = (
        torch.randn(each.shape, generator=generator, dtype=F64) for each in (x.inputs, x.gradients)
    )
    before = attrs.evolve(x, inputs=inputs, gradients=gradients)
    old, new = decomposed(before.factors), decomposed(x.factors)
    scale = measured(old, before.samples)
    results = []
    for parts in (new, turned_in_null_space(new, seed)):
        carried = Ekfac().transport(scale, old, parts)
        results.append(Ekfac().operator(parts, carried, x.tau, {}).solve(x.gradient))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


@law
@given(drawn(), st.integers(0, 99))
def test_transport_is_the_diagonal_of_the_old_operator_in_the_new_basis(
    x: Drawn, seed: int
) -> None:
    d_out, d_in = x.gradient.shape
    old, new = (
        {
            "A": {
                "eigenvalues": torch.ones(d_in, dtype=F64),
                "eigenvectors": orthogonal(d_in, seed + k),
            },
            "G": {
                "eigenvalues": torch.ones(d_out, dtype=F64),
                "eigenvectors": orthogonal(d_out, seed + k + 1),
            },
        }
        for k in (0, 7)
    )
    scale = x.gradient.square()
    operator = ekfac_block(*bases(old), scale, 0.0)
    carried = Ekfac().transport({"scale": scale}, old, new)["scale"]
    q = dense_kron(*bases(new))
    torch.testing.assert_close(vec(carried), (q.T @ operator @ q).diagonal(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        Ekfac().transport({"scale": scale}, old, old)["scale"], scale, rtol=1e-9, atol=1e-11
    )
    assert Ekfac().transport({}, old, new) == {}


@law
@given(drawn())
def test_the_condition_is_that_of_the_dense_block(x: Drawn) -> None:
    parts = decomposed(x.factors)
    scale = measured(parts, x.samples)
    values = torch.linalg.eigvalsh(ekfac_block(*bases(parts), scale["scale"], x.tau))
    told = float(Ekfac().operator(parts, scale, x.tau, {}).condition())
    assert told == pytest.approx(float(values[-1] / values[0]), rel=1e-8)


def test_where_moments_come_from_and_how_long_they_last() -> None:
    assert (Ekfac(scale="running").moments_from, Ekfac().moments_from) == ("gradient", "samples")
    assert (
        Ekfac(scale="running").moment_decay,
        Ekfac().moment_decay,
        Ekfac(scale_decay=0.5).moment_decay,
    ) == (0.95, 0.0, 0.5)


def test_only_the_exact_scale_claims_to_be_closer_than_kfac() -> None:
    assert Ekfac().laws - Ekfac(scale="running").laws == {"closer-than-kfac"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "mean"}, "scale='mean'"),
        ({"scale_decay": 1.5}, "scale_decay=1.5"),
        ({"scale_decay": -0.1}, "scale_decay=-0.1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Ekfac(**options)


@pytest.mark.parametrize(
    ("basis", "curvature", "module"),
    [
        ({}, "kfac", torch.nn.Linear(3, 2)),
        ({"inputs": "channels"}, "conv_kfac", torch.nn.Conv1d(2, 3, 2)),
        ({"inputs": "channels"}, "conv_kfac", torch.nn.Conv1d(70, 2, 2)),
    ],
)
def test_a_power_of_one_half_is_the_root_of_the_inverse(
    basis: dict[str, Any], curvature: str, module: torch.nn.Module
) -> None:
    """Twice the root is the inverse, through the dense products of both operators."""
    x = torch.randn(5, 3) if curvature == "kfac" else torch.randn(5, module.in_channels, 4)
    given = {"name": "ekfac", "power": 0.5, **basis}
    model = torch.nn.Sequential(module, torch.nn.Flatten()).double()
    recipe = kfactk.build(curvature=curvature, basis=given, likelihood="gaussian")
    optimizer = recipe.bind(model)
    model(x.double()).square().sum().backward()
    optimizer.step()
    root = optimizer.layers["0"].operator
    inverse = attrs.evolve(root, power=1.0)
    v = torch.randn_like(root.spectrum)
    torch.testing.assert_close(root.solve(root.solve(v)), inverse.solve(v))


def test_a_power_waives_the_inverse() -> None:
    assert Ekfac().waives == frozenset()
    assert Ekfac(power=0.5).waives == {"damped-inverse"}
