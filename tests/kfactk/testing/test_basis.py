"""The laws of bases can fail: each catches a stage that breaks it, and says what is wrong."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis.vendor.pretty import pretty

from kfactk import Basis, OptionError
from kfactk.testing import BasisLaws
from kfactk.testing._support.basis_frame import BasisFrame
from kfactk.testing._support.situations import (
    Situation,
    dense,
    null_dimension,
    separated,
    turn_within_null,
)
from kfactk.testing._support.strategies import single_row_cases
from kfactk.testing._support.truth import dense_kron
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.curvature.conv_kfac import ConvKfac
from kfactk_stages.curvature.kfac import Kfac
from tests.kfactk.testing import broken_bases as faulty
from tests.kfactk.testing.broken import caught, laws_of


class TestDiagonal(BasisLaws):
    """A curvature with its basis, which claims nothing beyond."""

    stage: ClassVar[Any] = faulty.DiagonalInverse
    curvature: ClassVar[Any] = faulty.DiagonalFisher


def test_a_first_draft_of_a_diagonal_basis_is_told_what_it_lacks() -> None:
    laws = ("test_a_matrix_that_is_not_finite_is_refused", "test_it_stays_finite_without_damping")
    found = caught(BasisLaws, faulty.Plain, *laws, curvature=faulty.DiagonalFisher)
    assert (
        "must raise kfactk.DecompositionError"
        in found["test_a_matrix_that_is_not_finite_is_refused"]
    )
    assert (
        "kfactk.linalg.damping_floor, keeps divisions finite"
        in found["test_it_stays_finite_without_damping"]
    )


def test_a_basis_that_resets_its_moments_is_sound() -> None:
    laws = [name for name in laws_of(BasisLaws) if "transport" in name]
    assert len(laws) == 3
    assert caught(BasisLaws, faulty.Reset, *laws) == {}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (faulty.Unturned, "solve_coordinates is not solve"),
        (faulty.Displaced, "coordinates are not linear"),
        (faulty.Miscounting, "coordinate_moments gives another 'square'"),
    ],
)
def test_coordinates_that_do_not_stand_for_their_matrix_are_caught(
    stage: Any, message: str
) -> None:
    law = "test_coordinates_stand_for_their_matrix"
    assert message in caught(BasisLaws, stage(), law, curvature="gradient")[law]


@pytest.mark.parametrize(
    ("stage", "name", "message"),
    [
        (faulty.Normalised, "test_it_is_linear", "solve is not linear"),
        (
            faulty.OneWay,
            "test_it_is_self_adjoint",
            "solve is not self-adjoint: <W, P V> =",
        ),
        (
            faulty.Uphill,
            "test_it_is_positive_definite",
            "solve is not positive definite: <V, P V> = -",
        ),
        (
            faulty.Twice,
            "test_with_much_damping_it_divides_by_it",
            "damping * P is not the identity",
        ),
        (
            faulty.Twice,
            "test_it_is_the_dense_damped_inverse",
            "solve is not the inverse of the damped matrix of `block`",
        ),
        (
            faulty.Undamped,
            "test_damping_acts_where_it_says",
            "its damped_at is 'solve', and another damping at the refresh does not change solve",
        ),
        (
            faulty.Denying,
            "test_damping_acts_where_it_says",
            "its damped_at is 'never', and another damping at the refresh changes solve",
        ),
        (
            faulty.Transposed,
            "test_it_is_the_dense_damped_inverse",
            "solve is not the inverse of the damped",
        ),
        (
            faulty.Doubling,
            "test_an_operator_serves_many_gradients",
            "used again, the operator's solve gives another result",
        ),
        (
            faulty.Wandering,
            "test_decomposing_again_changes_nothing",
            "the matrix gives another solve",
        ),
        (faulty.Shifted, "test_multiplying_is_linear", "multiply is not linear"),
        (
            faulty.Indefinite,
            "test_multiplying_is_the_block_without_damping",
            "multiply is not positive semi-definite",
        ),
        (
            faulty.Lopsided,
            "test_multiplying_is_the_block_without_damping",
            "multiply is not self-adjoint",
        ),
        (
            faulty.Twice,
            "test_solving_undoes_multiplying",
            "P (F V + damping V) differs from V",
        ),
        (
            faulty.Misjudging,
            "test_the_spectrum_is_that_of_the_matrix",
            "the spectrum does not hold the eigenvalues of multiply",
        ),
        (
            faulty.Rooting,
            "test_a_function_acts_on_the_spectrum",
            "function is not f(F) V, for the root",
        ),
        (
            faulty.Boasting,
            "test_the_condition_is_no_more_than_the_true_one",
            "that of the dense block is",
        ),
        (
            faulty.ByGroup,
            "test_the_condition_is_no_more_than_the_true_one",
            "has the shape (1,); it must be a scalar tensor",
        ),
        (
            faulty.Bare,
            "test_it_stays_finite_without_damping",
            "without damping the preconditioned gradient holds NaN or inf",
        ),
        (
            faulty.Absolute,
            "test_it_scales_with_the_curvature",
            "times what it was: is there an absolute threshold?",
        ),
        (
            faulty.Overflowing,
            "test_float32_holds_from_1e_20_to_1e20",
            "holds NaN or inf at this scale",
        ),
        (
            faulty.Patching,
            "test_a_matrix_that_is_not_finite_is_refused",
            "it must raise kfactk.DecompositionError",
        ),
        (
            faulty.Undeclared,
            "test_moments_come_from_where_it_says",
            "moments_from is None, yet moments gives scale",
        ),
        (
            faulty.Silent,
            "test_moments_come_from_where_it_says",
            "moments_from is 'samples', yet nothing comes from there",
        ),
        (
            faulty.Forever,
            "test_moments_come_from_where_it_says",
            "moment_decay is 1.5, which is not in [0, 1]",
        ),
        (faulty.Dotted, "test_the_state_survives_a_checkpoint", "names have no dots"),
        (
            faulty.Misstating,
            "test_the_state_survives_a_checkpoint",
            "eigenvectors is not lower triangular with a positive diagonal",
        ),
        (
            faulty.Sized,
            "test_it_can_be_allocated_without_data",
            "decomposition: without data there is",
        ),
        (
            faulty.Remembering,
            "test_each_matrix_is_decomposed_alone",
            "it depends on more than its arguments",
        ),
        (
            faulty.Mixing,
            "test_groups_stand_alone",
            "solve of group 0 depends on the other groups",
        ),
        (
            faulty.Scribbling,
            "test_nothing_it_is_given_is_modified",
            "operator changes what it is given: moment scale",
        ),
        (
            faulty.Narrow,
            "test_a_wider_gradient_is_taken",
            "solve of a float64 gradient with float32 state is torch.float32",
        ),
        (
            faulty.Fading,
            "test_transport_into_the_same_basis_changes_nothing",
            "transport from a basis to itself changes",
        ),
        (
            faulty.Inventing,
            "test_transport_into_the_same_basis_changes_nothing",
            "transport of no moments gives scale",
        ),
        (
            faulty.Fading,
            "test_transport_keeps_the_trace",
            "moments do not fit the basis they were carried into",
        ),
        (faulty.Keeping, "test_transport_follows_the_directions", "moments mix two bases"),
        (
            faulty.Unpooled,
            "test_the_choice_within_null_spaces_does_not_matter",
            "another choice gives another result",
        ),
        (
            faulty.Entrywise,
            "test_it_turns_with_the_coordinates",
            "solve depends on the coordinates",
        ),
        (
            faulty.Entrywise,
            "test_one_row_gives_the_fisher",
            "F is not the Fisher matrix",
        ),
        (
            {"name": faulty.Further, "scale": "running"},
            "test_it_is_at_least_as_close_to_the_fisher_as_kfac",
            "further from the Fisher matrix than",
        ),
        (
            faulty.Unknown,
            "test_what_it_claims_is_known",
            "Did you mean 'rotation-equivariant'? There are: 'rotation-equiv",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_each_law_can_fail(stage: Any, name: str, message: str) -> None:
    assert message in caught(BasisLaws, stage, name)[name]


def test_each_law_is_shown_to_fail() -> None:
    [mark] = test_each_law_can_fail.pytestmark  # type: ignore[attr-defined]
    shown_elsewhere = {
        "test_two_ranks_are_one_process",  # see test_division.py
        "test_coordinates_stand_for_their_matrix",  # see above
    }
    assert {case[1] for case in mark.args[1]} == set(laws_of(BasisLaws)) - shown_elsewhere


def test_a_block_of_its_own_tests_multiply_too() -> None:
    halved = faulty.changing(KfacInverse, multiply=lambda right, v: right.multiply(v) / 2)

    def block(self: BasisLaws, situation: Situation) -> torch.Tensor:
        size = situation.gradient[..., :, :].numel() // (situation.groups or 1)
        damped = situation.damping * torch.eye(size, dtype=torch.float64)
        return dense_kron(situation.matrices["A"], situation.matrices["G"]) + damped

    name = "test_multiplying_is_the_block_without_damping"
    said = caught(BasisLaws, halved, name, block=block)[name]
    assert "multiply is not the matrix of `block` without damping" in said


def test_a_block_of_the_wrong_shape_is_told() -> None:
    name = "test_it_is_the_dense_damped_inverse"
    found = caught(BasisLaws, "kfac", name, block=lambda self, situation: torch.eye(77))
    assert "block(situation) has the shape (77, 77); it must be (" in found[name]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"stage": faulty.Strange},
            r"requires strange, which no registered curvature provides "
            r"\(.*conv_kfac provides A, C, G, K;",
        ),
        (
            {"stage": faulty.DiagonalInverse, "curvature": "kfac"},
            r"requires square, and curvature 'kfac' provides A, G\. Name another one",
        ),
    ],
)
def test_a_basis_without_a_curvature_is_told(members: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        type("TestMine", (BasisFrame,), members)().measure()


def test_the_first_curvature_that_provides_what_is_required_is_measured_with() -> None:
    frame = type("TestMine", (BasisFrame,), {"stage": "ekfac"})()
    assert frame.subject().requires <= frame.measure().provides


def test_a_curvature_without_layers_is_told() -> None:
    class Picky(Kfac):
        def unsupported(self, module: Any) -> str | None:
            return "not this one"

    with pytest.raises(
        OptionError,
        match=r"supports none of the layers that the laws can draw\. Override `cases\(self\)`",
    ):
        type("TestMine", (BasisFrame,), {"stage": "kfac", "curvature": Picky})().cases()


def test_claims_on_matrices_that_are_not_known_are_told() -> None:
    claims = {
        "test_it_turns_with_the_coordinates": "what becomes of its matrix 'square' in these is not",
        "test_the_choice_within_null_spaces_does_not_matter": "does not provide A and G",
        "test_it_is_at_least_as_close_to_the_fisher_as_kfac": "does not provide A and G",
    }
    found = caught(BasisLaws, faulty.Claiming, *claims, curvature=faulty.DiagonalFisher)
    assert {name: message in found[name] for name, message in claims.items()} == dict.fromkeys(
        claims, True
    )


@settings(max_examples=10)
@given(single_row_cases())
def test_a_situation_is_shown_with_what_it_was_drawn_from(case: Any) -> None:
    situation = Situation.of(KfacInverse(), ConvKfac(), case, damping=0.5)
    shown = repr(situation)
    assert shown.startswith(f"Situation(Case({case.module}")
    assert "of rank" in shown
    assert pretty(situation) == shown
    assert shown.endswith("no moments, terms " + f"{len(case.gradient)}, damping 0.5)")


def test_turning_within_a_null_space_leaves_the_matrix() -> None:
    rows = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = rows.mT @ rows
    turn = turn_within_null(matrix, 3)
    torch.testing.assert_close(turn @ matrix @ turn.mT, matrix)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    assert float((turn - torch.eye(4)).abs().max()) > 0.1
    assert null_dimension(matrix) == 3
    assert separated(matrix, null=True)
    assert not separated(matrix, null=False)


def test_a_linear_map_as_a_matrix() -> None:
    left, right = (
        torch.randn(2, 3, 3, dtype=torch.float64),
        torch.randn(2, 4, 4, dtype=torch.float64),
    )
    found = dense(lambda v: left @ v @ right.mT, torch.zeros(2, 3, 4, dtype=torch.float64))
    torch.testing.assert_close(found, dense_kron(right, left))


def test_our_bases_have_the_members_of_the_protocol() -> None:
    bases: list[Basis] = [Ekfac(), KfacInverse(), faulty.DiagonalInverse()]
    assert [sorted(basis.requires) for basis in bases] == [["A", "G"], ["A", "G"], ["square"]]
