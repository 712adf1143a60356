"""Wide parametrizations: a covering sample in the quick profile, the product in the thorough one.

A law over several axes, such as recipes, placements and bad batches, has a product of cases. The
quick profile runs a sample that covers every pair of values: each value and each interaction of two
can fail. The other cases carry the mark `thorough`; `tests/conftest.py` deselects them unless
`KFACTK_LAWS=thorough`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

Case = tuple[Any, ...]


def sample(cases: Sequence[Case], strength: int = 2) -> list[int]:
    """Return positions of cases that have between them all combinations of any `strength` elements.

    The choice is greedy: the case with the most new combinations comes next, the first of several.

    Args:
        cases: Of the same length; their elements must be hashable.
        strength: 1 covers each value, 2 each pair of values of two axes.
    """
    chosen = list(itertools.combinations(range(len(cases[0])), min(strength, len(cases[0]))))
    covers = [{(axes, tuple(case[axis] for axis in axes)) for axes in chosen} for case in cases]
    missing, found = set[Any]().union(*covers), list[int]()
    while missing:
        found.append(max(range(len(cases)), key=lambda number: len(covers[number] & missing)))
        missing -= covers[found[-1]]
    return sorted(found)


def covering(
    strength: int = 2, allowed: Callable[..., bool] = lambda *values: True, **axes: Iterable[Any]
) -> pytest.MarkDecorator:
    """Parametrize a test over the product of several axes, most of it in the thorough profile only.

    Args:
        strength: As in `sample`.
        allowed: Tells for one value of each axis whether they are a case.
        **axes: The values of each argument, or `pytest.param` with marks or an id.

    Example:
        @covering(basis=BASES, placement=PLACEMENTS)
        def test_ranks_agree(basis: str, placement: str) -> None: ...
    """
    values = [[_parameter(value) for value in axis] for axis in axes.values()]
    product = [
        places
        for places in itertools.product(*(range(len(axis)) for axis in values))
        if allowed(*(axis[place].values[0] for axis, place in zip(values, places, strict=True)))
    ]
    quick = set(sample(product, strength))
    cases = [
        _case(
            [axis[place] for axis, place in zip(values, places, strict=True)], number not in quick
        )
        for number, places in enumerate(product)
    ]
    return pytest.mark.parametrize(tuple(axes), cases)


def widening(cases: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Return the cases as parameters of a test; those outside `quick` are marked `thorough`.

    Raises:
        ValueError: A quick case is not among the cases.
    """
    every, kept = list(cases), list(quick)
    unknown = [case for case in kept if case not in every]
    if unknown:
        raise ValueError(f"no such cases: {unknown}")
    return [
        _case([_parameter(value) for value in _values(case)], case not in kept) for case in every
    ]


def _values(case: Any) -> Case:
    return case if isinstance(case, tuple) else (case,)


def _parameter(value: Any) -> Any:
    """The value as `pytest.param`, with an id."""
    if hasattr(value, "marks"):
        return value if value.id else pytest.param(*value.values, marks=value.marks, id=_id(value))
    return pytest.param(value, id=_id(value))


def _id(value: Any) -> str:
    value = value.values[0] if hasattr(value, "marks") else value
    return str(getattr(value, "__name__", value))


def _case(parameters: Sequence[Any], thorough: bool) -> Any:
    marks = [mark for each in parameters for mark in each.marks]
    return pytest.param(
        *(value for each in parameters for value in each.values),
        marks=[*marks, pytest.mark.thorough] if thorough else marks,
        id="-".join(each.id for each in parameters),
    )
