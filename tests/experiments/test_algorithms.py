import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import kfactk
from experiments import algorithms, settings
from experiments.algorithms import Collector, means
from experiments.errors import ExperimentError
from experiments.settings import Algorithm


def algorithm(optimizer: str = "kfactk", *, trusted: bool = False, **options: Any) -> Algorithm:
    return Algorithm(name="x", label="X", optimizer=optimizer, options=options, trusted=trusted)


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 2)),
        *(nn.Flatten(), nn.Linear(3, 4), nn.Linear(4, 2)),
    )


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, shape: tuple[int, ...]) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(model(torch.randn(6, *shape)), torch.arange(6) % 2).backward()
    optimizer.step()


@pytest.mark.parametrize("preset", settings.presets())
def test_algorithms_of_all_presets_can_be_made(preset: str):
    study, model = settings.load(preset), nn.Sequential(nn.Sequential(network()))
    algorithms.check(study.algorithms.values())
    for each in study.algorithms.values():
        optimizer = algorithms.make(each, model, seed=5, collector=Collector(1))
        assert isinstance(optimizer, kfactk.Optimizer) == each.second_order
        group = optimizer.param_groups[0]
        assert all(
            group[key] == each.options.get(key, group[key])
            for key in ("lr", "damping")
            if key in group
        )
        algorithms.close(optimizer)


@pytest.mark.parametrize("name", sorted(set(algorithms.TORCH) - {"LBFGS", "SparseAdam"}))
def test_optimizers_of_torch_take_a_step_by_their_name(name: str):
    model = nn.Linear(3, 2, bias=False)  # Muon takes matrices only
    chosen, before = algorithm(name, lr=0.02), model.weight.detach().clone()
    if name != "Muon":
        algorithms.check([chosen])
        assert algorithms.describe(chosen, seed=0)["lr"] == 0.02
    optimizer = algorithms.make(chosen, model, seed=0, collector=Collector(1))
    assert type(optimizer) is getattr(torch.optim, name)
    assert optimizer.param_groups[0]["lr"] == 0.02
    take_step(model, optimizer, (3,))
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (algorithm("SDG", lr=0.1), r"algorithms.x.optimizer: there is no 'SDG'. .*'SGD'"),
        (algorithm("sgd", lr=0.1), r"'SGD'"),
        (algorithm("SGD", lr=0.1, momentun=0.9), r"^algorithm x: .*'momentun'.*'momentum'"),
        (algorithm("SGD", params=[]), "^algorithm x: there is no option 'params'"),
        (algorithm("SGD", momentum="much"), "^algorithm x: "),
        (algorithm("SGD", lr=-1), "^algorithm x: .*lr|learning rate"),
        (algorithm("SGD", nesterov=True), "^algorithm x: Nesterov"),
        (algorithm("Adam", betas=3), "^algorithm x: "),
        (algorithm("Adam", betas=[0.9]), "^algorithm x: "),
        (algorithm("LBFGS"), "^algorithm x: .*closure"),
        (algorithm("SparseAdam"), "^algorithm x: .*dense"),
        (algorithm("Muon"), "^algorithm x: .*2D"),
        (algorithm(basis="ekfc"), "^algorithm x: .*'ekfac'"),
        (algorithm(dampning=0.1), "^algorithm x: .*damping"),
        (algorithm(clip={"name": "kl", "limt": 1}), "^algorithm x: .*limit"),
        (algorithm(factor_every=0), "^algorithm x: .*factor_every"),
        (algorithm(damping=-1), "^algorithm x: .*damping.*-1"),
        (algorithm(preset="shrt"), "^algorithm x: .*'short'"),
        (algorithm(preset="short", dampning=1), "^algorithm x: .*damping"),
        (algorithm(basis=3), "^algorithm x: .*basis"),
        (algorithm("torch.optim:Adm", trusted=True), "^algorithms.x.optimizer: .* imported"),
        (algorithm("no_such_module:x", trusted=True), "^algorithms.x.optimizer: .* imported"),
        (algorithm(".:x", trusted=True), "^algorithms.x.optimizer: .* imported"),
        (algorithm("os:sep", trusted=True), "is no class and no function"),
        (algorithm("torch.nn:Linear", trusted=True), "^algorithm x: "),
        (algorithm("builtins:list", trusted=True), "^algorithm x: "),
        (algorithm("torch.optim:SGD", trusted=False), "add --trust-config"),
    ],
)
def test_settings_are_checked_before_any_run(chosen: Algorithm, words: str):
    with pytest.raises(ExperimentError, match=words):
        algorithms.check([chosen])


@pytest.mark.parametrize("preset", ["short", "cheap"])
def test_presets_of_kfactk_take_changed_options(preset: str):
    plain = kfactk.preset(preset).to_dict()
    chosen = algorithm(preset=preset, lr=0.0123, basis_every=7)
    algorithms.check([chosen])
    found = algorithms.describe(chosen, seed=7)
    assert (found.pop("optimizer"), found["lr"], found["basis_every"]) == ("kfactk", 0.0123, 7)
    if "seed" in found["fisher"]:
        assert found["fisher"].pop("seed") == 7
        plain["fisher"].pop("seed")
    assert {**found, "lr": 0, "basis_every": 0} == {**plain, "lr": 0, "basis_every": 0}


def test_seed_reaches_the_fisher_pass():
    adam = settings.load("digits").algorithms["ekfacadam"]
    assert algorithms.describe(adam, seed=7)["fisher"]["seed"] == 7
    twice = adam.with_options(fisher={"name": "mc", "samples": 2})
    found = algorithms.describe(twice, seed=7)["fisher"]
    assert (found["seed"], found["samples"]) == (7, 2)
    given = adam.with_options(fisher={"name": "mc", "seed": 3})
    assert algorithms.describe(given, seed=7)["fisher"]["seed"] == 3


def test_fisher_without_draws_has_no_seed():
    exact = settings.load("digits").algorithms["ekfacadam"]
    exact = exact.with_options(fisher={"name": "exact", "max_passes": 20})
    assert algorithms.describe(exact, seed=7)["fisher"] == {"name": "exact", "max_passes": 20}


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("stage", [False, True])
def test_import_paths_run_code_only_if_trusted(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool, stage: bool
):
    name = f"intruder_of_tests_{stage}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\nclass Clip:\n    def clip(self, pairs, dot):\n        raise OSError\n"
        "def mine(params, lr=0.1): return torch.optim.SGD(params, lr=lr)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    old, new = (
        ("[algorithms.ekfacadam]", f'[algorithms.ekfacadam]\nclip = "{name}:Clip"')
        if stage
        else ('optimizer = "SGD"\nmomentum = 0.9', f'optimizer = "{name}:mine"')
    )
    assert old in tiny.read_text()
    tiny.write_text(tiny.read_text().replace(old, new).replace("weight_decay = 0.0001\n", ""))
    found = settings.read(tiny, trusted=trusted).algorithms["ekfacadam" if stage else "sgd"]
    if not trusted:
        with pytest.raises(ExperimentError, match="--trust-config"):
            algorithms.check([found])
        assert name not in sys.modules
        return
    algorithms.check([found])
    if stage:
        assert algorithms.describe(found, seed=0)["clip"]["name"] == f"{name}:Clip"
    else:
        assert algorithms.describe(found, seed=0)["optimizer"] == f"{name}:mine"


def test_functions_whose_first_parameter_is_model_get_it():
    chosen = algorithm("experiments.algorithms:muon", trusted=True, lr=0.02, adamw_lr=0.003)
    algorithms.check([chosen])
    model = network()
    optimizer = algorithms.make(chosen, model, seed=0, collector=Collector(1))
    hidden, rest = optimizer.param_groups
    assert (hidden["lr"], hidden["use_muon"]) == (0.02, True)
    assert (rest["lr"], rest["use_muon"]) == (0.003, False)
    names = {id(value): name for name, value in model.named_parameters()}
    assert [names[id(each)] for each in hidden["params"]] == ["2.weight", "4.weight"]
    assert [names[id(each)] for each in rest["params"]] == [
        *("0.weight", "1.weight", "1.bias", "2.bias", "4.bias", "5.weight", "5.bias")
    ]
    before = [each.detach().clone() for each in model.parameters()]
    take_step(model, optimizer, (1, 4, 4))
    assert not any(map(torch.equal, before[3:], list(model.parameters())[3:]))


def test_muon_without_hidden_matrices_is_adamw():
    optimizer = algorithms.muon(nn.Linear(2, 2))
    assert [group["use_muon"] for group in optimizer.param_groups] == [False]


def test_collector_gets_the_metrics_of_a_tracker():
    model, collector = nn.Sequential(nn.Linear(4, 3)), Collector(2)
    chosen = settings.load("digits").algorithms["ekfac"]
    optimizer = algorithms.make(chosen, model, seed=0, collector=collector)
    for _ in range(5):
        take_step(model, optimizer, (4,))
    algorithms.close(optimizer)
    points = collector.take()
    assert [point.step for point in points] == [0, 2, 4]
    assert collector.take() == []
    assert means(points)["damping"] == pytest.approx(optimizer.param_groups[0]["damping"])
    assert 0 < means(points)["clip_factor"] <= 1


def test_collectors_return_points_once():
    collector = Collector(3)
    assert collector.every == 3
    collector.record(3, {"a": 1.0, "b": float("nan")})
    collector.record(6, {"a": 3.0})
    points = collector.take()
    assert [(point.step, point.metrics["a"]) for point in points] == [(3, 1.0), (6, 3.0)]
    assert means(points) == {"a": 2.0}
    assert collector.take() == []
    json.dumps(means(points))
