"""The frame of the laws: tests for each subclass, profiles, messages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from kfactk import OptionError
from kfactk.testing import Laws, close, effort, law
from tests.kfactk.testing.broken import caught, laws_of


class EvenLaws(Laws):
    """Two laws, one over a strategy of the class' own."""

    family = "clip"
    seen: list[int]

    def numbers(self) -> st.SearchStrategy[int]:
        return st.integers(0, 10).map(lambda n: 2 * n)

    @law(examples=7, number="numbers")
    def test_numbers_are_even(self, number: int) -> None:
        """Numbers are
        even."""
        self.seen.append(number)
        assert number % 2 == 0, f"{number} is odd"

    @law()
    def test_without_arguments(self) -> None:
        """It has a limit."""
        assert self.subject().limit > 0


class Odd(EvenLaws):
    """One of its strategies breaks a law."""

    def numbers(self) -> st.SearchStrategy[int]:
        return st.just(3)


def test_each_law_is_a_test_of_each_subclass() -> None:
    assert laws_of(EvenLaws) == laws_of(Odd) == ["test_numbers_are_even", "test_without_arguments"]
    assert EvenLaws.test_numbers_are_even is not Odd.test_numbers_are_even


def test_examples_are_drawn_from_the_class() -> None:
    seen: list[int] = []
    assert caught(EvenLaws, "norm", seen=seen) == {}
    assert 1 < len(seen) <= 7


def test_a_broken_law_says_which_stage_broke_what() -> None:
    found = caught(Odd, {"name": "norm", "limit": 2.0}, seen=[])
    assert list(found) == ["test_numbers_are_even"]
    assert "3 is odd" in found["test_numbers_are_even"]
    assert (
        "clip {'name': 'norm', 'limit': 2.0} breaks a law of its family: Numbers are even."
        in found["test_numbers_are_even"]
    )


def test_a_class_without_a_stage_is_told() -> None:
    assert (
        "names no clip. Write `stage = ...`"
        in caught(EvenLaws, None, "test_without_arguments")["test_without_arguments"]
    )


def test_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFACTK_LAWS", raising=False)
    assert effort(10) == 10
    monkeypatch.setenv("KFACTK_LAWS", "thorough")
    assert effort(10) == 300
    monkeypatch.setenv("KFACTK_LAWS", "thorugh")
    with pytest.raises(
        OptionError,
        match=r"KFACTK_LAWS='thorugh'.*Did you mean 'thorough'\? Choose one of: quick, thorough",
    ):
        effort(10)


def test_a_law_may_be_replaced_or_taken_out() -> None:
    made = type(
        "TestOne", (EvenLaws,), {"stage": "norm", "test_without_arguments": None, "seen": []}
    )
    assert laws_of(made) == ["test_numbers_are_even"]


@pytest.mark.parametrize(
    ("actual", "expected"), [(1.0, 1.1), (float("nan"), float("nan")), (float("inf"), 1.0)]
)
def test_close_says_what_ought_to_be_equal(actual: float, expected: float) -> None:
    close(torch.ones(2), torch.ones(2) + 1e-12, "ones are ones")
    with pytest.raises(AssertionError, match=r"^halves make a whole\.\n"):
        close(torch.tensor(actual), torch.tensor(expected), "halves make a whole")


def test_laws_run_in_the_order_they_are_written() -> None:
    """The class' own, then the inherited ones."""

    class Last(EvenLaws):
        @law()
        def test_added_by_the_author(self) -> None:
            """Of the class alone."""

    written = [name for name in vars(Last) if name.startswith("test_")]
    assert written == [
        "test_added_by_the_author",
        "test_numbers_are_even",
        "test_without_arguments",
    ]


def test_a_stage_that_is_not_installed_is_told_how_to() -> None:
    assert (
        "pip install -e ."
        in caught(EvenLaws, "nowhere", "test_without_arguments")["test_without_arguments"]
    )
