"""Values and forms of saved tensors: what is damaged is found, and what is legitimate passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kfactk import StateError, linalg
from kfactk.preconditioner.damage import (
    SHOWN,
    Damage,
    curvature_fault,
    form_fault,
    number_of,
    real_values,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]


def refused(damage: Damage) -> str:
    """Return the message; "" where nothing is wrong."""
    try:
        damage.refuse()
    except StateError as error:
        return str(error)
    return ""


def found(tensor: Tensor, **bounds: Any) -> str:
    damage = Damage()
    damage.check_values("it", tensor, **bounds)
    return refused(damage)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 3, 5])
def test_values_that_are_not_finite_are_found(dtype: torch.dtype, place: int) -> None:
    good = torch.linspace(-1, 1, 6).to(dtype).view(2, 3)
    assert found(good) == found(good, low=-1, high=1) == ""
    for bad in (math.nan, math.inf, -math.inf):
        values = torch.linspace(-1, 1, 6)
        values[place] = bad
        cast = values.to(dtype).view(2, 3)
        if not torch.isfinite(cast.float()).all():
            assert "it holds NaN or inf" in found(cast)
            assert ("it holds NaN" in found(cast, infinite=True)) == bool(
                cast.float().isnan().any()
            )


def test_values_out_of_range_are_found() -> None:
    values = torch.tensor([-2.0, 0.0, 5.0])
    assert "it holds less than 0" in found(values, low=0)
    assert "it holds more than 4 in size" in found(values, high=4)
    assert found(values, low=-2, high=5) == ""
    assert "less than 0" in found(torch.tensor([1, -1]), low=0)
    assert found(torch.tensor([math.inf]), low=0, infinite=True) == ""
    assert "less than 0" in found(torch.tensor([-math.inf]), low=0, infinite=True)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(0),
        torch.ones(2, 0, dtype=torch.float64),
        torch.tensor([True]),
        torch.tensor(3),
        torch.tensor([255], dtype=torch.uint8),
        torch.ones(3, 2).mT,
        torch.ones(()).expand(4),
        torch.eye(3).to_sparse(),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, requires_grad=True),
    ],
    ids=str,
)
def test_values_of_every_kind_of_tensor_are_read(tensor: Tensor) -> None:
    assert found(tensor) == ""


def test_values_of_sparse_and_complex_tensors_are_read() -> None:
    bad = torch.tensor([1.0, math.nan])
    assert "NaN" in found(bad.to_sparse())
    assert "NaN" in found(torch.complex(torch.ones(2), bad))
    assert real_values(torch.tensor([True])) is None


def test_faults_are_read_together_and_counted() -> None:
    damage = Damage()
    for number in range(SHOWN + 2):
        damage.check_values(f"tensor {number}", torch.tensor(math.nan))
        damage.check_values(f"tensor {number}", torch.tensor(math.nan))
    damage.note("an entry is gone")
    text = refused(damage)
    assert text.startswith("the saved state is damaged: an entry is gone; tensor 0 holds NaN")
    assert "(and 3 more). Load an earlier checkpoint." in text
    damage = Damage()
    damage.suspect(torch.tensor(False), "nothing")
    assert refused(damage) == ""
    damage.note("damage")
    damage.note_misfit("a shape")
    assert refused(damage).startswith(
        "the saved state does not fit this model and recipe: a shape."
    )


def of_form(tensor: Tensor, form: str) -> bool:
    damage = Damage()
    damage.check_form("it", tensor, form)
    return not refused(damage)


def gram(n: int, rank: int, dtype: torch.dtype, *lead: int) -> Tensor:
    rows = torch.randn(*lead, n, rank, dtype=torch.float64)
    return (rows @ rows.mT).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e12, 1e30])
@pytest.mark.parametrize(("n", "rank"), [(1, 1), (7, 7), (40, 3), (150, 150)])
def test_factors_and_their_decompositions_have_their_forms(
    n: int, rank: int, size: float, dtype: torch.dtype
) -> None:
    factor = gram(n, rank, dtype, 2) * size
    assert of_form(factor, "semidefinite")
    values, vectors = linalg.eigh(factor)
    assert of_form(values, "nonnegative")
    assert of_form(vectors, "eigenvectors")
    _, turned = linalg.orthogonal_iteration(factor * 1.1, vectors, values)
    assert of_form(turned, "eigenvectors")
    shift = factor.diagonal(dim1=-2, dim2=-1).mean(-1) * 1e-3
    assert of_form(linalg.cholesky(factor, shift), "cholesky")


def test_zeros_and_identities_have_their_forms() -> None:
    zeros, eye = torch.zeros(3, 4, 4), torch.eye(4).expand(3, 4, 4)
    assert of_form(zeros, "semidefinite")
    assert of_form(zeros, "nonnegative")
    assert of_form(eye, "eigenvectors")
    assert of_form(eye, "cholesky")
    assert all(of_form(torch.zeros(0, 0), form) for form in ("semidefinite", "eigenvectors"))


def test_factors_that_are_no_such_thing_are_found() -> None:
    factor = gram(6, 6, torch.float32)
    asymmetric, indefinite = factor.clone(), factor.clone()
    asymmetric[0, 1] += factor.abs().max()
    indefinite[0, 1] = indefinite[1, 0] = 2 * factor.diagonal().max()
    for bad in (-factor, asymmetric, indefinite, factor.triu()):
        assert not of_form(bad, "semidefinite")


@pytest.mark.parametrize("n", [2, 5, 60])
def test_vectors_that_are_not_orthonormal_are_found(n: int) -> None:
    vectors = linalg.eigh(gram(n, n, torch.float32, 2))[1]
    flipped, doubled, scaled, swapped = (vectors.clone() for _ in range(4))
    flipped[0, 0, 0] += 0.5
    doubled[1, :, 0] = doubled[1, :, 1]
    scaled[1, :, 1] *= 1.1
    for bad in (flipped, doubled, scaled, vectors * 0, torch.ones_like(vectors), vectors * 1e30):
        assert not of_form(bad, "eigenvectors")
    swapped[..., [0, 1]] = swapped[..., [1, 0]]
    assert of_form(swapped, "eigenvectors"), "any order is a basis"


def test_triangles_that_are_no_cholesky_factors_are_found() -> None:
    lower = linalg.cholesky(gram(5, 5, torch.float32), 0.1)
    for bad in (lower.mT, -lower, lower * 0, lower + 1):
        assert not of_form(bad, "cholesky")
    assert not of_form(torch.tensor([1.0, -1e-9]), "nonnegative")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3),
        (3.0, 3),
        (torch.tensor(3), 3),
        (torch.tensor(3.0, dtype=torch.bfloat16), 3),
        (True, None),
        ("3", None),
        (None, None),
        (2.5, None),
        (-1, None),
        (10**30, None),
        (math.nan, None),
        (math.inf, None),
        (torch.tensor([3]), None),
        (torch.tensor(True), None),
        (torch.tensor(3j), None),
        (torch.tensor(3, device="meta"), None),
        (torch.tensor(3).to_sparse(), None),
    ],
    ids=str,
)
def test_a_number_is_one_number_in_range(value: Any, expected: int | None) -> None:
    assert number_of(value, 0, 2**53, whole=True) == expected


def test_tensors_that_cannot_be_curvature_are_named() -> None:
    assert form_fault([1]) == "is no tensor, but a list"
    assert "without data" in form_fault(torch.ones(1, device="meta"))
    assert "torch.sparse_coo" in curvature_fault(torch.ones(1).to_sparse())
    assert curvature_fault(torch.ones(1)) == ""
