"""The networks: a small residual network for digits, ResNet-8 and ResNet-50 for CIFAR-10."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


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


def resnet50_for_cifar(classes: int) -> nn.Module:
    """Return torchvision's ResNet-50 with a stem for 32x32 images: stride 1, and no max-pooling."""
    from torchvision.models import resnet50

    model = resnet50(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def make(name: str, *, channels: int, classes: int, seed: int) -> nn.Module:
    """Make a network; `seed` draws its initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "digits_resnet":
            return ResNet(channels, (16, 32), classes)
        if name == "resnet8":
            return ResNet(channels, (16, 32, 64), classes)
        if name == "resnet50":
            return resnet50_for_cifar(classes)
    raise ValueError(f"unknown model {name!r}")
