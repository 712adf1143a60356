"""Generated mutants: which are drawn, which are not, and how survivors are explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from mutation.mutants import MutantError
from mutation.sampled import SOURCES, candidates_of, explained, sample

pytestmark = pytest.mark.xdist_group("mutants")

TEXT = '''"""A module."""

from __future__ import annotations


class Box:
    """A box of side 2 + 3."""

    side: float | None = None

    def volume(self, side: float | None = None, *, times: int = 1) -> float | None:
        """Its volume, 2 * 3 * 4."""
        return side * times if side is not None else None
'''


def changed() -> dict[str, str]:
    """Key to source, of all changes of the text."""
    return {
        c.key(TEXT, source): source
        for c in candidates_of("kfactk/box.py", TEXT)
        if (source := c.source(TEXT)) is not None
    }


def test_changes_are_named_by_what_they_change() -> None:
    line = "return side * times if side is not None else None"
    assert f"kfactk/box.py:Box.volume: {line} => {line.replace(' * ', ' + ')}" in changed()
    assert f"kfactk/box.py:Box.volume: {line} => {line.replace('is not', 'is')}" in changed()
    assert all(source != TEXT for source in changed().values())


def test_annotations_docstrings_and_nonsense_do_not_change() -> None:
    texts = changed().values()
    assert all(text.count('"""Its volume, 2 * 3 * 4."""') == 1 for text in texts)
    assert all(text.count("float | None") == TEXT.count("float | None") for text in texts)
    assert not any("side << times" in text or "side & times" in text for text in texts)


def files(folder: Path, text: str) -> None:
    for name in SOURCES:
        path = folder / name
        if path.suffix:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        else:
            path.mkdir(parents=True)
    (folder / "kfactk/linalg.py").write_text(text)
    (folder / "tests/kfactk").mkdir(parents=True)
    (folder / "tests/kfactk/test_linalg.py").touch()


def test_sample_has_one_mutant_of_each_place_and_is_stable(tmp_path: Path) -> None:
    files(tmp_path, TEXT)
    drawn = sample(3, 0, tmp_path)
    assert drawn == sample(3, 0, tmp_path)
    assert len({mutant.name for mutant in drawn}) == 3
    assert all(
        mutant.tests == ("tests/kfactk/test_linalg.py", "tests/kfactk", "tests/kfactk_stages")
        for mutant in drawn
    )
    assert {mutant.name for mutant in sample(1000, 0, tmp_path)} != {
        mutant.name for mutant in sample(1000, 1, tmp_path)
    }
    files_below = "\n\n\nNUMBER = 1\n" + TEXT
    (tmp_path / "kfactk/linalg.py").write_text(files_below)
    again = {mutant.name for mutant in sample(6, 0, tmp_path)}
    assert len(again & {mutant.name for mutant in drawn}) >= 2, "one more line exchanges few"


def test_explanations_fit_the_source() -> None:
    assert all(explained().values())


ENTRY = """
[[explained]]
path = "kfactk/linalg.py"
where = "Box.volume"
old = "{old}"
new = "{new}"
because = "{because}"
"""
OLD = "return side * times if side is not None else None"


def test_stale_explanations_are_refused(tmp_path: Path) -> None:
    files(tmp_path, TEXT)
    path = tmp_path / "explained.toml"
    path.write_text(ENTRY.format(old=OLD, new=OLD.replace("*", "+"), because="it is so"))
    assert list(explained(tmp_path, path).values()) == ["it is so"]
    path.write_text(ENTRY.format(old=OLD, new=OLD.replace("*", "++"), because="it is so"))
    with pytest.raises(
        MutantError, match=r"stale: no mutant has this key any more.*\nkfactk/linalg.py:Box.volume"
    ):
        explained(tmp_path, path)
    path.write_text(ENTRY.format(old=OLD, new=OLD.replace("*", "+"), because=""))
    with pytest.raises(MutantError, match=r"no reason is given for\nkfactk/linalg\.py"):
        explained(tmp_path, path)
