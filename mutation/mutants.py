"""Mutants: mistakes, one at a time, each in one file; and the committed list of them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

ROOT = Path(__file__).parents[1]
LISTED = Path(__file__).with_name("listed.toml")


class MutantError(Exception):
    """A list of mutants does not fit the source."""


@attrs.frozen
class Mutant:
    """One mistake.

    Args:
        name: What it is called.
        path: The file it is made in, from the root of the checkout.
        source: The whole of that file with the mistake in it.
        tests: Paths of the tests that have to notice it, the most telling first.
        hangs: Whether the mistake may make a test run for ever, so that a timeout counts as noticed.
    """

    name: str
    path: str
    source: str = attrs.field(repr=False)
    tests: tuple[str, ...]
    hangs: bool = False

    @property
    def module(self) -> str:
        """The file as a module to import."""
        return ".".join(Path(self.path.removeprefix("plugins/")).with_suffix("").parts)


def listed(root: Path = ROOT, path: Path = LISTED) -> list[Mutant]:
    """The committed list, made from the files under `root`.

    Raises:
        MutantError: An entry is incomplete, its text does not stand in its file exactly once, or one of its tests does not exist.
    """
    with path.open("rb") as file:
        entries = tomllib.load(file)["mutant"]
    mutants = [_made(entry, root) for entry in entries]
    names = [mutant.name for mutant in mutants]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise MutantError(f"several mutants of one name: {doubled}")
    return mutants


def _made(entry: dict[str, Any], root: Path) -> Mutant:
    name = entry.get("name", "a mutant without a name")
    if lacking := [
        key for key in ("name", "path", "old", "new", "why", "tests") if key not in entry
    ]:
        raise MutantError(f"{name}: {', '.join(lacking)} is missing")
    if unknown := sorted(set(entry) - {"name", "path", "old", "new", "why", "tests", "hangs"}):
        raise MutantError(f"{name}: there is no {', '.join(unknown)}")
    text, old, new = (root / entry["path"]).read_text(), entry["old"], entry["new"]
    if text.count(old) != 1 or old == new:
        raise MutantError(
            f"{name}: its text stands {text.count(old)} times in {entry['path']}, where once is wanted:\n{old}"
        )
    _present(name, entry["tests"], root)
    return Mutant(
        name,
        entry["path"],
        text.replace(old, new),
        tuple(entry["tests"]),
        hangs=entry.get("hangs", False),
    )


def _present(name: str, tests: Iterable[str], root: Path) -> None:
    absent = [path for path in tests if not (root / path).exists()]
    if absent:
        raise MutantError(f"{name}: there are no tests at {', '.join(absent)}")
