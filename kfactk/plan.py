"""What one step gathers: the schedule, and what single layers still owe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from kfactk.layerstate import LayerState
from kfactk.schedule import NOTHING, Due
from kfactk.stages import Layer


@attrs.frozen(eq=False)
class Need:
    """What one layer is followed for in this step.

    Args:
        layer: The layer.
        factors: Whether its factors are refreshed.
        scale: Whether its moments are measured on samples.
        basis: Whether its matrices are decomposed.
        late: Whether they are measured in `step()` only, on samples kept until then: in a basis that is made, or fetched, there.
        waited_for: Whether it is followed only because it did not run when it was due; it may not run now either.
    """

    layer: Layer
    factors: bool
    scale: bool
    basis: bool
    late: bool
    waited_for: bool

    @property
    def follows(self) -> bool:
        """Whether its uses are wanted."""
        return self.factors or self.scale

    @classmethod
    def of(cls, layer: Layer, state: LayerState, now: Due, *, sampled: bool, here: bool = True) -> Need:
        """The need of a layer whose state is `state` when `now` is due by the schedule; `here`: every rank holds its decomposition.

        A layer that has no decomposition yet is due whatever the schedule says, and one that did not run when it was due stays due until
        it runs.
        """
        new, owed = not state.ready, state.owed
        basis = new or now.basis or owed.basis
        factors = new or now.factors or owed.factors
        scale = sampled and (new or now.scale or owed.scale)
        scheduled = now.factors or (sampled and now.scale) or (new and not state.missed)
        return cls(layer, factors, scale, basis, scale and (basis or not here), not scheduled)

    def debt(self) -> Due:
        """What the layer owes when it did not run."""
        return Due(self.factors, self.scale, self.basis)


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

    def settle(self, states: Mapping[str, LayerState], unseen: Iterable[str]) -> None:
        """Note in the states what the layers that did not run still owe, and that the others owe nothing."""
        unseen = set(unseen)
        for name, need in self.needs.items():
            if need.follows:
                states[name].missed = name in unseen
                states[name].owed = need.debt() if name in unseen else NOTHING
