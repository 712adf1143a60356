"""One experiment at a time in an output folder.

The lock is the operating system's: it ends with the process that holds it, however that ends, so
that no leftover of a killed experiment keeps others out.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from experiments.errors import ExperimentError
from experiments.files import TEMPORARY, write_text

LOCK, OWNER = ".lock", ".lock-owner"


@contextlib.contextmanager
def hold(output: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other experiments out of a folder, and remove what killed ones were writing.

    Args:
        output: The folder.
        say: Takes a message where the file system cannot lock.

    Raises:
        ExperimentError: Another experiment writes there now.
    """
    lock = filelock.FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ExperimentError(
            f"--output {output} is in use by another experiment ({_owner(output)}): wait for it, "
            "end it, or choose another --output"
        ) from error
    except NotImplementedError:
        say(f"{output} is on a file system without locks: start no second experiment there")
    except OSError as error:
        raise ExperimentError(
            f"--output {output} cannot be locked ({error.strerror or error}): choose another"
        ) from error
    try:
        _remove_leftovers(output)
        now = datetime.datetime.now().isoformat(" ", "seconds")
        write_text(
            output / OWNER, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n"
        )
        yield
    finally:
        with contextlib.suppress(OSError):
            (output / OWNER).unlink(missing_ok=True)
        lock.release()


def _owner(output: Path) -> str:
    """Return who holds the lock, in words."""
    try:
        return (output / OWNER).read_text(encoding="utf-8", errors="replace").strip()[:200]
    except OSError:
        return "which has just begun"


def _remove_leftovers(output: Path) -> None:
    """Remove temporary files of killed writers; nobody else writes here while we hold the lock."""
    folders = [output, output / "cache", output / "figures", *(output / "runs").glob("*")]
    for path in [path for folder in folders if folder.is_dir() for path in folder.iterdir()]:
        if re.fullmatch(TEMPORARY, path.name) and path.is_file():
            path.unlink(missing_ok=True)
