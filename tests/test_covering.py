"""Samples of wide parametrizations cover what they promise; the rest is marked `thorough`."""

import itertools

import pytest

from tests.covering import covering, sample, widening

AXES = [range(4), range(3), range(4), range(2)]


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_a_sample_covers_all_combinations_of_some_axes(strength: int) -> None:
    product = list(itertools.product(*AXES))
    found = [product[number] for number in sample(product, strength)]
    for chosen in itertools.combinations(range(len(AXES)), strength):
        seen = {tuple(case[axis] for axis in chosen) for case in found}
        assert seen == set(itertools.product(*(AXES[axis] for axis in chosen)))
    assert len(found) <= len(product) / 2


def test_the_rest_of_the_product_is_marked() -> None:
    names, cases = covering(a=["x", "y"], b=[1, 2, 3], c=(len, max)).args
    assert names == ("a", "b", "c")
    assert [case.id for case in cases] == [
        f"{a}-{b}-{c.__name__}" for a, b, c in itertools.product("xy", (1, 2, 3), (len, max))
    ]
    assert sum(bool(case.marks) for case in cases) == len(cases) - 6
    assert {mark.name for case in cases for mark in case.marks} == {"thorough"}


def test_what_is_not_allowed_is_no_case() -> None:
    _, cases = covering(allowed=lambda a, b: a != b, a=[0, 1, 2], b=[0, 1, 2]).args
    assert [case.values for case in cases] == list(itertools.permutations(range(3), 2))
    assert not any(case.marks for case in cases)


def test_marks_and_ids_of_values_are_kept() -> None:
    two = pytest.param(2, marks=pytest.mark.skipif(True, reason="no device"), id="two")
    _, cases = covering(a=[1, two], b=["x"]).args
    assert [case.id for case in cases] == ["1-x", "two-x"]
    assert [[mark.name for mark in case.marks] for case in cases] == [[], ["skipif"]]


def test_cases_named_as_quick_are_the_quick_ones() -> None:
    cases = widening([("a", 1), ("b", 2), ("c", 3)], quick=[("b", 2)])
    assert [case.values for case in cases if not case.marks] == [("b", 2)]
    assert len(cases) == 3
    with pytest.raises(ValueError, match="no such cases"):
        widening(["a"], quick=["b"])
