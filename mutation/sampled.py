"""A sample of the mutants that cosmic-ray's operators make."""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from mutation.mutants import ROOT, Mutant, MutantError

EXPLAINED = Path(__file__).with_name("explained.toml")
SOURCES = (
    "kfactk/linalg.py",
    "kfactk/statistics.py",
    "kfactk/samples.py",
    "plugins/kfactk_stages/curvature",
    "plugins/kfactk_stages/basis",
    "plugins/kfactk_stages/clip",
    "plugins/kfactk_stages/link",
)
"""Files and folders from which mutants are made."""
MORE = ("tests/kfactk", "tests/kfactk_stages")
"""Tests to run after those at the mirrored path have passed."""
BITS = {"RShift", "LShift", "BitAnd", "BitOr", "BitXor"}
"""Operators on bits: in place of arithmetic they raise, which proves nothing."""
SAME = {("Eq", "Is"), ("Is", "Eq"), ("NotEq", "IsNot"), ("IsNot", "NotEq")}
"""Comparisons that agree on strings, small numbers and `None`."""


@attrs.frozen
class Candidate:
    """One change that cosmic-ray can make.

    Args:
        path: The file.
        where: Qualified name of the function or class that changes.
        line: The first line that changes, stripped.
        operator: Name of the operator.
        occurrence: Index among the places of the file where the operator applies.
        place: Line and column; a sample has at most one change of each place.
    """

    path: str
    where: str
    line: str
    operator: str
    occurrence: int
    place: tuple[int, int]

    def source(self, text: str) -> str | None:
        """Return the changed file, or `None` where the change is meaningless.

        That is so where only annotations and docstrings change, or where the result is no Python.
        """
        return _changed(text, self.operator, self.occurrence)

    def key(self, text: str, source: str) -> str:
        """Return a name that does not depend on changes elsewhere in the file."""
        return _key(self.path, self.where, *_difference(text, source))


def sample(count: int, seed: int, root: Path = ROOT) -> list[Mutant]:
    """Draw `count` mutants, at most one of each place.

    The order is by a hash of each candidate's surroundings: changes of the source replace few of
    the mutants.
    """

    def order(c: Candidate) -> bytes:
        return hashlib.blake2b(
            f"{seed} {c.path} {c.where} {c.line} {c.operator} {c.place[1]}".encode()
        ).digest()

    found: dict[tuple[str, tuple[int, int]], Mutant] = {}
    for candidate in sorted(candidates(root), key=order) if count else ():
        place, text = (candidate.path, candidate.place), (root / candidate.path).read_text()
        if place not in found and (source := candidate.source(text)) is not None:
            found[place] = _mutant(candidate.key(text, source), candidate.path, source, root)
        if len(found) == count:
            break
    return list(found.values())


def explained(root: Path = ROOT, path: Path = EXPLAINED) -> dict[str, str]:
    """Return key and reason of mutants that no test can or should notice.

    Raises:
        MutantError: An entry has no reason, or no longer matches a mutant.
    """
    with path.open("rb") as file:
        entries: list[dict[str, Any]] = tomllib.load(file).get("explained", [])
    known, found = candidates(root) if entries else [], {}
    for entry in entries:
        key = _key(entry["path"], entry["where"], entry["old"], entry["new"])
        if not entry.get("because"):
            raise MutantError(f"no reason is given for\n{key}")
        possible = [
            c
            for c in known
            if (c.path, c.where) == (entry["path"], entry["where"])
            and entry["old"].startswith(c.line)
        ]
        text = (root / entry["path"]).read_text() if possible else ""
        if not any(
            (source := c.source(text)) is not None and c.key(text, source) == key for c in possible
        ):
            raise MutantError(
                f"stale: no mutant has this key any more; remove or update the entry:\n{key}"
            )
        found[key] = entry["because"]
    return found


def candidates(root: Path = ROOT) -> list[Candidate]:
    """Return all changes that cosmic-ray can make."""
    found = []
    for name in SOURCES:
        files = sorted((root / name).glob("*.py")) if (root / name).is_dir() else [root / name]
        for file in files:
            found += candidates_of(file.relative_to(root).as_posix(), file.read_text())
    return found


@functools.cache
def candidates_of(path: str, text: str) -> list[Candidate]:
    """Return the changes of one file."""
    nodes, lines, names, found = list(ast_nodes(get_ast(text))), text.splitlines(), _names(text), []
    for name in filter(_is_informative, sorted(operator_names())):
        kind = get_operator(name)
        if kind.arguments():
            continue
        operator = kind()
        places = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, place in enumerate(places):
            where = max(
                (span for span in names if span[0] <= place[0] <= span[1]), default=(0, 0, "module")
            )[2]
            found.append(
                Candidate(path, where, lines[place[0] - 1].strip(), name, occurrence, place)
            )
    return found


@functools.cache
def _changed(text: str, operator: str, occurrence: int) -> str | None:
    changed: str | None = mutate_code(text, get_operator(operator)(), occurrence)
    try:
        return None if changed is None or _meaning(changed) == _meaning(text) else changed
    except SyntaxError:
        return None


def _is_informative(operator: str) -> bool:
    kind, _, change = operator.removeprefix("core/").partition("_")
    old, _, new = change.partition("_")
    if kind == "ReplaceComparisonOperator":
        return (old, new) not in SAME
    return kind != "ReplaceBinaryOperator" or (old in BITS) == (new in BITS)


def _key(path: str, where: str, old: str, new: str) -> str:
    return f"{path}:{where}: {old} => {new}"


@functools.cache
def _meaning(text: str) -> str:
    """Return the syntax tree without docstrings and annotations, which are never evaluated."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef():
                node.returns = None
            case ast.arg():
                node.annotation = None
            case ast.AnnAssign():
                node.annotation = ast.Constant(None)
            case ast.Expr(value=ast.Constant()):
                node.value = ast.Constant(None)
    return ast.dump(tree)


def _names(text: str) -> list[tuple[int, int, str]]:
    """Return first line, last line and qualified name of every function and class."""
    found: list[tuple[int, int, str]] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                first = min(
                    [child.lineno, *(decorator.lineno for decorator in child.decorator_list)]
                )
                found.append((first, child.end_lineno or first, prefix + child.name))
                visit(child, f"{prefix}{child.name}.")
            else:
                visit(child, prefix)

    visit(ast.parse(text), "")
    return found


def _difference(text: str, source: str) -> tuple[str, str]:
    old, new = text.splitlines(), source.splitlines()
    changed = [
        step
        for step in difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes()
        if step[0] != "equal"
    ]
    return _joined(line for _, i, j, _, _ in changed for line in old[i:j]), _joined(
        line for *_, i, j in changed for line in new[i:j]
    )


def _joined(lines: Iterable[str]) -> str:
    return " | ".join(line.strip() for line in lines)


def _mutant(name: str, path: str, source: str, root: Path) -> Mutant:
    folder, stem = Path(path.removeprefix("plugins/")).parent, Path(path).stem
    mirrored = sorted(
        found.relative_to(root).as_posix()
        for found in (root / "tests" / folder).glob(f"test_{stem}*.py")
    )
    first = mirrored or [f"tests/{folder.as_posix()}"]
    return Mutant(name, path, source, (*first, *MORE))
