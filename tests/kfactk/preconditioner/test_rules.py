"""Which modules a rule may take, by the names of the modules."""

from __future__ import annotations

import pytest

from kfactk.preconditioner.rules import BlockRule, within
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.curvature.conv_kfac import ConvKfac


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("encoder", {"encoder", "encoder.0", "encoder.0.fc"}),
        ("encoder.?", {"encoder.0", "encoder.0.fc"}),
        ("*.fc", {"encoder.0.fc", "decoder.fc"}),
        ("[de]*coder.fc", {"decoder.fc"}),
        ("fc", set()),
        ("Encoder", set()),
        ("*", {"encoder", "encoder.0", "encoder.0.fc", "decoder.fc", ""}),
    ],
)
def test_a_pattern_matches_a_module_and_all_within_it(pattern: str, matched: set[str]) -> None:
    names = ["", "encoder", "encoder.0", "encoder.0.fc", "decoder.fc"]
    assert {name for name in names if within(name, pattern)} == matched


def test_a_rule_without_patterns_may_take_any_module() -> None:
    rule = BlockRule(ConvKfac(), Ekfac())
    assert rule.allows("")
    assert rule.allows("encoder.0")


def test_a_rule_may_take_what_any_of_its_patterns_matches() -> None:
    rule = BlockRule(ConvKfac(), Ekfac(), layers=("head", "*.fc"))
    allowed = [name for name in ("head.0", "body.fc", "body.conv") if rule.allows(name)]
    assert allowed == ["head.0", "body.fc"]
