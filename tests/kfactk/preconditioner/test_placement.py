"""What one rank makes of a placement's answer, against answers written out; no processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import nn

from kfactk import Assignment, Layer, PluginError, Share, StateError, Workload
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.placement import ALONE, BlockPlacement, device_of
from kfactk.preconditioner.schedule import UpdateSchedule
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.curvature.kfac import Kfac

SHARES = {
    "conv": Share({"A": (0,), "G": (2,)}, (0, 2)),
    "fc": Share({"A": (3,), "G": (3,)}, (1,)),
    "all": Share({"A": (0, 1, 2, 3), "G": (0, 1, 2, 3)}, (0, 1, 2, 3)),
}


@attrs.frozen
class Given:
    """Gives the shares above; keeps what it was asked."""

    asked: list[Workload] = attrs.field(factory=list, kw_only=True)
    process_group: Any = None
    wire_dtype: str | None = None

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        self.asked.append(workload)
        names = [work.layer for work in workload.works]
        return Assignment("given", {name: SHARES[name] for name in names}, f"{len(names)} layers")


class Failing(Given):
    def assign(self, workload: Workload, ranks: int) -> Assignment:
        raise ZeroDivisionError("no ranks")


@attrs.define
class OneOf:
    """Stands for the communicator of one of several ranks; notes which groups are made."""

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


def blocks(*names: str, module: nn.Module | None = None, basis: Any = None) -> list[Block]:
    module = nn.Linear(2, 2) if module is None else module
    parameters = ("weight", "bias")
    return [Block(Layer(n, module, parameters), Kfac(), basis or KfacInverse()) for n in names]


SCHEDULE = UpdateSchedule(3, 4, 6)


def placed(
    communicator: OneOf, stage: Any = None, names: Sequence[str] = tuple(SHARES)
) -> BlockPlacement:
    found = BlockPlacement(stage or Given(), communicator, SCHEDULE)  # type: ignore[arg-type]
    found.extend(blocks(*names))
    return found


def test_who_does_what_is_read_off_the_shares() -> None:
    two = placed(OneOf(2))
    assert two.factor_workers("conv", "A") == (0,)
    assert two.factor_workers("conv", "G") == (2,)
    assert two.factor_workers("conv", "of both") == (
        0,
        2,
    )  # a statistic that is no matrix goes to all inverse workers
    assert [
        two.wanted(key) for key in ("factor.G|conv", "factor.other|conv", "moment.scale|fc")
    ] == [(2,), (0, 2), (1,)]
    conv, fc, everywhere = blocks("conv", "fc", "all")
    assert two.decomposed_here(conv) == {"G"}
    assert two.decomposed_here(fc) == frozenset()
    assert two.decomposed_here(everywhere) == {"A", "G"}
    assert [two.holds(name) for name in SHARES] == [True, False, True]
    assert [two.everywhere(name) for name in SHARES] == [False, False, True]
    assert [two.divided(name) for name in SHARES] == [True, True, False]
    assert [two.apart(name) for name in SHARES] == [True, False, False]
    assert (two.shapes("fc"), two.gradient("fc")) == (
        {"A": (3, 3), "G": (2, 2)},
        (2, 3),
    )


def test_each_rank_outside_receives_from_one_gradient_worker() -> None:
    zero = placed(OneOf(0))
    assert zero.receivers(SHARES["conv"], 0) == (
        0,
    )  # ranks 1 and 3 receive from the worker of number 1 modulo 2
    assert zero.receivers(SHARES["conv"], 2) == (1, 2, 3)
    assert zero.receivers(SHARES["fc"], 1) == (0, 1, 2, 3)
    assert zero.receivers(SHARES["all"], 3) == (3,)


@pytest.mark.parametrize(
    ("layer", "refreshed", "visiting", "expected"),
    [
        ("conv", True, False, {"A": (0, (0, 2)), "G": (2, (0, 2))}),
        ("conv", True, True, {"A": (0, (0, 1, 2, 3)), "G": (2, (0, 1, 2, 3))}),
        (
            "conv",
            False,
            True,
            {"A": (0, (0, 1, 3)), "G": (0, (0, 1, 3))},
        ),  # from the first gradient worker to all others
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
        assert placed(OneOf(rank)).routes(layer, refreshed=refreshed, visiting=visiting) == expected


def test_groups_are_made_for_every_route() -> None:
    for rank in range(4):
        ranks = OneOf(rank)
        found = placed(ranks)
        [made] = ranks.groups
        assert made == {(0, 2), (1, 2, 3), (1, 3), (0, 1, 3)}
        for layer in SHARES:
            for refreshed, visiting in ((True, False), (True, True), (False, True)):
                routes = found.routes(layer, refreshed=refreshed, visiting=visiting)
                assert {members for _, members in routes.values()} <= made | {(0, 1, 2, 3)}


def test_layers_that_appear_later_are_added() -> None:
    ranks = OneOf(1)
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


def test_a_single_process_asks_no_stage() -> None:
    found = placed(OneOf(0, 1), Failing())
    assert found.assignment is ALONE
    assert found.summary() == {}
    assert found.factor_workers("x", "A") == found.gradient_workers("x") == (0,)
    [x] = blocks("x")
    assert found.decomposed_here(x) == {"A", "G"}
    assert (found.holds("x"), found.everywhere("x"), found.divided("x"), found.apart("x")) == (
        True,
        True,
        False,
        False,
    )
    assert found.routes("x", refreshed=True, visiting=True) == {}


def test_ranks_that_disagree_are_refused() -> None:
    with pytest.raises(StateError, match="ranks disagree on the layers of the model"):
        placed(OneOf(0, agree=False))


@attrs.define
class Unlike(OneOf):
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


def test_the_workload_tells_shapes_periods_and_precision() -> None:
    stage = Given()
    found = BlockPlacement(stage, OneOf(0), SCHEDULE)  # type: ignore[arg-type]
    assert not found.knows("conv")
    found.extend(blocks("conv", module=nn.Linear(4, 3).to(torch.bfloat16)))
    found.extend(blocks("fc", module=nn.Linear(4, 3).double(), basis=Ekfac()))
    one, other = stage.asked
    assert (one.factor_every, one.scale_every, one.basis_every) == (3, 4, 6)
    assert [work.matrices for work in one.works] == [{"A": (5, 5), "G": (3, 3)}]
    assert (one.itemsize, one.sampled, one.device) == (4, False, "cpu")
    assert (other.itemsize, other.sampled) == (8, True)
    assert found.knows("conv")
    assert device_of(blocks("fc")) == device_of([]) == torch.device("cpu")


def test_places_follow_layers_to_their_new_names() -> None:
    """Names may be swapped, and one that is free again belongs to no layer."""
    found = placed(OneOf(2))
    found.rename({"conv": "fc", "fc": "conv", "all": "last"})
    assert found.assignment.shares == {
        "fc": SHARES["conv"],
        "conv": SHARES["fc"],
        "last": SHARES["all"],
    }
    assert not found.knows("all")
    found.rename({"new": "conv"})  # a layer without a place took the name of one that is gone
    assert not found.knows("conv")
    found.forget("last")
    found.forget("nobody")
    assert set(found.assignment.shares) == {"fc"}
    assert found.shapes("fc") == {"A": (3, 3), "G": (2, 2)}


def test_a_forgotten_layer_is_placed_again_by_its_new_shapes() -> None:
    found = placed(OneOf(2))
    found.forget("fc")
    found.extend(blocks("fc", module=nn.Linear(6, 5)))
    assert (found.gradient("fc"), found.gradient("conv")) == ((5, 7), (2, 3))


def test_a_single_process_renames_nothing() -> None:
    found = placed(OneOf(0, 1), Failing())
    found.rename({"conv": "fc"})
    found.forget("conv")
    assert found.assignment is ALONE
