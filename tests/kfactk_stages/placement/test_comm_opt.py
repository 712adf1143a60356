"""Matrices divided among ranks, gradients preconditioned by all."""

import pytest

from kfactk import OptionError, Share
from kfactk.testing import PlacementLaws
from kfactk_stages.placement.comm_opt import CommOpt
from tests.kfactk_stages.placement.work import WORKLOAD


class TestCommOpt(PlacementLaws):
    stage = "comm_opt"


def test_pieces_go_longest_first_to_the_least_loaded_rank() -> None:
    """1000 | 512 + 280, then 27, 12, 8 go to the second rank, which has less throughout."""
    everyone = (0, 1)
    assert CommOpt().assign(WORKLOAD, 2).shares == {
        "small": Share({"A": (1,), "G": (1,)}, everyone),
        "large": Share({"A": (0,), "G": (1,)}, everyone),
        "joined": Share({"A": (1,), "G": (1,)}, everyone),
        "flat": Share({"square": (1,)}, everyone),
    }


def test_a_and_g_of_one_layer_may_have_different_ranks() -> None:
    """1000 | 512 | 280 | 27 + 12 + 8."""
    everyone = (0, 1, 2, 3)
    assert CommOpt().assign(WORKLOAD, 4).shares == {
        "small": Share({"A": (3,), "G": (3,)}, everyone),
        "large": Share({"A": (0,), "G": (1,)}, everyone),
        "joined": Share({"A": (2,), "G": (2,)}, everyone),
        "flat": Share({"square": (3,)}, everyone),
    }


@pytest.mark.parametrize("wire", ["float16", "int8", "float64", 16])
def test_wire_dtype_is_checked(wire: object) -> None:
    with pytest.raises(OptionError, match=r"wire_dtype=.* one of 'bfloat16', 'float32', None"):
        CommOpt(wire_dtype=wire)  # type: ignore[arg-type]
