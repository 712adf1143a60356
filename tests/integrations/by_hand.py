"""What frameworks are compared with: a model, data, and an ordinary loop written by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

import kfactk

EXAMPLES, BATCH = 40, 8
RECIPE: dict[str, Any] = {
    **{"curvature": "kfac", "basis": "ekfac", "update": "momentum", "lr": 0.02},
    **{"damping": 0.1, "factor_every": 2, "scale_every": 2, "basis_every": 4},
}
"""Periods that 5 batches an epoch are no multiple of, so that a count that is off by one shows."""


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def points(dtype: torch.dtype = torch.float32) -> TensorDataset:
    """The same data each time."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 6, dtype=torch.float64, generator=generator)
    return TensorDataset(x.to(dtype), x[:, :3].argmax(1))


def loader(
    batch: int = BATCH, dtype: torch.dtype = torch.float32
) -> DataLoader[tuple[Tensor, ...]]:
    """Batches in order."""
    return DataLoader(points(dtype), batch)


def bound(model: nn.Module, **options: Any) -> tuple[kfactk.Optimizer, ExponentialLR]:
    """An optimizer and its scheduler."""
    optimizer = kfactk.build(**{**RECIPE, **options}).bind(model)
    return optimizer, ExponentialLR(optimizer, 0.8)


def trained(
    *,
    epochs: int = 2,
    micro: int = 1,
    clip: float | None = None,
    half: bool = False,
    each: str = "epoch",
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, kfactk.Optimizer]:
    """The loop of torch's tutorials.

    Args:
        epochs: How many.
        micro: Batches whose gradients are accumulated before a step; fewer are left at the end of
            an epoch.
        clip: Bound on the norm of the gradients.
        half: Whether forwards run under autocast to bfloat16.
        each: What the scheduler counts: "epoch" or "step".
        dtype: Precision of the model.
    """
    model = network(dtype)
    optimizer, scheduler = bound(model, **({"fisher": "exact"} if dtype == torch.float64 else {}))
    for _ in range(epochs):
        batches = list(loader(dtype=dtype))
        for number, (x, y) in enumerate(batches, start=1):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                output = model(x)
            (F.cross_entropy(output.to(dtype), y) / micro).backward()
            if number % micro == 0 or number == len(batches):
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                if each == "step":
                    scheduler.step()
        if each == "epoch":
            scheduler.step()
    return model, optimizer


def same(
    found: tuple[nn.Module, kfactk.Optimizer],
    expected: tuple[nn.Module, kfactk.Optimizer],
    tolerance: float = 0.0,
) -> None:
    """Parameters, factors and scales are equal: bit for bit, or to a relative tolerance."""
    for mine, theirs in zip(numbers(*found), numbers(*expected), strict=True):
        if tolerance:
            torch.testing.assert_close(
                mine, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max())
            )
        else:
            assert torch.equal(mine, theirs)
    assert found[1].steps == expected[1].steps
    assert [group["lr"] for group in found[1].param_groups] == [
        group["lr"] for group in expected[1].param_groups
    ]


def numbers(model: nn.Module, optimizer: kfactk.Optimizer) -> list[Tensor]:
    """All that a run ends with, as plain tensors."""
    views = optimizer.layers.values()
    found = [
        *model.parameters(),
        *(each for view in views for each in (*view.factors.values(), *view.scale.values())),
    ]
    return [tensor.detach() for tensor in found]
