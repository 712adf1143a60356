"""What stages tell of their steps before there are any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import nn

import kfactk
from kfactk import PluginError
from kfactk.optim.predicted import control_rates, longest_interval
from kfactk_stages.controller.quadratic import Quadratic
from kfactk_stages.pace.similar import Similar

CONTROLLED: dict[str, Any] = {
    "curvature": "kfac",
    "basis": {"name": "kfac", "solver": "eigh"},
    "update": "velocity",
}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def notes(**recipe: Any) -> tuple[str, ...]:
    """Notes of the table before bind, which are those after it."""
    made, model = kfactk.build(**recipe), net()
    found = made.coverage(model)
    bound = made.bind(model).coverage()
    assert bound.notes == found.notes
    assert str(found).splitlines()[-len(found.notes) :] == list(found.notes)
    return found.notes


@attrs.frozen
class Doubling:
    """Doubles its interval while nothing changes."""

    most: int

    @property
    def keeps(self) -> int:
        return 1

    def interval(self, changes: Sequence[float], intervals: Sequence[int]) -> int:
        return min(self.most, 2 * intervals[0]) if changes else 1


@pytest.mark.parametrize(
    ("pace", "expected"),
    [
        (Similar(), None),
        (Similar(longest=1), 1),
        (Similar(longest=100), 100),
        (Doubling(64), 64),
        (Doubling(2**40), None),
    ],
)
def test_longest_interval_is_that_where_nothing_changes(pace: Any, expected: int | None) -> None:
    assert longest_interval(pace) == expected


def test_a_pace_that_fails_is_named() -> None:
    @attrs.frozen
    class Failing(Doubling):
        def interval(self, changes: Sequence[float], intervals: Sequence[int]) -> int:
            raise ZeroDivisionError("of its own")

    with pytest.raises(PluginError, match="of its own"):
        longest_interval(Failing(3))


def test_a_controller_is_asked_with_the_numbers_that_it_begins_with() -> None:
    asked = []

    @attrs.frozen
    class Asked(Quadratic):
        def dampings(self, step: int, numbers: Any) -> Any:
            asked.append(dict(numbers))
            return super().dampings(step, numbers)

    made = kfactk.build(**CONTROLLED, controller=Asked(model_damping=3.0, adapt_every=4))
    rates = control_rates(made)
    assert asked[0] == {"lr": 0.003, "momentum": 0.9, "damping": 3.0, "model_damping": 3.0}
    assert rates.evaluations == 0.25
    assert dict(rates.tries) == {1: 0.95, 3: 0.05}


def test_a_table_has_no_notes_without_them() -> None:
    assert kfactk.build().coverage(net()).notes == ()


def test_a_table_tells_of_links_controllers_paces_and_lags() -> None:
    [told] = notes(link="two_level")
    assert told == "link two_level: 2 layers, under 1 kB between steps"
    chain, controller = notes(**CONTROLLED, link="block_tridiagonal", controller="quadratic")
    first, second = {"A": 5, "G": 5}, {"A": 6, "G": 3}
    psi = sum(first[side] * second[side] for side in "AG")  # as the cross factors
    roots = sum(n * n for sides in (first, second) for n in sides.values())
    size = 4 * (2 * psi + roots + 5 * 5 + 6 * 3)
    assert chain.startswith(
        f"link block_tridiagonal: 2 layers, {size / 1e3:.0f} kB between steps, "
    )
    assert chain.endswith(" a preparation")
    assert controller.startswith("controller quadratic: in a mean step 2.1 forwards with deriv")
    [pace] = notes(pace={"name": "similar", "longest": 9})
    assert "at most 9; the bytes of blocks count 2 more sets" in pace
    [pace] = notes(pace="similar")
    assert "without a limit" in pace
    [lag] = notes(lag=3)
    assert lag.startswith("lag 3: decompositions run beside so many steps, with ")


def test_notes_of_the_first_layer_have_no_numbers_of_a_model_on_meta() -> None:
    with torch.device("meta"):
        model = net()
    [told] = kfactk.build(link="two_level").coverage(model).notes
    assert told == "link two_level: 2 layers, under 1 kB between steps"
