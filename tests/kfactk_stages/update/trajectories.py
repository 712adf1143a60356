"""Run optimizers over the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kfactk.testing._support.trajectories import gradient as gradient

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def parameters(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in [(3, 2), (4,), ()]
    ]


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups; the second has its own learning rate and weight decay."""
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.003, "weight_decay": 0.2}]


def run(
    make: Make,
    *,
    steps: int = 12,
    lr_factors: Sequence[float] = (),
    dtype: torch.dtype = torch.float64,
) -> list[list[Tensor]]:
    """Parameters after every step; `lr_factors[k]` multiplies learning rates before step k."""
    params = parameters(dtype)
    optimizer = make(groups(params))
    history = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] *= lr_factors[step] if step < len(lr_factors) else 1.0
        for parameter in params:
            parameter.grad = gradient(parameter, step)
        optimizer.step()
        history.append([p.detach().clone() for p in params])
    return history


def assert_same(one: list[list[Tensor]], other: list[list[Tensor]], **tolerance: float) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        for x, y in zip(mine, theirs, strict=True):
            torch.testing.assert_close(x, y, **(tolerance or {"rtol": 0, "atol": 0}))
