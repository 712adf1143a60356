"""What one step gathers for each block, and what it refreshes."""

from __future__ import annotations

import attrs

from kfactk.preconditioner.schedule import DueWork
from kfactk.preconditioner.state import BlockState


@attrs.frozen
class BlockPlan:
    """What one step does for one block.

    Args:
        factors: Whether its factors are refreshed, without those made of inputs alone where these
            are summed apart.
        inputs: Whether its factors made of inputs alone are refreshed.
        scale: Whether its moments are measured on samples.
        basis: Whether its matrices are decomposed.
        late: Whether its moments are measured in `step()`, on samples kept until then, because
            their basis is made or received there.
        waited_for: Whether it is followed only because it did not run when it was due. It may not
            run now either.
        input_factors: Names of the factors made of inputs alone, where these are summed apart.
        delays_scale: Whether the scale, due in a basis that this step makes for the first time, is
            left to the next forward.
        of_gradient: Whether factors, and moments, are measured on the user's gradient, in `step()`.
            No forward is followed then.
        begins: Whether a decomposition begins, to be adopted in a later step.
    """

    factors: bool
    inputs: bool
    scale: bool
    basis: bool
    late: bool = False
    waited_for: bool = False
    input_factors: frozenset[str] = frozenset()
    delays_scale: bool = False
    of_gradient: bool = False
    begins: bool = False

    @classmethod
    def of(
        cls,
        state: BlockState,
        now: DueWork,
        *,
        sampled: bool,
        of_gradient: bool = False,
        begins: bool = False,
        here: bool = True,
        stagger: bool = False,
        soon: bool = False,
        input_factors: frozenset[str] = frozenset(),
        inputs_suffice: bool = False,
    ) -> BlockPlan:
        """Return the plan of a block when the schedule says that `now` is due.

        A block without a decomposition is due whatever the schedule says. A block whose layer did
        not run when it was due stays due until it runs.

        Args:
            state: The block's state.
            now: What the schedule says.
            sampled: Whether moments are measured on samples, or on the gradient that `of_gradient`
                tells of.
            of_gradient: Whether all is measured on the user's gradient.
            begins: Whether the schedule wants a decomposition that begins now.
            here: Whether every rank holds the decomposition.
            stagger: Whether the schedule is staggered. The first scale then waits for the next
                forward, where it is measured as gradients arrive. Otherwise the samples of all
                layers would be in memory together.
            soon: Whether the schedule brings the scale so soon that the first one waits for that.
            input_factors: Names of the factors that are summed apart.
            inputs_suffice: Whether there are no other factors.
        """
        new, overdue = not state.ready, state.overdue
        basis = new or now.basis or overdue.basis
        factors = not inputs_suffice and (new or now.factors or overdue.factors)
        inputs = new or now.inputs or overdue.inputs if input_factors else factors
        waits = new and stagger and sampled and not of_gradient
        scale = sampled and not waits and (new or now.scale or overdue.scale)
        scheduled = (
            (now.factors and not inputs_suffice)
            or (bool(input_factors) and now.inputs)
            or (sampled and now.scale)
        )
        scheduled = scheduled or (new and not state.missed)
        return cls(
            factors,
            inputs,
            scale,
            basis,
            late=scale and (basis or not here) and not of_gradient,
            waited_for=not scheduled,
            input_factors=input_factors,
            delays_scale=waits and not soon,
            of_gradient=of_gradient,
            begins=begins and not new,
        )

    @property
    def measures(self) -> bool:
        """Whether it needs a sample of the layer, or a gradient of its parameters."""
        return self.factors or self.scale or self.inputs

    @property
    def passes(self) -> bool:
        """Whether it needs gradients of samples, for which there is a Fisher pass."""
        return (self.factors or self.scale) and not self.of_gradient

    @property
    def follows(self) -> bool:
        """Whether it needs the layer's calls, with their gradients or without."""
        return self.measures and not self.of_gradient

    @property
    def due(self) -> bool:
        """Whether the step changes anything that is kept of the block."""
        return self.measures or self.basis

    def gathers(self, key: str) -> bool:
        """Return whether the sum of this key ("factor.A", "moment.scale") is taken in forwards."""
        kind, _, name = key.partition(".")
        if self.of_gradient or kind == "link":
            return False
        if kind == "factor":
            return self.inputs if name in self.input_factors else self.factors
        return self.scale and not self.late

    def settle(self, state: BlockState, *, seen: bool) -> None:
        """Note in the state what is overdue after the step.

        Args:
            state: The block's state.
            seen: Whether the layer ran, on any rank.
        """
        if not self.measures:
            return
        state.missed = not seen
        if seen:
            state.overdue = DueWork(False, self.delays_scale, False, False)
        else:
            state.overdue = DueWork(self.factors, self.scale, self.basis, self.inputs)
