"""When factors, scales and decompositions are due."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs

from kfactk.errors import OptionError
from kfactk.options import Period, period_at


@attrs.frozen
class DueWork:
    """What is due at one step.

    Args:
        factors: The factors, without those made of inputs alone where these are summed apart.
        scale: The moments of the basis.
        basis: The decompositions.
        inputs: The factors made of inputs alone.
    """

    factors: bool
    scale: bool
    basis: bool
    inputs: bool


NOTHING = DueWork(False, False, False, False)
EVERYTHING = DueWork(True, True, True, True)


def due_at(step: int, factor_every: Period, scale_every: Period, basis_every: Period) -> DueWork:
    """Return what is due at `step`, each period on its own; everything is due at step 0.

    A refreshed basis measures its scale anew.

    Example:
        >>> due_at(20, 10, 10, 100)
        DueWork(factors=True, scale=True, basis=False, inputs=True)
    """
    factors = step % period_at("factor_every", factor_every, step) == 0
    scale = step % period_at("scale_every", scale_every, step) == 0
    basis = step % period_at("basis_every", basis_every, step) == 0
    return DueWork(factors, scale or basis, basis, factors)


@attrs.frozen
class UpdateSchedule:
    """What is due when, and which layers are decomposed at which step of a staggered schedule.

    A staggered schedule spreads the load over steps:

    - Output factors and scale need the gradients of a Fisher pass. They are due together, so that
      one pass serves both. Layers form two parts, each with a pass of its own, a third of a period
      apart.
    - Input factors need no gradients. They are due after two thirds of a period.
    - Each layer has a slot: a step of each `basis_every` steps at which it is decomposed. Slots lie
      on steps where nothing else is due, if there are any.

    At the first step everything is due. The second decomposition of a layer comes with its first
    slot, and every `basis_every` steps from then on. Its moments are carried into the new basis
    until they are measured there.

    Args:
        factor_every: Steps between refreshes of the factors.
        scale_every: Steps between refreshes of the scale.
        basis_every: Steps between decompositions.
        stagger: Whether to spread the load; periods must be whole numbers then.

    Raises:
        OptionError: The schedule is staggered and a period is a function.

    Example:
        >>> schedule = UpdateSchedule(10, 10, 100, stagger=True)
        >>> schedule.slots, schedule.slot(1), schedule.slot(7), schedule.slot(107)
        (70, None, 0, 0)
        >>> [step for step in range(25) if schedule.due(step, part=1).scale]
        [3, 13, 23]
        >>> schedule.due(107, slot=0), schedule.due(107, slot=1).basis
        (DueWork(factors=False, scale=False, basis=True, inputs=False), False)
    """

    factor_every: Period
    scale_every: Period
    basis_every: Period
    stagger: bool = False
    _third: int = attrs.field(init=False, repr=False, eq=False)
    _slot_of_step: Mapping[int, int] = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        given = (self.factor_every, self.scale_every, self.basis_every)
        if self.stagger and any(callable(period) for period in given):
            raise OptionError(
                "stagger=True needs factor_every, scale_every and basis_every as whole numbers, "
                "because it lays out slots over one period. Give numbers, or leave stagger out."
            )
        steps = self._slot_steps() if self.stagger else (0,)
        third = min(self.periods(0)[:2]) // 3 if self.stagger else 0
        object.__setattr__(self, "_third", third)
        object.__setattr__(self, "_slot_of_step", {step: n for n, step in enumerate(steps)})

    def _slot_steps(self) -> tuple[int, ...]:
        """Return the steps of a period that slots lie on: quiet steps, or all if none is quiet.

        The first slot is the first step after the factors of the first step were refreshed.
        """
        factors, scale, basis = self.periods(0)
        third = min(factors, scale) // 3
        # Over many periods, work comes at every multiple of these.
        every = math.gcd(factors, basis), math.gcd(scale, basis)
        busy = [(each, part * third) for each in every for part in (0, 1)]
        busy.append((every[0], _inputs_at(factors)))
        quiet = [s for s in range(basis) if all((s - at) % each for each, at in busy)]
        steps = quiet or list(range(basis))
        return tuple(sorted(steps, key=lambda step: (step < _inputs_at(factors), step)))

    def due(self, step: int, slot: int = 0, part: int = 0) -> DueWork:
        """Return what is due at `step` for a layer that has been decomposed before.

        Args:
            step: From 0.
            slot: The layer's slot.
            part: The layer's part, 0 or 1.
        """
        if not self.stagger:
            return due_at(step, self.factor_every, self.scale_every, self.basis_every)
        (factors, scale, _), shifted = self.periods(step), step - part * self._third
        return DueWork(
            factors=shifted % factors == 0,
            scale=shifted % scale == 0,
            basis=self.slot(step) == slot,
            inputs=step % factors == _inputs_at(factors),
        )

    def soon(self, step: int, part: int) -> bool:
        """Return whether a staggered part's scale is due within a third of a period of `step`."""
        ahead = (part * self._third - step) % self.periods(step)[1]
        return self.stagger and 0 < ahead <= self._third

    def periods(self, step: int) -> tuple[int, int, int]:
        """Return the periods of factors, scale and basis at `step`."""
        return (
            period_at("factor_every", self.factor_every, step),
            period_at("scale_every", self.scale_every, step),
            period_at("basis_every", self.basis_every, step),
        )

    @property
    def slots(self) -> int:
        """Number of slots in a period; 1 when all layers are decomposed together."""
        return len(self._slot_of_step)

    def slot(self, step: int) -> int | None:
        """Return the slot at `step`; `None` where there is none.

        There is none either while only the factors of the first step have been measured.
        """
        factors, _, basis = self.periods(step)
        if self.stagger and 0 < step < _inputs_at(factors):
            return None
        return self._slot_of_step.get(step % basis)


def _inputs_at(factor_every: int) -> int:
    """Return the step of each period at which staggered input factors are due."""
    return 2 * factor_every // 3


def early(step: int) -> int:
    """Return a period that grows with the step: 10, then 20 from step 40, 40 from 80, 80 from 160.

    Use it as `basis_every` in runs of a few hundred steps. A network changes most at first, so its
    first bases are soon out of date. Ten decompositions in 320 steps then do what one every 10
    steps does with 32.

    Args:
        step: From 0.

    Example:
        >>> import kfactk
        >>> recipe = kfactk.build(basis_every=kfactk.early)
        >>> [step for step in range(200) if recipe.schedule.due(step).basis]
        [0, 10, 20, 30, 40, 60, 80, 120, 160]
    """
    return 10 if step < 40 else 20 if step < 80 else 40 if step < 160 else 80
