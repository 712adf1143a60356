"""The searches choose what a plain loop over their rows chooses, also after interruptions."""

import itertools
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from experiments import data, runner, search, settings
from experiments.data import Dataset
from experiments.errors import ExperimentError
from experiments.ranks import Communicator
from experiments.results import Results
from experiments.runner import Job
from experiments.search import Row, Rows, Search
from experiments.settings import Study
from experiments.store import Run
from tests.experiments.studies import with_training

CPU = torch.device("cpu")
WHERE = {"device": "cpu", "processes": 1}
OWN = tuple[Study, Dataset]


@pytest.fixture
def own_study(own: Path) -> OWN:
    study = settings.read(own, trusted=True)
    return study, data.load(study.data, None, own.parent, print, trusted=True)


def begun(own_study: OWN, protocol: str, folder: Path) -> Search:
    return Search(own_study[0], protocol, own_study[1], folder, WHERE)


def conducted(
    own_study: OWN, protocol: str, folder: Path, most: int = 1000
) -> tuple[Search, list[Job]]:
    """Do at most so many trials; return the search, and the trials that it did."""
    found, jobs = begun(own_study, protocol, folder), []
    for groups in found.stages():
        for group in groups:
            if len(jobs) == most:
                return found, jobs
            runner.run_all([group], Rows(found), device=CPU, ranks=Communicator())
            jobs += group
    return found, jobs


def summary(found: Search) -> dict[str, Any]:
    """The summary without what a clock says."""
    values = found.summary()
    trials = [{**trial, "seconds": 0} for trial in values["trials"]]
    return {**values, "trials": trials}


@pytest.mark.parametrize("preset", ["mnist1d", "cifar10-small"])
def test_grids_are_those_of_the_thesis(preset: str, dataset: Dataset, tmp_path: Path):
    study = settings.load(preset)
    thesis = attrs.evolve(study.search.thesis, train=0)
    study = attrs.evolve(study, search=attrs.evolve(study.search, thesis=thesis))
    found = Search(study, "thesis", dataset, tmp_path, WHERE)
    decays = (0.01, 0.003, 0.001, 0.0003, 0.0001)
    second = itertools.product((0.03, 0.01, 0.003), decays, (0.03, 0.001, 0.003))
    assert list(found.study.algorithms) == [
        *("sgd", "kfac", "ekfac", "ekfacnag", "ekfacadam", "ekfacradam")
    ]
    for name, algorithm in found.study.algorithms.items():
        points = [tuple(point.items()) for point in found.points(algorithm)]
        if name == "sgd":
            assert points == [
                (("lr", lr), ("weight_decay", decay)) for lr in (0.3, 0.1, 0.03) for decay in decays
            ]
            continue
        second, wanted = itertools.tee(second)
        assert points == [
            (("lr", lr), ("weight_decay", decay), ("damping", damping))
            for lr, decay, damping in wanted
        ]
    (groups,) = found.stages()
    assert len(groups) == 15 + 5 * 45
    epochs = {group[0].algorithm.name: group[0].study.training.epochs for group in groups}
    assert epochs == {**dict.fromkeys(found.study.algorithms, 5), "sgd": 10}


def test_points_are_the_same_every_time_and_in_their_ranges():
    study = settings.load("mnist1d")
    how = study.search.fair
    for algorithm in study.algorithms.values():
        points = search.quasi_random(algorithm, how)
        assert points == search.quasi_random(algorithm, how)
        assert len({tuple(point.values()) for point in points}) == len(points) == how.trials
        for name, (low, high) in algorithm.search.items():
            values = sorted(point[name] for point in points)
            assert low <= values[0]
            assert values[-1] <= high
            logs = [math.log(value / low) / math.log(high / low) for value in values]
            for part in range(4):  # even, on a log scale
                assert sum(part / 4 <= log < (part + 1) / 4 for log in logs) in range(7, 10)
    other = search.quasi_random(algorithm, attrs.evolve(how, seed=how.seed + 1))
    assert other != points
    with pytest.raises(ExperimentError, match=r"algorithms.sgd.search is missing"):
        search.quasi_random(attrs.evolve(study.algorithms["sgd"], search={}), how)


def brute_force(rows: list[dict[str, Any]], name: str, stage: str) -> Mapping[str, float]:
    best, chosen = math.inf, None
    for number in sorted({row["number"] for row in rows if row["algorithm"] == name}):
        own = [
            row
            for row in rows
            if (row["algorithm"], row["stage"], row["number"]) == (name, stage, number)
        ]
        if not own or any(row["value"] is None for row in own):
            continue
        value = statistics.median(row["value"] for row in own)
        if value < best:
            best, chosen = value, own[0]["options"]
    assert chosen is not None
    return chosen


def test_thesis_search_chooses_the_lowest_training_loss(own_study: OWN, tmp_path: Path):
    found, jobs = conducted(own_study, "thesis", tmp_path / "one")
    assert len(jobs) == 4 + 3
    assert {job.seed for job in jobs} == {100}
    values = found.summary()
    assert values["criterion"] == "training loss"
    assert values["examples"] == 64
    for name in ("adamw", "ekfac"):
        assert values["chosen"][name] == brute_force(values["trials"], name, "search")
    tuned = found.tuned().algorithms["ekfac"].options
    assert tuned["lr"] == values["chosen"]["ekfac"]["lr"]
    assert tuned["basis"] == "ekfac"  # the rest stays
    json.dumps(values)


@pytest.mark.parametrize(("protocol", "count"), [("thesis", 7), ("fair", 16)])
def test_interrupted_searches_find_the_same(
    protocol: str, count: int, own_study: OWN, tmp_path: Path
):
    """After any number of trials, and where a row was being written."""
    whole, jobs = conducted(own_study, protocol, tmp_path / "whole")
    assert len(jobs) == count
    folder, taken = tmp_path / "parts", 0
    for most in (0, 1, 5, 4, 1000):
        part, jobs = conducted(own_study, protocol, folder, most)
        taken += len(jobs)
        with (folder / f"{protocol}.log").open("ab") as file:
            file.write(b'{"op_code":4,"cut')
        (folder / f"{protocol}.log.lock").symlink_to("nowhere")
    assert taken == count
    assert summary(part) == summary(whole)
    assert conducted(own_study, protocol, folder)[1] == []


def test_fair_search_confirms_the_best_with_other_seeds(own_study: OWN, tmp_path: Path):
    study, _ = own_study
    found, jobs = conducted(own_study, "fair", tmp_path)
    values = found.summary()
    assert values["criterion"] == "validation loss"
    assert values["examples"] == 32  # of 40, 8 decide
    rows = values["trials"]
    for name in study.algorithms:
        own = [row for row in rows if row["algorithm"] == name]
        first = sorted((r["value"], r["number"]) for r in own if r["stage"] == "search")
        again = {(r["number"], r["seed"]) for r in own if r["stage"] == "confirm"}
        assert again == {(number, seed) for _, number in first[:2] for seed in (101, 102)}
        assert values["chosen"][name] == brute_force(rows, name, "confirm")
    assert {job.seed for job in jobs if job.trial["stage"] == "search"} == {100}
    assert not {job.seed for job in jobs} & set(found.tuned().training.seeds)
    numbers = {job.key for job in jobs}
    assert len(numbers) == len(jobs)


def test_no_trial_sees_a_test_example(own_study: OWN, tmp_path: Path):
    _, dataset = own_study

    def rows(examples: data.Examples) -> set[tuple[float, ...]]:
        return {tuple(each.flatten().tolist()) for each in examples.inputs}

    test, train = rows(dataset.test), rows(dataset.train)
    for protocol in ("thesis", "fair"):
        for groups in itertools.islice(begun(own_study, protocol, tmp_path).stages(), 1):
            for (job,) in groups:
                assert job.folder is None
                assert rows(job.dataset.train) <= train
                assert not rows(job.dataset.train) & rows(job.dataset.test)
                if protocol == "fair":
                    assert rows(job.dataset.test) <= train
                    assert not rows(job.dataset.test) & test


def test_thesis_choice_does_not_depend_on_test_examples(own_study: OWN, tmp_path: Path):
    study, dataset = own_study
    changed = attrs.evolve(dataset, test=dataset.train[:9])
    one = conducted((study, dataset), "thesis", tmp_path / "one")[0]
    other = conducted((study, changed), "thesis", tmp_path / "other")[0]
    assert summary(one) == summary(other)


def made_up(
    own_study: OWN, protocol: str, folder: Path, values: Mapping[str, list[float | None]]
) -> Search:
    """A search whose trials have these values, the confirmation's twice; `None` diverged."""
    found = begun(own_study, protocol, folder)
    for groups in found.stages():
        for (job,) in reversed(groups):
            value = values[job.algorithm.name][job.trial["number"]]
            loss = math.nan if value is None else value
            epoch = runner.Epoch(1, 1, 1.0, loss, 0.0, loss, 0.0)
            status = "diverged" if value is None else "finished"
            found.add(job, Run(job.algorithm.name, job.seed, status, {}, {}, (epoch,)))
    return found


@pytest.mark.parametrize("protocol", ["thesis", "fair"])
def test_ties_go_to_the_first_and_diverged_trials_are_never_chosen(
    protocol: str, own_study: OWN, tmp_path: Path
):
    values = {"adamw": [None, 0.5, 0.5, 0.7], "ekfac": [0.9, None, 0.2, 0.2]}
    found = made_up(own_study, protocol, tmp_path, values)
    numbers = {"adamw": 1, "ekfac": 2}
    for name, number in numbers.items():
        points = found.points(found.study.algorithms[name])
        assert found.chosen()[name] == points[number]
    rows = found.summary()["trials"]
    assert sum(row["value"] is None for row in rows) == 2  # never confirmed
    assert rows == sorted(
        rows, key=lambda row: (row["algorithm"], row["stage"], row["number"], row["seed"])
    )


def test_infinite_losses_of_finished_trials_are_diverged_ones(own_study: OWN, tmp_path: Path):
    values = {"adamw": [math.inf, 0.5, 3.0, 0.7], "ekfac": [0.9, math.nan, 0.2]}
    found = made_up(own_study, "thesis", tmp_path, values)
    assert found.chosen()["adamw"] == {"lr": 0.1, "weight_decay": 0.01}
    assert found.chosen()["ekfac"] == {"lr": 0.001}


@pytest.mark.parametrize("protocol", ["thesis", "fair"])
def test_algorithms_that_always_diverge_are_told(protocol: str, own_study: OWN, tmp_path: Path):
    values = {"adamw": [None] * 4, "ekfac": [0.9, 0.1, 0.2, 0.2]}
    with pytest.raises(ExperimentError, match="every trial of adamw diverged"):
        made_up(own_study, protocol, tmp_path, values).chosen()
    study, dataset = own_study
    left = begun((study.only(["ekfac"]), dataset), protocol, tmp_path)
    assert list(left.chosen()) == ["ekfac"]  # the trials are kept


def test_searches_that_cannot_be_are_told(own_study: OWN, tmp_path: Path):
    study, dataset = own_study
    plain = attrs.evolve(study, search=settings.Search())
    for changed, protocol, words in (
        (plain, "thesis", r"no \[search.thesis\]"),
        (plain, "fair", r"no \[search.fair\]"),
        (with_training(study, seeds=(0, 100)), "thesis", r"the seeds of \[search.thesis\] are 100"),
        (with_training(study, seeds=(0, 100)), "fair", r"the seeds of \[search.fair\] are 100"),
        (with_training(study, seeds=(102,)), "fair", r"the seeds of .* are 100, 101, 102"),
    ):
        with pytest.raises(ExperimentError, match=words):
            begun((changed, dataset), protocol, tmp_path)
    fair = attrs.evolve(study.search.fair, seed=101)
    same = attrs.evolve(study, search=settings.Search(fair=fair))
    with pytest.raises(ExperimentError, match="are 101, 101, 102, and one occurs twice"):
        begun((same, dataset), "fair", tmp_path)
    thesis = attrs.evolve(study.search.thesis, algorithms=("ekfac",))
    some = attrs.evolve(study, search=attrs.evolve(study.search, thesis=thesis))
    assert list(begun((some, dataset), "thesis", tmp_path).study.algorithms) == ["ekfac"]
    with pytest.raises(ExperimentError, match="none of these algorithms takes part"):
        begun((some.only(["adamw"]), dataset), "thesis", tmp_path)


def test_trials_of_another_search_are_refused(own_study: OWN, tmp_path: Path):
    study, dataset = own_study
    conducted(own_study, "fair", tmp_path, most=2)
    other = study.algorithms["adamw"]
    other = attrs.evolve(other, search={**other.search, "lr": (0.001, 0.2)})
    changed = attrs.evolve(study, algorithms={**study.algorithms, "adamw": other})
    with pytest.raises(ExperimentError, match="are of another search"):
        conducted((changed, dataset), "fair", tmp_path)


def written(own_study: OWN, found: Search, protocol: str, folder: Path) -> Path:
    """Results with the summary of a search."""
    study, _ = own_study
    Results(
        study=attrs.evolve(found.tuned(), training=with_training(study, epochs=9).training),
        dataset="own",
        device="cpu",
        command="",
        runs=[],
        searches={protocol: found.summary()},
    ).write(folder)
    return folder


@pytest.mark.parametrize("protocol", ["thesis", "fair"])
def test_trials_are_taken_from_results(protocol: str, own_study: OWN, tmp_path: Path):
    """All of them: none runs again, and the same settings are found; those it lacks are run."""
    study, dataset = own_study
    whole, jobs = conducted(own_study, protocol, tmp_path / "whole")
    folder = written(own_study, whole, protocol, tmp_path / "results")
    again = begun(own_study, protocol, tmp_path / "again")
    again.take(folder)
    again.take(folder)
    assert [groups for groups in again.stages() if groups] == []
    assert again.summary() == whole.summary()
    part, _ = conducted((study.only(["adamw"]), dataset), protocol, tmp_path / "part")
    folder = written((study.only(["adamw"]), dataset), part, protocol, tmp_path / "adamw")
    more = begun(own_study, protocol, tmp_path / "more")
    more.take(folder)
    ran = [job for groups in more.stages() for (job,) in groups]
    assert {job.algorithm.name for job in ran} == {"ekfac"}
    assert sum(job.algorithm.name == "ekfac" for job in jobs) >= len(ran) > 0


def test_trials_of_other_terms_are_not_taken(own_study: OWN, tmp_path: Path):
    study, dataset = own_study
    found, _ = conducted(own_study, "fair", tmp_path / "one")
    folder = written(own_study, found, "fair", tmp_path / "results")
    ekfac, how = study.algorithms["ekfac"], study.search.fair
    changes: dict[str, Study] = {
        "another ekfac": attrs.evolve(
            study,
            algorithms={**study.algorithms, "ekfac": ekfac.with_options(update="nag")},
        ),
        "trials of another length": attrs.evolve(
            study, search=attrs.evolve(study.search, fair=attrs.evolve(how, epochs=3))
        ),
        "another batch size": with_training(study, batch_size=4),
        "other examples": attrs.evolve(study, data=attrs.evolve(study.data, seed=1)),
    }
    for text, changed in changes.items():
        with pytest.raises(ExperimentError, match=f"--trials: .* has {text}"):
            begun((changed, dataset), "fair", tmp_path / "two").take(folder)
    with pytest.raises(ExperimentError, match="holds no search by the thesis protocol"):
        begun(own_study, "thesis", tmp_path / "two").take(folder)
    with pytest.raises(ExperimentError, match="cannot be read"):
        begun(own_study, "fair", tmp_path / "two").take(tmp_path)


@pytest.mark.parametrize("content", [b"no journal\n", b"{}\n", b"\xff\n", None])
def test_damaged_journals_are_one_line(content: bytes | None, own_study: OWN, tmp_path: Path):
    path = tmp_path / "fair.log"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content + content)
    with pytest.raises(ExperimentError, match=r"fair\.log cannot be read .*delete it") as told:
        begun(own_study, "fair", tmp_path)
    assert str(told.value).isprintable()


def test_rows_are_read_as_written(tmp_path: Path):
    journal = search._Journal(tmp_path / "x.log", "x")
    rows = [
        Row("a", "search", 0, 100, {"lr": 0.1, "damping": 3.0}, 0.5, 1.0),
        Row("a", "search", 1, 100, {"lr": 0.2}, None, 1.0),
    ]
    for row in reversed(rows):
        journal.add(row)
    assert journal.rows() == search._Journal(tmp_path / "x.log", "x").rows() == rows


def test_medians_of_the_confirmation_decide(own_study: OWN, tmp_path: Path):
    found = begun(own_study, "fair", tmp_path)
    confirmed = {(0, 101): 5.0, (0, 102): 5.0, (1, 101): 1.0, (1, 102): 6.0}
    for groups in found.stages():
        for (job,) in groups:
            number = job.trial["number"]
            loss = confirmed.get((number, job.seed), float(number))
            epoch = runner.Epoch(1, 1, 1.0, 0.0, 0.0, loss, 0.0)
            found.add(job, Run(job.algorithm.name, job.seed, "finished", {}, {}, (epoch,)))
    for name, algorithm in found.study.algorithms.items():
        assert found.chosen()[name] == found.points(algorithm)[1]
