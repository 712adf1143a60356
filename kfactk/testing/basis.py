"""The laws of bases: the operator that a basis makes of one layer's curvature.

    class TestMine(BasisLaws):
        stage = "mine"

A class names its `stage`. It may also set `curvature`, what to measure with; `block`, the dense
matrix that the basis claims to invert; and what is drawn. Further laws are tested where a basis
claims them in its `laws`. What a basis waives in its `waives` is skipped, and says so: test that
against algebra of your own. The laws of its state (decompositions, moments) are inherited too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from hypothesis import assume, strategies as st
from torch import Tensor

from kfactk.errors import DecompositionError
from kfactk.linalg import mean_diagonal
from kfactk.operators import CurvatureOperator, SpectralOperator
from kfactk.testing._support.basis_frame import BasisFrame, inner, same
from kfactk.testing._support.basis_state import BasisStateLaws
from kfactk.testing._support.basis_traits import BasisTraitLaws
from kfactk.testing._support.division import InRecipe
from kfactk.testing._support.laws import close, law
from kfactk.testing._support.situations import Situation, columns, dense
from kfactk.testing._support.strategies import seeds
from kfactk.validation import square

MUCH = 1e16
"""Damping that leaves nothing of any curvature, times the mean of its diagonal."""
FLOOR = 1e-12
"""Curvature below it may drown, in float32, in the least damping that keeps divisions finite."""


class BasisLaws(BasisStateLaws, BasisTraitLaws, InRecipe):
    """The laws that every basis obeys, and those it claims.

    F is the operator that the basis makes of a situation, P its `solve`.
    """

    def in_recipe(self) -> dict[str, Any]:
        """Return a recipe with the basis, and what measures for it."""
        return {"basis": self.subject(), "curvature": self.measure()}

    # ------------------------------------------------------------------------------------- solve

    @law(waivable="linear", situation="any_situations", seed=seeds(), factor=st.floats(-3, 3))
    def test_it_is_linear(self, situation: Situation, seed: int, factor: float) -> None:
        """P (c V + W) = c P V + P W."""
        other = situation.another(seed)
        together = situation.solve(factor * situation.gradient + other)
        apart = factor * situation.solve() + situation.solve(other)
        says = f"solve is not linear: P(c V + W), c = {factor}, differs from c P V + P W"
        same(together, apart, says)

    @law(waivable="self-adjoint", situation="any_situations", seed=seeds())
    def test_it_is_self_adjoint(self, situation: Situation, seed: int) -> None:
        """<W, P V> = <P W, V>."""
        other = situation.another(seed)
        forth, back = situation.solve(), situation.solve(other)
        there, again = inner(other, forth), inner(back, situation.gradient)
        size = float(other.norm() * forth.norm() + situation.gradient.norm() * back.norm())
        assert abs(there - again) <= 1e-8 * size, (
            f"solve is not self-adjoint: <W, P V> = {there} differs from <P W, V> = {again}"
        )

    @law(situation="any_situations")
    def test_it_is_positive_definite(self, situation: Situation) -> None:
        """<V, P V> > 0, so that the step goes downhill."""
        product = inner(situation.gradient, situation.solve())
        assert product > 0, (
            f"solve is not positive definite: <V, P V> = {product} for a gradient that is not zero"
        )

    @law(waivable="damped-inverse", situation="situations")
    def test_with_much_damping_it_divides_by_it(self, situation: Situation) -> None:
        """Refreshed with a damping far above the curvature, damping * P is the identity."""
        fisher = dense(situation.multiply, situation.gradient)
        size = float(fisher.diagonal(dim1=-2, dim2=-1).abs().max())
        damped = situation.refreshed(damping=MUCH * max(size, 1.0))
        says = "damping * P is not the identity, though the damping is 1e16 times the curvature"
        same(damped.damping * damped.solve(), damped.gradient, says, 1e-5)

    @law(situation="situations", power=st.integers(1, 12))
    def test_damping_acts_where_it_says(self, situation: Situation, power: int) -> None:
        """Another damping changes P after a refresh, unless `damped_at` is "never".

        With "solve" it changes P at once.
        """
        basis, usual = situation.basis, situation.solve()
        more = 10.0**power * (situation.damping + float(usual.abs().max().reciprocal()))
        dampings = {"refresh": situation.refreshed(damping=more)}
        if basis.damped_at != "refresh":
            dampings["solve"] = attrs.evolve(situation, damping=more)
        for when, damped in dampings.items():
            changed = not torch.equal(damped.solve(), usual)
            assert changed == (basis.damped_at != "never"), (
                f"its damped_at is {basis.damped_at!r}, and another damping at the {when} "
                f"{'changes' if changed else 'does not change'} solve"
            )

    @law(waivable="damped-inverse", situation="any_situations")
    def test_it_is_the_dense_damped_inverse(self, situation: Situation) -> None:
        """P is the inverse of the damped matrix that the basis claims to be (method `block`)."""
        block, vector = self.block(situation), columns(situation.gradient)
        shape = (*vector.shape, vector.shape[-1])
        assert block.shape == shape, (
            f"block(situation) has the shape {tuple(block.shape)}; it must be {shape}"
        )
        expected = torch.linalg.solve(block.double(), vector)
        when = "with its moments" if situation.moments else "without moments"
        says = f"{when}, solve is not the inverse of the damped matrix of `block`"
        same(columns(situation.solve()), expected, says, 1e-6)

    @law(situation="any_situations", seed=seeds())
    def test_an_operator_serves_many_gradients(self, situation: Situation, seed: int) -> None:
        """An operator is kept between refreshes: each time it does what a fresh one does."""
        kept = situation.fresh_operator()
        for gradient in (situation.gradient, situation.another(seed), situation.gradient):
            for method in ("solve", "multiply")[: 1 if self.waives("fisher") else 2]:
                found = getattr(kept, method)(gradient)
                expected = getattr(situation.fresh_operator(), method)(gradient)
                same(found, expected, f"used again, the operator's {method} gives another result")

    @law(situation="any_situations", seed=seeds())
    def test_coordinates_stand_for_their_matrix(self, situation: Situation, seed: int) -> None:
        """Where a basis has coordinates, moments and P of these are those of the matrix.

        They are linear in the matrix.
        """
        basis, parts, one = situation.basis, situation.decomposition, situation.gradient
        turned = basis.coordinates(parts, one)
        if turned is None:
            return
        other = situation.another(seed)
        found, more = (basis.coordinates(parts, each) for each in (one - 2 * other, other))
        says = "some matrices have coordinates, and others none"
        assert found is not None, says
        assert more is not None, says
        same(found, turned - 2 * more, "coordinates are not linear")
        before = turned.clone()
        found = situation.operator.solve_coordinates(turned)
        same(found, situation.solve(), "solve_coordinates is not solve")
        assert torch.equal(turned, before), "solve_coordinates changes what it is given"
        moments = basis.gradient_moments(parts, one, situation.num_terms)
        again = basis.coordinate_moments(parts, turned, situation.num_terms)
        assert moments.keys() == again.keys(), "coordinate_moments gives other moments"
        for name, statistic in moments.items():
            same(again[name].total, statistic.total, f"coordinate_moments gives another {name!r}")

    @law(situation="situations")
    def test_decomposing_again_changes_nothing(self, situation: Situation) -> None:
        """A matrix decomposed from its own decomposition (`context.previous`) gives the same P."""
        again = {
            name: situation.basis.decompose(
                name, situation.matrices[name], attrs.evolve(situation.context(name), previous=last)
            )
            for name, last in situation.decomposition.items()
        }
        moments = situation.measured(again)
        expected = attrs.evolve(
            situation, moments=situation.measured(situation.decomposition)
        ).solve()
        found = attrs.evolve(situation, decomposition=again, moments=moments).solve()
        says = "decomposed again from its own decomposition, the matrix gives another solve"
        same(found, expected, says, 1e-5)

    # ---------------------------------------------------------------------------------- multiply

    @law(waivable="fisher", situation="any_situations", seed=seeds(), factor=st.floats(-3, 3))
    def test_multiplying_is_linear(self, situation: Situation, seed: int, factor: float) -> None:
        """F (c V + W) = c F V + F W."""
        other = situation.another(seed)
        together = situation.multiply(factor * situation.gradient + other)
        apart = factor * situation.multiply() + situation.multiply(other)
        says = f"multiply is not linear: F(c V + W), c = {factor}, differs from c F V + F W"
        same(together, apart, says)

    @law(waivable="fisher", situation="any_situations")
    def test_multiplying_is_the_block_without_damping(self, situation: Situation) -> None:
        """F is symmetric, positive semi-definite, and what `block` says without damping."""
        fisher = dense(situation.multiply, situation.gradient)
        says = "multiply is not self-adjoint: F^T differs from F"
        same(fisher.transpose(-1, -2), fisher, says)
        values = torch.linalg.eigvalsh(fisher)
        least, largest = float(values.min()), float(values.max())
        assert least >= -1e-9 * abs(largest), (
            f"multiply is not positive semi-definite: eigenvalues are from {least} to {largest}"
        )
        claimed = self.block(attrs.evolve(situation, damping=0.0))
        same(fisher, claimed, "multiply is not the matrix of `block` without damping")

    @law(waivable="damped-inverse", situation="situations")
    def test_solving_undoes_multiplying(self, situation: Situation) -> None:
        """P (F V + damping V) = V, for a basis that damps by adding damping times the identity."""
        plain = type(self).block is BasisFrame.block
        if not plain and not isinstance(situation.operator, SpectralOperator):
            pytest.skip(f"{self.label()} damps otherwise: its `block` says how")
        damped = situation.multiply() + situation.damping * situation.gradient
        says = "solve does not undo multiply: P (F V + damping V) differs from V"
        same(situation.solve(damped), situation.gradient, says, 1e-6)

    # ------------------------------------------------------------------------ condition, spectrum

    @law(waivable="damped-inverse", situation="any_situations")
    def test_the_condition_is_no_more_than_the_true_one(self, situation: Situation) -> None:
        """The condition number is a finite scalar of at least 1, exact or a lower bound."""
        told = situation.operator.condition()
        assert told is not None, "a basis that inverts a damped curvature has a condition number"
        assert told.shape == (), (
            f"the condition number has the shape {tuple(told.shape)}; it must be a scalar tensor"
        )
        values = torch.linalg.eigvalsh(self.block(situation).double())
        true = float(values.max() / values.min())
        assert 1 - 1e-9 <= float(told) <= true * (1 + 1e-6), (
            f"the condition number is {float(told)}; that of the dense block is {true}"
        )

    @law(waivable="damped-inverse", situation="situations")
    def test_the_spectrum_is_that_of_the_matrix(self, situation: Situation) -> None:
        """Of a `SpectralOperator`: the spectrum holds the eigenvalues of F, logdet is exact."""
        operator, fisher = self._spectral(situation)
        found = operator.spectrum.double().flatten(-2).sort(-1).values
        says = "the spectrum does not hold the eigenvalues of multiply"
        same(found, torch.linalg.eigvalsh(fisher), says, 1e-7)
        eye = torch.eye(fisher.shape[-1], dtype=fisher.dtype)
        expected = torch.linalg.slogdet(fisher + situation.damping * eye).logabsdet.sum()
        says = "logdet is not the logarithm of the determinant of F + damping I"
        close(operator.logdet().double(), expected, says, rtol=1e-6, atol=1e-6)

    @law(waivable="fisher", situation="situations")
    def test_a_function_acts_on_the_spectrum(self, situation: Situation) -> None:
        """Of a `SpectralOperator`: `function(f, V)` is f(F) V."""
        operator, fisher = self._spectral(situation)
        values, vectors = torch.linalg.eigh(fisher)
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "root": lambda s: s.sqrt(),
            "exponential": lambda s: (-s).exp(),
        }
        for name, f in functions.items():
            scaled = vectors * f(values.clamp(min=0)).unsqueeze(-2)
            expected = (scaled @ vectors.mT @ columns(situation.gradient).unsqueeze(-1)).squeeze(-1)
            found = columns(operator.function(f, situation.gradient))
            same(found, expected, f"function is not f(F) V, for the {name}", 1e-5)

    def _spectral(self, situation: Situation) -> tuple[SpectralOperator, Tensor]:
        """Return the operator and F; skip the law where it is not diagonal in its basis."""
        operator: CurvatureOperator = situation.operator
        if not isinstance(operator, SpectralOperator):
            pytest.skip(f"the operator of {self.label()} is no kfactk.SpectralOperator")
        return operator, dense(operator.multiply, situation.gradient)

    # ------------------------------------------------------------------------------------- scales

    @law(situation="any_situations", dtype=st.sampled_from([torch.float32, torch.float64]))
    def test_it_stays_finite_without_damping(
        self, situation: Situation, dtype: torch.dtype
    ) -> None:
        """Without damping the result is finite, also where curvature lacks rank or is zero."""
        case = situation.case.to(dtype)
        measured = bool(situation.moments)
        for each in (case, case.times(gradients=0.0)):
            bare = Situation.of(situation.basis, situation.curvature, each, damping=0.0)
            bare = bare if measured else attrs.evolve(bare, moments={})
            found = bare.solve()
            assert bool(torch.isfinite(found).all()), (
                f"without damping the preconditioned gradient holds NaN or inf ({dtype}): {found}. "
                "A floor under the damping, kfactk.linalg.damping_floor, keeps divisions finite"
            )
            told = None if self.waives("fisher") else bare.operator.condition()
            assert told is None or math.isfinite(told), (
                f"without damping the condition number is {told}"
            )

    @law(waivable="damped-inverse", situation="any_situations", power=st.integers(-60, 60))
    def test_it_scales_with_the_curvature(self, situation: Situation, power: int) -> None:
        """Gradients times c multiply F by c^2; with damping times c^2 they multiply P by 1/c^2.

        So no threshold is an absolute number. Where a matrix is zero, there is no scale to go by.
        """
        matrices = [matrix for matrix in situation.matrices.values() if square(matrix)]
        assume(all(float(mean_diagonal(matrix).min()) > 0 for matrix in matrices))
        c = 2.0**power
        scaled = Situation.of(
            situation.basis,
            situation.curvature,
            situation.case.times(gradients=c),
            num_terms=situation.num_terms,
            damping=situation.damping * c * c,
        )
        moments = scaled.moments if situation.moments else {}
        scaled = attrs.evolve(scaled, moments=moments, gradient=situation.gradient)
        says = f"with gradients {c} times as large, {{}} is not {{}} times what it was: is there "
        says += "an absolute threshold?"
        expected = situation.multiply() * c * c
        same(scaled.multiply(), expected, says.format("multiply", c * c), 1e-6)
        expected = situation.solve() / (c * c)
        same(scaled.solve(), expected, says.format("solve", 1 / c / c), 1e-6)

    @law(waivable="fisher", situation="scaled")
    def test_float32_holds_from_1e_20_to_1e20(self, situation: Situation) -> None:
        """At every scale of float32 the result is finite, downhill, and no longer than V / damping.

        It is right too, unless curvature is so small that it drowns in the least damping.
        """
        found = situation.solve()
        assert bool(torch.isfinite(found).all()), (
            f"the preconditioned gradient holds NaN or inf at this scale: {found}"
        )
        assert inner(situation.gradient, found) > 0, (
            "at this scale the preconditioned gradient does not go downhill"
        )
        if self.waives("damped-inverse"):
            return
        longest = float(situation.gradient.double().norm()) / situation.damping
        length = float(found.double().norm())
        assert length <= longest * 1.001, (
            f"at this scale P V has the norm {length}, more than V over the damping, {longest}"
        )
        matrices = [matrix for matrix in situation.matrices.values() if square(matrix)]
        sizes = [float(mean_diagonal(matrix).min()) for matrix in matrices]
        if min([*sizes, situation.damping]) > FLOOR:
            block = self.block(situation).double()
            expected = torch.linalg.solve(block, columns(situation.gradient))
            says = "at this scale solve is not the inverse of the damped matrix of `block`"
            same(columns(found), expected, says, 1e-2)

    @law(
        examples=10,
        situation="situations",
        bad=st.sampled_from([float("nan"), float("inf")]),
        seed=seeds(),
    )
    def test_a_matrix_that_is_not_finite_is_refused(
        self, situation: Situation, bad: float, seed: int
    ) -> None:
        """A matrix with NaN or inf in it raises DecompositionError: the last good one is kept."""
        basis = situation.basis
        pairs = [(name, name) for name in sorted(basis.requires)]
        pairs += [(name, each) for name, beside in basis.beside.items() for each in beside]
        for name, wrong in pairs:
            matrix = situation.matrices[wrong].clone(memory_format=torch.contiguous_format)
            if not matrix.numel():
                continue
            matrix.view(-1)[seed % matrix.numel()] = bad
            spoilt = attrs.evolve(situation, matrices={**situation.matrices, wrong: matrix})
            where = "" if wrong == name else f" ({wrong}, beside it)"
            try:
                found = basis.decompose(name, spoilt.matrices[name], spoilt.context(name))
            except DecompositionError:
                continue
            raise AssertionError(
                f"decompose({name!r}, ...) took a matrix that holds {bad}{where} and gave "
                f"{', '.join(found) or 'nothing'}; it must raise kfactk.DecompositionError, so "
                "that the framework goes on with the last good decomposition"
            )
