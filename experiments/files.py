"""Write files atomically: a reader always sees the old file or the new one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from experiments.errors import ExperimentError, system_reason

TEMPORARY = r"\..+\.(json|pt|html|svg|png|lock-owner)\.\d+|\.\.lock-owner\.\d+"
"""Names of temporary files, which a killed process leaves behind."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then move it to `path` in one step.

    Raises:
        ExperimentError: The file cannot be written, as on a full disk. The old one stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeErrors where a write fails
        raise ExperimentError(
            f"{path} cannot be written ({system_reason(error)}): make space there or choose "
            "another --output. What was written before is whole, and --resume continues from it"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it cannot be made there, so nothing has to be removed
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step; what UTF-8 cannot hold is escaped."""
    data = text.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
