"""Tracking to a file of JSON lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from kfactk import OptionError, hookimpl
from kfactk_stages.tracker._buffer import Buffer, at_least_one, text


def _as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@attrs.frozen
class JsonLines:
    r"""Append one JSON object a recorded step to a file.

    The first line is `{"recipe": {...}}`, each further one `{"step": 10, NAME: FIGURE, ...}`. An existing file is appended to, beginning
    with a recipe line again, so a resumed run leaves two; a line that was cut off by a crash is left alone on its own line. JSON
    has no word for them, so a figure that is not finite is written as the string `"nan"`, `"inf"` or `"-inf"`, which Python's `float`
    reads back.

    Args:
        path: The file; its directory is created when missing.
        every: Record one step in so many.
        buffer: Recorded steps held back before they are written. What is held is lost when the process dies or the write fails.

    Raises:
        OptionError: An option is not of its kind, or the file cannot be written, which the start tries out.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl"
        >>> tracker = JsonLines(path=path, every=1)
        >>> tracker.start({"lr": 0.1}); tracker.record(0, {"clip_factor": float("inf")}); tracker.close()
        >>> print(path.read_text(), end="")
        {"recipe": {"lr": 0.1}}
        {"step": 0, "clip_factor": "inf"}
    """

    path: str = attrs.field(default="kfactk.jsonl", converter=_as_text, validator=text)
    every: int = attrs.field(default=10, validator=at_least_one)
    buffer: int = attrs.field(default=50, validator=at_least_one)
    _held: Buffer = attrs.field(factory=Buffer, init=False, eq=False, repr=False)

    def start(self, recipe: Mapping[str, Any]) -> None:
        """Write the recipe's line."""
        self.flush()
        self._append(_line({"recipe": recipe}))

    def record(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Hold the figures of one step back; write when enough are held."""
        self._held.add(step, metrics)
        if len(self._held) >= self.buffer:
            self.flush()

    def flush(self) -> None:
        """Write what is held back."""
        if len(self._held):
            self._append(
                "".join(_line({"step": row.step, **row.metrics}) for row in self._held.take())
            )

    def close(self) -> None:
        """Write what is held back; no file stays open between writes."""
        self.flush()

    def _append(self, lines: str) -> None:
        try:
            path = Path(self.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    lines = lines if file.read(1) == b"\n" else "\n" + lines
                file.write(lines.encode())
        except OSError as error:
            raise OptionError(
                f"tracker 'jsonl' cannot write {self.path!r}: {error.strerror or error}. Give a path= in a directory that can be written, "
                "with room left on its disk."
            ) from error


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(_valid(entry), allow_nan=False, ensure_ascii=False, default=str) + "\n"


def _valid(value: Any) -> Any:
    """The value with numbers that are not finite as strings."""
    if isinstance(value, Mapping):
        return {str(name): _valid(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@hookimpl
def kfactk_trackers() -> dict[str, type[JsonLines]]:
    """The tracker `jsonl`."""
    return {"jsonl": JsonLines}
