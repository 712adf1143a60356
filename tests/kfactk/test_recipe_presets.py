"""Presets are what the page on performance measured, and train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfactk
from kfactk.recipe import PRESETS


def test_the_thesis_preset_is_the_default() -> None:
    assert kfactk.preset("thesis") == kfactk.build()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_train(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
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
    ("arguments", "error", "words"),
    [
        ({"name": "shrot"}, kfactk.UnknownStageError, "Did you mean 'short'"),
        ({"name": "short", "lrr": 0.1}, kfactk.OptionError, "'lrr' is not an argument"),
    ],
)
def test_mistakes_are_told(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        kfactk.preset(**arguments)
