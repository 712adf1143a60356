"""The tables of settings: each can be made, and those of torch do what they say."""

import importlib.util

import pytest
import torch
from torch import nn

from benchmarks import settings
from kfactk.optim.optimizer import Optimizer


@pytest.mark.parametrize("name", sorted(settings.RECIPES))
def test_every_recipe_trains_the_network(name: str):
    setting = settings.ours(name)
    optimizer = setting.make(settings.network(1))
    assert isinstance(optimizer, Optimizer)
    assert optimizer.recipe == setting.recipe()
    assert setting.recipe(factor_every=3).schedule.periods(0)[0] == 3


def test_precisions_are_of_settings():
    assert set(settings.PRECISIONS) <= set(settings.RECIPES)


def test_others_are_raced_where_they_are_installed():
    absent = {module for module in settings.OTHERS if importlib.util.find_spec(module) is None}
    assert set(settings.missing()) == absent
    names = set(settings.settings())
    assert {settings.BASELINE, *settings.RECIPES} <= names
    assert set(settings.settings("no such name")) == {settings.BASELINE}


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
