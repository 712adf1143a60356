"""What is covered, and every refusal with its reason."""

import copy
import pickle
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from kfactk_stages.curvature._coverage import TRANSPOSED, conv1d
from kfactk_stages.curvature.conv_kfac import ConvKfac
from kfactk_stages.curvature.embedding import Embedding
from kfactk_stages.curvature.kfac import Kfac
from kfactk_stages.curvature.norm import Norm


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Filled(nn.Linear):
    """Other names, other numbers, more methods: the same function."""

    gain = 3.0

    def __init__(self, width, *, note):
        super().__init__(width, width)
        self.note = note

    def reset_parameters(self):
        nn.init.eye_(self.weight)

    def extra_repr(self):
        return self.note

    def scaled(self):
        return self.gain * self.weight


class Volume(nn.Conv3d):
    """As in torchvision's video models."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, (1, 3, 3), padding=(0, 1, 1), bias=False)

    @staticmethod
    def get_downsample_stride(stride):
        return stride


class Mixin:
    def __init__(self, *args):
        super().__init__(*args)
        self.mixed = True


class Mixed(Mixin, nn.Linear):
    pass


class Up(nn.ConvTranspose2d):
    pass


class Table(nn.Embedding):
    def reset_parameters(self):
        nn.init.zeros_(self.weight)


class Scale(nn.LayerNorm):
    pass


class Halved(nn.Linear):
    """A property between the parameter and its reader."""

    @property
    def weight(self):
        if "weight" not in self._parameters:
            raise AttributeError("weight")
        return self._parameters["weight"] / 2


class Padded(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.abs(), weight, bias)


class Called(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) + x


class Strided(nn.Conv2d):
    @property
    def stride(self):
        return (2, 2)

    @stride.setter
    def stride(self, value):
        pass


class Checked(nn.BatchNorm2d):
    def _check_input_dim(self, x):
        pass


class Sized(nn.ConvTranspose2d):
    def _output_padding(self, *args):
        return [0, 0]


class MixedForward:
    def forward(self, x):
        return x


class Shadowed(MixedForward, nn.Linear):
    pass


class OutProjection(nn.modules.linear.NonDynamicallyQuantizableLinear):
    pass


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = 3
        self.down_proj = nn.Parameter(torch.ones(3, 2, 4))
        self.register_parameter("down_proj_bias", None)


def forward_replaced():
    module = nn.Linear(2, 2)
    module.forward = lambda x: x
    return module


def conv_forward_replaced():
    module = nn.Conv2d(2, 2, 1)
    module._conv_forward = lambda x, weight, bias: x
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
CONVOLUTIONS += [cls(2, 2, 1) for cls in TRANSPOSED]


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
        (lambda: Padded(2, 2, 1), "Conv2d with its own _conv_forward, so what it"),
        (lambda: Called(2, 2), "Called is a subclass of Linear with its own __call__"),
        (lambda: Halved(2, 2), "Halved is a subclass of Linear with its own weight"),
        (lambda: Strided(2, 2, 1), "a subclass of Conv2d with its own stride"),
        (lambda: Sized(2, 2, 1), "a subclass of ConvTranspose2d with its own _output_padding"),
        (lambda: Shadowed(2, 2), "a subclass of Linear with its own forward"),
        (lambda: OutProjection(2, 2), "attention's out_proj"),
        (forward_replaced, "forward was replaced"),
        (conv_forward_replaced, "its _conv_forward was replaced on the instance"),
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
            lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(2, 2, 1)),
            "its weight is parametrized",
        ),
        (lambda: nn.MultiheadAttention(2, 1).out_proj, "attention's out_proj"),
        (Experts, "curvature='experts' covers stacked experts"),
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
        isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
        and type(curvature) is Kfac
        and "parametrized" not in reason
    ):
        assert reason in answer


@pytest.mark.parametrize(
    ("module", "curvature"),
    [
        (Filled(2, note="x"), Kfac()),
        (Mixed(2, 2), Kfac()),
        (Volume(2, 2), ConvKfac()),
        (Up(2, 2, 2), ConvKfac()),
        (Table(2, 2), Embedding()),
        (Scale(2), Norm()),
    ],
)
def test_a_subclass_that_inherits_what_it_computes_is_covered(module, curvature):
    assert curvature.unsupported(module) is None


def test_a_check_of_the_input_may_be_anything():
    assert "with its own _check_input_dim" in Norm().unsupported(Checked(2))


def test_a_class_called_conv1d_is_not_that_of_transformers():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))

    Conv1D.__module__ = "transformers.pytorch_utils"
    assert Kfac().unsupported(Conv1D()) == "no curvature for Conv1D"
    assert ConvKfac().unsupported(Conv1D()) == "no curvature for Conv1D"


def test_what_stands_in_for_transformers_gives_no_class(monkeypatch):
    for value in (None, 3, int):
        stand_in = types.ModuleType("transformers.pytorch_utils")
        stand_in.Conv1D = value
        monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", stand_in)
        assert conv1d() == ()
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils")
    assert conv1d() == ()


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
