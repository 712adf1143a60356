import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import kfactk
from experiments import algorithms, config
from experiments.collector import Collector, means
from experiments.config import Algorithm
from experiments.errors import ExperimentError


@pytest.mark.parametrize("preset", ["digits", "cifar10-small", "cifar10-resnet50"])
def test_algorithms_of_all_presets_can_be_made(preset):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    for algorithm in config.load(preset).algorithms.values():
        algorithms.check(algorithm)
        optimizer = algorithms.make(algorithm, model, seed=5, collector=Collector(1))
        assert isinstance(optimizer, kfactk.Optimizer) == (algorithm.name != "sgd")
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (
            algorithm.settings["lr"],
            algorithm.settings["weight_decay"],
        )
        algorithms.close(optimizer)


def test_seed_reaches_the_fisher_pass():
    adam = config.load("digits").algorithms["ekfacadam"]
    assert algorithms.describe(adam, seed=7)["fisher"]["seed"] == 7


def test_fisher_without_draws_has_no_seed():
    adam = config.load("digits").algorithms["ekfacadam"]
    exact = Algorithm(
        "x", "X", {**adam.settings, "fisher": {"name": "exact", "max_passes": 20}}, {}
    )
    assert algorithms.describe(exact, seed=7)["fisher"] == {"name": "exact", "max_passes": 20}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "sdg", "lr": 0.1, "weight_decay": 0}, "algorithm x: .*'sgd'"),
        ({"basis": "ekfc"}, "algorithm x: .*'ekfac'"),
        ({"clip": {"name": "kl", "limt": 1}}, "algorithm x: .*limit"),
        ({"factor_every": 0}, "algorithm x: .*factor_every"),
    ],
)
def test_settings_are_checked_before_any_run(settings, words):
    with pytest.raises(ExperimentError, match=words):
        algorithms.check(Algorithm("x", "X", settings, {}))


@pytest.mark.parametrize("trusted", [False, True])
def test_a_settings_file_runs_code_of_import_paths_only_if_trusted(tmp_path, monkeypatch, trusted):
    (tmp_path / "intruder_of_tests.py").write_text(
        "class Clip:\n    def clip(self, pairs, dot):\n        raise NotImplementedError\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    digits = (Path(config.__file__).parent / "configs" / "digits.toml").read_text()
    path = tmp_path / "mine.toml"
    changed = digits.replace(
        "[algorithms.ekfac]", '[algorithms.ekfac]\nclip = "intruder_of_tests:Clip"'
    )
    path.write_text(changed)
    algorithm = config.read(path, trusted=trusted).algorithms["ekfac"]
    if trusted:
        assert (
            algorithms.recipe(algorithm, seed=0).to_dict()["clip"]["name"]
            == "intruder_of_tests:Clip"
        )
        return
    with pytest.raises(ExperimentError, match=r"holds the import path .*--trust-config"):
        algorithms.check(algorithm)
    assert "intruder_of_tests" not in sys.modules


def test_collector_gets_the_metrics_of_a_tracker():
    model, collector = nn.Sequential(nn.Linear(4, 3)), Collector(2)
    optimizer = algorithms.make(
        config.load("digits").algorithms["ekfac"], model, seed=0, collector=collector
    )
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            model(torch.randn(8, 4)), torch.zeros(8, dtype=torch.long)
        ).backward()
        optimizer.step()
    algorithms.close(optimizer)
    points = collector.take()
    assert [point.step for point in points] == [0, 2, 4]
    assert collector.take() == []
    assert means(points)["damping"] == pytest.approx(optimizer.param_groups[0]["damping"])
    assert 0 < means(points)["clip_factor"] <= 1
