"""`python -m kfactk import-records`: the tracker that can import gets the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from kfactk.cli.main import main
from kfactk.errors import OptionError
from kfactk.registry.hookspecs import hookimpl
from kfactk.registry.registry import registry


@attrs.frozen
class Importing:
    """A tracker that imports."""

    every: int = 1
    tracking_uri: str = "its own"

    def start(self, recipe: Any) -> None: ...
    def record(self, step: int, metrics: Any) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...

    def import_records(self, path: Path) -> str:
        if path.name == "bad":
            raise OptionError("bad file")
        return f"sent {path.name} to {self.tracking_uri}"


@pytest.fixture
def importing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Plugin:
        @hookimpl
        def kfactk_trackers(self) -> dict[str, Any]:
            return {"importing": Importing}

    plugin = Plugin()
    plugins = registry()
    plugins.register(plugin, "importing")
    yield
    plugins.unregister(plugin)


def test_chosen_tracker_imports(importing: None, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["import-records", "FILE", "--tracker", "importing"]
    assert main(common) == 0
    assert capsys.readouterr().out == "sent FILE to its own\n"
    assert main([*common, "--tracking-uri", "there"]) == 0
    assert capsys.readouterr().out == "sent FILE to there\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["FILE"],
            "(importing, mlflow). Give the name of one as --tracker",
        ),
        (["FILE", "--tracker", "import"], "Did you mean 'importing'?"),
        (["FILE", "--tracker", "jsonl"], "'jsonl' is none of them"),
        (["bad", "--tracker", "importing"], "bad file"),
        (["nosuch", "--tracker", "mlflow"], "nosuch cannot be read"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], words: str, importing: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import-records", *arguments]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_only_importer_needs_no_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-records", str(tmp_path / "nosuch")]) == 2
    assert "cannot be read" in capsys.readouterr().err
