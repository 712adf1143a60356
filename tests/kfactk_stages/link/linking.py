"""What tests of links share: a recipe without its link, batches of a classifier, saved states."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfactk import Optimizer
from tests.kfactk.small import F64

TAU = 0.05
RECIPE: dict[str, Any] = {
    "curvature": "kfac",
    "basis": "kfac",
    "fisher": "exact",
    "clip": "none",
    "update": "sgd",
    "lr": 0.1,
    "damping": TAU,
    "factor_every": 1,
    "basis_every": 1,
    "factor_decay": 0.5,
}
Batch = tuple[Tensor, Tensor]


def batch(shape: tuple[int, ...], classes: int, n: int, seed: int = 0) -> Batch:
    """Draw inputs `[n, *shape]` and classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, *shape, generator=generator, dtype=F64)
    return inputs, torch.randint(classes, (n,), generator=generator)


def step(model: nn.Module, optimizer: Optimizer, data: Batch) -> None:
    """Take a step on one batch."""
    optimizer.zero_grad()
    F.cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()


def saved(optimizer: Optimizer) -> Any:
    """Return the state as a file gives it back."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
