"""The laws of bases: the preconditioner as a linear operator.

    class TestMine(BasisLaws):
        stage = "mine"

Members: `stage`; `curvature`, what to measure with; `block`, the dense matrix that the basis claims to invert; and what is drawn. What a
basis claims beyond, in its `laws`, is tested where it is claimed (`kfactk.testing._support.basis_traits`); what is kept of it between steps, and
carried into a new basis, in `kfactk.testing._support.basis_state`.
"""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch
from hypothesis import assume, strategies as st

from kfactk.errors import DecompositionError
from kfactk.linalg import mean_diagonal
from kfactk.preconditioner.block import makes_operator, redecomposes
from kfactk.testing._support.basis_frame import inner, same
from kfactk.testing._support.basis_state import BasisStateLaws
from kfactk.testing._support.basis_traits import BasisTraitLaws
from kfactk.testing._support.division import InRecipe
from kfactk.testing._support.laws import law
from kfactk.testing._support.situations import Situation, columns, dense
from kfactk.testing._support.strategies import seeds
from kfactk.validation import square

MUCH = 1e16
"""Damping that leaves nothing of any curvature, times the mean of its diagonal."""
FLOOR = 1e-12
"""Curvature below it may drown, in float32, in the least damping that keeps divisions finite."""


class BasisLaws(BasisStateLaws, BasisTraitLaws, InRecipe):
    """The laws that every basis obeys, and those it claims."""

    def in_recipe(self) -> dict[str, Any]:
        """A recipe with the basis, and what measures for it."""
        return {"basis": self.subject(), "curvature": self.measure()}

    @law(situation="any_situations", seed=seeds(), factor=st.floats(-3, 3))
    def test_it_is_linear(self, situation: Situation, seed: int, factor: float) -> None:
        """P (c V + W) = c P V + P W."""
        other = situation.another(seed)
        together = situation.precondition(factor * situation.gradient + other)
        apart = factor * situation.precondition() + situation.precondition(other)
        same(
            together,
            apart,
            f"the preconditioner is not linear: P(c V + W), c = {factor}, differs from c P V + P W",
        )

    @law(situation="any_situations", seed=seeds())
    def test_it_is_self_adjoint(self, situation: Situation, seed: int) -> None:
        """<W, P V> = <P W, V>."""
        other = situation.another(seed)
        there, back = (
            inner(other, situation.precondition()),
            inner(situation.precondition(other), situation.gradient),
        )
        size = float(
            other.norm() * situation.precondition().norm()
            + situation.gradient.norm() * situation.precondition(other).norm()
        )
        assert abs(there - back) <= 1e-8 * size, (
            f"the preconditioner is not self-adjoint: <W, P V> = {there} differs from <P W, V> = {back}"
        )

    @law(situation="any_situations")
    def test_it_is_positive_definite(self, situation: Situation) -> None:
        """<V, P V> > 0, so that the step goes downhill."""
        product = inner(situation.gradient, situation.precondition())
        assert product > 0, (
            f"the preconditioner is not positive definite: <V, P V> = {product} for a gradient that is not zero"
        )

    @law(situation="situations")
    def test_with_much_damping_it_divides_by_it(self, situation: Situation) -> None:
        """Refreshed with a damping far above the curvature, damping * P is the identity."""
        size = float(
            dense(situation.product, situation.gradient).diagonal(dim1=-2, dim2=-1).abs().max()
        )
        damped = situation.refreshed(damping=MUCH * max(size, 1.0))
        says = "damping * P is not the identity, though the damping is 1e16 times the curvature"
        same(damped.damping * damped.precondition(), damped.gradient, says, 1e-5)

    @law(situation="any_situations")
    def test_it_is_the_dense_damped_inverse(self, situation: Situation) -> None:
        """P is the inverse of the damped matrix that the basis claims to represent (the method `block`)."""
        block, vector = self.block(situation), columns(situation.gradient)
        shape = (*vector.shape, vector.shape[-1])
        assert block.shape == shape, (
            f"block(situation) has the shape {tuple(block.shape)}, where {shape} is due"
        )
        expected = torch.linalg.solve(block.double(), vector)
        when = "with its moments" if situation.moments else "without moments"
        same(
            columns(situation.precondition()),
            expected,
            f"{when}, precondition is not the inverse of the damped matrix of `block`",
            1e-6,
        )

    @law(situation="any_situations", seed=seeds(), damping=st.floats(0.01, 10.0))
    def test_its_operator_is_the_preconditioner(
        self, situation: Situation, seed: int, damping: float
    ) -> None:
        """Where a basis has an `operator`, it does to any gradient, again and again, what `precondition` does."""
        if not makes_operator(situation.basis):
            pytest.skip(f"{self.label()} has no operator")
        operator = situation.basis.operator(situation.decomposition, situation.moments, damping)
        for gradient in (situation.gradient, situation.another(seed), situation.gradient):
            expected = attrs.evolve(situation, damping=damping).precondition(gradient)
            same(operator(gradient), expected, "the operator differs from `precondition`", 1e-6)

    @law(situation="situations")
    def test_decomposing_again_changes_nothing(self, situation: Situation) -> None:
        """Where a basis starts from its last decomposition, that of a matrix which has not changed gives the same preconditioner."""
        if not redecomposes(situation.basis):
            pytest.skip(f"{self.label()} starts afresh each time")
        again = {
            name: situation.basis.redecompose(
                name, situation.matrices[name], situation.context, last
            )
            for name, last in situation.decomposition.items()
        }
        moments = situation.measured(again)
        expected = attrs.evolve(
            situation, moments=situation.measured(situation.decomposition)
        ).precondition()
        found = attrs.evolve(situation, decomposition=again, moments=moments).precondition()
        same(
            found,
            expected,
            "decomposed again from its own decomposition, the matrix gives another preconditioner",
            1e-5,
        )

    @law(situation="any_situations", seed=seeds(), factor=st.floats(-3, 3))
    def test_the_product_is_linear(self, situation: Situation, seed: int, factor: float) -> None:
        """F (c V + W) = c F V + F W."""
        other = situation.another(seed)
        together = situation.product(factor * situation.gradient + other)
        apart = factor * situation.product() + situation.product(other)
        same(
            together,
            apart,
            f"the product is not linear: F(c V + W), c = {factor}, differs from c F V + F W",
        )

    @law(situation="any_situations")
    def test_the_product_is_the_block_without_damping(self, situation: Situation) -> None:
        """F is symmetric, positive semi-definite, and what `block` says without damping."""
        product = dense(situation.product, situation.gradient)
        same(
            product.transpose(-1, -2),
            product,
            "the product is not self-adjoint: F^T differs from F",
        )
        values = torch.linalg.eigvalsh(product)
        least, largest = float(values.min()), float(values.max())
        assert least >= -1e-9 * abs(largest), (
            f"the product is not positive semi-definite: F has eigenvalues from {least} to {largest}"
        )
        claimed = self.block(attrs.evolve(situation, damping=0.0))
        same(product, claimed, "the product is not the matrix of `block` without damping")

    @law(situation="any_situations")
    def test_the_condition_is_no_more_than_the_true_one(self, situation: Situation) -> None:
        """The condition number told is a finite scalar of at least 1, exact or a lower bound."""
        told = situation.basis.condition(
            situation.decomposition, situation.moments, situation.damping
        )
        assert told.shape == (), (
            f"the condition number is a tensor of shape {tuple(told.shape)}, where a scalar one is due"
        )
        values = torch.linalg.eigvalsh(self.block(situation).double())
        true = float(values.max() / values.min())
        assert 1 - 1e-9 <= float(told) <= true * (1 + 1e-6), (
            f"the condition number told is {float(told)}; that of the dense block is {true}"
        )

    @law(situation="any_situations", dtype=st.sampled_from([torch.float32, torch.float64]))
    def test_it_stays_finite_without_damping(
        self, situation: Situation, dtype: torch.dtype
    ) -> None:
        """Without damping the result is finite, whether the curvature lacks rank or is zero."""
        case = situation.case.to(dtype)
        measured = bool(situation.moments)
        for each in (case, case.times(gradients=0.0)):
            bare = Situation.of(situation.basis, situation.curvature, each, damping=0.0)
            bare = bare if measured else attrs.evolve(bare, moments={})
            found = bare.precondition()
            assert bool(torch.isfinite(found).all()), (
                f"without damping the preconditioned gradient holds NaN or inf ({dtype}): {found}. A floor under the damping, such as "
                "kfactk.linalg.damping_floor, keeps divisions finite"
            )
            told = float(bare.basis.condition(bare.decomposition, bare.moments, 0.0))
            assert math.isfinite(told), f"without damping the condition number told is {told}"

    @law(situation="any_situations", power=st.integers(-60, 60))
    def test_it_scales_with_the_curvature(self, situation: Situation, power: int) -> None:
        """Gradients c times as large, c = 2^power, make F c^2 times as large, and with a damping c^2 times as large P 1/c^2 times: no
        threshold is an absolute number. (Where a matrix is zero, there is no scale to go by.)"""
        assume(
            all(
                float(mean_diagonal(matrix).min()) > 0
                for matrix in situation.matrices.values()
                if square(matrix)
            )
        )
        c = 2.0**power
        case = situation.case.times(gradients=c)
        scaled = Situation.of(
            situation.basis,
            situation.curvature,
            case,
            num_terms=situation.num_terms,
            damping=situation.damping * c * c,
        )
        moments = scaled.moments if situation.moments else {}
        scaled = attrs.evolve(scaled, moments=moments, gradient=situation.gradient)
        says = f"with gradients {c} times as large the {{}} is not {{}} times what it was: is there an absolute threshold?"
        same(scaled.product(), situation.product() * c * c, says.format("product", c * c), 1e-6)
        same(
            scaled.precondition(),
            situation.precondition() / (c * c),
            says.format("preconditioned gradient", 1 / c / c),
            1e-6,
        )

    @law(situation="scaled")
    def test_float32_holds_from_1e_20_to_1e20(self, situation: Situation) -> None:
        """At every scale that float32 can represent the result is finite, downhill, no longer than the gradient over the damping; and
        right, unless curvature is so small that it drowns in the least damping."""
        found = situation.precondition()
        assert bool(torch.isfinite(found).all()), (
            f"the preconditioned gradient holds NaN or inf at this scale: {found}"
        )
        assert inner(situation.gradient, found) > 0, (
            "at this scale the preconditioned gradient does not go downhill"
        )
        longest = float(situation.gradient.double().norm()) / situation.damping
        length = float(found.double().norm())
        assert length <= longest * 1.001, (
            f"at this scale P V has norm {length}, more than that of V over the damping, {longest}"
        )
        sizes = [
            float(mean_diagonal(matrix).min())
            for matrix in situation.matrices.values()
            if square(matrix)
        ]
        if min([*sizes, situation.damping]) > FLOOR:
            expected = torch.linalg.solve(
                self.block(situation).double(), columns(situation.gradient)
            )
            same(
                columns(found),
                expected,
                "at this scale precondition is not the inverse of the damped matrix of `block`",
                1e-2,
            )

    @law(
        examples=15,
        situation="situations",
        bad=st.sampled_from([float("nan"), float("inf")]),
        seed=seeds(),
    )
    def test_a_matrix_that_is_not_finite_is_refused(
        self, situation: Situation, bad: float, seed: int
    ) -> None:
        """A matrix with NaN or inf in it raises DecompositionError, so that the last good decomposition is kept."""
        for name in sorted(situation.basis.requires):
            matrix = situation.matrices[name].clone()
            row, column = seed % matrix.shape[-2], seed % matrix.shape[-1]
            matrix[..., row, column] = bad
            spoilt = attrs.evolve(situation, matrices={**situation.matrices, name: matrix})
            try:
                found = situation.basis.decompose(name, matrix, spoilt.context)
            except DecompositionError:
                continue
            raise AssertionError(
                f"decompose({name!r}, ...) took a matrix that holds {bad} and gave {', '.join(found) or 'nothing'}, where it must raise "
                "kfactk.DecompositionError: the framework then goes on with the last good decomposition"
            )
