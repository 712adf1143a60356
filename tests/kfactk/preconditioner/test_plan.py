"""What one step gathers and refreshes of one block, by its definition."""

from __future__ import annotations

from typing import Any

from hypothesis import given, strategies as st

from kfactk.preconditioner.plan import BlockPlan
from kfactk.preconditioner.schedule import NOTHING, DueWork
from kfactk.preconditioner.state import BlockState

DUE = st.builds(DueWork, *[st.booleans()] * 4)
STATES = st.builds(BlockState, ready=st.booleans(), overdue=DUE, missed=st.booleans())
HOW: Any = st.fixed_dictionaries(
    {
        "sampled": st.booleans(),
        "here": st.booleans(),
        "stagger": st.booleans(),
        "soon": st.booleans(),
        "input_factors": st.sampled_from([frozenset(), frozenset({"A"})]),
    }
)


@given(STATES, DUE, HOW)
def test_work_is_due_for_a_new_block_by_the_schedule_or_where_it_is_overdue(
    state: BlockState, now: DueWork, how: Any
) -> None:
    plan, new = BlockPlan.of(state, now, **how), not state.ready
    assert plan.factors == (new or now.factors or state.overdue.factors)
    assert plan.basis == (new or now.basis or state.overdue.basis)
    if how["input_factors"]:
        assert plan.inputs == (new or now.inputs or state.overdue.inputs)
    else:
        assert plan.inputs == plan.factors
    if not how["sampled"]:
        assert not plan.scale
    elif not (new and how["stagger"]):
        assert plan.scale == (new or now.scale or state.overdue.scale)


@given(STATES, DUE, HOW)
def test_samples_are_kept_where_the_basis_comes_in_the_step(
    state: BlockState, now: DueWork, how: Any
) -> None:
    plan = BlockPlan.of(state, now, **how)
    assert plan.late == (plan.scale and (plan.basis or not how["here"]))
    assert plan.passes == (plan.factors or plan.scale)
    assert plan.follows == (plan.passes or plan.inputs)
    assert plan.due == (plan.follows or plan.basis)


def test_a_staggered_first_scale_waits_for_the_next_forward() -> None:
    new = BlockState()
    plan = BlockPlan.of(new, NOTHING, sampled=True, stagger=True)
    assert (plan.scale, plan.basis, plan.delays_scale) == (False, True, True)
    plan.settle(new, seen=True)
    assert new.overdue == DueWork(False, True, False, False)
    soon = BlockPlan.of(new, NOTHING, sampled=True, stagger=True, soon=True)
    assert not soon.delays_scale  # the schedule brings it


def test_a_block_that_is_only_waited_for_may_be_missing_again() -> None:
    settled = BlockState(ready=True)
    factors = DueWork(True, False, False, True)
    assert not BlockPlan.of(settled, factors, sampled=False).waited_for
    overdue = BlockState(ready=True, overdue=factors, missed=True)
    assert BlockPlan.of(overdue, NOTHING, sampled=False).waited_for
    assert not BlockPlan.of(overdue, factors, sampled=False).waited_for
    assert not BlockPlan.of(BlockState(), NOTHING, sampled=False).waited_for
    assert BlockPlan.of(BlockState(missed=True), NOTHING, sampled=False).waited_for


@given(STATES, DUE, HOW)
def test_what_a_missing_layer_was_due_for_stays_overdue(
    state: BlockState, now: DueWork, how: Any
) -> None:
    plan, before = BlockPlan.of(state, now, **how), state.overdue
    plan.settle(state, seen=False)
    if not plan.follows:
        assert state.overdue == before
        return
    assert state.missed
    assert (state.overdue.factors, state.overdue.basis) == (plan.factors, plan.basis)
    assert state.overdue.inputs == plan.inputs
    assert state.overdue.scale == plan.scale
    plan.settle(state, seen=True)
    assert not state.missed
    assert state.overdue == DueWork(False, plan.delays_scale, False, False)


def test_which_sums_are_gathered_in_forwards() -> None:
    keys = ["factor.A", "factor.G", "moment.scale"]
    parted = BlockPlan(False, True, True, False, input_factors=frozenset({"A"}))
    assert [parted.gathers(key) for key in keys] == [True, False, True]
    gradients = BlockPlan(True, False, True, True, late=True, input_factors=frozenset({"A"}))
    assert [gradients.gathers(key) for key in keys] == [False, True, False]
    together = BlockPlan(True, True, False, False)
    assert [together.gathers(key) for key in keys] == [True, True, False]
