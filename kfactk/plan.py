"""What one step gathers: the schedule, and what single layers still owe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from kfactk.layerstate import LayerState
from kfactk.schedule import Due
from kfactk.stages import Layer


@attrs.frozen(eq=False)
class Need:
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
        state: LayerState,
        now: Due,
        *,
        sampled: bool,
        here: bool = True,
        spread: bool = False,
        soon: bool = False,
        from_inputs: frozenset[str] = frozenset(),
    ) -> Need:
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
        new, owed = not state.ready, state.owed
        basis = new or now.basis or owed.basis
        factors = new or now.factors or owed.factors
        inputs = new or now.inputs or owed.inputs if from_inputs else factors
        waits = new and spread and sampled
        scale = sampled and not waits and (new or now.scale or owed.scale)
        scheduled = now.factors or (bool(from_inputs) and now.inputs) or (sampled and now.scale) or (new and not state.missed)
        return cls(layer, factors, inputs, scale, basis, scale and (basis or not here), not scheduled, from_inputs, waits and not soon)

    @property
    def due(self) -> bool:
        """Whether the step changes anything that is kept of the layer."""
        return self.follows or self.basis

    def debt(self) -> Due:
        """What the layer owes when it did not run."""
        return Due(self.factors, self.scale, self.basis, self.inputs)

    def rest(self) -> Due:
        """What it owes when it did."""
        return Due(False, self.puts_off, False, False)


@attrs.frozen(eq=False)
class Plan:
    """What one step gathers.

    Args:
        needs: By layer name, in the model's order.
        counts_terms: Whether the number of likelihood terms is wanted for the moments of the user's gradient.
    """

    needs: Mapping[str, Need]
    counts_terms: bool

    def follow(self) -> list[Layer] | None:
        """The layers to follow in a forward; `None` when it is of no interest."""
        layers = [need.layer for need in self.needs.values() if need.follows]
        return layers if layers or self.counts_terms else None

    def expects(self) -> bool:
        """Whether a forward is sure to be of interest."""
        return self.counts_terms or any(need.follows and not need.waited_for for need in self.needs.values())

    def due(self) -> bool:
        """Whether the step changes anything that is kept of curvature, or gathers anything for it."""
        return self.counts_terms or any(need.due for need in self.needs.values())

    def settle(self, states: Mapping[str, LayerState], unseen: Iterable[str]) -> None:
        """Note in the states what the layers still owe."""
        unseen = set(unseen)
        for name, need in self.needs.items():
            if need.follows:
                states[name].missed = name in unseen
                states[name].owed = need.debt() if name in unseen else need.rest()
