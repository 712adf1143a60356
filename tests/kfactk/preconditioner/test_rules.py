"""Which modules a rule may take, by shell-style patterns of their names."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from kfactk.preconditioner.rules import BlockRule, within
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.curvature.kfac import Kfac

NAMES = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=4).map(".".join)


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("encoder.0.fc", "encoder", True),
        ("encoder.0.fc", "encoder.0", True),
        ("encoder.0.fc", "encoder.0.fc", True),
        ("encoder.0.fc", "*.fc", True),
        ("encoder.0.fc", "encoder.*.fc", True),
        ("encoder.0.fc", "*", True),
        ("encoder.0.fc", "fc", False),
        ("encoder.0.fc", "enc", False),
        ("encoder.10.fc", "encoder.1", False),
        ("encoder.10.fc", "encoder.1?", True),
        ("Head", "head", False),
        ("", "head", False),
    ],
)
def test_a_pattern_names_a_module_or_one_that_contains_it(
    name: str, pattern: str, expected: bool
) -> None:
    assert within(name, pattern) == expected


@given(NAMES, NAMES)
def test_a_name_without_wildcards_matches_itself_and_what_it_contains(one: str, other: str) -> None:
    assert within(one, other) == (one == other or one.startswith(f"{other}."))


def test_a_rule_without_patterns_may_take_every_module() -> None:
    everything = BlockRule(Kfac(), Ekfac())
    some = BlockRule(Kfac(), Ekfac(), ("head", "*.attention"))
    names = ["", "head", "head.0", "body", "body.attention"]
    assert [everything.allows(name) for name in names] == [True] * 5
    assert [some.allows(name) for name in names] == [False, True, True, False, True]
