"""Presets are what the page on performance measured, and train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfactk
from kfactk.preconditioner.rules import within
from kfactk.recipe import IN_REPEATED_BLOCKS, PRESETS


def test_the_thesis_preset_is_the_default() -> None:
    assert kfactk.preset("thesis") == kfactk.build()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_numbers_that_they_name(name: str) -> None:
    made = kfactk.preset(name)
    for field in {"lr", "damping"} & PRESETS[name].keys():
        assert getattr(made, field) == PRESETS[name][field], field
    assert kfactk.preset(name, update=made.to_dict()["update"]) == made


def test_another_kind_of_rule_gets_numbers_of_its_own() -> None:
    usual = kfactk.build(update="momentum")
    made = kfactk.preset("short", update="momentum")
    assert (made.lr, made.damping) == (usual.lr, usual.damping)
    assert kfactk.preset("short", update="momentum", lr=0.7).lr == 0.7


@pytest.mark.parametrize("name", PRESETS)
def test_presets_train(name: str) -> None:
    torch.manual_seed(0)
    repeated = nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()))
    model = nn.Sequential(nn.Sequential(repeated), nn.Flatten(), nn.Linear(36, 3))
    optimizer = kfactk.preset(name).bind(model)
    x, y, losses = torch.randn(24, 1, 5, 5), torch.arange(24) % 3, []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        *(("blocks.0.qkv", True), ("transformer.h.11.mlp.c_fc", True)),
        *(("model.layers.3.mlp.up_proj", True), ("encoder.layers.encoder_layer_2.mlp.0", True)),
        *(("wte", False), ("lm_head", False), ("heads.head", False), ("patch_embed.proj", False)),
        *(("0", False), ("mlp.2", False)),
    ],
)
def test_hidden_layers_of_a_transformer_are_those_in_numbered_modules(
    path: str, inside: bool
) -> None:
    assert any(within(path, pattern) for pattern in IN_REPEATED_BLOCKS) == inside


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"name": "shrot"}, kfactk.UnknownStageError, "Did you mean 'short'"),
        ({"name": "short", "lrr": 0.1}, kfactk.OptionError, "'lrr' is not an argument"),
    ],
)
def test_mistakes_are_told(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        kfactk.preset(**arguments)
