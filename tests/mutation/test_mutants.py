"""The committed list of mutants fits the source, entry by entry."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from mutation.mutants import ROOT, MutantError, listed

DEMANDED = [
    "transposed projection",
    "identity-started average",
    "scale not transported at refresh",
    "missing 1/T",
    "absolute eigenvalue threshold",
    "missing min(1, .) in the KL clip",
    "groups joined",
    "first group's learning rate for all",
    "off by one in frequencies",
    "evaluation captured",
    "no_grad captured",
    "last micro-batch only",
]
"""Mistakes that have been made elsewhere, and must stay on the list whatever else changes."""


def test_list_fits_the_source() -> None:
    mutants = listed()
    assert not set(DEMANDED) - {mutant.name for mutant in mutants}
    assert len(mutants) >= 25
    for mutant in mutants:
        original = (ROOT / mutant.path).read_text()
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse(original)), (
            f"{mutant.name} changes nothing that is run"
        )
        assert mutant.module.startswith(("kfactk.", "kfactk_stages.")), mutant.name


ENTRY = {
    "name": "one",
    "path": "a.py",
    "old": "x = 1",
    "new": "x = 2",
    "why": "it is one",
    "tests": ["test_a.py"],
}


def made(folder: Path, *entries: dict[str, Any], text: str = "x = 1\n") -> Any:
    (folder / "a.py").write_text(text)
    (folder / "test_a.py").touch()
    lines = [
        f"{key} = {json.dumps(value)}"
        for entry in entries
        for key, value in [("[[mutant]]", None), *entry.items()]
    ]
    (folder / "list.toml").write_text("\n".join(line.removesuffix(" = null") for line in lines))
    return listed(folder, folder / "list.toml")


def test_entries_become_files_with_mistakes(tmp_path: Path) -> None:
    (mutant,) = made(tmp_path, {**ENTRY, "hangs": True}, text="y = 0\nx = 1\n")
    assert (mutant.source, mutant.tests, mutant.hangs) == ("y = 0\nx = 2\n", ("test_a.py",), True)


@pytest.mark.parametrize(
    ("entries", "text", "message"),
    [
        (
            [ENTRY],
            "y = 1\n",
            "one: its text occurs 0 times in a.py, not once, or does not change:\nx = 1",
        ),
        ([ENTRY], "x = 1\nx = 1\n", "occurs 2 times"),
        ([{**ENTRY, "new": "x = 1"}], "x = 1\n", "or does not change"),
        ([ENTRY, ENTRY], "x = 1\n", r"several mutants of one name: \['one'\]"),
        (
            [{key: value for key, value in ENTRY.items() if key != "why"}],
            "x = 1\n",
            "one: why is missing",
        ),
        ([{**ENTRY, "test": []}], "x = 1\n", "one: there is no test$"),
        (
            [{**ENTRY, "tests": ["test_a.py", "test_b.py"]}],
            "x = 1\n",
            "one: there are no tests at test_b.py",
        ),
    ],
    ids=["gone", "twice", "the same", "name twice", "no reason", "misspelt", "no tests"],
)
def test_entries_are_checked(
    tmp_path: Path, entries: list[dict[str, Any]], text: str, message: str
) -> None:
    with pytest.raises(MutantError, match=message):
        made(tmp_path, *entries, text=text)
