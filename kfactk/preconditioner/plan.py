"""What one step gathers: the schedule, and what single layers still owe.

What each step gathers, worked out from the calendar, the stages and what single layers still owe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial

import attrs

from kfactk.assignment import assign_slots, layers_near_output
from kfactk.preconditioner.block import Blocks
from kfactk.preconditioner.placement import BlockPlacement
from kfactk.preconditioner.schedule import NOTHING, DueWork, UpdateSchedule
from kfactk.preconditioner.state import BlockState
from kfactk.stages import Layer


@attrs.frozen(eq=False)
class BlockPlan:
    """What one layer is followed for in this step.

    Args:
        layer: The layer.
        factors: Whether its factors are refreshed; but for those of inputs alone, where these come apart.
        inputs: Whether those of inputs alone are.
        scale: Whether its moments are measured on samples.
        basis: Whether its matrices are decomposed.
        late: Whether they are measured in `step()` only, on samples kept until then: in a basis that is made, or fetched, there.
        waited_for: Whether it is followed only because it did not run when it was due; it may not run now either.
        from_inputs: Names of the factors that come apart from the others, since they are made of inputs alone.
        puts_off: Whether the scale, due in a basis that is made in this step for the first time, is left to the next forward.
    """

    layer: Layer
    factors: bool
    inputs: bool
    scale: bool
    basis: bool
    late: bool
    waited_for: bool
    from_inputs: frozenset[str] = frozenset()
    puts_off: bool = False

    @property
    def passes(self) -> bool:
        """Whether gradients are wanted, for which there is a Fisher pass."""
        return self.factors or self.scale

    @property
    def follows(self) -> bool:
        """Whether its uses are wanted, with their gradients or without."""
        return self.passes or self.inputs

    def gathers(self, key: str) -> bool:
        """Whether the sum of this name ("factor.A", "moment.scale") is taken before `step()`."""
        kind, _, name = key.partition(".")
        if kind == "factor":
            return self.inputs if name in self.from_inputs else self.factors
        return self.scale and not self.late

    @classmethod
    def of(
        cls,
        layer: Layer,
        state: BlockState,
        now: DueWork,
        *,
        sampled: bool,
        here: bool = True,
        spread: bool = False,
        soon: bool = False,
        from_inputs: frozenset[str] = frozenset(),
    ) -> BlockPlan:
        """The need of a layer whose state is `state` when `now` is due by the schedule.

        A layer that has no decomposition yet is due whatever the schedule says, and one that did not run when it was due stays due until
        it runs.

        Args:
            layer: The layer.
            state: Its state.
            now: What is due.
            sampled: Whether moments are measured on samples.
            here: Whether every rank holds its decomposition.
            spread: Whether what is due is spread over steps. The first scale then waits for the next forward, when it can be measured
                as the gradients arrive: else the samples of all layers would be kept at the same time.
            soon: Whether the schedule brings the scale so soon that the first one can wait for that.
            from_inputs: Names of the factors that come apart from the others.
        """
        new, overdue = not state.ready, state.overdue
        basis = new or now.basis or overdue.basis
        factors = new or now.factors or overdue.factors
        inputs = new or now.inputs or overdue.inputs if from_inputs else factors
        waits = new and spread and sampled
        scale = sampled and not waits and (new or now.scale or overdue.scale)
        scheduled = (
            now.factors
            or (bool(from_inputs) and now.inputs)
            or (sampled and now.scale)
            or (new and not state.missed)
        )
        return cls(
            layer,
            factors,
            inputs,
            scale,
            basis,
            scale and (basis or not here),
            not scheduled,
            from_inputs,
            waits and not soon,
        )

    @property
    def due(self) -> bool:
        """Whether the step changes anything that is kept of the layer."""
        return self.follows or self.basis

    def debt(self) -> DueWork:
        """What the layer owes when it did not run."""
        return DueWork(self.factors, self.scale, self.basis, self.inputs)

    def rest(self) -> DueWork:
        """What it owes when it did."""
        return DueWork(False, self.puts_off, False, False)


@attrs.frozen(eq=False)
class Plan:
    """What one step gathers.

    Args:
        needs: By layer name, in the model's order.
        counts_terms: Whether the number of likelihood terms is wanted for the moments of the user's gradient.
    """

    needs: Mapping[str, BlockPlan]
    counts_terms: bool

    def follow(self) -> list[Layer] | None:
        """The layers to follow in a forward; `None` when it is of no interest."""
        layers = [need.layer for need in self.needs.values() if need.follows]
        return layers if layers or self.counts_terms else None

    def expects(self) -> bool:
        """Whether a forward is sure to be of interest."""
        return self.counts_terms or any(
            need.follows and not need.waited_for for need in self.needs.values()
        )

    def due(self) -> bool:
        """Whether the step changes anything that is kept of curvature, or gathers anything for it."""
        return self.counts_terms or any(need.due for need in self.needs.values())

    def settle(self, states: Mapping[str, BlockState], unseen: Iterable[str]) -> None:
        """Note in the states what the layers still owe."""
        unseen = set(unseen)
        for name, need in self.needs.items():
            if need.follows:
                states[name].missed = name in unseen
                states[name].overdue = need.debt() if name in unseen else need.rest()


NOBODYS = -1
"""A turn that never comes."""


class Planner:
    """Makes the plans of one optimizer's steps.

    Args:
        calendar: What is due when.
        blocks: The stages.
        places: Who does what.
    """

    def __init__(self, calendar: UpdateSchedule, blocks: Blocks, places: BlockPlacement) -> None:
        self.calendar, self._blocks, self._places = calendar, blocks, places
        self._divided: list[tuple[str, tuple[str, ...]]] = []
        self._slots: dict[str, int] = {}
        self._late: frozenset[str] = frozenset()
        self._parted: dict[tuple[str, tuple[str, ...]], frozenset[str]] = {}

    def plan(self, step: int, layers: Sequence[Layer], states: Mapping[str, BlockState]) -> Plan:
        """What the step of this number gathers, by the states as they are now."""
        sampled = self._blocks.basis.moments_from == "samples"
        self._places.extend(layers)
        self._divide(layers)
        due, today = (
            cache(partial(self.calendar.due, step)),
            self.calendar.slot(step) if self.calendar.stagger else 0,
        )
        soon = [self.calendar.soon(step, part) for part in (0, 1)]
        needs = {}
        for layer in layers:
            part, state, slot = (
                self._part(layer),
                states[layer.name],
                self._slots.get(layer.name, 0),
            )
            now = due(
                slot if slot == today else NOBODYS, part
            )  # for all whose turn it is not, the same
            if now == NOTHING and state.settled:
                continue
            needs[layer.name] = BlockPlan.of(
                layer,
                state,
                now,
                sampled=sampled,
                here=self._places.everywhere(layer.name),
                spread=self.calendar.stagger,
                soon=soon[part],
                from_inputs=self._from_inputs(layer),
            )
        refreshed = due(0, 0).scale or any(need.basis for need in needs.values())
        return Plan(needs, self._blocks.basis.moments_from == "gradient" and refreshed)

    def _part(self, layer: Layer) -> int:
        return 1 if self._late and layer.name not in self._late else 0

    def _from_inputs(self, layer: Layer) -> frozenset[str]:
        """Names of the layer's factors that are summed up apart from the others, where things are spread over steps."""
        if not self.calendar.stagger:
            return frozenset()
        key = layer.name, layer.parameters
        if key not in self._parted:
            self._parted[key] = self._blocks.from_inputs(layer)
        return self._parted[key]

    def _divide(self, layers: Sequence[Layer]) -> None:
        """Divide the layers among turns, and among passes: by cost, whatever the ranks, so that another number of them does the same."""
        trained = [(layer.name, layer.parameters) for layer in layers]
        if not self.calendar.stagger or self._divided == trained:
            return
        self._divided = trained
        works = [self._blocks.work(layer) for layer in layers]
        placed = assign_slots({work.layer: work.cost for work in works}, self.calendar.slots)
        self._slots = {work.layer: placed[work.layer] for work in works}
        self._late = (
            layers_near_output(works) if self._blocks.basis.moments_from == "samples" else frozenset()
        )
