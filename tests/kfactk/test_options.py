"""Validators of options: what passes, what is refused, and how the error reads."""

import math
from typing import Any

import attrs
import numpy as np
import pytest
import torch

import kfactk
from kfactk import OptionError
from kfactk.options import (
    Validator,
    as_tuple,
    choice,
    flag,
    function,
    number,
    number_at,
    period_at,
    plain,
    text,
    whole,
)


def given(validator: Validator, value: Any) -> Any:
    """Return the value of an option with this validator, made by attrs."""
    made = attrs.make_class("Stage", {"_size": attrs.field(validator=validator, alias="size")})
    return made(size=value)._size


@pytest.mark.parametrize(
    ("validator", "allowed", "refused", "must"),
    [
        (number(), [0, -1.5], ["1", None, True, math.nan, math.inf], "a finite number."),
        (number(0), [0, 2], [-1e-9], "a finite number of at least 0."),
        (number(0, low_open=True), [1e-9], [0], "a finite number greater than 0."),
        (number(0, 1), [0, 1], [-1, 2], "a finite number in [0, 1]."),
        (number(0, 1, high_open=True, hint=" here"), [0], [1], "a finite number in [0, 1) here."),
        (number(0, optional=True), [None, 1], ["a"], "a finite number of at least 0 or None."),
        (whole(), [1, 9], [0, 1.0, True, "1"], "a whole number of at least 1."),
        (whole(None), [-3], [0.5], "a whole number."),
        (whole(0, optional=True), [0, None], [-1], "a whole number of at least 0 or None."),
        (text(), ["a"], ["", 1, None], "a non-empty string."),
        (text(empty=True, optional=True), ["", None], [1], "a string or None."),
        (choice("a", None, 1), ["a", None, 1], ["b", True, 1.0], "one of 'a', None, 1."),
        (flag, [True, False], [0, None, "yes"], "True or False."),
        (function(hint=" of x"), [abs, None], [1], "a function of x."),
        (function(optional=False), [abs], [None], "a function."),
    ],
)
def test_validator_allows_and_refuses(
    validator: Validator, allowed: list[Any], refused: list[Any], must: str
) -> None:
    for value in allowed:
        assert given(validator, value) is value
    for value in refused:
        with pytest.raises(OptionError) as caught:
            given(validator, value)
        assert str(caught.value).startswith(f"Stage: size={value!r} cannot work: it must be {must}")


def test_choice_names_near_values() -> None:
    with pytest.raises(OptionError, match=r"Did you mean 'sampled'\?$"):
        given(choice("sampled", "running"), "sample")


def test_as_tuple_converts_lists_alone() -> None:
    assert (as_tuple([1, 2]), as_tuple("ab"), as_tuple(3)) == ((1, 2), "ab", 3)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2"])
def test_period_at_refuses_what_counts_no_steps(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^every is .*; it counts steps.* at least 1\.$"):
        period_at("every", value, 0)
    with pytest.raises(OptionError, match="at step 3; it counts steps"):
        period_at("every", lambda step: value, 3)


def test_period_at_asks_functions_for_the_step() -> None:
    assert (period_at("every", 4, 9), period_at("every", lambda step: step + 1, 9)) == (4, 10)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, True, "2", None])
def test_number_at_refuses_what_is_out_of_bounds(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^tau is .*must be a finite number of at least 0\.$"):
        number_at("tau", value, 0)
    with pytest.raises(OptionError, match=r"at step 3; it must be a finite number in \[0, 1\]\.$"):
        number_at("tau", lambda step: 2.0, 3, high=1.0)


def test_number_at_asks_functions_for_the_step() -> None:
    assert (number_at("tau", 1, 0), number_at("tau", lambda step: step / 4, 2)) == (1.0, 0.5)


def test_plain_reads_tensors_of_one_element() -> None:
    assert (plain(torch.tensor([0.5])), plain("x")) == (0.5, "x")
    assert plain(pair := torch.ones(2)) is pair


@pytest.mark.parametrize("value", [1e308, 10**400, -(10**400)])
def test_a_number_that_float32_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(OptionError, match=r"at most 3\.4e\+38") as caught:
        number_at("lr", value, 0, low=-math.inf)
    assert len(str(caught.value)) < 200
    with pytest.raises(OptionError, match="a finite number"):
        kfactk.build(clip={"name": "norm", "limit": 10**400})


def test_numbers_of_numpy_are_taken_as_pythons() -> None:
    betas = np.float32(0.5), np.float64(0.75)
    given = {"lr": np.float32(0.5), "damping": lambda step: np.float16(0.25), "strict": False}
    recipe = kfactk.build(
        **given, factor_every=np.int64(2), update={"name": "adam", "betas": betas}
    )
    assert recipe.evolve(damping=0.25) == kfactk.build(
        lr=0.5, damping=0.25, factor_every=2, update={"name": "adam", "betas": (0.5, 0.75)}
    )
    assert type(recipe.lr) is float
    assert number_at("damping", recipe.damping, 0) == 0.25
