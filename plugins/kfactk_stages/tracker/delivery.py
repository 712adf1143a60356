"""Send records to a store from a thread of their own; keep what cannot be sent in a file.

A store may be slow, locked or silent. Training never waits for it longer than `PATIENCE`: one
daemon thread makes the calls, in order. Once a call has failed, or a store has been silent too
long, all records that it has not confirmed go to a file of JSON lines, from which they can be
imported later.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
"""One record: something that JSON can hold, and that a store knows how to send."""

PATIENCE = 2.0
"""Seconds that a caller waits for a store that does not answer."""
SILENCE = 30.0
"""Seconds without an answer after which a store counts as failed, while nobody waits."""
LIMIT = 1000
"""Entries that wait for a store, at most."""


class Delivery:
    """Entries on their way to a store, which one daemon thread sends in order.

    Only one thread of the owner may call it. After a failure it stays failed: whatever comes then
    belongs into the file.

    Args:
        send: Sends one entry; called by the thread.
        making: Seconds that the first answer may take where it is needed, such as for a database
            that has yet to be made.

    Attributes:
        failure: What went wrong, if anything did.
    """

    def __init__(self, send: Callable[[Entry], None], making: float | None = None) -> None:
        self._send, self._making = send, PATIENCE if making is None else making
        self._waiting: deque[Entry] = deque()
        self._state = threading.Condition()
        self._answered = time.monotonic()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._vain = 0.0
        self.failure: Exception | None = None

    def put(self, entry: Entry) -> None:
        """Hand over an entry; return at once."""
        with self._state:
            if not self._waiting:
                self._answered = time.monotonic()  # nothing was asked until now
            self._waiting.append(entry)
            self._state.notify_all()
            silent = time.monotonic() - self._answered
            if len(self._waiting) > LIMIT or silent > SILENCE:
                self._fail(TimeoutError(f"no answer for {silent:.0f} s"))
        if self._thread is None and self.failure is None:
            self._thread = threading.Thread(target=self._run, name="kfactk records", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:  # while the interpreter ends, or without free threads
                self._fail(error)

    def wait(self, *, needed: bool = False) -> bool:
        """Wait until all entries are sent, and return whether they are.

        An answer of the store starts the patience again. What was waited in vain since the last
        answer counts, so that repeated calls do not add up.

        Args:
            needed: Whether a first answer may take as long as the store needs to be made.
        """
        start = time.monotonic()
        with self._state:
            if needed:
                self._vain = 0.0
            while self._waiting and self.failure is None:
                patience = self._making if needed else PATIENCE
                left = max(start - self._vain, self._answered) + patience - time.monotonic()
                if left <= 0:
                    break
                self._state.wait(left)
            done = not self._waiting and self.failure is None
            waited = time.monotonic() - max(start, self._answered)
            self._vain = 0.0 if done else self._vain + max(0.0, waited)
            return done

    def settle(self) -> None:
        """Wait until all entries are sent; a store that does not answer in time has failed."""
        if not self.wait(needed=True):
            self._fail(TimeoutError(f"no answer for {self._making:g} s"))

    def unsent(self) -> list[Entry]:
        """Return the entries that a failed store has not confirmed, and forget them."""
        with self._state:
            if self.failure is None:
                return []
            entries = list(self._waiting)
            self._waiting.clear()
            return entries

    def stop(self) -> None:
        """Let the thread end after its last call."""
        with self._state:
            self._stopping = True
            self._state.notify_all()

    def _fail(self, error: Exception) -> None:
        with self._state:
            self.failure = self.failure or error
            self._state.notify_all()

    def _run(self) -> None:
        while True:
            with self._state:
                while not self._waiting and not self._stopping and self.failure is None:
                    self._state.wait()
                if self.failure is not None or not self._waiting:
                    return
                entry = self._waiting[0]
            try:
                self._send(entry)
            except Exception as error:  # reported by the owner's thread, with where the records go
                self._fail(error)
                return
            with self._state:
                if self.failure is None:
                    self._waiting.popleft()
                self._answered = time.monotonic()
                self._vain, self._making = 0.0, PATIENCE
                self._state.notify_all()


def append(path: Path, entries: list[Entry]) -> None:
    """Append entries to a file of JSON lines, on the disk when it returns.

    Several processes may append to one file.

    Raises:
        OSError: The file cannot be written.
    """
    lines = "".join(json.dumps(valid(entry), allow_nan=False) + "\n" for entry in entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read(1) == b"\n" else "\n" + lines  # after a line cut off
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line; the value is `None` where a line is no JSON."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def valid(value: Any) -> Any:
    """Return the value with non-finite numbers as strings, which `float` reads."""
    if isinstance(value, Mapping):
        return {str(name): valid(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [valid(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
