"""The running scale is measured when it is due, also where nothing else is: by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk

DECAY, EXAMPLES = 0.9, 8


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(EXAMPLES, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (EXAMPLES,), generator=generator)


def matrix(layer: Any) -> Tensor:
    return torch.cat([layer.weight.grad, layer.bias.grad.unsqueeze(1)], 1)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("scale_every", [1, 2])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_scale_follows_gradients_between_refreshes_of_factors(
    fisher: str, scale_every: int, parts: int
) -> None:
    """Factors are due at step 0 alone, and so is the basis: `s <- decay s + (1 - decay) M g^2`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = kfactk.build(
        curvature="kfac",
        basis={"name": "ekfac", "scale": "running", "scale_decay": DECAY},
        fisher=fisher,
        clip="none",
        update="sgd",
        lr=0.1,
        factor_every=100,
        scale_every=scale_every,
        basis_every=100,
    ).bind(model)
    sums, weights = {"0": torch.zeros(()), "2": torch.zeros(())}, 0.0
    for step in range(7):
        x, y = batch(step)
        optimizer.zero_grad()
        for own in range(parts):  # micro-batches
            rows = slice(own * EXAMPLES // parts, (own + 1) * EXAMPLES // parts)
            (F.cross_entropy(model(x[rows]), y[rows]) / parts).backward()
        gradients = {name: matrix(model[int(name)]).clone() for name in sums}
        optimizer.step()
        if step % scale_every:
            continue
        weights = DECAY * weights + 1 - DECAY
        for name, gradient in gradients.items():
            parts_of = optimizer.layers[name].decomposition
            left, right = (parts_of[side]["eigenvectors"] for side in ("G", "A"))
            square = EXAMPLES * (left.T @ gradient @ right).square()
            sums[name] = DECAY * sums[name] + (1 - DECAY) * square
            torch.testing.assert_close(
                optimizer.layers[name].scale["scale"], sums[name] / weights, rtol=1e-9, atol=1e-14
            )
