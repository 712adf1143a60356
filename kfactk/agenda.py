"""What each step gathers, worked out from the calendar, the stages and what single layers still owe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kfactk.assignment import take_turns
from kfactk.blocks import Blocks
from kfactk.layerstate import LayerState
from kfactk.places import Places
from kfactk.plan import Need, Plan
from kfactk.schedule import Calendar
from kfactk.stages import Layer


class Agenda:
    """Makes the plans of one optimizer's steps.

    Args:
        calendar: What is due when.
        blocks: The stages.
        places: Who does what.
    """

    def __init__(self, calendar: Calendar, blocks: Blocks, places: Places) -> None:
        self.calendar, self._blocks, self._places = calendar, blocks, places
        self._turns: dict[str, int] = {}
        self._parted: dict[tuple[str, tuple[str, ...]], frozenset[str]] = {}

    def plan(self, step: int, layers: Sequence[Layer], states: Mapping[str, LayerState]) -> Plan:
        """What the step of this number gathers, by the states as they are now."""
        sampled = self._blocks.basis.moments_from == "samples"
        self._places.extend(layers)
        turns = self._turns_of(layers)
        due = {turn: self.calendar.due(step, turn) for turn in {0, *turns.values()}}
        needs = {}
        for layer in layers:
            needs[layer.name] = Need.of(
                layer,
                states[layer.name],
                due[turns.get(layer.name, 0)],
                sampled=sampled,
                here=self._places.everywhere(layer.name),
                spread=self.calendar.stagger,
                from_inputs=self._from_inputs(layer),
            )
        refreshed = due[0].scale or any(need.basis for need in needs.values())
        return Plan(needs, self._blocks.basis.moments_from == "gradient" and refreshed)

    def _from_inputs(self, layer: Layer) -> frozenset[str]:
        """Names of the layer's factors that are summed up apart from the others, where things are spread over steps."""
        if not self.calendar.stagger:
            return frozenset()
        key = layer.name, layer.parameters
        if key not in self._parted:
            self._parted[key] = self._blocks.from_inputs(layer)
        return self._parted[key]

    def _turns_of(self, layers: Sequence[Layer]) -> dict[str, int]:
        """In which turn each layer is decomposed: by cost, whatever the ranks, so that another number of them does the same."""
        if self.calendar.turns == 1:
            return {}
        names = [layer.name for layer in layers]
        if list(self._turns) != names:
            placed = take_turns({each.name: self._blocks.work(each).cost for each in layers}, self.calendar.turns)
            self._turns = {name: placed[name] for name in names}
        return self._turns
