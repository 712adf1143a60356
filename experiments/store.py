"""The files of a study, from which an interrupted one continues, and its lock.

    OUTPUT/runs/ALGORITHM-seedN/run.json        settings, environment, status, epochs so far
    OUTPUT/runs/ALGORITHM-seedN/checkpoint.pt   while it runs: model, optimizer, schedule,
                                                random states, epochs
    OUTPUT/runs/ALGORITHM-seedN/model.pt        when it is finished: the trained weights

Every file is replaced in one step: a reader sees the old one or the new one. While a run is
running, its checkpoint is authoritative; after that, `run.json` is.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import cattrs
import filelock
import torch

from experiments.errors import ExperimentError, system_reason
from experiments.settings import METRICS

RUNNING = "running"
STATUSES = (RUNNING, "finished", "diverged")
FILES = ("run.json", "checkpoint.pt", "model.pt")
LOCK, OWNER = ".lock", ".lock-owner"
TEMPORARY = r"\..+\.(json|pt|html|svg|png|lock-owner)\.\d+|\.\.(lock-owner|study)\.\d+"
"""Names of temporary files, which a killed process leaves behind."""


@attrs.frozen
class Epoch:
    """One pass over the training examples.

    Args:
        epoch: Its number, from 1.
        steps: Number of optimizer steps.
        seconds: Time of the training steps, without evaluation.
        train_loss: Mean loss, in the unit of `settings.LOSSES`.
        train_accuracy: In per cent; `None` for a reconstruction.
        test_loss: As the training loss.
        test_accuracy: As the training accuracy.
        losses: Loss of the mini-batch of each step, before the step.
        times: Seconds of each step.
        curvature: Metrics of the second-order stages: means over the epoch.
    """

    epoch: int
    steps: int
    seconds: float
    train_loss: float
    train_accuracy: float | None
    test_loss: float
    test_accuracy: float | None
    losses: tuple[float, ...] = ()
    times: tuple[float, ...] = ()
    curvature: Mapping[str, float] = attrs.field(factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics that it has."""
        values = {key: getattr(self, key) for key in METRICS}
        return {key: value for key, value in values.items() if value is not None}


@attrs.frozen
class Run:
    """One algorithm with one seed: the content of `run.json`.

    Args:
        algorithm: The algorithm's name.
        seed: The seed.
        status: "running", "finished", or "diverged": the loss became infinite or NaN, and the run
            stopped.
        settings: Everything that its numbers depend on, as nested plain values.
        environment: Commit, versions and hardware.
        history: Its epochs.
    """

    algorithm: str
    seed: int
    status: str = attrs.field(validator=attrs.validators.in_(STATUSES))
    settings: Mapping[str, Any]
    environment: Mapping[str, Any] = attrs.field(factory=dict)
    history: tuple[Epoch, ...] = ()

    @property
    def key(self) -> str:
        """Its name in folders and in MLflow."""
        return f"{self.algorithm}-seed{self.seed}"

    def compact(self, points: int) -> Run:
        """Return it with about `points` means of losses and seconds, in five digits."""
        chunk = max(1, math.ceil(sum(epoch.steps for epoch in self.history) / points))

        def thin(values: tuple[float, ...]) -> tuple[float, ...]:
            parts = [values[i : i + chunk] for i in range(0, len(values), chunk)]
            return tuple(float(f"{sum(part) / len(part):.5g}") for part in parts)

        history = tuple(
            attrs.evolve(
                epoch,
                losses=thin(epoch.losses),
                times=thin(epoch.times),
                seconds=round(epoch.seconds, 4),
                **{name: float(f"{value:.6g}") for name, value in epoch.metrics.items()},
                curvature={},
            )
            for epoch in self.history
        )
        return attrs.evolve(self, history=history)


@attrs.frozen
class RunFolder:
    """The folder of one run."""

    path: Path

    def run(self) -> Run | None:
        """Read `run.json`; return `None` where there is none."""
        try:
            return read_run(self.path / "run.json")
        except ExperimentError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def write_run(self, run: Run) -> None:
        """Write `run.json`; delete the checkpoint of a finished run."""
        write_json(self.path / "run.json", attrs.asdict(run))
        if run.status != RUNNING:
            (self.path / "checkpoint.pt").unlink(missing_ok=True)

    def checkpoint(self) -> dict[str, Any] | None:
        """Read the last checkpoint; return `None` where there is none."""
        path = self.path / "checkpoint.pt"
        try:
            _check_regular(path)
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        except FileNotFoundError:
            return None
        except Exception as error:  # torch.load may raise anything for a damaged file
            raise ExperimentError(
                f"{path} cannot be read ({type(error).__name__}): delete it to start that run again"
            ) from error

    def write_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint."""
        write_atomically(self.path / "checkpoint.pt", lambda path: torch.save(dict(state), path))

    def write_model(self, weights: Mapping[str, Any]) -> None:
        """Write the trained weights."""
        write_atomically(self.path / "model.pt", lambda path: torch.save(dict(weights), path))


def read_run(path: Path) -> Run:
    """Read a run; numbers that JSON has no names for were written as text.

    Raises:
        ExperimentError: It cannot be read, or no study can have written it.
    """
    try:
        _check_regular(path)
        values = json.loads(path.read_text(encoding="utf-8"))
        for epoch in values["history"]:
            epoch.update({k: _numbers(value) for k, value in epoch.items()})
        run = cattrs.structure(values, Run)
        if not run.history and run.status != RUNNING:
            raise ValueError("it has no epochs")
        return run
    # Structuring a damaged file may raise anything.
    except Exception as error:
        raise ExperimentError(
            f"{path} cannot be read ({type(error).__name__}: {system_reason(error)}): delete the "
            "folder to run it again"
        ) from error


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return float(value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    """Return nested values as JSON has them: infinity and NaN as text."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _check_regular(path: Path) -> None:
    """Refuse what is no file; reading a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")


def folder(output: Path, algorithm: str, seed: int) -> RunFolder:
    """Return the folder of one run."""
    return RunFolder(output / "runs" / f"{algorithm}-seed{seed}")


def move_earlier_runs(output: Path) -> Path | None:
    """Move the runs and trials in `output` to another folder, and return it; `None` without any.

    Raises:
        ExperimentError: The folder holds what no study has written. It stays as it is.
    """
    runs, search = output / "runs", output / "search"
    for folder, is_ours in ((runs, _is_run), (search, _is_of_search)):
        for path in folder.iterdir() if folder.is_dir() else ():
            if not is_ours(path):
                raise ExperimentError(
                    f"{folder} holds {path.name}, which is of no study, and nothing of others is "
                    "moved: choose another --output"
                )
    filled = [each for each in (runs, search) if each.is_dir() and any(each.iterdir())]
    if not filled:
        return None
    number = 1
    while (target := output / "earlier" / str(number)).exists():
        number += 1
    target.mkdir(parents=True)
    for each in filled:
        each.rename(target / each.name)
    return target


def _is_run(path: Path) -> bool:
    """Return whether a path is a folder that `RunFolder` has written, or begun to write."""
    if not re.fullmatch(r".+-seed\d+", path.name) or path.is_symlink() or not path.is_dir():
        return False
    return all(file.name in FILES or re.fullmatch(TEMPORARY, file.name) for file in path.iterdir())


def _is_of_search(path: Path) -> bool:
    """Return whether a path is a file of a search, or of its lock."""
    ours = re.fullmatch(r"(thesis|fair)\.(json|log(\.lock.*)?)", path.name)
    return bool(ours or re.fullmatch(TEMPORARY, path.name)) and not path.is_dir()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ, each as `key was old, now new`."""
    before, after = dict(flatten(old)), dict(flatten(new))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [
        f"{key} was {before.get(key, 'not set')}, now {after.get(key, 'not set')}" for key in keys
    ]


def as_read(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as they are after they were written and read."""
    values: dict[str, Any] = json.loads(json.dumps(_plain(settings)))
    return values


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings as pairs of a dotted key and a value; sequences as their text."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(list(value)) if isinstance(value, list | tuple) else value


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


def write_json(path: Path, values: Any) -> None:
    """Write nested plain values as JSON, in one step."""
    write_text(path, json.dumps(_plain(values), allow_nan=False, separators=(",", ":")) + "\n")


@contextlib.contextmanager
def hold(output: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other studies out of a folder, and remove what killed ones were writing.

    The lock is the operating system's: it ends with the process that holds it, however that ends.

    Args:
        output: The folder.
        say: Takes a message where the file system cannot lock.

    Raises:
        ExperimentError: Another study writes there now, or nothing can be written.
    """
    lock = filelock.FileLock(output / LOCK)
    try:
        output.mkdir(parents=True, exist_ok=True)
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
            f"--output {output} cannot be written to ({system_reason(error)})"
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
    names = ("cache", "figures", "results", "search")
    folders = [output, *(output / name for name in names), *(output / "runs").glob("*")]
    for path in [path for folder in folders if folder.is_dir() for path in folder.iterdir()]:
        if re.fullmatch(TEMPORARY, path.name) and path.is_file():
            path.unlink(missing_ok=True)
