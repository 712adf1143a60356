"""When factors, scales and decompositions are due, and numbers that may be functions of the step."""

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
        factors: The factors; but for those made of inputs alone, where these can come apart.
        scale: The scale.
        basis: Decompositions.
        inputs: Factors made of inputs alone.
    """

    factors: bool
    scale: bool
    basis: bool
    inputs: bool


NOTHING = DueWork(False, False, False, False)


def due_at(step: int, factor_every: Period, scale_every: Period, basis_every: Period) -> DueWork:
    """What is due at `step`: each period on its own, everything at step 0. A refreshed basis measures its scale anew.

    Example:
        >>> due_at(20, 10, 10, 100)
        Due(factors=True, scale=True, basis=False, inputs=True)
    """
    factors, scale, basis = (
        step % period_at(name, every, step) == 0
        for name, every in (
            ("factor_every", factor_every),
            ("scale_every", scale_every),
            ("basis_every", basis_every),
        )
    )
    return DueWork(factors, scale or basis, basis, factors)


@attrs.frozen
class UpdateSchedule:
    """What is due when, and whose turn it is where decompositions take turns.

    Staggered, steps share the load: what needs the gradients of a Fisher pass, output factors and scale, comes together, so that one pass
    serves both; layers in two parts have a pass each, a third of a period apart; input factors, which need none, come after two thirds of
    it; and layers are decomposed in turns, on steps where nothing else is due, if there are any. A layer's first decomposition waits for
    nothing, so that at the first step everything is due; the second comes with its first turn, and from then on it waits `basis_every`
    steps from one to the next. Its moments are carried into the new basis, until they are measured there.

    Args:
        factor_every: Steps between refreshes of the factors, as `due_at` takes it; so are the next two.
        scale_every: Steps between refreshes of the scale.
        basis_every: Steps between decompositions.
        stagger: Whether to do so; periods must be whole numbers then.

    Raises:
        OptionError: Layers are to take turns, and a period is a function.

    Example:
        >>> calendar = UpdateSchedule(10, 10, 100, stagger=True)
        >>> calendar.slots, calendar.slot(1), calendar.slot(7), calendar.slot(107)
        (70, None, 0, 0)
        >>> [step for step in range(25) if calendar.due(step, part=1).scale]
        [3, 13, 23]
        >>> calendar.due(107, slot=0), calendar.due(107, slot=1).basis
        (Due(factors=False, scale=False, basis=True, inputs=False), False)
    """

    factor_every: Period
    scale_every: Period
    basis_every: Period
    stagger: bool = False
    _third: int = attrs.field(init=False, repr=False, eq=False)
    _quiet: Mapping[int, int] = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        if self.stagger and any(
            callable(period) for period in (self.factor_every, self.scale_every, self.basis_every)
        ):
            raise OptionError(
                "stagger=True needs factor_every, scale_every and basis_every as whole numbers: turns are laid out over one period. "
                "Give numbers, or leave stagger out."
            )
        object.__setattr__(self, "_third", min(self.periods(0)[:2]) // 3 if self.stagger else 0)
        object.__setattr__(
            self,
            "_quiet",
            {step: slot for slot, step in enumerate(self._quiet_steps() if self.stagger else (0,))},
        )

    def _quiet_steps(self) -> tuple[int, ...]:
        """Steps of a period on which turns fall: those on which nothing else is due in any period, or all where there are none.

        The first turn is the first step after which factors are others than at the first step.
        """
        factors, scale, basis = self.periods(0)
        every = (
            math.gcd(factors, basis),
            math.gcd(scale, basis),
        )  # over many periods, a step is at every multiple of these
        busy = [(each, part * self._third) for each in every for part in (0, 1)] + [
            (every[0], _inputs_at(factors))
        ]
        quiet = [s for s in range(basis) if all((s - at) % each for each, at in busy)] or list(
            range(basis)
        )
        return tuple(sorted(quiet, key=lambda step: (step < _inputs_at(factors), step)))

    def due(self, step: int, slot: int = 0, part: int = 0) -> DueWork:
        """What is due at `step` for a layer of this turn and this part, 0 or 1, that has been decomposed before."""
        if not self.stagger:
            return due_at(step, self.factor_every, self.scale_every, self.basis_every)
        (factors, scale, _), at = self.periods(step), step - part * self._third
        return DueWork(
            at % factors == 0,
            at % scale == 0,
            self.slot(step) == slot,
            step % factors == _inputs_at(factors),
        )

    def soon(self, step: int, part: int) -> bool:
        """Whether this part's scale is due within a third of a period after `step`, where things are staggered."""
        return (
            self.stagger and 0 < (part * self._third - step) % self.periods(step)[1] <= self._third
        )

    def periods(self, step: int) -> tuple[int, int, int]:
        """The periods of factors, scale and basis, as they are at `step`."""
        return (
            period_at("factor_every", self.factor_every, step),
            period_at("scale_every", self.scale_every, step),
            period_at("basis_every", self.basis_every, step),
        )

    @property
    def slots(self) -> int:
        """Number of turns in a period; 1 when all layers are decomposed together."""
        return len(self._quiet)

    def slot(self, step: int) -> int | None:
        """Whose turn it is at `step`; `None` when it is nobody's, as long as there are but the factors of the first step, too."""
        factors, _, basis = self.periods(step)
        rest = step % basis
        return None if self.stagger and 0 < step < _inputs_at(factors) else self._quiet.get(rest)


def _inputs_at(factor_every: int) -> int:
    """At which step of each period staggered input factors are due."""
    return 2 * factor_every // 3


def early(step: int) -> int:
    """A period that doubles with the age of the run: due at steps 0, 10, 20, 30, 40, 60, 80, 120, 160 and every 80th from there.

    For `basis_every` in runs of a few hundred steps: a network changes most at first, and the basis of its first mini-batch with it, so
    that what is measured early is stale early. Ten decompositions do for the first 320 steps what one every 10 steps does with 32.

    Args:
        step: From 0.

    Example:
        >>> import kfactk
        >>> recipe = kfactk.build(basis_every=kfactk.early)
        >>> [step for step in range(200) if recipe.calendar.due(step).basis]
        [0, 10, 20, 30, 40, 60, 80, 120, 160]
    """
    return 10 if step < 40 else 20 if step < 80 else 40 if step < 160 else 80
