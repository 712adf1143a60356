"""Distributions with plugins: modules and metadata in a folder, as an installer leaves them."""

import importlib.metadata
import sys
import textwrap
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest


class Site:
    """A folder on sys.path that distributions are put into.

    Args:
        folder: The folder, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def module(self, name: str, source: str) -> None:
        """Write an importable module; `hookimpl` and `attrs` are imported for it."""
        header = "from __future__ import annotations\nimport attrs\n"
        header += "from kfactk.registry.hookspecs import hookimpl\n"
        (self.folder / f"{name}.py").write_text(header + textwrap.dedent(source))
        self.modules.append(name)

    def install(
        self, distribution: str, entry_points: Mapping[str, str], version: str = "1.0"
    ) -> None:
        """Write the metadata of a distribution with entry points of the group `kfactk`."""
        folder = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        lines = [f"{name} = {value}" for name, value in entry_points.items()]
        (folder / "entry_points.txt").write_text("\n".join(["[kfactk]", *lines]) + "\n")

    def entry_points(self) -> list[EntryPoint]:
        """Entry points of the distributions in the folder, in their order on disk made steady."""
        found = sorted(
            importlib.metadata.distributions(path=[str(self.folder)]),
            key=lambda each: each.metadata["Name"],
        )
        return [entry for each in found for entry in each.entry_points]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A `Site` for one test; its modules are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    made = Site(folder)
    yield made
    for name in made.modules:
        sys.modules.pop(name, None)


CLIP = """
@attrs.frozen
class {name}:
    '''Divide by a number.

    Args:
        by: What to divide by,
            a plain number.
        mode: How.

    References:
        Someone et al. 1999, A paper about
        dividing, arXiv:9901.00001; and another one 2001.
    '''
    by: float
    mode: str = "all"

    def clip(self, pairs, dot):
        return [pair.preconditioned / self.by for pair in pairs], None

@hookimpl
def kfactk_clips():
    return {{"{stage}": {name}}}
"""
"""Source of a module that provides one clip; to be formatted with `name` and `stage`."""
