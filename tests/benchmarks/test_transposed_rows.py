"""The comparison of two views of transposed convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.transposed_rows import VIEWS, decoder, errors, exact_gradients, smooth


@pytest.fixture(autouse=True)
def in_double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def found(geometry: tuple[int, int, int], layer: int, images: Tensor) -> dict[Any, float]:
    torch.manual_seed(0)
    model = decoder(*geometry)
    return errors(model[layer], *exact_gradients(model, model[layer], images))


def test_overlapping_patches_are_no_rows() -> None:
    """Pixels of the output are independent: with their rows K-FAC is nearly exact."""
    error = found((3, 1, 1), 2, smooth(6, 3, 3))
    for basis in ("K-FAC", "EKFAC"):
        outputs, inputs = (error[basis, view] for view in VIEWS)
        assert outputs < 0.1 < 0.5 < inputs


def test_one_row_of_one_example_is_exact() -> None:
    """One pixel and one example: one row in the view of inputs, several in that of outputs."""
    error = found((2, 2, 0), 0, smooth(1, 3, 1))
    assert max(error[basis, VIEWS[1]] for basis in ("K-FAC", "EKFAC")) < 1e-12
    assert error["EKFAC", VIEWS[0]] <= error["K-FAC", VIEWS[0]]
