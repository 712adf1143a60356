"""Which way is taken, where it is known by measurement which is the cheapest."""

from __future__ import annotations

import pytest
from torch import nn

from kfactk_stages.curvature._plan import cheapest, costs_of
from kfactk_stages.curvature._unfold import Window


@pytest.mark.parametrize(
    ("conv", "size", "way"),
    [
        (nn.Conv2d(16, 16, 3, padding=1), 32, "correlation"),
        (nn.Conv2d(64, 64, 3, padding=1), 16, "correlation"),
        (nn.Conv2d(16, 16, 5, padding=2), 32, "correlation"),
        (nn.Conv2d(3, 16, 3, padding=1), 32, "slabs"),
        (nn.Conv2d(16, 32, 3, padding=1, stride=2), 32, "slabs"),
        (nn.Conv2d(32, 64, 3, padding=1), 3, "slabs"),
        (nn.Conv2d(64, 64, 3, padding=1, groups=64), 8, "slabs"),
        (nn.Conv2d(64, 64, 3, padding=1, groups=64), 16, "slabs"),
        (nn.Conv2d(16, 16, 3, padding=1, groups=1), 4, "slabs"),
        (nn.Conv2d(64, 64, 3, padding=1), 4, "correlation"),
        (nn.Conv2d(64, 64, 1), 32, "pixels"),
        (nn.Conv2d(64, 64, 1, stride=2), 32, "pixels"),
        (nn.Conv2d(64, 64, 1, padding=1), 32, "slabs"),
        (nn.Conv2d(4, 4, 3, padding=1), 2, "patches"),
        (nn.Conv2d(64, 10, 1), 1, "pixels"),
    ],
    ids=str,
)
def test_the_cheapest_way_is_taken(conv: nn.Conv2d, size: int, way: str) -> None:
    assert (
        cheapest(Window.of(conv), (size, size), conv.in_channels // conv.groups, 64 * conv.groups)
        == way
    )


@pytest.mark.parametrize(("size", "correlated"), [(3, False), (4, True)])
def test_small_inputs_are_not_correlated(size: int, correlated: bool) -> None:
    """What would be taken off again would leave its rounding."""
    costs = costs_of(Window.of(nn.Conv2d(256, 1, 3, padding=1)), (size, 32), 256, 1000)
    assert ("correlation" in costs) == correlated


def test_twice_the_examples_cost_twice_but_for_the_calls() -> None:
    window = Window.of(nn.Conv2d(16, 16, 3, padding=1))
    one, two, four = (costs_of(window, (16, 16), 16, n) for n in (32, 64, 128))
    assert all(four[way] - two[way] == pytest.approx(2 * (two[way] - one[way])) for way in one)
