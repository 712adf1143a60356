"""Layers, and the parameters of modules by name."""

from __future__ import annotations

import torch
from torch import nn

from kfactk.stages import Layer, owner_of, parameter_at


def test_a_layer_reads_its_parameters_from_the_module() -> None:
    module = nn.Linear(2, 3)
    layer = Layer("body.fc[out]", module, ("bias", "weight"), part="out")
    assert (layer.path, layer.bias, layer.sites) == ("body.fc", True, (module,))
    assert layer.anchor is module.bias
    module.bias = nn.Parameter(torch.ones(3))
    assert layer.anchor is module.bias, "a parameter that was replaced"
    assert not Layer("fc", module, ("weight",)).bias
    assert layer != Layer("body.fc[out]", module, ("bias", "weight"), part="out")


def test_parameters_are_found_in_modules_inside() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1, bias=False)))
    assert parameter_at(model, "1.0.weight") is model[1][0].weight
    assert owner_of(model, "1.0.weight") == (model[1][0], "weight")
    assert owner_of(model[0], "bias") == (model[0], "bias")
    assert parameter_at(model, "1.0.bias") is None, "the module has none"
    assert parameter_at(model, "2.weight") is None, "there is no such module"
