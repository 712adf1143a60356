"""What one step gathers and refreshes, against periods and overdue work written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kfactk import Layer
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.planner import EMPTY, Planner, StepPlan
from kfactk.preconditioner.schedule import DueWork, UpdateSchedule
from kfactk.stages import Basis
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.curvature.kfac import Kfac


class FakePlacement:
    """Says of each layer whether every rank holds its decomposition."""

    def __init__(self, *elsewhere: str) -> None:
        self.elsewhere = elsewhere

    def everywhere(self, layer: str) -> bool:
        return layer not in self.elsewhere


def made(*bases: Basis, ready: bool = True) -> list[Block]:
    """Return blocks of square layers named "0", "1" and so on."""
    blocks = []
    for number, basis in enumerate(bases):
        module = nn.Linear(4, 4, dtype=torch.float64)
        layer = Layer(str(number), module, ("weight", "bias"))
        block = Block(layer, Kfac(), basis)
        block.state.ready = ready
        blocks.append(block)
    return blocks


def planner(*periods: int, stagger: bool = False, elsewhere: tuple[str, ...] = ()) -> Planner:
    placement: Any = FakePlacement(*elsewhere)
    return Planner(UpdateSchedule(*periods, stagger=stagger), placement)


def flags(plan: StepPlan, block: Block) -> str:
    """Return the letters of what is planned: factors, scale, basis; "-" for nothing."""
    found = plan.plans.get(block)
    if found is None:
        return "-"
    return "f" * found.factors + "s" * found.scale + "b" * found.basis


def test_blocks_follow_the_periods() -> None:
    """A basis without moments has no scale, and a new basis measures its scale anew."""
    blocks, plans = made(KfacInverse(), Ekfac()), planner(2, 3, 5)
    found = [[flags(plans.plan(step, blocks), block) for step in range(7)] for block in blocks]
    assert found[0] == ["fb", "-", "f", "", "f", "b", "f"]
    assert found[1] == ["fsb", "-", "f", "s", "f", "sb", "fs"]


def test_a_step_without_work_needs_no_forward() -> None:
    blocks, plans = made(Ekfac()), planner(4, 4, 4)
    quiet = plans.plan(1, blocks)
    assert (quiet.due, quiet.passes, quiet.of_interest, quiet.expects_forward) == (False,) * 4
    assert quiet.fingerprint() == EMPTY.fingerprint()
    busy = plans.plan(4, blocks)
    assert (busy.due, busy.passes, busy.of_interest, busy.expects_forward) == (True,) * 4
    assert busy.followed == blocks
    assert list(busy.named()) == ["0"]


def test_a_new_basis_alone_follows_no_layer() -> None:
    plan = planner(2, 2, 3).plan(3, made(KfacInverse()))
    assert plan.due
    assert plan.followed == []
    assert not plan.of_interest


def test_a_block_without_a_decomposition_is_due_at_once() -> None:
    [block] = made(Ekfac(), ready=False)
    plan = planner(4, 4, 4).plan(1, [block])
    assert flags(plan, block) == "fsb"
    assert plan.plans[block].late, "its scale is measured in the basis that the step makes"


def test_overdue_work_is_followed_but_no_forward_is_expected_for_it() -> None:
    waiting, other = made(Ekfac(), Ekfac())
    waiting.state.overdue = DueWork(True, False, False, False)
    waiting.state.missed = True
    plan = planner(4, 4, 4).plan(1, [waiting, other])
    assert flags(plan, waiting) == "f"
    assert plan.followed == [waiting]
    assert plan.plans[waiting].waited_for
    assert not plan.expects_forward
    assert plan.of_interest


def test_moments_are_late_where_a_rank_lacks_the_decomposition() -> None:
    blocks = made(Ekfac(), Ekfac())
    plan = planner(2, 2, 5, elsewhere=("1",)).plan(2, blocks)
    assert [plan.plans[block].late for block in blocks] == [False, True]


@pytest.mark.parametrize(("step", "counted"), [(0, True), (1, False), (3, True), (5, True)])
def test_terms_are_counted_for_moments_of_the_users_gradient(step: int, counted: bool) -> None:
    """They are due with the scale and with each new basis."""
    blocks, plans = made(Ekfac(scale="running")), planner(2, 3, 5)
    assert plans.plan(step, blocks).counts_terms is counted
    assert not plans.plan(step, made(Ekfac())).counts_terms


def test_plans_that_differ_have_other_fingerprints() -> None:
    blocks, plans = made(Ekfac(), Ekfac()), planner(2, 3, 5)
    texts = [plans.plan(step, blocks).fingerprint() for step in (0, 2, 3, 5)]
    assert len(set(texts)) == len(texts)
    assert plans.plan(8, blocks).fingerprint() == texts[1]
    assert plans.plan(2, blocks[:1]).fingerprint() != texts[1]


def test_a_staggered_schedule_decomposes_each_layer_once_a_period() -> None:
    blocks, plans = made(Ekfac(), Ekfac(), Ekfac()), planner(4, 4, 12, stagger=True)
    steps = {block.name: set() for block in blocks}
    for step in range(12, 36):
        for block, plan in plans.plan(step, blocks).plans.items():
            if plan.basis:
                steps[block.name].add(step)
    firsts = [min(found) for found in steps.values()]
    assert len(set(firsts)) == len(blocks), "each has a slot of its own"
    assert all(found == {min(found), min(found) + 12} for found in steps.values())


def test_a_staggered_schedule_takes_input_factors_without_a_pass() -> None:
    blocks, plans = made(Ekfac(), Ekfac()), planner(4, 4, 12, stagger=True)
    plan = plans.plan(14, blocks)  # two thirds of a period of 4 after step 12
    assert plan.followed == blocks
    assert not plan.passes
    assert all(plan.plans[block].gathers("factor.A") for block in blocks)
    assert not any(plan.plans[block].gathers("factor.G") for block in blocks)
    parts = [[block.name for block in plans.plan(step, blocks).followed] for step in (12, 13)]
    assert sorted(parts[0] + parts[1]) == ["0", "1"], "each layer is in one of two passes"
