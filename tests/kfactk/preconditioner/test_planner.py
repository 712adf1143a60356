"""The plan of one step over all blocks; runs with layers that come and go are beside it."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from torch import nn

from kfactk import Layer
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.planner import Planner, StepPlan
from kfactk.preconditioner.schedule import DueWork, UpdateSchedule
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.curvature.kfac import Kfac

RUNNING = Ekfac(scale="running")


@attrs.frozen
class Everywhere:
    """Stands for a `BlockPlacement` by which every rank preconditions these layers."""

    names: tuple[str, ...] = ("a", "b", "c", "d")

    def everywhere(self, layer: str) -> bool:
        return layer in self.names


def block(name: str, width: int = 2, basis: Any = None, *, ready: bool = True) -> Block:
    made = Layer(name, nn.Linear(width, width), ("weight", "bias"))
    found = Block(made, Kfac(), Ekfac() if basis is None else basis)
    found.state.ready = ready
    return found


def planner(*periods: int, stagger: bool = False, placement: Any = None) -> Planner:
    return Planner(UpdateSchedule(*periods, stagger=stagger), placement or Everywhere())


def test_blocks_with_nothing_due_have_no_plan() -> None:
    a, b, c = block("a"), block("b", basis=KfacInverse()), block("c", ready=False)
    steps = planner(2, 3, 4)
    assert [p.name for p in steps.plan(1, [a, b]).plans] == []
    assert steps.plan(1, [a, b, c]).followed == [c]
    plans = steps.plan(3, [a, b]).plans  # the scale alone: nothing for a basis without moments
    assert plans[a].scale
    assert not plans[b].due
    assert steps.plan(4, [a, b]).followed == [a, b]


def test_what_a_step_needs_is_what_any_block_needs() -> None:
    a, b = block("a"), block("b")
    idle = planner(2, 2, 2).plan(1, [a, b])
    assert not any([idle.due, idle.of_interest, idle.expects_forward, idle.passes])
    due = planner(2, 2, 2).plan(2, [a, b])
    assert all([due.due, due.of_interest, due.expects_forward, due.passes])
    a.state.overdue, a.state.missed = DueWork(True, False, False, True), True
    waiting = planner(2, 2, 2).plan(1, [a, b])
    assert waiting.of_interest
    assert not waiting.expects_forward  # the layer may be missing again


def test_moments_of_the_users_gradient_need_the_number_of_terms() -> None:
    a, b = block("a", basis=RUNNING), block("b", basis=KfacInverse())
    steps = planner(2, 3, 4)
    counted = [n for n in range(7) if steps.plan(n, [a, b]).counts_terms]
    assert counted == [0, 3, 4, 6]  # the scale, or a new basis
    assert not any(steps.plan(n, [b]).counts_terms for n in range(7))
    assert steps.plan(3, [a]).of_interest
    assert steps.plan(3, [a]).passes


def test_samples_are_kept_where_a_rank_lacks_the_decomposition() -> None:
    a, b = block("a"), block("b")
    plans = planner(2, 1, 4, placement=Everywhere(("a",))).plan(1, [a, b]).plans
    assert not plans[a].late
    assert plans[b].late


def test_ranks_compare_plans_by_layers_parameters_and_work() -> None:
    def text(*blocks: Block, step: int = 2) -> str:
        return planner(2, 2, 4, stagger=False).plan(step, blocks).fingerprint()

    assert text(block("a"), block("b")) == text(block("a"), block("b"))
    frozen = block("a")
    frozen.layer = attrs.evolve(frozen.layer, parameters=("weight",))
    others = [
        text(block("a")),
        text(block("a"), block("c")),
        text(frozen, block("b")),
        text(block("a", ready=False), block("b")),
        text(block("a"), block("b"), step=4),
        text(block("a", basis=RUNNING), block("b", basis=RUNNING)),
    ]
    assert text(block("a"), block("b")) not in others
    assert len(set(others)) == len(others)


def test_plans_are_found_by_name() -> None:
    a = block("a", ready=False)
    found = planner(1, 1, 1).plan(0, [a])
    assert found.named() == {"a": found.plans[a]}
    assert StepPlan({}, True).due


# --------------------------------------------------------------------------------- staggered plans


def test_slots_and_parts_follow_the_cost_of_layers() -> None:
    """The widest layer has the first slot; the layers near the output make the second part.

    The rule is in `assign_slots` and `layers_near_output`.
    """
    blocks = [block("a", 2), block("b", 9), block("c", 4)]
    steps = planner(3, 3, 12, stagger=True)
    bases = {b.name: [] for b in blocks}
    scales = {b.name: [] for b in blocks}
    for step in range(2, 14):
        for each, plan in steps.plan(step, blocks).plans.items():
            if plan.basis:
                bases[each.name].append(step)
            if plan.scale:
                scales[each.name].append(step)
    assert all(len(found) == 1 for found in bases.values())
    assert bases["b"] == [2]  # the first step after the factors of the first step
    assert bases["b"] < bases["c"] < bases["a"]
    assert scales["a"] == [4, 7, 10, 13]
    assert scales["b"] == scales["c"] == [3, 6, 9, 12]


def test_a_renamed_layer_keeps_its_slot() -> None:
    blocks = [block("a", 2), block("b", 9), block("c", 4)]
    steps = planner(3, 3, 12, stagger=True)

    def slots() -> dict[Block, list[int]]:
        found: dict[Block, list[int]] = {each: [] for each in blocks}
        for step in range(3, 15):
            for each, plan in steps.plan(step, blocks).plans.items():
                if plan.basis:
                    found[each].append(step)
        return found

    before = slots()
    for each, name in zip(blocks, "bcd", strict=True):
        each.layer = attrs.evolve(each.layer, name=name)
    assert slots() == before


@pytest.mark.parametrize("basis", [KfacInverse(), RUNNING])
def test_layers_without_samples_make_one_part(basis: Any) -> None:
    blocks = [block(name, basis=basis) for name in "abc"]
    steps = planner(3, 3, 12, stagger=True)
    for step in range(3, 15):
        factors = {plan.factors for plan in steps.plan(step, blocks).plans.values()}
        assert factors <= {step % 3 == 0}
