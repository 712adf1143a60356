"""Tracking to a file of JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from kfactk import OptionError, hookimpl
from kfactk.masking import mask_settings
from kfactk.options import text, whole
from kfactk_stages.tracker._buffer import Buffer
from kfactk_stages.tracker.delivery import valid


def _as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@attrs.frozen
class JsonLines:
    r"""Append one JSON object for each recorded step to a file.

    The first line is `{"recipe": {...}}`. Each further line is `{"step": 10, NAME: VALUE, ...}`. A
    resumed run appends to the file, and begins with another recipe line. A line that a crash cut
    off stays on its own line. JSON has no number for NaN and infinity: they are written as the
    strings `"nan"`, `"inf"` and `"-inf"`, which Python's `float` reads. Credentials in the recipe
    are masked.

    Args:
        path: The file; its directory is created when missing.
        every: Record one step in so many.
        buffer: Number of recorded steps to collect before a write. They are lost when the process
            dies or the write fails.

    Raises:
        OptionError: An option has a value that cannot work, or, at the start, the file cannot be
            written.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl"
        >>> tracker = JsonLines(path=path, every=1)
        >>> tracker.start({"lr": 0.1})
        >>> tracker.record(0, {"clip_factor": float("inf")})
        >>> tracker.close()
        >>> print(path.read_text(), end="")
        {"recipe": {"lr": 0.1}}
        {"step": 0, "clip_factor": "inf"}
    """

    path: str = attrs.field(default="kfactk.jsonl", converter=_as_text, validator=text())
    every: int = attrs.field(default=10, validator=whole())
    buffer: int = attrs.field(default=50, validator=whole())
    _pending: Buffer = attrs.field(factory=Buffer, init=False, eq=False, repr=False)

    def start(self, recipe: Mapping[str, Any]) -> None:
        """Write the line of the recipe."""
        self.flush()
        self._append(_line({"recipe": mask_settings(recipe)}))

    def record(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Add the metrics of one step to the buffer; write when it is full."""
        self._pending.add(step, metrics)
        if len(self._pending) >= self.buffer:
            self.flush()

    def flush(self) -> None:
        """Write the buffer."""
        if len(self._pending):
            rows = self._pending.take()
            self._append("".join(_line({"step": row.step, **row.metrics}) for row in rows))

    def close(self) -> None:
        """Write the buffer; no file stays open between writes."""
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
                f"tracker 'jsonl' cannot write {self.path!r}: {error.strerror or error}. Give a "
                "path= in a writable directory, on a disk with free space."
            ) from error


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(valid(entry), allow_nan=False, ensure_ascii=False, default=str) + "\n"


@hookimpl
def kfactk_trackers() -> dict[str, type[JsonLines]]:
    """Register the tracker `jsonl`."""
    return {"jsonl": JsonLines}
