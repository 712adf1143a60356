"""What a step gathers and refreshes: from the schedule, and from what single blocks are overdue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial

import attrs

from kfactk.assignment import assign_slots, layers_near_output
from kfactk.errors import OptionError
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.placement import BlockPlacement
from kfactk.preconditioner.plan import BlockPlan
from kfactk.preconditioner.schedule import EVERYTHING, NOTHING, DueWork, UpdateSchedule
from kfactk.validation import lag_message

NO_SLOT = -1
"""A slot that never comes."""


@attrs.frozen(eq=False)
class StepPlan:
    """What one step gathers and refreshes.

    Args:
        plans: The blocks for which anything is due, in the model's order.
        counts_terms: Whether the step needs the number of likelihood terms, for moments of the
            user's own gradient.
    """

    plans: Mapping[Block, BlockPlan]
    counts_terms: bool

    @property
    def followed(self) -> list[Block]:
        """The blocks whose layers are followed in a forward."""
        return [block for block, plan in self.plans.items() if plan.follows]

    @property
    def measured(self) -> list[Block]:
        """The blocks that need samples, or gradients of their parameters."""
        return [block for block, plan in self.plans.items() if plan.measures]

    @property
    def of_interest(self) -> bool:
        """Whether a forward is of any interest."""
        return self.counts_terms or any(plan.follows for plan in self.plans.values())

    @property
    def expects_forward(self) -> bool:
        """Whether the step needs a forward."""
        needed = (plan.follows and not plan.waited_for for plan in self.plans.values())
        return self.counts_terms or any(needed)

    @property
    def due(self) -> bool:
        """Whether the step changes anything that is kept, or gathers anything for it."""
        return self.counts_terms or any(plan.due for plan in self.plans.values())

    @property
    def passes(self) -> bool:
        """Whether the step needs the gradients of a Fisher pass."""
        return self.counts_terms or any(plan.passes for plan in self.plans.values())

    def named(self) -> dict[str, BlockPlan]:
        """Return the plans by layer name."""
        return {block.name: plan for block, plan in self.plans.items()}

    def fingerprint(self) -> str:
        """Return a text that is the same on all ranks that plan the same."""
        told = [
            (block.name, block.layer.parameters, attrs.astuple(plan, filter=_own))
            for block, plan in self.plans.items()
        ]
        return repr((told, self.counts_terms))


def _paced(block: Block, step: int) -> DueWork:
    """Return what is due for a block whose pace says when; what is overdue is due anyway."""
    state = block.state
    return EVERYTHING if step >= state.pace.due and state.overdue == NOTHING else NOTHING


def _own(attribute: attrs.Attribute[object], value: object) -> bool:
    return attribute.name != "input_factors"  # a set has no order; it follows from the stages


EMPTY = StepPlan({}, False)


class Planner:
    """Makes the plans of one optimizer's steps.

    Args:
        schedule: What is due when.
        placement: Who does what.
        lag: Steps between the beginning of a decomposition and its use.
    """

    def __init__(self, schedule: UpdateSchedule, placement: BlockPlacement, lag: int = 0) -> None:
        self.schedule, self._placement, self._lag = schedule, placement, lag
        self._divided: list[Block] = []
        self._slots: dict[Block, int] = {}
        self._second_part: frozenset[Block] = frozenset()

    @property
    def lags(self) -> bool:
        """Whether decompositions begin before they are due."""
        return self._lag > 0

    def plan(self, step: int, blocks: Sequence[Block]) -> StepPlan:
        """Return the plan of the step of this number, by the blocks as they are now."""
        schedule = self.schedule
        self._divide(blocks)
        due = cache(partial(schedule.due, step))
        slot_now = schedule.slot(step) if schedule.stagger else 0
        soon = [schedule.soon(step, part) for part in (0, 1)]
        later = step + self._lag
        if self._lag and schedule.periods(later)[2] <= self._lag:
            raise OptionError(lag_message(self._lag, schedule.periods(later)[2], later))
        slot_then = schedule.slot(later) if schedule.stagger else 0
        mixed = not all(block.of_gradient for block in blocks)
        plans = {}
        for block in blocks:
            part, slot = int(block in self._second_part), self._slots.get(block, 0)
            now = due(slot if slot == slot_now else NO_SLOT, part)
            if block.pace is not None:
                now = _paced(block, step)
            if mixed and block.of_gradient and block.moments_of_gradient:
                now = attrs.evolve(now, scale=True)  # one gradient alone is a poor divisor
            begins = bool(self._lag) and slot == slot_then and schedule.due(later, slot).basis
            if block.measures_nothing or (now == NOTHING and block.state.settled and not begins):
                continue
            plans[block] = BlockPlan.of(
                block.state,
                now,
                sampled=block.sampled or (block.of_gradient and block.moments_of_gradient),
                of_gradient=block.of_gradient,
                begins=begins,
                here=self._placement.everywhere(block.name),
                stagger=schedule.stagger,
                soon=soon[part],
                input_factors=(
                    block.input_factors()
                    if schedule.stagger or block.inputs_suffice
                    else frozenset()
                ),
                inputs_suffice=block.inputs_suffice,
            )
        return StepPlan(plans, self._counts_terms(due(0, 0).scale, blocks, plans))

    def on_the_way(self, step: int, blocks: Sequence[Block]) -> list[Block]:
        """Return the blocks whose decomposition has begun before `step` and is not due yet."""
        if not self._lag:
            return []
        self._divide(blocks)
        schedule, found = self.schedule, []
        coming = range(max(step, 1 + self._lag), step + self._lag)
        for block in blocks:
            slot = self._slots.get(block, 0)
            mine = (d for d in coming if not schedule.stagger or schedule.slot(d) == slot)
            if not block.measures_nothing and any(schedule.due(d, slot).basis for d in mine):
                found.append(block)
        return found

    @staticmethod
    def _counts_terms(
        scale: bool, blocks: Sequence[Block], plans: Mapping[Block, BlockPlan]
    ) -> bool:
        """Return whether moments of the user's gradient are due, whose terms count."""
        refreshed = scale or any(plan.basis for plan in plans.values())
        return refreshed and any(
            block.moments_of_gradient and not block.of_gradient for block in blocks
        )

    def _divide(self, blocks: Sequence[Block]) -> None:
        """Divide the layers among slots and among passes, by cost.

        Costs do not depend on the ranks, so another number of ranks does the same.
        """
        if not self.schedule.stagger or self._divided == list(blocks):
            return
        self._divided = list(blocks)
        works = [block.work() for block in blocks]
        costs = {work.layer: work.cost for work in works}
        placed = assign_slots(costs, self.schedule.slots)
        self._slots = {block: placed[block.name] for block in blocks}
        near = layers_near_output(works) if any(b.sampled for b in blocks) else frozenset()
        self._second_part = frozenset(b for b in blocks if near and b.name not in near)
