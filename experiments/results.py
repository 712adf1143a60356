"""The results of a study: its settings, its search and its runs, as one folder of small files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from experiments import settings, store
from experiments.errors import ExperimentError, system_reason
from experiments.settings import METRICS, Algorithm, Study
from experiments.store import RUNNING, Run
from kfactk.masking import mask_settings

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

    @property
    def algorithms(self) -> list[Algorithm]:
        """The algorithms that have runs, in the order of the study."""
        return [each for each in self.study.algorithms.values() if self.of(each.name)]

    @property
    def metrics(self) -> list[str]:
        """What the runs measure, as keys of `METRICS`."""
        return list(self._ended[0].history[0].metrics) if self._ended else list(METRICS)

    @property
    def classifies(self) -> bool:
        """Whether they measure accuracies."""
        return "train_accuracy" in self.metrics

    @property
    def epochs(self) -> int:
        """Number of epochs of the longest run."""
        return max((run.history[-1].epoch for run in self._ended), default=0)

    @property
    def first(self) -> Algorithm:
        """The algorithm that others are compared with: SGD, or the first without it."""
        return next((each for each in self.algorithms if each.name == "sgd"), self.algorithms[0])

    @property
    def _ended(self) -> list[Run]:
        return [run for run in self.runs if run.status != RUNNING and run.history]

    def of(self, name: str) -> dict[int, Run]:
        """Return the ended runs of an algorithm by seed, in the order of seeds."""
        found = {run.seed: run for run in self._ended if run.algorithm == name}
        return dict(sorted(found.items()))

    def label(self, name: str) -> str:
        """Return the name of an algorithm for readers."""
        return self.study.algorithms[name].label

    def write(self, folder: Path) -> None:
        """Write the results, compact, into a folder; runs there that are not among ours go."""
        values = {
            "settings": mask_settings(attrs.asdict(self.study)),
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
