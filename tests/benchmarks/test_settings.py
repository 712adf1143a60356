"""The tables of settings: each can be made, and those of torch do what they say."""

import importlib.util

import pytest
import torch
from torch import nn

import kfactk
from benchmarks import settings, tasks
from benchmarks.tasks import Task
from kfactk.optim.optimizer import Optimizer


@pytest.mark.parametrize("task", [tasks.resnet8(1), tasks.transformer(4, depth=1)])
def test_every_recipe_trains_its_network(task: Task):
    inputs, labels = task.batch(2, torch.device("cpu"))
    for name in task.recipes:
        setting, model = task.settings(name)[name], task.network()
        optimizer = setting.make(model)
        assert isinstance(optimizer, Optimizer)
        assert optimizer.recipe == setting.recipe()
        assert setting.recipe(factor_every=3).schedule.periods(0)[0] == 3
        assert setting.precision == ("bfloat16" if "bfloat16" in name else "float32")
        before = task.loss(model(inputs), labels).detach()
        for _ in range(2):  # the first step of SOAP moves nothing
            optimizer.zero_grad()
            task.loss(model(inputs), labels).backward()
            optimizer.step()
        assert task.loss(model(inputs), labels) < before


def test_others_are_raced_where_they_are_installed():
    absent = {module for module in settings.OTHERS if importlib.util.find_spec(module) is None}
    assert set(settings.missing()) == absent
    names = set(settings.settings())
    assert {settings.BASELINE, *settings.RECIPES} <= names
    assert set(settings.settings("no such name")) == {settings.BASELINE}


def test_only_packages_of_named_settings_are_imported(monkeypatch: pytest.MonkeyPatch):
    made = {name: lambda name=name: {f"x ({name})": None} for name in ("one", "other")}
    monkeypatch.setattr(settings, "OTHERS", made)
    monkeypatch.setattr(settings, "missing", list)
    assert {"x (one)", "x (other)"} <= set(settings.rivals())
    named = settings.rivals(["x (one)", "ekfac"])
    assert "x (one)" in named
    assert "x (other)" not in named


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_kernels_are_shown_to_muon_as_matrices():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    kernel, weight = model[0].weight, nn.Parameter(model[0].weight.detach().flatten(1).clone())
    norm = model[1].weight.detach().clone()
    optimizer, direct = settings.Matrices(model), torch.optim.Muon([weight], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 5, 5)).square().sum().backward()
        weight.grad = kernel.grad.flatten(1).clone()
        optimizer.step()
        direct.step()
    torch.testing.assert_close(kernel.flatten(1), weight)
    assert not torch.equal(model[1].weight, norm)


def test_the_preset_is_raced_as_it_is():
    raced = tasks.transformer(64).settings("preset")["the preset transformer"].recipe().to_dict()
    unread = ("likelihood",)  # no block of it reads one
    for name, value in kfactk.preset("transformer").to_dict().items():
        assert name in unread or raced[name] == value, name
