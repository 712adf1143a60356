"""Everything to everybody."""

from kfactk import Share
from kfactk.testing import PlacementLaws
from kfactk_stages.placement.replicated import Replicated
from tests.kfactk_stages.placement.work import WORKLOAD


class TestReplicated(PlacementLaws):
    stage = "replicated"


def test_every_rank_does_all() -> None:
    found = Replicated().assign(WORKLOAD, 3)
    everyone = (0, 1, 2)
    assert found.shares == {
        "small": Share({"A": everyone, "G": everyone}, everyone),
        "large": Share({"A": everyone, "G": everyone}, everyone),
        "joined": Share({"A": everyone, "G": everyone}, everyone),
        "flat": Share({"square": everyone}, everyone),
    }
    assert (found.strategy, found.reason) == ("replicated", "every rank does all")


def test_equality_is_over_the_group() -> None:
    assert Replicated() == Replicated(process_group=None)
    assert Replicated() != Replicated(process_group="other")
