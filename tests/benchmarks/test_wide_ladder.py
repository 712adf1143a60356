"""The ladder of wide layers, on sides that are small."""

from __future__ import annotations

import pytest
from torch import nn

from benchmarks import wide_ladder
from benchmarks.wide_ladder import recipe_of, row, seconds_of


@pytest.mark.parametrize("wide", ["diagonal", "blocks"])
def test_every_step_is_timed_with_the_wide_side(wide: str) -> None:
    model, recipe = nn.Linear(6, 20), recipe_of(8, wide, "ekfac")
    assert recipe.coverage(model).rows[0].wide == (
        "output side 20: " + ("3 blocks" if wide == "blocks" else "diagonal"),
    )
    seconds = seconds_of(model, 6, recipe, 4)
    assert len(seconds) == 4
    assert min(seconds) > 0


@pytest.mark.parametrize(
    ("worst", "told"), [(2.9, "2.90"), (3.0, "3.00: not below 3"), (7.5, "7.50: not below 3")]
)
def test_a_worst_step_of_three_medians_is_told(worst: float, told: str) -> None:
    cells = [cell.strip() for cell in row("head", [99.0, 1.0, 1.0, worst, 1.0], 1.25).split("|")]
    assert cells[4] == told


def test_the_first_step_is_shown_apart() -> None:
    cells = [cell.strip() for cell in row("head", [9.0, 1.0, 1.0, 2.0], 1.25).split("|")]
    assert cells[1:-1] == [wide_ladder.MODELS["head"][0], "1", "2", "2.00", "9", "1.2"]
