"""The laws that a basis claims beyond those of every basis, by the names in its `laws`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume
from torch import Tensor

from kfactk.errors import OptionError, near_names
from kfactk.linalg import mean_diagonal
from kfactk.samples import Samples
from kfactk.testing._support.basis_frame import BasisFrame, same
from kfactk.testing._support.laws import law
from kfactk.testing._support.situations import (
    Situation,
    dense,
    null_dimension,
    orthogonal,
    over_taps,
    separated,
    turn_within_null,
)
from kfactk.testing._support.strategies import seeds
from kfactk.testing._support.truth import dense_fisher, dense_kron
from kfactk.validation import square

TRAITS = {
    "rotation-equivariant": "in other orthonormal coordinates of inputs and outputs, P is the same operator",
    "null-space-independent": "P does not depend on which eigenvectors span the null space of a matrix",
    "closer-than-kfac": "F differs from the Fisher matrix of its mini-batch no more than A kron G does, in the Frobenius norm; where it "
    "requires C, C kron K, or C kron I_taps, stands for A",
    "exact-when-kronecker": "for one example with T = 1, F is the Fisher matrix",
}
"""Names that `Basis.laws` may hold, each with its law."""


class BasisTraitLaws(BasisFrame):
    """What a basis claims."""

    @law()
    def test_what_it_claims_is_known(self) -> None:
        """Every name in `laws` is that of a law there is."""
        for name in sorted(set(self.subject().laws) - set(TRAITS)):
            known = "; ".join(f"{each!r}: {what}" for each, what in TRAITS.items())
            raise AssertionError(
                f"it claims the law {name!r}, which is not known.{near_names(name, TRAITS)} There are: {known}"
            )

    @law(situation="regular_situations", seed=seeds())
    def test_it_turns_with_the_coordinates(self, situation: Situation, seed: int) -> None:
        """Trait "rotation-equivariant": in other orthonormal coordinates of inputs and outputs, P is the same operator."""
        self.wants(situation, "rotation-equivariant")
        assume(
            all(
                separated(matrix, null=True)
                for matrix in situation.required.values()
                if square(matrix)
            )
        )
        rows = situation.samples
        left, right = (
            orthogonal(_square(situation, -2), seed),
            orthogonal(_square(situation, -1), seed + 1),
        )
        matrices = {
            name: self.turned(name, situation.matrices[name], left, right)
            for name in sorted(situation.basis.requires)
        }
        turned = situation.refreshed(**_turned(situation, rows, left, right), matrices=matrices)
        expected = left @ situation.precondition() @ right.mT
        says = "the preconditioner depends on the coordinates: P'(S V R^T) differs from S P(V) R^T for rotations S and R"
        same(turned.precondition(), expected, says, 1e-5)

    @law(situation="few", seed=seeds())
    def test_the_choice_within_null_spaces_does_not_matter(
        self, situation: Situation, seed: int
    ) -> None:
        """Trait "null-space-independent": P does not depend on which eigenvectors span the null space of A or G.

        For a rotation R within the null space, R A R^T = A, so that the eigenvectors U and R U are as good as one another. To have had R U
        in place of U is the same as to see samples and gradient through R while U is kept, whatever a decomposition may consist of. Where
        C, or C and K, stand for A, R is of channels, the same for each tap, and of taps, the same for each channel.
        """
        self.wants(situation, "null-space-independent")
        assume(
            all(
                separated(matrix, null=True)
                for matrix in situation.required.values()
                if square(matrix)
            )
        )
        channels, taps, g = self.factors(situation, "null-space-independent")
        assume(
            max(null_dimension(each) for each in (channels, g, *([] if taps is None else [taps])))
            > 1
        )
        turns = (
            turn_within_null(channels, seed + 1),
            None if taps is None else turn_within_null(taps, seed + 2),
        )
        left, right = (
            turn_within_null(g, seed),
            over_taps(*turns, situation.gradient.shape[-1], 1.0),
        )
        turned = situation.remeasured(**_turned(situation, situation.samples, left, right))
        says = "the preconditioner depends on the choice of eigenvectors in a null space of A or G: another choice gives another result"
        same(turned.precondition(), left @ situation.precondition() @ right.mT, says, 1e-6)

    @law(situation="situations")
    def test_it_is_at_least_as_close_to_the_fisher_as_kfac(self, situation: Situation) -> None:
        """Trait "closer-than-kfac": ||Fisher - F|| <= ||Fisher - A kron G|| in the Frobenius norm, on the mini-batch of the moments."""
        self.wants(situation, "closer-than-kfac")
        channels, taps, g = self.factors(situation, "closer-than-kfac")
        a = over_taps(
            channels, taps, situation.gradient.shape[-1], float(mean_diagonal(channels).mean())
        )
        fisher = dense_fisher(situation.per_example, situation.num_terms)
        mine, kfac = (
            torch.linalg.matrix_norm(fisher - each)
            for each in (dense(situation.product, situation.gradient), dense_kron(a, g))
        )
        assert bool((mine <= kfac * (1 + 1e-9) + 1e-12 * fisher.norm()).all()), (
            f"it is further from the Fisher matrix than K-FAC: ||Fisher - F|| = {mine.tolist()}, ||Fisher - A kron G|| = {kfac.tolist()}"
        )

    @law(situation="single_rows")
    def test_one_row_gives_the_fisher(self, situation: Situation) -> None:
        """Trait "exact-when-kronecker": for one example with T = 1, where the Fisher matrix is A kron G, F is the Fisher matrix."""
        self.wants(situation, "exact-when-kronecker")
        fisher = dense_fisher(situation.per_example, situation.num_terms)
        product = dense(situation.product, situation.gradient)
        same(
            product,
            fisher,
            "for one example with T = 1 it does not represent the Fisher matrix E[vec(D) vec(D)^T]",
            1e-6,
        )

    def wants(self, situation: Situation, trait: str) -> None:
        """Skip a law that the basis does not claim."""
        if trait not in situation.basis.laws:
            pytest.skip(f"{self.label()} does not claim {trait!r} ({TRAITS[trait]})")

    def factors(self, situation: Situation, trait: str) -> tuple[Tensor, Tensor | None, Tensor]:
        """A, or C for a basis that requires it, K where it requires that, and G.

        Raises:
            OptionError: There are none.
        """
        side = {"C"} & situation.basis.requires or {"A"}
        taps = {"K"} & situation.basis.requires
        missing = sorted((side | taps | {"G"}) - set(situation.matrices))
        if missing:
            spoken = " and ".join(sorted(side | taps | {"G"}))
            raise OptionError(
                f"{self.label()} claims {trait!r}, which speaks of {spoken}, and curvature {situation.curvature!r} does not provide "
                f"{' and '.join(missing)}. Name another one in the class (`curvature = ...`), or do not claim it."
            )
        found = situation.matrices
        return found[min(side)], found["K"] if taps else None, found["G"]


def _square(situation: Situation, dim: int) -> Tensor:
    """Any tensor `[..., n, n]`, n being a dimension of the gradient."""
    size = situation.gradient.shape[dim]
    return situation.gradient.new_zeros(*situation.gradient.shape[:-2], size, size)


def _turned(situation: Situation, rows: Samples, left: Tensor, right: Tensor) -> dict[str, Any]:
    """Samples and gradients in coordinates in which inputs are multiplied by `right` and output gradients by `left`."""
    inputs, gradients = (
        rows.inputs() @ right.mT.unsqueeze(-3),
        rows.gradients() @ left.mT.unsqueeze(-3),
    )
    return {
        "samples": Samples(inputs, gradients, num_terms=situation.num_terms),
        "mean_gradient": left @ situation.mean_gradient @ right.mT,
        "gradient": left @ situation.gradient @ right.mT,
    }
