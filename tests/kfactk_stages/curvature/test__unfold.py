"""Where patches lie: how large the padded input is that they are views of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfactk_stages.curvature._unfold import Window


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 2},
        {"padding": (0, 3)},
        {"padding": "same", "dilation": (1, 2)},
        {"padding": (2, 1), "padding_mode": "circular"},
    ],
    ids=str,
)
def test_padded_positions_are_those_of_the_padded_input(options: dict[str, Any]) -> None:
    window, inputs = Window.of(nn.Conv2d(2, 3, (2, 4), **options)), torch.zeros(1, 2, 5, 7)
    padded = F.pad(inputs, window.pads, mode=window.mode) if any(window.pads) else inputs
    assert window.padded_positions(inputs.shape[2:]) == math.prod(padded.shape[2:])
    assert window.patches(inputs).shape[2:4] == nn.Conv2d(2, 3, (2, 4), **options)(inputs).shape[2:]
