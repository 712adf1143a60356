"""Layers whose weight cannot be preconditioned, whatever their class."""

import pytest
from torch import nn

from kfactk_stages.curvature.kfac import Kfac


def without_weight() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_parameter("weight", None)
    return layer


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("make", "reason"),
    [(without_weight, "it has no weight"), (lambda: nn.Linear(2, 0), "its weight is empty")],
    ids=["none", "empty"],
)
def test_a_layer_without_numbers_is_left_alone(make, reason):
    assert Kfac().unsupported(make()) == reason
