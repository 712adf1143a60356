"""What each step gathers, worked out from the calendar, the stages and what single layers still owe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial

from kfactk.assignment import late_part, take_turns
from kfactk.blocks import Blocks
from kfactk.layerstate import LayerState
from kfactk.places import Places
from kfactk.plan import Need, Plan
from kfactk.schedule import NOTHING, Calendar
from kfactk.stages import Layer

NOBODYS = -1
"""A turn that never comes."""


class Agenda:
    """Makes the plans of one optimizer's steps.

    Args:
        calendar: What is due when.
        blocks: The stages.
        places: Who does what.
    """

    def __init__(self, calendar: Calendar, blocks: Blocks, places: Places) -> None:
        self.calendar, self._blocks, self._places = calendar, blocks, places
        self._divided: list[tuple[str, tuple[str, ...]]] = []
        self._turns: dict[str, int] = {}
        self._late: frozenset[str] = frozenset()
        self._parted: dict[tuple[str, tuple[str, ...]], frozenset[str]] = {}

    def plan(self, step: int, layers: Sequence[Layer], states: Mapping[str, LayerState]) -> Plan:
        """What the step of this number gathers, by the states as they are now."""
        sampled = self._blocks.basis.moments_from == "samples"
        self._places.extend(layers)
        self._divide(layers)
        due, today = cache(partial(self.calendar.due, step)), self.calendar.turn(step) if self.calendar.stagger else 0
        soon = [self.calendar.soon(step, part) for part in (0, 1)]
        needs = {}
        for layer in layers:
            part, state, turn = self._part(layer), states[layer.name], self._turns.get(layer.name, 0)
            now = due(turn if turn == today else NOBODYS, part)  # for all whose turn it is not, the same
            if now == NOTHING and state.settled:
                continue
            needs[layer.name] = Need.of(
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
        placed = take_turns({work.layer: work.cost for work in works}, self.calendar.turns)
        self._turns = {work.layer: placed[work.layer] for work in works}
        self._late = late_part(works) if self._blocks.basis.moments_from == "samples" else frozenset()
