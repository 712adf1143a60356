"""What is trained in a race: a network, its mini-batches, and the settings that fit it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.settings import (
    ADAMW,
    BASELINE,
    FUSED,
    RECIPES,
    ROUNDED,
    Setting,
    network,
    ours,
    rivals,
)
from experiments.models import gpt, resnet50
from kfactk.recipe import PRESETS

TOKENS, LENGTH = 256, 128
OWN_PERIODS = {"factor_every": None, "scale_every": None, "basis_every": None}
"""Those that statistics of gradients have by default, in place of the thesis'."""
OF_TOKENS = {
    "curvature": "all",
    "likelihood": {"name": "categorical", "class_axis": -1},
    "clip": "none",
    "update": FUSED,
}
TRANSFORMER_RECIPES: dict[str, dict[str, Any]] = {
    "ekfac": {},
    "ekfac, staggered": {"stagger": True},
    "ekfac, staggered, a lag of 10": {"stagger": True, "lag": 10},
    "ekfac, staggered, bfloat16": {"stagger": True, "basis": ROUNDED},
    "kfac, staggered": {"stagger": True, "basis": "kfac"},
    "kfac by inverses, staggered": {
        "stagger": True,
        "basis": {"name": "kfac", "solver": "inverse"},
    },
    "ekfac, running": {
        "basis": {"name": "ekfac", "scale": "running"},
        "fisher": "empirical",
        "stagger": True,
    },
    "SOAP, every 10": {
        "curvature": {"name": "gradient", "counts": "next"},
        "basis": "soap",
        "update": "sgd",
        "first_moment": 0.95,
        "factor_every": 1,
        "scale_every": 1,
        "basis_every": 10,
        "lr": 0.003,
    },
    "the preset transformer": {**OWN_PERIODS, **PRESETS["transformer"]},
}
"""Settings of kfactk for transformers, besides `OF_TOKENS` and the periods."""


@attrs.frozen
class Task:
    """What is trained.

    Args:
        name: The network and an example, in words.
        model: Makes the network.
        shape: Shape of an example, in the form of `kfactk plan`: "3x32x32", "128:int64".
        classes: Number of classes, of each token where examples are tokens.
        baseline: Name of the setting that others are relative to.
        recipes: Settings of kfactk by name.
        common: What these settings share.
    """

    name: str
    model: Callable[[], nn.Module]
    shape: str
    classes: int
    baseline: str
    recipes: Mapping[str, Mapping[str, Any]]
    common: Mapping[str, Any]

    def network(self) -> nn.Module:
        """Return the network, always the same."""
        torch.manual_seed(0)
        return self.model()

    def batch(self, size: int, device: torch.device, number: int = 0) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of a mini-batch, the same for the same number."""
        torch.manual_seed(number)
        sides, _, kind = self.shape.partition(":")
        shape = (size, *map(int, sides.split("x")))
        if kind:
            tokens = torch.randint(self.classes, shape, device=device)
            return tokens, tokens.roll(-1, 1)
        return (
            torch.randn(shape, device=device),
            torch.randint(self.classes, (size,), device=device),
        )

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross entropy over examples, or over tokens."""
        return F.cross_entropy(output.flatten(0, -2), labels.flatten())

    def settings(self, only: str = "", named: Collection[str] | None = None) -> dict[str, Setting]:
        """Return the baseline, and other available settings, by name.

        Args:
            only: Their names contain this.
            named: Their names are among these, and come in this order; `None` for any.
        """
        mine = {name: ours({**self.common, **each}, name) for name, each in self.recipes.items()}
        every = rivals(named) | mine
        order = every if named is None else (self.baseline, *named)
        return {
            name: every[name]
            for name in order
            if name in every and (name == self.baseline or only in name)
        }


def resnet8(width: int) -> Task:
    """Return a ResNet-8 with so many channels in its first stage, on images of 32 x 32."""
    return Task(
        name=f"ResNet-8, {width} channels, images of 32 x 32",
        model=lambda: network(width),
        shape="3x32x32",
        classes=10,
        baseline=BASELINE,
        recipes=RECIPES,
        common={},
    )


def transformer(width: int, depth: int = 4) -> Task:
    """Return a GPT of so many blocks and this width, on sequences of bytes."""
    return Task(
        name=f"GPT of {depth} blocks, width {width}, {LENGTH} tokens",
        model=lambda: gpt(
            channels=LENGTH, classes=TOKENS, width=width, depth=depth, heads=max(1, width // 64)
        ),
        shape=f"{LENGTH}:int64",
        classes=TOKENS,
        baseline=ADAMW,
        recipes=TRANSFORMER_RECIPES,
        common=OF_TOKENS,
    )


def gpt2(width: int) -> Task:
    """Return a GPT-2 small of this width (768 is its own): 12 blocks, 1,024 of 50,257 tokens."""
    task = transformer(width, depth=12)
    model = partial(gpt, channels=1024, classes=50_257, width=width, depth=12, heads=width // 64)
    return attrs.evolve(
        task,
        name=f"GPT-2 of 12 blocks, width {width}, 1,024 tokens",
        model=model,
        shape="1024:int64",
        classes=50_257,
        common={**OF_TOKENS, "exclude": ["head"]},
    )


def large_resnet(size: int) -> Task:
    """Return the ResNet-50 of the thesis, on images of this size (32 is its own)."""
    name = f"ResNet-50, images of {size} x {size}"
    return attrs.evolve(resnet8(1), name=name, model=resnet50, shape=f"3x{size}x{size}")


def imagenet(size: int) -> Task:
    """Return the ResNet-50 of torchvision for 1,000 classes, on images of this size (224)."""
    from torchvision.models import resnet50

    name = f"ResNet-50 of torchvision, images of {size} x {size}"
    shape = f"3x{size}x{size}"
    return attrs.evolve(resnet8(1), name=name, model=resnet50, shape=shape, classes=1000)


TASKS: dict[str, Callable[[int], Task]] = {
    "resnet8": resnet8,
    "resnet50": large_resnet,
    "imagenet": imagenet,
    "gpt": transformer,
    "gpt2": gpt2,
}
"""Makers of tasks of a width, by name."""
