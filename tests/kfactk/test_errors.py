"""Errors have one base class, and near names help."""

import inspect
import string

from hypothesis import given, strategies as st

from kfactk import errors
from kfactk.errors import KfactkError, KfactkWarning, OptionError, near_names

names = st.text(string.ascii_lowercase + "_", min_size=3, max_size=12)


def test_errors_derive_from_kfactk_error() -> None:
    classes = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    kinds = [
        kind for kind in classes if issubclass(kind, Exception) and not issubclass(kind, Warning)
    ]
    assert len(kinds) == 9
    assert all(issubclass(kind, KfactkError) and kind.__doc__ for kind in kinds)
    assert issubclass(KfactkWarning, UserWarning)


def test_option_error_is_a_value_error() -> None:
    assert issubclass(OptionError, ValueError)


def test_near_names_lists_at_most_three_closest_first() -> None:
    assert near_names("ekfca", ["kfac", "ekfac", "adam"]) == " Did you mean 'ekfac' or 'kfac'?"
    assert near_names("aaaa", ["aaab", "aaac", "aaad", "aaae"]).count(" or ") == 2


def test_near_names_is_empty_without_a_near_name() -> None:
    assert near_names("zzz", ["kfac"]) == ""
    assert near_names("kfac", []) == ""


@given(name=names, others=st.lists(names, max_size=5), data=st.data())
def test_near_names_finds_a_name_with_a_letter_missing(
    name: str, others: list[str], data: st.DataObject
) -> None:
    gap = data.draw(st.integers(0, len(name) - 1))
    typo = name[:gap] + name[gap + 1 :]
    assert repr(name) in near_names(typo, [name])
    hint = near_names(typo, [name, *others])
    assert hint.startswith(" Did you mean ")
    assert hint.endswith("?")


@given(name=names, known=st.lists(names))
def test_near_names_suggests_known_names_only(name: str, known: list[str]) -> None:
    hint = near_names(name, iter(known))
    assert all(part in known for part in hint.split("'")[1::2])
