"""The results of a study: its settings, its search and its runs, as one folder of small files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from experiments import settings, store
from experiments.errors import ExperimentError, system_reason
from experiments.settings import Study
from experiments.store import Run

POINTS = 300
"""Means of losses and seconds that a file keeps of a run."""
STUDY = "study.json"


@attrs.frozen(eq=False)
class Results:
    """All finished runs of a study.

    Args:
        study: The settings.
        dataset: Name of the examples for readers.
        device: The device, in words.
        command: The command that made them.
        runs: The runs.
        searches: By protocol ("thesis", "fair"), how settings were chosen: `trials`, a list of
            `algorithm`, `options`, `seed`, `value` (the criterion; `None` for a diverged one),
            `seconds` and `stage`; `chosen`, the options by algorithm; `criterion`.
    """

    study: Study
    dataset: str
    device: str
    command: str
    runs: Sequence[Run]
    searches: Mapping[str, Any] = attrs.field(factory=dict)

    def write(self, folder: Path) -> None:
        """Write the results, compact, into a folder; runs there that are not among ours go."""
        values = {
            "settings": attrs.asdict(self.study),
            "dataset": self.dataset,
            "device": self.device,
            "command": self.command,
            "searches": self.searches,
        }
        store.write_json(folder / STUDY, values)
        names = {f"{run.key}.json" for run in self.runs}
        for path in folder.glob("*-seed*.json"):
            if path.name not in names:
                path.unlink()
        for run in self.runs:
            store.write_json(folder / f"{run.key}.json", attrs.asdict(run.compact(POINTS)))


def read(folder: Path) -> Results:
    """Read the results of a folder.

    Raises:
        ExperimentError: It holds none, or damaged ones.
    """
    path = folder / STUDY
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        study = settings.from_plain(values.pop("settings"))
        runs = [store.read_run(each) for each in sorted(folder.glob("*-seed*.json"))]
        return Results(study=study, runs=runs, **values)
    except ExperimentError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise ExperimentError(f"{path} cannot be read ({system_reason(error)})") from error
