"""Validators of options, and numbers that depend on the step."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, strategies as st

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
    whole,
)


def stage(validator: Validator) -> Any:
    """Return a stage with one option."""
    return attrs.make_class("Stage", {"option": attrs.field(validator=validator)})


def refusal(validator: Validator, value: Any) -> str:
    with pytest.raises(OptionError) as error:
        stage(validator)(value)
    return str(error.value)


NO_NUMBERS: list[Any] = ["1", None, True, 1j, math.nan, math.inf, [1.0]]


@given(
    low=st.floats(-5, 5), width=st.floats(0, 5), value=st.floats(-11, 11), low_open=st.booleans()
)
def test_a_number_lies_in_its_interval(
    low: float, width: float, value: float, low_open: bool
) -> None:
    validator = number(low, low + width, low_open=low_open)
    good = low <= value <= low + width and not (low_open and value == low)
    if good:
        assert stage(validator)(value).option == value
    else:
        assert f"option={value!r} cannot work" in refusal(validator, value)


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_what_is_no_number_is_refused(value: Any) -> None:
    assert refusal(number(), value).endswith("it must be a finite number.")


def test_the_message_tells_the_interval_and_the_hint() -> None:
    assert "must be a finite number in (0, 1]; use" in refusal(
        number(0, 1, low_open=True, hint="; use less"), 2
    )
    assert "in [0, 1)" in refusal(number(0, 1, high_open=True), 1)
    assert "of at least 0 or None" in refusal(number(0, optional=True), -1)
    assert "greater than 0." in refusal(number(0, low_open=True), 0)
    assert stage(number(optional=True))(None).option is None


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None])
def test_a_whole_number_is_an_int_from_its_least_value(value: Any) -> None:
    assert refusal(whole(), value).endswith("it must be a whole number of at least 1.")
    assert [stage(whole(n))(n).option for n in (0, 3)] == [0, 3]
    assert stage(whole(optional=True))(None).option is None


def test_a_choice_tells_near_names() -> None:
    validator = choice("sud", "sua", None, 1, hint=", as the paper has it")
    assert [stage(validator)(value).option for value in ("sua", None, 1)] == ["sua", None, 1]
    message = refusal(validator, "sub")
    assert "one of 'sud', 'sua', None, 1, as the paper has it. Did you mean" in message
    assert "True cannot work" in refusal(validator, True)  # though it equals 1
    assert "1.0 cannot work" in refusal(validator, 1.0)


@pytest.mark.parametrize("value", [0, 1, "yes", None])
def test_a_flag_is_true_or_false(value: Any) -> None:
    assert refusal(flag, value).endswith("it must be True or False.")
    assert stage(flag)(False).option is False


def test_a_function_can_be_called() -> None:
    assert stage(function())(None).option is None
    assert stage(function())(len).option is len
    assert refusal(function(hint=" of the step"), 3).endswith("must be a function of the step.")
    assert refusal(function(optional=False), None).endswith("must be a function.")


def test_a_list_becomes_a_tuple() -> None:
    assert [as_tuple(value) for value in ([1, 2], (1,), "ab")] == [(1, 2), (1,), "ab"]


# --------------------------------------------------------------------- what depends on the step


@pytest.mark.parametrize("period", [0, -1, 2.5, "3", True, None, math.nan])
def test_a_period_that_is_no_number_of_steps_is_refused(period: Any) -> None:
    with pytest.raises(OptionError, match=r"factor_every is .* a whole number of at least 1"):
        period_at("factor_every", period, 0)
    with pytest.raises(OptionError, match=r"basis_every is .* at step 7"):
        period_at("basis_every", lambda step: period, 7)


@pytest.mark.parametrize("value", [-0.1, 1.1, "x", True, None, math.nan])
def test_a_number_out_of_its_bounds_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match=r"factor_decay is .* finite number in \[0, 1\]"):
        number_at("factor_decay", value, 0, high=1.0)
    with pytest.raises(OptionError, match=r"factor_decay is .* at step 3"):
        number_at("factor_decay", lambda step: value, 3, high=1.0)


def test_numbers_and_periods_may_be_functions_of_the_step() -> None:
    assert number_at("damping", lambda step: 1 / (1 + step), 3) == 0.25
    assert number_at("damping", 2, 3) == 2.0
    assert period_at("basis_every", lambda step: 2 + step, 3) == 5
    with pytest.raises(OptionError, match="damping is -1; it must be a finite number of at least"):
        number_at("damping", -1, 0)
    with pytest.raises(OptionError, match="damping is inf"):
        number_at("damping", math.inf, 0)


def test_a_tensor_of_one_element_is_its_number() -> None:
    pair = torch.ones(2)
    assert plain(torch.tensor([0.5])) == 0.5
    assert plain(pair) is pair
    assert plain(3) == 3
