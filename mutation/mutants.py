"""Mutants, each one mistake in one file; and the committed list of them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

ROOT = Path(__file__).parents[1]
LISTED = Path(__file__).with_name("listed.toml")
REQUIRED = ("name", "path", "old", "new", "why", "tests")
"""Keys of every entry of the list."""


class MutantError(Exception):
    """A list of mutants does not fit the source."""


@attrs.frozen
class Mutant:
    """One mistake.

    Args:
        name: Its name.
        path: The changed file, from the root of the checkout.
        source: The whole file with the mistake.
        tests: Paths of the tests that must notice it, the most specific first.
        hangs: Whether the mistake may make a test run forever: a timeout then counts as noticed.
    """

    name: str
    path: str
    source: str = attrs.field(repr=False)
    tests: tuple[str, ...]
    hangs: bool = False

    @property
    def module(self) -> str:
        """Name of the module of the file."""
        return ".".join(Path(self.path.removeprefix("plugins/")).with_suffix("").parts)


def listed(root: Path = ROOT, path: Path = LISTED) -> list[Mutant]:
    """Return the committed list, applied to the files under `root`.

    Raises:
        MutantError: An entry is incomplete, its text does not occur exactly once in its file, or a
            test does not exist.
    """
    with path.open("rb") as file:
        entries = tomllib.load(file)["mutant"]
    mutants = [_mutant_of(entry, root) for entry in entries]
    names = [mutant.name for mutant in mutants]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise MutantError(f"several mutants of one name: {repeated}")
    return mutants


def _mutant_of(entry: dict[str, Any], root: Path) -> Mutant:
    name = entry.get("name", "a mutant without a name")
    if lacking := [key for key in REQUIRED if key not in entry]:
        raise MutantError(f"{name}: {', '.join(lacking)} is missing")
    if unknown := sorted(set(entry) - {*REQUIRED, "hangs"}):
        raise MutantError(f"{name}: there is no {', '.join(unknown)}")
    text, old, new = (root / entry["path"]).read_text(), entry["old"], entry["new"]
    if text.count(old) != 1 or old == new:
        raise MutantError(
            f"{name}: its text occurs {text.count(old)} times in {entry['path']}, not once, or "
            f"does not change:\n{old}"
        )
    _check_tests(name, entry["tests"], root)
    return Mutant(
        name,
        entry["path"],
        text.replace(old, new),
        tuple(entry["tests"]),
        hangs=entry.get("hangs", False),
    )


def _check_tests(name: str, tests: Iterable[str], root: Path) -> None:
    absent = [path for path in tests if not (root / path).exists()]
    if absent:
        raise MutantError(f"{name}: there are no tests at {', '.join(absent)}")
