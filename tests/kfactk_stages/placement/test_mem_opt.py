"""Each layer to one rank."""

from kfactk import Share
from kfactk.testing import PlacementLaws
from kfactk_stages.placement.mem_opt import MemOpt
from tests.kfactk_stages.placement.work import WORKLOAD


class TestMemOpt(PlacementLaws):
    stage = "mem_opt"


class TestMemOptRounded(PlacementLaws):
    stage = {"name": "mem_opt", "wire_dtype": "bfloat16"}  # noqa: RUF012


def test_whole_layers_go_longest_first() -> None:
    """1512 | 280 + 35 + 12."""
    one, other = (0,), (1,)
    assert MemOpt().assign(WORKLOAD, 2).shares == {
        "small": Share({"A": other, "G": other}, other),
        "large": Share({"A": one, "G": one}, one),
        "joined": Share({"A": other, "G": other}, other),
        "flat": Share({"square": other}, other),
    }


def test_surplus_ranks_get_no_layer() -> None:
    shares = MemOpt().assign(WORKLOAD, 6).shares
    assert {name: share.gradient_workers for name, share in shares.items()} == {
        "small": (2,),
        "large": (0,),
        "joined": (1,),
        "flat": (3,),
    }
