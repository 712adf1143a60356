"""Errors: one root, and near names that help."""

import inspect
import string

from hypothesis import given, strategies as st

from kfactk import errors
from kfactk.errors import KfactkError, KfactkWarning, OptionError, near_names

names = st.text(string.ascii_lowercase + "_", min_size=3, max_size=12)


def test_every_error_derives_from_the_root() -> None:
    classes = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    kinds = [
        kind for kind in classes if issubclass(kind, Exception) and not issubclass(kind, Warning)
    ]
    assert len(kinds) == 8
    assert all(issubclass(kind, KfactkError) and kind.__doc__ for kind in kinds)
    assert issubclass(KfactkWarning, UserWarning)


def test_a_wrong_option_is_a_value_error_too() -> None:
    assert issubclass(OptionError, ValueError)


def test_near_names_come_closest_first_and_at_most_three() -> None:
    assert near_names("ekfca", ["kfac", "ekfac", "adam"]) == " Did you mean 'ekfac' or 'kfac'?"
    assert near_names("aaaa", ["aaab", "aaac", "aaad", "aaae"]).count(" or ") == 2


def test_nothing_near_says_nothing() -> None:
    assert near_names("zzz", ["kfac"]) == ""
    assert near_names("kfac", []) == ""


@given(name=names, others=st.lists(names, max_size=5), data=st.data())
def test_a_dropped_letter_is_forgiven(name: str, others: list[str], data: st.DataObject) -> None:
    gap = data.draw(st.integers(0, len(name) - 1))
    typo = name[:gap] + name[gap + 1 :]
    assert repr(name) in near_names(typo, [name]), "the name itself, alone, is near"
    hint = near_names(typo, [name, *others])
    assert hint.startswith(" Did you mean ")
    assert hint.endswith("?")


@given(name=names, known=st.lists(names))
def test_only_known_names_are_suggested(name: str, known: list[str]) -> None:
    hint = near_names(name, iter(known))
    assert all(part in known for part in hint.split("'")[1::2])
