"""The files of each run, from which an interrupted experiment continues.

    OUTPUT/runs/ALGORITHM-seedN/run.json        settings, status, epochs so far
    OUTPUT/runs/ALGORITHM-seedN/checkpoint.pt   while it runs: model, optimizer, schedule,
                                                random states, epochs
    OUTPUT/runs/ALGORITHM-seedN/model.pt        when it is finished: the trained weights

Every file is replaced in one step. While a run is running, its checkpoint is authoritative; after
that, `run.json` is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from experiments.errors import ExperimentError
from experiments.files import TEMPORARY, write_atomically, write_text
from experiments.results import Epoch

RUNNING = "running"
STATUSES = (RUNNING, "finished", "diverged")
FILES = ("run.json", "checkpoint.pt", "model.pt")


NUMBERS = [field.name for field in attrs.fields(Epoch) if field.name != "curvature"]


@attrs.frozen
class RunRecord:
    """The content of `run.json`.

    Args:
        settings: Everything that the numbers of the run depend on, as nested plain values.
        status: "running", "finished" or "diverged".
        mlflow_run_id: Its run in MLflow.
        history: Its epochs.
    """

    settings: dict[str, Any]
    status: str
    mlflow_run_id: str
    history: tuple[Epoch, ...] = ()

    def check(self) -> None:
        """Check that an experiment can have written it.

        Raises:
            ValueError: It cannot.
        """
        numbers = [getattr(epoch, name) for epoch in self.history for name in NUMBERS]
        good = (
            isinstance(self.settings, dict)
            and isinstance(self.settings.get("algorithm"), dict)
            and self.status in STATUSES
            and isinstance(self.mlflow_run_id, str)
            and (self.history or self.status == RUNNING)
            and all(type(number) in (int, float) for number in numbers)
            and all(isinstance(epoch.curvature, dict) for epoch in self.history)
        )
        if not good:
            raise ValueError("its values are not those of a run")


@attrs.frozen
class RunFolder:
    """The folder of one run."""

    path: Path

    def record(self) -> RunRecord | None:
        """Read `run.json`; return `None` where there is none."""
        try:
            values = json.loads(self._readable("run.json").read_text(encoding="utf-8"))
            record = RunRecord(
                values["settings"],
                values["status"],
                values["mlflow_run_id"],
                tuple(Epoch(**_read(epoch)) for epoch in values["history"]),
            )
            record.check()
            return record
        except FileNotFoundError:
            return None
        except (
            *(OSError, ValueError, KeyError, TypeError, AttributeError),
            *(RecursionError, OverflowError),
        ) as error:
            raise ExperimentError(
                f"{self.path / 'run.json'} cannot be read ({error}): delete the folder to run it "
                "again"
            ) from error

    def _readable(self, name: str) -> Path:
        """Return the path of a file; reading a pipe would wait for ever."""
        path = self.path / name
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        return path

    def write_record(self, record: RunRecord) -> None:
        """Write `run.json`; delete the checkpoint of a finished run."""
        values = attrs.asdict(record)
        for epoch in values["history"]:
            epoch.update(
                {
                    key: repr(value)
                    for key, value in epoch.items()
                    if isinstance(value, float) and not math.isfinite(value)
                }
            )
        write_text(self.path / "run.json", json.dumps(values, indent=1, allow_nan=False) + "\n")
        if record.status != RUNNING:
            (self.path / "checkpoint.pt").unlink(missing_ok=True)

    def checkpoint(self) -> dict[str, Any] | None:
        """Read the last checkpoint; return `None` where there is none."""
        path = self.path / "checkpoint.pt"
        try:
            self._readable("checkpoint.pt")
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


def _read(epoch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(value) if isinstance(value, str) else value for key, value in epoch.items()}


def folder(output: Path, algorithm: str, seed: int) -> RunFolder:
    """Return the folder of one run."""
    return RunFolder(output / "runs" / f"{algorithm}-seed{seed}")


def move_earlier_runs(output: Path) -> Path | None:
    """Move the runs in `output` to another folder and return it; `None` where there are none.

    Raises:
        ExperimentError: The folder holds what no experiment has written. It stays as it is.
    """
    runs = output / "runs"
    if not runs.is_dir() or not any(runs.iterdir()):
        return None
    for path in runs.iterdir():
        if not _is_run(path):
            raise ExperimentError(
                f"{runs} holds {path.name}, which is of no experiment, and nothing of others is "
                "moved: choose another --output"
            )
    number = 1
    while (target := output / "earlier" / str(number)).exists():
        number += 1
    target.parent.mkdir(parents=True, exist_ok=True)
    runs.rename(target)
    return target


def _is_run(path: Path) -> bool:
    """Return whether a path is a folder that `RunFolder` has written, or begun to write."""
    if not re.fullmatch(r".+-seed\d+", path.name) or path.is_symlink() or not path.is_dir():
        return False
    return all(file.name in FILES or re.fullmatch(TEMPORARY, file.name) for file in path.iterdir())


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ, each as `key was old, now new`."""
    before, after = dict(flatten(old)), dict(flatten(new))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [
        f"{key} was {before.get(key, 'not set')}, now {after.get(key, 'not set')}" for key in keys
    ]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings as pairs of a dotted key and a value; sequences as their text."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value) if isinstance(value, list | tuple) else value
