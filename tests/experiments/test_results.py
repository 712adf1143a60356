from pathlib import Path

import attrs
import pytest

from experiments import results as stored
from experiments.errors import ExperimentError
from tests.experiments import made_up

NAN = float("nan")


def test_results_are_written_and_read(tmp_path: Path):
    results = attrs.evolve(
        made_up.results({"sgd": [[1.0, 0.5], [1.0, NAN]], "kfac": [[1.0, 0.5]]}),
        searches={"fair": {"trials": [], "chosen": {"sgd": {"lr": 0.1}}, "criterion": "loss"}},
    )
    results.write(tmp_path)
    again = stored.read(tmp_path)
    assert again.study == attrs.evolve(
        results.study,
        trusted=False,
        algorithms={
            name: attrs.evolve(each, trusted=again.study.algorithms[name].trusted)
            for name, each in results.study.algorithms.items()
        },
    )
    for key in ("dataset", "device", "command", "searches"):
        assert getattr(again, key) == getattr(results, key)
    for name in ("sgd", "kfac"):
        for one, other in zip(results.of(name).values(), again.of(name).values(), strict=True):
            assert (one.status, repr(one.history)) == (other.status, repr(other.history))


def test_runs_that_are_not_ours_go(tmp_path: Path):
    made_up.results({"sgd": [[1.0], [1.0]]}).write(tmp_path)
    made_up.results({"sgd": [[1.0]]}).write(tmp_path)
    assert [path.name for path in tmp_path.glob("*-seed*")] == ["sgd-seed0.json"]


def test_damaged_results_are_an_error_in_one_line(tmp_path: Path):
    with pytest.raises(ExperimentError, match="cannot be read"):
        stored.read(tmp_path)
    results = made_up.results({"sgd": [[1.0]]})
    for text in ("", "[]", "{}", '{"settings": 3}'):
        results.write(tmp_path)
        (tmp_path / "study.json").write_text(text)
        with pytest.raises(ExperimentError, match="cannot be read"):
            stored.read(tmp_path)
    results.write(tmp_path)
    (tmp_path / "sgd-seed0.json").write_text("{")
    with pytest.raises(ExperimentError, match=r"sgd-seed0\.json cannot be read"):
        stored.read(tmp_path)


def test_algorithms_have_the_order_of_the_study_and_ended_runs():
    results = made_up.results({"kfac": [[1.0, 0.5]], "sgd": [[1.0]], "ekfac": [[1.0, 0.9, 0.8]]})
    running = [
        attrs.evolve(run, status="running") if run.algorithm == "ekfac" else run
        for run in reversed(results.runs)
    ]
    results = attrs.evolve(results, runs=running)
    assert [each.name for each in results.algorithms] == ["kfac", "sgd"]
    assert results.epochs == 2
    assert results.first.name == "sgd"
    assert made_up.results({"kfac": [[1.0]], "ekfac": [[1.0]]}).first.name == "kfac"


def test_seeds_are_sorted():
    results = made_up.results({"sgd": [[1.0], [2.0], [3.0]]})
    assert list(attrs.evolve(results, runs=results.runs[::-1]).of("sgd")) == [0, 1, 2]
