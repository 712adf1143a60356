"""Laws of controllers, put to controllers that break them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import pytest

from kfactk import QuadraticModel
from kfactk.testing import ControllerLaws
from tests.kfactk.testing.broken import caught, laws_of

NAMES = "test_names_numbers_of_its_own"
FIRST = "test_first_damping_is_positive"
PRESENT = "test_dampings_begin_with_the_present_one"
LOWERS = "test_a_step_lowers_the_model"
MOMENTUM = "test_without_a_last_step_there_is_no_momentum"
ONE = "test_takes_one_of_the_dampings"
ADAPTED = "test_adapted_numbers_are_its_own"
ARGUMENTS = "test_follows_from_the_arguments"
TRAINING = "test_two_ranks_are_one_process"


@attrs.define
class Newton:
    """As it ought to be, but for what is given."""

    numbers: Mapping[str, float] = attrs.field(factory=lambda: {"model_damping": 1.0})
    first: Any = 1.0
    factors: Sequence[float] = (1.0,)
    length: float = 1.0
    momentum: float = 0.0
    choice: int = 0
    several: float = 1.0
    adapted: Any = None
    remembers: bool = False
    asked: int = 0

    def first_damping(self, weight_decay: float) -> Any:
        return self.first

    def dampings(self, step: int, numbers: Mapping[str, float]) -> list[float]:
        return [factor * numbers["damping"] for factor in self.factors]

    def decide(
        self, models: Sequence[QuadraticModel], numbers: Mapping[str, float]
    ) -> tuple[int, float, float]:
        curvature = models[0].damped(numbers["model_damping"])[0][0]
        length = self.length * (self.several if len(models) > 1 else 1.0)
        lr = -length * models[0].slopes[0] / curvature if curvature else 0.0
        return self.choice * (len(models) > 1), lr, self.momentum

    def evaluates(self, step: int) -> bool:
        self.asked += 1
        return self.remembers and self.asked > 1

    def adapt(
        self, before: float, after: float, model: QuadraticModel, numbers: Mapping[str, float]
    ) -> Mapping[str, float]:
        return {"model_damping": numbers["model_damping"]} if self.adapted is None else self.adapted


@pytest.mark.parametrize(
    ("stage", "law", "says"),
    [
        (Newton(numbers={"model_damping": 1.0, "lr": 1.0}, adapted={}), NAMES, "names of every"),
        (Newton(first=0.0), FIRST, "is 0.0"),
        (Newton(factors=()), PRESENT, "there is no damping"),
        (Newton(factors=(2.0,)), PRESENT, "at damping .* the dampings are"),
        (Newton(factors=(1.0, -1.0)), PRESENT, "the dampings are"),
        (Newton(length=3.0), LOWERS, r"M\(d\) - M\(0\) is"),
        (Newton(momentum=math.inf), LOWERS, "decide gives"),
        (Newton(momentum=1e-3), MOMENTUM, "the last step is zero, and momentum"),
        (Newton(choice=5), ONE, "it takes number 5 of"),
        (Newton(several=0.5), ONE, "of several dampings the step is"),
        (Newton(adapted={}), ADAPTED, "adapt gives {}"),
        (Newton(adapted={"model_damping": math.nan}), ADAPTED, "adapt gives"),
        (Newton(remembers=True), ARGUMENTS, "the same arguments give"),
    ],
)
def test_a_broken_controller_is_caught(stage: Any, law: str, says: str) -> None:
    found = caught(ControllerLaws, stage, law)
    assert law in found
    assert re.search(says, found[law]), found[law]


def test_a_right_controller_obeys() -> None:
    assert caught(ControllerLaws, Newton()) == {}


def test_every_law_is_tried() -> None:
    [mark] = test_a_broken_controller_is_caught.pytestmark
    assert {case[1] for case in mark.args[1]} | {TRAINING} == set(laws_of(ControllerLaws))
