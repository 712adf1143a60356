"""What is covered, and every refusal with its reason."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from kfactk_stages.curvature.conv_kfac import ConvKfac
from kfactk_stages.curvature.kfac import Kfac


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def forward_replaced():
    module = nn.Linear(2, 2)
    module.forward = lambda x: x
    return module


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return weight_norm(nn.Linear(2, 2))


def own_buffer_as_weight():
    module = nn.Linear(2, 2)
    del module.weight
    module.register_buffer("weight", torch.ones(2, 2))
    return module


CONVOLUTIONS = [nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1)]


def test_plain_layers_are_covered():
    assert Kfac().unsupported(nn.Linear(2, 2)) is None
    assert Kfac().unsupported(nn.Linear(2, 2, bias=False)) is None
    for module in (nn.Linear(2, 2), *CONVOLUTIONS):
        assert ConvKfac().unsupported(module) is None
        assert ConvKfac().unsupported(pickle.loads(pickle.dumps(copy.deepcopy(module)))) is None
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert ConvKfac().unsupported(nn.Linear(2, 2, dtype=dtype)) is None


def test_a_lazy_layer_is_covered_once_it_has_run():
    module = nn.LazyConv2d(3, 3)
    assert "run one forward" in ConvKfac().unsupported(module)
    module(torch.ones(1, 2, 4, 4))
    assert ConvKfac().unsupported(module) is None


@pytest.mark.parametrize("module", CONVOLUTIONS)
def test_kfac_points_to_conv_kfac(module):
    assert "curvature='conv_kfac'" in Kfac().unsupported(module)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Doubled(2, 2), "Doubled is a subclass of Linear"),
        (lambda: DoubledConv(2, 2, 1), "DoubledConv is a subclass of Conv2d"),
        (forward_replaced, "forward was replaced"),
        (lambda: nn.LazyLinear(2), "LazyLinear is not initialised yet; run one forward"),
        (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), "its weight is parametrized"),
        (lambda: parametrizations.orthogonal(nn.Conv2d(2, 2, 1)), "its weight is parametrized"),
        (
            lambda: parametrizations.spectral_norm(nn.Linear(2, 2), "bias"),
            "its bias is parametrized",
        ),
        (old_weight_norm, "its weight is computed from other parameters"),
        (
            lambda: nn.utils.spectral_norm(nn.Conv2d(2, 2, 1)),
            "its weight is computed from other parameters",
        ),
        (
            lambda: prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.5),
            "its weight is computed from other parameters",
        ),
        (
            lambda: prune.l1_unstructured(nn.Linear(2, 2), "bias", 0.5),
            "its bias is computed from other parameters",
        ),
        (own_buffer_as_weight, "its weight is computed"),
        (
            lambda: nn.ConvTranspose2d(2, 2, 1),
            "no curvature for transposed convolutions (ConvTranspose2d)",
        ),
        (lambda: nn.MultiheadAttention(2, 1).out_proj, "attention's out_proj"),
        (lambda: nn.Bilinear(2, 2, 2), "no curvature for Bilinear"),
        (lambda: nn.Embedding(2, 2), "no curvature for Embedding"),
        (lambda: nn.BatchNorm2d(2), "no curvature for BatchNorm2d"),
        (lambda: nn.LayerNorm(2), "no curvature for LayerNorm"),
        (lambda: nn.LazyBatchNorm2d(), "no curvature for LazyBatchNorm2d"),
        (lambda: nn.LSTM(2, 2), "no curvature for LSTM"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "its weight is torch.complex64"),
        (lambda: nn.Linear(2, 2).to(torch.float8_e4m3fn), "its weight is torch.float8_e4m3fn"),
    ],
)
@pytest.mark.parametrize("curvature", [Kfac(), ConvKfac()])
def test_refusals_say_why(make, reason, curvature):
    module = make()
    answer = curvature.unsupported(module)
    assert answer is not None
    if not (
        isinstance(module, nn.Conv2d) and type(curvature) is Kfac and "parametrized" not in reason
    ):
        assert reason in answer


def test_the_subclass_that_fully_shard_swaps_in_is_covered():
    from torch.distributed.fsdp import FSDPModule

    module = nn.Linear(2, 2)
    module.__class__ = type(
        "FSDPLinear", (FSDPModule, nn.Linear), {"__module__": FSDPModule.__module__}
    )
    assert Kfac().unsupported(module) is None
    module = Doubled(2, 2)
    module.__class__ = type(
        "FSDPDoubled", (FSDPModule, Doubled), {"__module__": FSDPModule.__module__}
    )
    assert "Doubled is a subclass of Linear" in Kfac().unsupported(module)
