"""What a basis keeps has the forms that it states; what has not is noted with its place."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from kfactk import PluginError, StateError
from kfactk.preconditioner.damage import Damage
from kfactk.preconditioner.forms import check_forms, precise
from kfactk_stages.basis.ekfac import Ekfac

A, G = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.eye(3)


class Misnamed(Ekfac):
    """States a form that there is not."""

    @property
    def forms(self) -> dict[str, str]:
        return {"eigenvalues": "positive"}


def kept() -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return a decomposition and moments that are sound."""
    parts = {}
    for name, matrix in {"A": A, "G": G}.items():
        values, vectors = torch.linalg.eigh(matrix)
        parts[name] = {"eigenvalues": values, "eigenvectors": vectors}
    return parts, {"scale": torch.ones(3, 2)}


def refused(
    parts: dict[str, dict[str, Tensor]], moments: dict[str, Tensor], basis: Ekfac | None = None
) -> None:
    damage = Damage()
    matrices = {"A": A, "G": G}
    check_forms(basis or Ekfac(), parts, moments, matrices, (3, 2), " of layer 'fc'", damage)
    damage.refuse()


def test_what_is_sound_passes() -> None:
    refused(*kept())


@pytest.mark.parametrize(
    ("matrix", "part", "value", "words"),
    [
        ("A", "eigenvalues", torch.tensor([-1.0, 2.0]), "A.eigenvalues of layer 'fc' holds neg"),
        ("A", "eigenvalues", torch.ones(3), r"has the shape \(3,\), where it must be \(2,\)"),
        ("A", "eigenvectors", torch.ones(2, 2), "A.eigenvectors of layer 'fc'"),
        ("G", "eigenvectors", 2 * torch.eye(3), "G.eigenvectors of layer 'fc'"),
        ("G", "eigenvalues", torch.ones(3, dtype=torch.float16), "has the dtype torch.float16"),
    ],
)
def test_a_part_without_its_form_is_refused(
    matrix: str, part: str, value: Tensor, words: str
) -> None:
    parts, moments = kept()
    parts[matrix][part] = value
    with pytest.raises(StateError, match=words):
        refused(parts, moments)


def test_a_moment_of_another_shape_is_refused() -> None:
    parts, _ = kept()
    with pytest.raises(StateError, match=r"moment.scale of layer 'fc' has the shape \(2, 3\)"):
        refused(parts, {"scale": torch.ones(2, 3)})


def test_the_diagonal_of_a_matrix_is_no_matrix() -> None:
    """Of groups, a has two dimensions that may be equal."""
    damage, a = Damage(), torch.ones(2, 2)
    basis = Ekfac(inputs="diagonal")
    check_forms(basis, {"a": {"eigenvalues": a}}, {}, {"a": a}, (2, 1, 2), "", damage)
    damage.refuse()


def test_a_form_that_is_not_known_is_refused() -> None:
    with pytest.raises(PluginError, match=r"Misnamed states the form 'positive'.*Use one of: chol"):
        refused(*kept(), Misnamed())


def test_curvature_is_kept_in_float32_or_float64() -> None:
    damage = Damage()
    assert precise("it", torch.ones(1, dtype=torch.float64), damage)
    assert not precise("it", torch.ones(1, dtype=torch.bfloat16), damage)
    with pytest.raises(StateError, match=r"it has the dtype torch\.bfloat16"):
        damage.refuse()


class Roots(Ekfac):
    """States what a chain over time keeps."""

    forms = MappingProxyType(
        {
            "gains": "correlations",
            "root": "root",
            "next": "contraction",
            "number": "count",
            "mean": "matrix",
            "low": "lower",
            "up": "upper",
        }
    )


def chain_parts() -> dict[str, dict[str, Tensor]]:
    """Return parts of these forms that are sound."""
    both = {"root": -A, "next": torch.tensor([[0.6, -0.8], [0.0, 1.0]]), "mean": 0 * A}
    low = torch.tensor([[-1.0, 0.0], [3.0, 2.0]])
    parts = {"gains": torch.tensor([-1.0, 1.0]), "low": low, "up": low.mT, **both}
    return {"A": parts, "steps": {"number": torch.tensor([7.0])}}


def refused_chain(parts: dict[str, dict[str, Tensor]]) -> None:
    damage, matrices = Damage(), {"A": A, "steps": torch.tensor([7.0, 49.0])}
    check_forms(Roots(), parts, {}, matrices, (3, 2), "", damage)
    damage.refuse()


def test_a_sound_chain_passes() -> None:
    refused_chain(chain_parts())


@pytest.mark.parametrize(
    ("matrix", "part", "value", "words"),
    [
        ("A", "gains", torch.tensor([0.0, -1.1]), "A.gains holds more than 1 in size"),
        ("A", "gains", torch.ones(2, 2), r"the shape \(2, 2\), where it must be \(2,\)"),
        ("A", "root", torch.tensor([[1.0, 1.0], [0.0, 0.0]]), "A.root cannot be inverted"),
        ("A", "root", torch.tensor([[1.0, 0.0], [1.0, 0.0]]), "A.root cannot be inverted"),
        ("A", "root", torch.eye(3), r"the shape \(3, 3\), where it must be \(2, 2\)"),
        ("A", "next", torch.tensor([[0.8, 0.8], [0.0, 1.0]]), "A.next has rows longer than 1"),
        ("A", "low", torch.tensor([[1.0, 0.1], [0.0, 1.0]]), "A.low is not lower triangular"),
        ("A", "low", torch.tensor([[1.0, 0.0], [1.0, 0.0]]), "A.low is not lower triangular"),
        ("A", "low", torch.eye(3), r"the shape \(3, 3\), where it must be \(2, 2\)"),
        ("A", "up", torch.tensor([[1.0, 0.0], [0.1, 1.0]]), "A.up is not upper triangular"),
        ("A", "up", torch.tensor([[0.0, 1.0], [0.0, 1.0]]), "A.up is not upper triangular"),
        ("A", "mean", torch.eye(3), r"the shape \(3, 3\), where it must be \(2, 2\)"),
        ("A", "mean", torch.eye(2, dtype=torch.float16), r"the dtype torch\.float16"),
        ("steps", "number", torch.tensor([7.5]), "steps.number is no whole number"),
        ("steps", "number", torch.tensor([0.0]), "steps.number is no whole number"),
        ("steps", "number", torch.ones(2), r"the shape \(2,\), where it must be \(1,\)"),
        ("A", "gains", torch.zeros(2, dtype=torch.float64), "several dtypes"),
    ],
)
def test_a_chain_without_its_forms_is_refused(
    matrix: str, part: str, value: Tensor, words: str
) -> None:
    parts = chain_parts()
    parts[matrix][part] = value
    with pytest.raises(StateError, match=words):
        refused_chain(parts)


def test_a_root_that_is_a_diagonal_has_no_zero() -> None:
    for values, sound in ((torch.tensor([1.0, -2.0]), True), (torch.tensor([1.0, 0.0]), False)):
        damage = Damage()
        damage.check_form("it", values, "root")
        if sound:
            damage.refuse()
        else:
            with pytest.raises(StateError, match="it cannot be inverted: it has a zero"):
                damage.refuse()
