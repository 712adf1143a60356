"""Find the settings of every algorithm: by the thesis' protocol, or by a fair one.

Every trial is a row of an Optuna study in a journal file. All points are fixed beforehand, so that
an interrupted search goes on with those that lack a row, and finds the same.
"""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from experiments import results, runner
from experiments.data import Dataset
from experiments.errors import ExperimentError, system_reason
from experiments.runner import Job
from experiments.settings import Algorithm, FairSearch, Study, ThesisSearch, Training
from experiments.store import Run

CRITERIA = {"thesis": "training loss", "fair": "validation loss"}
"""What each protocol chooses by."""
DIVERGED = 1e9
"""The value of a diverged trial; Optuna's journal has no infinity."""


@attrs.frozen
class Row:
    """A finished trial.

    Args:
        algorithm: The algorithm's name.
        stage: "search" or "confirm".
        number: Number of the point.
        seed: Its seed.
        options: The point.
        value: The criterion after the last epoch; `None` where it diverged.
        seconds: Its training time.
    """

    algorithm: str
    stage: str
    number: int
    seed: int
    options: Mapping[str, float]
    value: float | None
    seconds: float

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What tells it from all others of its search."""
        return self.algorithm, self.stage, self.number, self.seed


def participants(study: Study, protocol: str) -> tuple[ThesisSearch | FairSearch, list[str]]:
    """Return how a protocol searches, and the names of its algorithms.

    Raises:
        ExperimentError: The preset does not say how to search, or nothing takes part.
    """
    how: ThesisSearch | FairSearch | None = getattr(study.search, protocol)
    if how is None:
        raise ExperimentError(
            f"the settings have no [search.{protocol}]: add it, or choose another --preset"
        )
    known = study.algorithms
    names = [each for each in getattr(how, "algorithms", ()) or known if each in known]
    if not names:
        raise ExperimentError(
            f"none of these algorithms takes part in [search.{protocol}]: {', '.join(known)}"
        )
    seeds = [how.seed, *getattr(how, "confirm_seeds", ())]
    if len({*seeds, *study.training.seeds}) < len(seeds) + len(study.training.seeds):
        raise ExperimentError(
            f"the seeds of [search.{protocol}] are {', '.join(map(str, seeds))}, and one occurs "
            "twice or is in training.seeds: give others, so that no run is chosen by itself"
        )
    return how, names


class Search:
    """A search, and its journal.

    Args:
        study: The settings.
        protocol: "thesis" or "fair".
        dataset: All examples of the study.
        folder: Where the journal is.
        where: Device and number of processes.

    Raises:
        ExperimentError: The preset does not say how to search.
    """

    def __init__(
        self, study: Study, protocol: str, dataset: Dataset, folder: Path, where: Mapping[str, Any]
    ) -> None:
        how, names = participants(study, protocol)
        self.protocol, self.how, self._where = protocol, how, where
        self.study = study.only(names)
        validation = how.validation if isinstance(how, FairSearch) else 0.0
        self._dataset = dataset.for_search(how.train, validation, study.data.seed)
        self._journal = _Journal(folder / f"{protocol}.log", f"{study.preset}-{protocol}")

    def points(self, algorithm: Algorithm) -> list[dict[str, float]]:
        """Return the points of one algorithm."""
        if isinstance(self.how, FairSearch):
            return quasi_random(algorithm, self.how)
        grid = (self.how.second_order if algorithm.second_order else self.how.first_order).values
        return [dict(zip(grid, each, strict=True)) for each in itertools.product(*grid.values())]

    def take(self, folder: Path) -> None:
        """Take the trials of a search from committed results, for the algorithms of this one.

        Raises:
            ExperimentError: There are none, or of a search on other terms.
        """
        other = results.read(folder)
        theirs, chosen = other.study, other.searches.get(self.protocol, {}).get("chosen", {})
        if not chosen:
            raise ExperimentError(
                f"--trials: {folder} holds no search by the {self.protocol} protocol: give the "
                "results of one, or leave --trials out"
            )
        mine, differ = self.study, []
        if (mine.data, mine.model) != (theirs.data, theirs.model):
            differ.append("other examples or another model")
        if _steps(mine.training) != _steps(theirs.training):
            differ.append("another batch size, schedule or loss")
        if _length(self.how) != _length(getattr(theirs.search, self.protocol)):
            differ.append("trials of another length")
        for name in mine.algorithms.keys() & chosen.keys():
            ours, their = (
                study.algorithms[name].with_options(**chosen[name]) for study in (mine, theirs)
            )
            if (ours.optimizer, ours.options) != (their.optimizer, their.options):
                differ.append(f"another {name}")
        if differ:
            raise ExperimentError(
                f"--trials: {folder} has {', '.join(sorted(differ))}: leave --trials out to search "
                "again, or choose algorithms that are the same with --algorithms"
            )
        known = {row.key for row in self._journal.rows()}
        for trial in other.searches[self.protocol]["trials"]:
            row = Row(**trial)
            if row.algorithm in mine.algorithms and row.key not in known:
                self._journal.add(row)

    def stages(self) -> Iterator[list[list[Job]]]:
        """Yield the trials that lack a row, stage by stage; rows are added by `Rows`."""
        yield self._jobs("search", self._first())
        if isinstance(self.how, FairSearch):
            yield self._jobs("confirm", self._confirmed(self.how))

    def add(self, job: Job, run: Run) -> None:
        """Add the row of a trial."""
        last = run.history[-1]
        value = last.train_loss if self.protocol == "thesis" else last.test_loss
        good = run.status == "finished" and math.isfinite(value)
        self._journal.add(
            Row(
                algorithm=run.algorithm,
                stage=job.trial["stage"],
                number=job.trial["number"],
                seed=run.seed,
                options=job.trial["options"],
                value=value if good else None,
                seconds=round(sum(epoch.seconds for epoch in run.history), 3),
            )
        )

    def chosen(self) -> dict[str, dict[str, float]]:
        """Return the best point of each algorithm: of the confirmed ones, where there are any."""
        rows, found = self._journal.rows(), {}
        for name, algorithm in self.study.algorithms.items():
            points = self.points(algorithm)
            stage = "confirm" if isinstance(self.how, FairSearch) else "search"
            values: dict[int, list[float]] = {}
            for row in rows:
                if (row.algorithm, row.stage) == (name, stage):
                    value = math.inf if row.value is None else row.value
                    values.setdefault(row.number, []).append(value)
            # Of equal points, the first one of the list.
            medians = {number: statistics.median(values[number]) for number in sorted(values)}
            best = min(medians, key=lambda number: medians[number], default=None)
            if best is None or medians[best] == math.inf:
                raise ExperimentError(
                    f"every trial of {name} diverged: leave it out with --algorithms, or give "
                    "other values to its search"
                )
            found[name] = points[best]
        return found

    def summary(self) -> dict[str, Any]:
        """Return the search as plain values: its rows, and what they chose."""
        return {
            "criterion": CRITERIA[self.protocol],
            "examples": len(self._dataset.train),
            "trials": [attrs.asdict(row) for row in self._journal.rows()],
            "chosen": self.chosen(),
        }

    def tuned(self) -> Study:
        """Return the study with the chosen settings."""
        chosen = self.chosen()
        algorithms = {
            name: algorithm.with_options(**chosen[name])
            for name, algorithm in self.study.algorithms.items()
        }
        return attrs.evolve(self.study, algorithms=algorithms)

    def _first(self) -> list[tuple[Algorithm, int, int]]:
        return [
            (algorithm, number, self.how.seed)
            for algorithm in self.study.algorithms.values()
            for number in range(len(self.points(algorithm)))
        ]

    def _confirmed(self, how: FairSearch) -> list[tuple[Algorithm, int, int]]:
        rows = [row for row in self._journal.rows() if row.stage == "search"]
        found = []
        for name, algorithm in self.study.algorithms.items():
            own = sorted(
                (row.value, row.number)
                for row in rows
                if row.algorithm == name and row.value is not None
            )
            found += [
                (algorithm, number, seed)
                for _, number in own[: how.confirm]
                for seed in how.confirm_seeds
            ]
        return found

    def _jobs(self, stage: str, wanted: Sequence[tuple[Algorithm, int, int]]) -> list[list[Job]]:
        done = {row.key: row for row in self._journal.rows()}
        images, jobs = self._dataset.checksum(), []
        for algorithm, number, seed in wanted:
            options = self.points(algorithm)[number]
            if row := done.get((algorithm.name, stage, number, seed)):
                if dict(row.options) != options:
                    raise ExperimentError(
                        f"the trials in {self._journal.path} are of another search: choose "
                        "another --output, or leave out --resume and --trials to start again"
                    )
                continue
            study, tried = self._short(algorithm), algorithm.with_options(**options)
            jobs.append(
                [
                    Job(
                        study=study,
                        algorithm=tried,
                        seed=seed,
                        settings=runner.effective(study, tried, seed, images, self._where),
                        folder=None,
                        dataset=self._dataset,
                        trial={"stage": stage, "number": number, "options": options},
                    )
                ]
            )
        return jobs

    def _short(self, algorithm: Algorithm) -> Study:
        """Return the study of a trial, as long as a trial is."""
        epochs = (
            self.how.epochs
            if isinstance(self.how, FairSearch)
            else (self.how.second_order if algorithm.second_order else self.how.first_order).epochs
        )
        return attrs.evolve(
            self.study, training=attrs.evolve(self.study.training, epochs=epochs, alternate=False)
        )


def _length(how: ThesisSearch | FairSearch | None) -> tuple[Any, ...]:
    """Return what a trial trains on, and how long."""
    if isinstance(how, ThesisSearch):
        return how.train, how.seed, how.first_order.epochs, how.second_order.epochs
    if isinstance(how, FairSearch):
        return how.train, how.seed, how.epochs, how.validation
    return ()


def _steps(training: Training) -> tuple[Any, ...]:
    """Return what a step of a trial depends on."""
    return training.batch_size, training.parts, training.schedule, training.loss


class Rows(runner.Listener):
    """A listener that adds the row of each trial."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def end(self, job: Job, run: Run) -> None:
        """Add the row."""
        self._search.add(job, run)


def quasi_random(algorithm: Algorithm, how: FairSearch) -> list[dict[str, float]]:
    """Return the points of the fair search: a Sobol sequence over logarithms, three digits each.

    Raises:
        ExperimentError: The algorithm has no `search` ranges.
    """
    from scipy.stats import qmc

    if not algorithm.search:
        raise ExperimentError(
            f"algorithms.{algorithm.name}.search is missing: give the range of each option, such "
            "as search = { lr = [0.001, 1] }"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numbers of points that are no power of two
        sample = qmc.Sobol(len(algorithm.search), seed=how.seed).random(how.trials)
    points = []
    for each in sample:
        values = {}
        for (name, (low, high)), part in zip(algorithm.search.items(), each, strict=True):
            values[name] = float(f"{low * (high / low) ** part:.3g}")
        points.append(values)
    return points


class _Journal:
    """The rows of a search, in a file of Optuna."""

    def __init__(self, path: Path, name: str) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.path = path
        self._optuna = optuna
        try:
            _mend(path)
            self._study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(path))),
                study_name=name,
                load_if_exists=True,
            )
            self.rows()
        except Exception as error:  # a damaged file may raise anything
            raise ExperimentError(
                f"{path} cannot be read ({type(error).__name__}: {system_reason(error)}): delete "
                "it to search again"
            ) from error

    def add(self, row: Row) -> None:
        plain = attrs.asdict(row)
        options = plain.pop("options")
        distributions = {
            # A grid has categories; either way the row shows the value itself.
            name: self._optuna.distributions.FloatDistribution(value, value)
            for name, value in options.items()
        }
        self._study.add_trial(
            self._optuna.trial.create_trial(
                params=options,
                distributions=distributions,
                value=DIVERGED if row.value is None else row.value,
                user_attrs=plain,
            )
        )

    def rows(self) -> list[Row]:
        """Return all rows, in an order that does not depend on when each was finished."""
        found = [
            Row(**trial.user_attrs, options=trial.params)
            for trial in self._study.get_trials(deepcopy=False)
        ]
        return sorted(found, key=lambda row: (row.algorithm, row.stage, row.number, row.seed))


def _mend(path: Path) -> None:
    """Remove what a killed process may have left: its lock, and the line that it was writing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if not path.exists():
        return
    if not path.is_file():
        raise ValueError("it is not a regular file")
    whole = path.read_bytes().rpartition(b"\n")
    if whole[2]:
        path.write_bytes(whole[0] + whole[1])
