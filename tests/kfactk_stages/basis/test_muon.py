"""Muon: the laws that are left; the orthogonal factor against a singular value decomposition."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kfactk import KfactkError, OptionError
from kfactk.testing import BasisLaws
from kfactk_stages.basis.muon import Muon

F64 = torch.float64
CONVERGING = (1.875, -1.25, 0.375)
"""Coefficients whose fixed point is 1: Newton-Schulz of fifth order."""


class TestMuon(BasisLaws):
    stage: ClassVar[Any] = {"name": "muon", "precision": "full"}
    curvature: ClassVar[Any] = "gradient"


def solved(v: Tensor, **options: Any) -> Tensor:
    return Muon(**options).operator({}, {}, 0.0, {}).solve(v)


def orthogonal(v: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(v, full_matrices=False)
    return left @ right


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6), (2, 5, 3), (2, 3, 5)])
def test_the_iteration_finds_the_orthogonal_factor(shape: tuple[int, ...]) -> None:
    v = torch.randn(shape, dtype=F64)
    exact = solved(v, steps=0, scale="none")
    torch.testing.assert_close(exact, orthogonal(v))
    found = solved(v, steps=40, coefficients=CONVERGING, precision="full", scale="none")
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("precision", ["full", "bfloat16"])
def test_singular_values_end_near_one(precision: str) -> None:
    v = torch.randn(20, 12, dtype=F64)
    found = solved(v, precision=precision, scale="none")
    values = torch.linalg.svdvals(found)
    assert 0.5 < float(values.min()) <= float(values.max()) < 1.3
    assert found.dtype == F64


@pytest.mark.parametrize(
    ("scale", "tall", "wide"),
    [
        ("original", 2.0, 1.0),
        ("spectral", 2.0, 0.5),
        ("match_rms", 0.2 * 8**0.5, 0.2 * 8**0.5),
        ("none", 1.0, 1.0),
    ],
)
def test_the_scale_depends_on_the_shape(scale: str, tall: float, wide: float) -> None:
    for v, factor in ((torch.randn(8, 2), tall), (torch.randn(2, 8), wide)):
        torch.testing.assert_close(solved(v, steps=0, scale=scale), factor * orthogonal(v))


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (2, 6, 3)])
def test_even_lines_have_one_length_and_the_norm_stays(shape: tuple[int, ...]) -> None:
    v = torch.randn(shape, dtype=F64)
    exact = orthogonal(v)
    found = solved(v, steps=0, scale="none", even=True)
    across = -1 if shape[-2] > shape[-1] else -2
    lengths = exact.square().sum(across, keepdim=True).sqrt()
    assert float(lengths.max() - lengths.min()) > 0.01
    torch.testing.assert_close(found, exact / lengths * (3 / 6) ** 0.5)
    torch.testing.assert_close(found.square().sum((-2, -1)), exact.square().sum((-2, -1)))
    torch.testing.assert_close(solved(v.mT, steps=0, scale="none", even=True), found.mT)


def test_the_factor_multiplies() -> None:
    v = torch.randn(4, 3, dtype=F64)
    torch.testing.assert_close(solved(v, steps=0, factor=2.5), 2.5 * solved(v, steps=0))


def test_lines_of_a_square_matrix_are_even_already() -> None:
    v = torch.randn(4, 4, dtype=F64)
    torch.testing.assert_close(solved(v, steps=0, scale="none", even=True), orthogonal(v))


@pytest.mark.parametrize("steps", [0, 5])
def test_nothing_stays_nothing_and_rank_is_kept(steps: int) -> None:
    assert not solved(torch.zeros(3, 2), steps=steps).any()
    one = torch.outer(torch.ones(3, dtype=F64), torch.ones(2, dtype=F64))
    assert (
        torch.linalg.matrix_rank(
            solved(one, steps=steps, **({"precision": "full"} if steps else {})), rtol=1e-6
        )
        == 1
    )


def test_there_is_no_fisher_matrix() -> None:
    made = Muon().operator({}, {}, 0.0, {})
    assert made.condition() is None
    with pytest.raises(KfactkError, match="no F to multiply by"):
        made.multiply(torch.ones(2, 2))


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (1, 1), (2, 1, 3)])
def test_vectors_are_not_its_business(shape: tuple[int, ...]) -> None:
    assert "this is a vector" in str(Muon().unsupported(shape))
    assert Muon().unsupported((2, 3)) is None


@pytest.mark.parametrize(
    "option",
    [
        {"steps": -1},
        {"coefficients": (1.0, 2.0)},
        {"coefficients": (1.0, 2.0, float("nan"))},
        {"precision": "float16"},
        {"scale": "rms"},
        {"eps": 0.0},
        {"even": 1},
        {"factor": 0.0},
    ],
)
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(option))}="):
        Muon(**option)
