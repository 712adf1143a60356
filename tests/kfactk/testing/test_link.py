"""Laws of links, put to links that break them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import pytest
from torch import Tensor

from kfactk import Preparation, Prepared
from kfactk.testing import LinkLaws
from kfactk_stages.link.two_level import TwoLevel
from tests.kfactk.testing.broken import caught


@attrs.frozen
class Wrong(TwoLevel):
    """A two-level link with one fault."""

    fault: str = ""

    def statistics(self, layers: Any, rows: Any, num_terms: Any) -> Any:
        found = super().statistics(layers, rows, num_terms)
        if self.fault == "mean" and rows:
            sums = found["coarse"]
            return {"coarse": attrs.evolve(sums, total=sums.total / float(num_terms))}
        if self.fault == "nothing" and not rows:
            return {"coarse": attrs.evolve(found["coarse"], total=None)}
        return found

    def prepare(self, layers: Any, statistics: Any) -> Prepared:
        return Prepared({"root": statistics["coarse"]}) if self.fault == "more" else Prepared()

    def preparation(self, layers: Any) -> Preparation:
        return Preparation(products=-1.0 if self.fault == "less" else 0.0)

    def correct(
        self, layers: Any, gradients: Any, preconditioned: Any, statistics: Any
    ) -> Mapping[str, Tensor]:
        found = super().correct(layers, gradients, preconditioned, statistics)
        names = list(found)
        if self.fault == "square":
            return {name: each + 1e-3 * each.square() for name, each in found.items()}
        if self.fault == "one way" and len(names) > 1:
            return {**found, names[0]: found[names[0]] + found[names[1]].sum()}
        if self.fault == "minus":
            return {name: 2 * preconditioned[name] - 100 * gradients[name].sum() for name in names}
        if self.fault == "alone" and len(layers) == 1:
            return {name: 2 * each for name, each in found.items()}
        if self.fault == "in place":
            return {name: each.mul_(1.0 + 1e-9) for name, each in preconditioned.items()}
        if self.fault == "counts" and len(gradients) < len(layers):
            return {name: each / 2 for name, each in found.items()}
        return found


@pytest.mark.parametrize(
    ("fault", "law", "says"),
    [
        ("square", "test_correction_is_linear", "the correction is not linear"),
        ("one way", "test_correction_is_self_adjoint", "not self-adjoint on all layers together"),
        ("minus", "test_correction_is_positive_definite", "not positive definite"),
        ("alone", "test_one_layer_is_left_as_it_is", "a layer alone was changed by the link"),
        (
            "counts",
            "test_layers_without_a_gradient_count_as_zero",
            "has no gradient, and does not count as zero",
        ),
        ("mean", "test_statistics_are_sums_over_examples", "is not that of the whole"),
        ("nothing", "test_statistics_are_sums_over_examples", "no tensor where no layer ran"),
        ("in place", "test_correction_is_linear", "was modified"),
        ("more", "test_what_is_prepared_is_what_was_told", "and preparation told {}"),
        ("less", "test_what_is_prepared_is_what_was_told", "preparation told Preparation("),
    ],
)
def test_each_fault_is_caught_by_its_law(fault: str, law: str, says: str) -> None:
    found = caught(LinkLaws, Wrong(fault), law)
    assert says in found[law]
    assert "breaks a law of its family" in found[law]


class Forgetful(TwoLevel):
    """Measures nothing."""

    def statistics(self, layers: Any, rows: Any, num_terms: Any) -> Any:
        return {}

    def correct(
        self, layers: Any, gradients: Any, preconditioned: Any, statistics: Any
    ) -> dict[str, Tensor]:
        return dict(preconditioned)


def test_a_link_that_keeps_nothing_is_told() -> None:
    law = "test_a_resumed_run_is_the_uninterrupted_one"
    assert "nothing of the link is in the state" in caught(LinkLaws, Forgetful(), law)[law]


def test_a_right_link_obeys_the_laws_of_its_correction() -> None:
    names = ["test_correction_is_linear", "test_one_layer_is_left_as_it_is"]
    assert caught(LinkLaws, TwoLevel(), *names) == {}
