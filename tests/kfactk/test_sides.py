"""Names of the matrices that stand for a side, and how a side is divided."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from kfactk.sides import DIAGONALS, SIDES, block_slices, mean_of, names_of, side_of, with_sides


@given(st.integers(1, 400), st.integers(1, 60))
def test_blocks_divide_a_side_as_equally_as_can_be(n: int, most: int) -> None:
    slices = list(block_slices(n, most).values())
    covered = [index for each in slices for index in range(each.start, each.stop)]
    sizes = [each.stop - each.start for each in slices]
    assert covered == list(range(n))
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == 1 or (len(sizes) - 1) * most < n


def test_blocks_come_in_their_order() -> None:
    names = [f"G{number}" for number in range(12)]
    assert names_of("G", sorted(names)) == names
    assert {side_of(name) for name in names} == {"G"}
    assert side_of("Omega") == "Omega"


@pytest.mark.parametrize("side", SIDES)
def test_the_mean_of_blocks_is_that_of_the_side(side: str) -> None:
    whole = torch.diag(torch.arange(1.0, 8.0, dtype=torch.float64))
    blocks = {side + n: whole[each, each] for n, each in block_slices(7, 3).items()}
    means = {name: mean_of(name, block) for name, block in blocks.items()}
    found = with_sides(means, {name: len(block) for name, block in blocks.items()})
    torch.testing.assert_close(found[side], whole.trace() / 7, rtol=1e-15, atol=0)
    diagonal = DIAGONALS[side]
    assert mean_of(diagonal, whole.diagonal()) == whole.trace() / 7
