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
    "rotation-equivariant": "in other orthonormal coordinates of inputs and outputs, solve is the "
    "same operator",
    "null-space-independent": "solve does not depend on which eigenvectors span the null space of "
    "a matrix",
    "closer-than-kfac": "F differs from the Fisher matrix of its mini-batch no more than A kron G "
    "does, in the Frobenius norm; C kron K, C kron I_taps or diag(a) stand for A where it is C, K "
    "or a that the basis requires",
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
                f"it claims the law {name!r}, which is not known.{near_names(name, TRAITS)} "
                f"There are: {known}"
            )

    @law(situation="regular_situations", seed=seeds())
    def test_it_turns_with_the_coordinates(self, situation: Situation, seed: int) -> None:
        """Trait "rotation-equivariant": in other orthonormal coordinates P is the same operator."""
        self.wants(situation, "rotation-equivariant")
        assume(_determined(situation))
        left, right = (
            orthogonal(_square(situation, -2), seed),
            orthogonal(_square(situation, -1), seed + 1),
        )
        matrices = {
            name: self.turned(name, situation.matrices[name], left, right)
            for name in sorted(situation.basis.reads)
        }
        turned = situation.refreshed(
            **_turned(situation, situation.samples, left, right), matrices=matrices
        )
        expected = left @ situation.solve() @ right.mT
        says = "solve depends on the coordinates: P'(S V R^T) differs from S P(V) R^T for "
        says += "rotations S and R"
        same(turned.solve(), expected, says, 1e-5)

    @law(situation="few", seed=seeds())
    def test_the_choice_within_null_spaces_does_not_matter(
        self, situation: Situation, seed: int
    ) -> None:
        """Trait "null-space-independent": which eigenvectors span a null space does not matter.

        For a rotation R within the null space of A, R A R^T = A, so U and R U are equally good
        eigenvectors. To have R U in place of U is the same as to see samples and gradient through R
        while U is kept, whatever a decomposition consists of. Where C, or C and K, stand for A, R
        is of channels, the same for each tap, and of taps, the same for each channel. Where a does,
        coordinates are fixed and R is the identity.
        """
        self.wants(situation, "null-space-independent")
        assume(_determined(situation))
        a, taps, g = self.factors(situation, "null-space-independent")
        chosen = [g, *([] if taps is None else [taps])]
        if "a" not in situation.basis.requires:
            chosen.append(a)
        assume(max(null_dimension(each) for each in chosen) > 1)
        left = turn_within_null(g, seed)
        if "a" in situation.basis.requires:
            right = torch.eye(a.shape[-1], dtype=a.dtype).expand(a.shape)
        else:
            turns = (
                turn_within_null(a, seed + 1),
                None if taps is None else turn_within_null(taps, seed + 2),
            )
            right = over_taps(*turns, situation.gradient.shape[-1], 1.0)
        turned = situation.remeasured(**_turned(situation, situation.samples, left, right))
        says = "solve depends on the choice of eigenvectors in a null space of A or G: another "
        says += "choice gives another result"
        same(turned.solve(), left @ situation.solve() @ right.mT, says, 1e-6)

    @law(situation="situations")
    def test_it_is_at_least_as_close_to_the_fisher_as_kfac(self, situation: Situation) -> None:
        """Trait "closer-than-kfac": on its mini-batch, ||Fisher - F|| <= ||Fisher - A kron G||.

        The norm is that of Frobenius.
        """
        self.wants(situation, "closer-than-kfac")
        channels, taps, g = self.factors(situation, "closer-than-kfac")
        bias = float(mean_diagonal(channels).mean())
        a = over_taps(channels, taps, situation.gradient.shape[-1], bias)
        fisher = dense_fisher(situation.per_example, situation.num_terms)
        mine, kfac = (
            torch.linalg.matrix_norm(fisher - each)
            for each in (dense(situation.multiply, situation.gradient), dense_kron(a, g))
        )
        assert bool((mine <= kfac * (1 + 1e-9) + 1e-12 * fisher.norm()).all()), (
            "it is further from the Fisher matrix than K-FAC: "
            f"||Fisher - F|| = {mine.tolist()}, ||Fisher - A kron G|| = {kfac.tolist()}"
        )

    @law(situation="single_rows")
    def test_one_row_gives_the_fisher(self, situation: Situation) -> None:
        """Trait "exact-when-kronecker": for one example with T = 1, F is the Fisher matrix.

        That is then A kron G.
        """
        self.wants(situation, "exact-when-kronecker")
        fisher = dense_fisher(situation.per_example, situation.num_terms)
        says = "for one example with T = 1, F is not the Fisher matrix E[vec(D) vec(D)^T]"
        same(dense(situation.multiply, situation.gradient), fisher, says, 1e-6)

    def wants(self, situation: Situation, trait: str) -> None:
        """Skip a law that the basis does not claim."""
        if trait not in situation.basis.laws:
            pytest.skip(f"{self.label()} does not claim {trait!r} ({TRAITS[trait]})")

    def factors(self, situation: Situation, trait: str) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return A, K and G; C or `diag(a)` in place of A, and `None` for K where not required.

        Raises:
            OptionError: The curvature does not provide them.
        """
        requires, found = situation.basis.requires, situation.matrices
        side = next((name for name in ("C", "a") if name in requires), "A")
        needs = {side, "G"} | ({"K"} & requires)
        if missing := sorted(needs - set(found)):
            raise OptionError(
                f"{self.label()} claims {trait!r}, a law on {' and '.join(sorted(needs))}, and "
                f"curvature {situation.curvature!r} does not provide {' and '.join(missing)}. Name "
                "another one in the class (`curvature = ...`), or do not claim it."
            )
        a = torch.diag_embed(found["a"]) if side == "a" else found[side]
        return a, found["K"] if "K" in needs else None, found["G"]


def _determined(situation: Situation) -> bool:
    """Return whether all eigenvectors outside null spaces are determined."""
    return all(
        separated(matrix, null=True) for matrix in situation.required.values() if square(matrix)
    )


def _square(situation: Situation, dim: int) -> Tensor:
    """Return any tensor `[..., n, n]`, n being a dimension of the gradient."""
    size = situation.gradient.shape[dim]
    return situation.gradient.new_zeros(*situation.gradient.shape[:-2], size, size)


def _turned(situation: Situation, rows: Samples, left: Tensor, right: Tensor) -> dict[str, Any]:
    """Return samples and gradients in other coordinates.

    Inputs are multiplied by `right`, output gradients by `left`.
    """
    inputs = rows.inputs() @ right.mT.unsqueeze(-3)
    gradients = rows.gradients() @ left.mT.unsqueeze(-3)
    return {
        "samples": Samples(inputs, gradients, num_terms=situation.num_terms),
        "mean_gradient": left @ situation.mean_gradient @ right.mT,
        "gradient": left @ situation.gradient @ right.mT,
    }
