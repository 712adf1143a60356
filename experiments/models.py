"""The networks, by name, and BatchNorm over the examples of all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from experiments.errors import ExperimentError, check_options, named, system_reason
from experiments.settings import Model

FIRST_INPUTS = 15
"""Inputs that a unit of the autoencoder begins with."""


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut (He et al. 2016).

    The shortcut is a 1x1 convolution where the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, inputs, H, W]` to `[N, outputs, H / stride, W / stride]`."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network of one block in each stage; all stages but the first halve the image."""

    def __init__(self, channels: int, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        before = (widths[0], *widths[:-1])
        self.blocks = nn.Sequential(
            *(Block(a, b, 1 + (i > 0)) for i, (a, b) in enumerate(zip(before, widths, strict=True)))
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, channels, H, W]` to logits `[N, classes]`."""
        x = self.blocks(functional.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


def resnet(widths: Sequence[int], *, channels: int, classes: int) -> nn.Module:
    """Return a residual network of one block for each width."""
    return ResNet(channels, widths, classes)


def resnet50(*, channels: int = 3, classes: int = 10) -> nn.Module:
    """Return torchvision's ResNet-50 with a stem for 32x32 images: stride 1, and no max-pooling."""
    from torchvision.models import resnet50

    model = resnet50(num_classes=classes)
    model.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def signal_cnn(*, channels: int, classes: int, width: int = 25) -> nn.Module:
    """Return the network of Greydanus and Kobak (2020) for signals of 40 values."""
    return nn.Sequential(
        *(nn.Conv1d(channels, width, 5, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv1d(width, width, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv1d(width, width, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(5 * width, classes)),
    )


class Attention(nn.Module):
    """A block of a transformer: causal attention, then two linear layers, each with a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, T, width]` to the same shape."""
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """A causal transformer with learned positions, in the form of GPT-2 without tied weights."""

    def __init__(self, length: int, tokens: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Attention(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                shrunk = (2 * depth) ** -0.5 if name.endswith(("project.weight", "2.weight")) else 1
                nn.init.normal_(parameter, std=0.02 * shrunk)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[N, T]` to logits of the next ones, `[N, T, tokens]`."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))


def gpt(
    *, channels: int, classes: int, width: int = 256, depth: int = 4, heads: int = 4
) -> nn.Module:
    """Return a causal transformer for text of `channels` tokens."""
    return Gpt(channels, classes, width, depth, heads)


class Lstm(nn.Module):
    """An LSTM that predicts the next token."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width // 2)
        self.recurrent = nn.LSTM(width // 2, width, batch_first=True)
        self.head = nn.Linear(width, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[N, T]` to logits of the next ones, `[N, T, tokens]`."""
        return self.head(self.recurrent(self.tokens(tokens))[0])


def lstm(*, channels: int, classes: int, width: int = 128) -> nn.Module:
    """Return an LSTM of one layer for text.

    Args:
        channels: Has no effect.
        classes: Number of tokens.
        width: Units of the LSTM; an embedding has half as many.
    """
    return Lstm(classes, width)


def autoencoder(
    *, channels: int, classes: int, widths: Sequence[int] = (1000, 500, 250, 30)
) -> nn.Module:
    """Return the autoencoder of Hinton and Salakhutdinov (2006) for images of `classes` pixels.

    The code, of the last width, is linear; all other units are logistic. The output is logits. Each
    unit begins with 15 inputs of normal weights, and no bias (Martens 2010): a network of logistic
    units that begins with small dense weights hardly learns.

    Args:
        channels: Has no effect.
        classes: Number of pixels, of all channels.
        widths: Units of each layer of the encoder; those of the decoder mirror them.
    """
    sizes = [classes, *widths, *widths[-2::-1], classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        layer = nn.Linear(inputs, outputs)
        nn.init.sparse_(layer.weight.data.T, max(0.0, 1 - (FIRST_INPUTS + 0.5) / inputs), std=1.0)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Sigmoid()]
        if i + 1 in (len(widths), len(sizes) - 1):
            layers.pop()
    return nn.Sequential(*layers)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "signal_cnn": signal_cnn,
    "digits_resnet": partial(resnet, (16, 32)),
    "resnet8": partial(resnet, (16, 32, 64)),
    "resnet50": resnet50,
    "gpt": gpt,
    "lstm": lstm,
    "autoencoder": autoencoder,
}
"""Functions that make a network from `channels`, `classes` and options of the settings."""


def make(settings: Model, *, channels: int, classes: int, seed: int, trusted: bool) -> nn.Module:
    """Make a network; `seed` draws its initial weights.

    Args:
        settings: Its name, and further options.
        channels: Channels of an example; of text, its number of tokens.
        classes: Number of outputs; of an autoencoder, of pixels.
        seed: The seed.
        trusted: Whether the name may be an import path.
    """
    function = named("model.name", settings.name, MODELS, trusted=trusted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = function(channels=channels, classes=classes, **settings.options)
    return model


@torch.no_grad()
def check(settings: Model, inputs: Tensor, *, classes: int, trusted: bool) -> None:
    """Check that a network takes some inputs, before any run starts.

    Args:
        settings: Its name, and further options.
        inputs: `[N, C, ...]`, or tokens `[N, T]`.
        classes: Number of outputs.
        trusted: Whether the name may be an import path.

    Raises:
        ExperimentError: It does not, or refuses its options.
    """
    function = named("model.name", settings.name, MODELS, trusted=trusted)
    text = inputs.dtype == torch.int64
    try:
        check_options(function, settings.options, given=["channels", "classes"])
        model = make(settings, channels=inputs.shape[1], classes=classes, seed=0, trusted=trusted)
        shape = tuple(model.eval()(inputs if text else inputs.float()).shape)
    except Exception as error:  # the network may raise anything
        raise ExperimentError(f"model {settings.name}: {system_reason(error)}") from error
    wanted = (*inputs.shape, classes) if text else (len(inputs), classes)
    if shape != wanted:
        raise ExperimentError(
            f"model {settings.name}: its output is of shape {shape}, not {wanted}"
        )


class _Mean(torch.autograd.Function):
    """The mean over processes: of values in the forward pass, of gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _mean(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _mean(gradient)


def _mean(values: Tensor) -> Tensor:
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm in several processes as in one: with the statistics of the whole batch.

    Each process has an equal part of it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[N, C, H, W]`; in training, forward and backward are collective calls."""
        if not self.training:
            return super().forward(x)
        own_variance, own_mean = (
            each.double() for each in torch.var_mean(x, (0, 2, 3), correction=0)
        )
        mean, square = _Mean.apply(torch.stack([own_mean, own_variance + own_mean**2]))
        variance = (square - mean**2).clamp(min=0)
        with torch.no_grad():
            count = x.numel() // self.num_features * dist.get_world_size()
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(
                (variance * count / (count - 1)).to(self.running_var.dtype), self.momentum
            )
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt().to(x.dtype)
        return x * scale[:, None, None] + (self.bias - mean.to(x.dtype) * scale)[:, None, None]


def share_batch_norms(model: nn.Module) -> None:
    """Replace the BatchNorm layers of a model by those over all processes."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                made = SharedBatchNorm2d(
                    child.num_features, eps=child.eps, momentum=child.momentum
                ).to(child.weight)
                made.load_state_dict(child.state_dict())
                setattr(parent, name, made)
