"""Laws of controllers: steps that lower the model, finite numbers, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st

from kfactk.errors import UnknownStageError
from kfactk.registry.registry import registry
from kfactk.stages import Controller, QuadraticModel
from kfactk.testing._support.division import InRecipe
from kfactk.testing._support.laws import law

WRITTEN = {"lr", "momentum", "damping"}
"""Numbers that belong to every optimizer."""
ROUNDING = 1e-9
"""Allowed rise of the model, relative to what the slopes could give."""


@st.composite
def models(draw: st.DrawFn, *, moving: bool = True) -> QuadraticModel:
    """Draw the quadratic model along two directions in few dimensions.

    Args:
        draw: Given by Hypothesis.
        moving: Whether there was a last step.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    size = draw(st.floats(-4.0, 4.0).map(lambda each: 10.0**each))
    rows, numbers = torch.randn(2, 4, generator=generator, dtype=torch.float64), []
    rows[1] *= 10.0 ** draw(st.floats(-3.0, 3.0)) if moving else 0.0
    root = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    gradient = size * torch.randn(4, generator=generator, dtype=torch.float64)
    for matrix in (size * root @ root.T, torch.eye(4, dtype=torch.float64)):
        (a, b), (c, d) = (rows @ matrix @ rows.T).tolist()
        numbers.append(((a, b), (c, d)))
    one, other = (rows @ gradient).tolist()
    return QuadraticModel((one, other), *numbers)


_STEPS = st.integers(0, 200)
_DAMPINGS = st.floats(-6.0, 4.0).map(lambda each: 10.0**each)
_LOSSES = st.floats(-1e6, 1e6)


class ControllerLaws(InRecipe):
    """Laws of every controller.

    Example:
        >>> class Newton:
        ...     numbers = {"model_damping": 1.0}
        ...     def first_damping(self, weight_decay):
        ...         return 1.0 + weight_decay
        ...     def dampings(self, step, numbers):
        ...         return [numbers["damping"]]
        ...     def decide(self, models, numbers):
        ...         curvature = models[0].damped(numbers["model_damping"])[0][0]
        ...         return 0, -models[0].slopes[0] / curvature if curvature else 0.0, 0.0
        ...     def evaluates(self, step):
        ...         return False
        ...     def adapt(self, before, after, model, numbers):
        ...         return {"model_damping": numbers["model_damping"]}
        >>> class TestNewton(ControllerLaws):
        ...     stage = Newton
        >>> TestNewton().test_a_step_lowers_the_model()
        >>> TestNewton().test_without_a_last_step_there_is_no_momentum()
    """

    family = "controller"
    model_damping: ClassVar[str] = "model_damping"
    """The name of the number that is lambda in the model which a step lowers."""

    def in_recipe(self) -> dict[str, Any]:
        """Return a recipe with the stage in it, and the first update rule that goes with it."""
        plugins = registry()
        for name in sorted({info.name for info in plugins.stages("update") if not info.blocked}):
            update = plugins.resolve("update", name)
            if getattr(update, "velocity_key", ""):
                return {"controller": self.subject(), "update": update}
        raise UnknownStageError(
            "no update rule has a velocity_key, and a controller needs one. Install kfactk's own "
            "stages, whose `velocity` has it."
        )

    def numbers(self, damping: float = 1.0) -> dict[str, float]:
        """Return all numbers that the stage is given, its own as they are at first."""
        stage: Controller = self.subject()
        return {"lr": 0.0, "momentum": 0.0, "damping": damping, **stage.numbers}

    def lowest(self, model: QuadraticModel, numbers: Mapping[str, float]) -> float:
        """Return by how much the step that the stage decides on changes the model."""
        stage: Controller = self.subject()
        _, lr, momentum = stage.decide([model], numbers)
        return model.change((lr, momentum), numbers.get(self.model_damping, 0.0))

    @law()
    def test_names_numbers_of_its_own(self) -> None:
        """Its own numbers are finite, and not named like those of every optimizer."""
        stage: Controller = self.subject()
        found = dict(stage.numbers)
        assert not found.keys() & WRITTEN, f"{sorted(found)} has names of every optimizer"
        assert all(math.isfinite(each) for each in found.values()), f"numbers are {found}"

    @law(examples=20, decay=st.floats(0.0, 1.0))
    def test_first_damping_is_positive(self, decay: float) -> None:
        """The damping that a recipe has without the user's is positive and finite."""
        found = self.subject().first_damping(decay)
        assert 0 < found < math.inf, f"first_damping({decay}) is {found}"

    @law(examples=50, step=_STEPS, damping=_DAMPINGS)
    def test_dampings_begin_with_the_present_one(self, step: int, damping: float) -> None:
        """The dampings of a step are positive and finite, the present one first."""
        found = list(self.subject().dampings(step, self.numbers(damping)))
        assert found, f"there is no damping for step {step}"
        assert found[0] == damping, f"at damping {damping} the dampings are {found}"
        assert all(0 < each < math.inf for each in found), f"the dampings are {found}"

    @law(examples=50, model=models())
    def test_a_step_lowers_the_model(self, model: QuadraticModel) -> None:
        """The step that it decides on is finite, and the model is no higher there than at 0."""
        numbers = self.numbers()
        _, lr, momentum = self.subject().decide([model], numbers)
        assert math.isfinite(lr + momentum), f"decide gives {lr}, {momentum}"
        change = self.lowest(model, numbers)
        size = max(abs(s * t) for s, t in zip(model.slopes, (lr, momentum), strict=True))
        assert change <= ROUNDING * size, f"M(d) - M(0) is {change} for lr={lr}, {momentum=}"

    @law(examples=20, model=models(moving=False))
    def test_without_a_last_step_there_is_no_momentum(self, model: QuadraticModel) -> None:
        """In the first step momentum is 0: there is nothing to take a share of."""
        _, _, momentum = self.subject().decide([model], self.numbers())
        assert momentum == 0, f"the last step is zero, and momentum {momentum}"

    @law(examples=20, several=st.lists(models(), min_size=2, max_size=3))
    def test_takes_one_of_the_dampings(self, several: list[QuadraticModel]) -> None:
        """It takes one of the dampings, with the step that it decides on for that one alone."""
        stage: Controller = self.subject()
        number, *step = stage.decide(several, self.numbers())
        assert number in range(len(several)), f"it takes number {number} of {len(several)}"
        _, *alone = stage.decide([several[number]], self.numbers())
        assert step == alone, f"of several dampings the step is {step}, alone {alone}"

    @law(examples=50, model=models(), before=_LOSSES, after=_LOSSES)
    def test_adapted_numbers_are_its_own(
        self, model: QuadraticModel, before: float, after: float
    ) -> None:
        """After a step it has the same numbers, finite, also where the loss is not."""
        stage: Controller = self.subject()
        _, lr, momentum = stage.decide([model], self.numbers())
        numbers = {**self.numbers(), "lr": lr, "momentum": momentum}
        for loss in (after, math.inf, math.nan):
            found = dict(stage.adapt(before, loss, model, numbers))
            assert found.keys() == stage.numbers.keys(), f"adapt gives {found}"
            assert all(math.isfinite(each) for each in found.values()), f"adapt gives {found}"

    @law(examples=20, model=models(), step=_STEPS, loss=_LOSSES)
    def test_follows_from_the_arguments(
        self, model: QuadraticModel, step: int, loss: float
    ) -> None:
        """Asked twice and asked anew, it gives the same: ranks ask on their own."""
        numbers, found = self.numbers(), []
        for stage in (self.subject(), *[self.subject()] * 2):
            answers = (
                list(stage.dampings(step, numbers)),
                stage.decide([model], numbers),
                stage.evaluates(step),
                dict(stage.adapt(0.0, loss, model, {**numbers, "lr": 0.1})),
            )
            found.append(repr(answers))
        assert len(set(found)) == 1, f"the same arguments give {found}"
