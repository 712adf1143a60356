"""What one rank reads from the placement's answer, against shares written out; no processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
from torch import nn

from kfactk import Assignment, Layer, PluginError, Share, StateError, Work, Workload
from kfactk.preconditioner.placement import ALONE, BlockPlacement
from kfactk.preconditioner.schedule import UpdateSchedule
from kfactk.stages import Basis
from kfactk_stages.basis.kfac import KfacInverse

SHARES = {
    "conv": Share({"A": (0,), "G": (2,)}, (0, 2)),
    "fc": Share({"A": (3,), "G": (3,)}, (1,)),
    "all": Share({"A": (0, 1, 2, 3), "G": (0, 1, 2, 3)}, (0, 1, 2, 3)),
}


@attrs.frozen
class Given:
    """The shares above, for the layers it is asked about."""

    process_group: Any = None
    wire_dtype: str | None = None

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        names = [work.layer for work in workload.works]
        return Assignment("given", {name: SHARES[name] for name in names}, f"{len(names)} layers")


class Failing(Given):
    def assign(self, workload: Workload, ranks: int) -> Assignment:
        raise ZeroDivisionError("no ranks")


@attrs.define
class FakeRanks:
    """Stands for one of several ranks; notes which groups are made."""

    rank: int
    size: int = 4
    agree: bool = True
    groups: list[set[tuple[int, ...]]] = attrs.Factory(list)

    @property
    def everyone(self) -> tuple[int, ...]:
        return tuple(range(self.size))

    def same(self, what: str) -> bool:
        return self.agree

    def prepare(self, groups: Any) -> None:
        self.groups.append({group for group in groups if 1 < len(group) < self.size})


@attrs.frozen(eq=False)
class FakeBlock:
    """Has the same two matrices, whatever its name."""

    name: str
    basis: Basis = attrs.field(factory=KfacInverse)
    sampled: bool = False

    @property
    def layer(self) -> Layer:
        return Layer(self.name, nn.Linear(2, 2), ("weight", "bias"))

    def work(self) -> Work:
        return Work(self.name, {"A": (3, 3), "G": (2, 2)}, (2, 3))


def blocks(*names: str) -> list[Any]:
    return [FakeBlock(name) for name in names]


def placed(
    ranks: FakeRanks, placement: Any = None, names: Sequence[str] = tuple(SHARES)
) -> BlockPlacement:
    schedule = UpdateSchedule(1, 1, 1)
    found = BlockPlacement(placement or Given(), ranks, schedule)  # type: ignore[arg-type]
    found.extend(blocks(*names))
    return found


def test_who_does_what_is_read_off_the_shares() -> None:
    two = placed(FakeRanks(2))
    assert two.factor_workers("conv", "A") == (0,)
    assert two.factor_workers("conv", "G") == (2,)
    # A factor that is no matrix goes to all ranks that decompose.
    assert two.factor_workers("conv", "of both") == (0, 2)
    assert [
        two.wanted(key) for key in ("factor.G|conv", "factor.other|conv", "moment.scale|fc")
    ] == [(2,), (0, 2), (1,)]
    assert [two.decomposed_here(block) for block in blocks(*SHARES)] == [{"G"}, set(), {"A", "G"}]
    assert [two.holds(name) for name in SHARES] == [True, False, True]
    assert [two.everywhere(name) for name in SHARES] == [False, False, True]
    assert [two.divided(name) for name in SHARES] == [True, True, False]
    assert [two.apart(name) for name in SHARES] == [True, False, False]
    assert (two.shapes("fc"), two.gradient("fc")) == ({"A": (3, 3), "G": (2, 2)}, (2, 3))


def test_each_other_rank_receives_from_one_gradient_worker() -> None:
    zero = placed(FakeRanks(0))
    # Ranks 1 and 3 receive from number 1 modulo 2 of the gradient workers.
    assert zero.receivers(SHARES["conv"], 0) == (0,)
    assert zero.receivers(SHARES["conv"], 2) == (1, 2, 3)
    assert zero.receivers(SHARES["fc"], 1) == (0, 1, 2, 3)
    assert zero.receivers(SHARES["all"], 3) == (3,)


@pytest.mark.parametrize(
    ("layer", "refreshed", "visiting", "expected"),
    [
        ("conv", True, False, {"A": (0, (0, 2)), "G": (2, (0, 2))}),
        ("conv", True, True, {"A": (0, (0, 1, 2, 3)), "G": (2, (0, 1, 2, 3))}),
        # From the first gradient worker to the ranks that are none.
        ("conv", False, True, {"A": (0, (0, 1, 3)), "G": (0, (0, 1, 3))}),
        ("fc", True, False, {"A": (3, (1, 3)), "G": (3, (1, 3))}),
        ("fc", False, True, {"A": (1, (0, 1, 2, 3)), "G": (1, (0, 1, 2, 3))}),
        ("all", True, True, {}),
        ("all", False, True, {}),
    ],
)
def test_routes_of_decompositions(
    layer: str, refreshed: bool, visiting: bool, expected: dict[str, Any]
) -> None:
    for rank in range(4):
        assert (
            placed(FakeRanks(rank)).routes(layer, refreshed=refreshed, visiting=visiting)
            == expected
        )


def test_groups_are_made_for_every_route() -> None:
    for rank in range(4):
        ranks = FakeRanks(rank)
        found = placed(ranks)
        [made] = ranks.groups
        assert made == {(0, 2), (1, 2, 3), (1, 3), (0, 1, 3)}
        for layer in SHARES:
            for refreshed, visiting in ((True, False), (True, True), (False, True)):
                routes = found.routes(layer, refreshed=refreshed, visiting=visiting)
                assert {members for _, members in routes.values()} <= made | {(0, 1, 2, 3)}


def test_layers_that_appear_later_are_added() -> None:
    ranks = FakeRanks(1)
    found = placed(ranks, names=["conv"])
    first = found.assignment
    found.extend(blocks("conv"))
    assert found.assignment is first
    found.extend(blocks("conv", "fc"))
    assert (list(found.assignment.shares), found.assignment.reason) == (["conv", "fc"], "1 layers")
    assert ranks.groups == [{(0, 2), (1, 2, 3), (0, 1, 3)}, {(1, 3)}]
    assert found.summary() == {
        "assignment": {"strategy": "given", "ranks": 4, "reason": "1 layers"}
    }


def test_places_follow_layers_to_their_new_names() -> None:
    found = placed(FakeRanks(1), names=["conv", "fc"])
    found.rename({"conv": "fc", "fc": "conv"})
    assert (found.share("fc"), found.share("conv")) == (SHARES["conv"], SHARES["fc"])
    found.rename({"fc": "conv"})
    assert found.share("conv") == SHARES["conv"]
    assert not found.knows("fc"), "no layer has this name any more"


def test_the_place_of_a_replaced_layer_is_forgotten() -> None:
    ranks = FakeRanks(1)
    found = placed(ranks)
    found.forget("conv")
    assert [found.knows(name) for name in SHARES] == [False, True, True]
    assert not found.everywhere("conv"), "a new layer has no place yet"
    found.extend(blocks(*SHARES))
    assert found.share("conv") == SHARES["conv"]


def test_a_single_process_asks_no_placement() -> None:
    found = placed(FakeRanks(0, 1), Failing())
    assert found.assignment is ALONE
    assert found.summary() == {}
    assert found.factor_workers("x", "A") == found.gradient_workers("x") == (0,)
    assert found.decomposed_here(blocks("x")[0]) == {"A", "G"}
    assert (found.holds("x"), found.everywhere("x"), found.divided("x"), found.apart("x")) == (
        True,
        True,
        False,
        False,
    )
    assert found.routes("x", refreshed=True, visiting=True) == {}


def test_ranks_that_disagree_are_refused() -> None:
    with pytest.raises(StateError, match="ranks disagree on the layers of the model"):
        placed(FakeRanks(0, agree=False))


@attrs.define
class Unlike(FakeRanks):
    """Agrees on the layers only."""

    asked: int = 0

    def same(self, what: str) -> bool:
        self.asked += 1
        return self.asked == 1


def test_answers_that_differ_between_ranks_are_refused() -> None:
    with pytest.raises(
        PluginError,
        match=r"placement .*:Given divided the same work differently on another rank.*same options",
    ):
        placed(Unlike(0))
    ranks = Unlike(0)
    with pytest.raises(
        PluginError,
        match=r"placement .*:Failing failed dividing the work \(ZeroDivisionError: no ranks\)",
    ):
        placed(ranks, Failing())
    assert ranks.asked == 2  # so that no other rank waits for it
