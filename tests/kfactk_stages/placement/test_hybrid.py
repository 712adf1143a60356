"""Each layer to a row of ranks."""

import pytest

from kfactk import OptionError, Share
from kfactk.testing import PlacementLaws
from kfactk_stages.placement.comm_opt import CommOpt
from kfactk_stages.placement.hybrid import Hybrid
from kfactk_stages.placement.mem_opt import MemOpt
from tests.kfactk_stages.placement.work import WORKLOAD


class TestHybrid(PlacementLaws):
    stage = "hybrid"


class TestHybridOfAThird(PlacementLaws):
    stage = {"name": "hybrid", "fraction": 0.34}  # noqa: RUF012


def test_layers_go_to_groups_and_matrices_to_their_ranks() -> None:
    """Groups 1512 | 280 + 35 + 12; in the first 1000 | 512, in the second 280 | 27 + 12 + 8."""
    first, second = (0, 1), (2, 3)
    assert Hybrid(fraction=0.5).assign(WORKLOAD, 4).shares == {
        "small": Share({"A": (3,), "G": (3,)}, second),
        "large": Share({"A": (0,), "G": (1,)}, first),
        "joined": Share({"A": (2,), "G": (2,)}, second),
        "flat": Share({"square": (3,)}, second),
    }


@pytest.mark.parametrize(
    ("fraction", "ranks", "width"),
    [
        (1, 6, 6),
        (0.99, 6, 3),
        (0.5, 6, 3),
        (0.49, 6, 2),
        (1 / 3, 6, 2),
        (0.1, 6, 1),
        (0.5, 5, 1),
        (0.5, 7, 1),
        (0.75, 8, 4),
        (0.01, 4, 1),
    ],
)
def test_width_is_a_divisor_of_the_ranks(fraction: float, ranks: int, width: int) -> None:
    """The largest that is no more than the fraction of the ranks, and 1 at least."""
    assert {
        len(share.gradient_workers)
        for share in Hybrid(fraction=fraction).assign(WORKLOAD, ranks).shares.values()
    } == {width}


def test_extreme_fractions_equal_other_placements() -> None:
    assert Hybrid(fraction=1).assign(WORKLOAD, 4).shares == CommOpt().assign(WORKLOAD, 4).shares
    assert Hybrid(fraction=0.25).assign(WORKLOAD, 4).shares == MemOpt().assign(WORKLOAD, 4).shares


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, True, "half", None])
def test_fraction_is_checked(fraction: object) -> None:
    with pytest.raises(OptionError, match=r"fraction=.* a finite number in \(0, 1\]"):
        Hybrid(fraction=fraction)  # type: ignore[arg-type]
