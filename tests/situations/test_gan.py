"""A discriminator that is called in the generator's step too, in the ways that loops write it.

Truth is a loop in which the discriminator learns from the same batches and nobody else calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import Optimizer

STEPS = 5
GeneratorStep = Callable[[nn.Module, Optimizer, Tensor], None]


def discriminator() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def batches(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    real = torch.randn(8, 3, generator=generator, dtype=torch.float64) + 1
    return real, torch.randn(8, 3, generator=generator, dtype=torch.float64)


def loss(logits: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def frozen(model: nn.Module, optimizer: Optimizer, fake: Tensor) -> None:
    """As pix2pix and Lightning's toggle_optimizer: no parameter wants a gradient."""
    model.requires_grad_(False)
    loss(model(fake.clone().requires_grad_()), 1.0).backward()
    model.requires_grad_(True)


def cleared_by_the_model(model: nn.Module, optimizer: Optimizer, fake: Tensor) -> None:
    """As DCGAN's tutorial: gradients of the generator's step are thrown away."""
    loss(model(fake.clone().requires_grad_()), 1.0).backward()
    model.zero_grad()


def cleared_by_the_optimizer(model: nn.Module, optimizer: Optimizer, fake: Tensor) -> None:
    loss(model(fake.clone().requires_grad_()), 1.0).backward()
    optimizer.zero_grad()


def in_evaluation_mode(model: nn.Module, optimizer: Optimizer, fake: Tensor) -> None:
    model.eval()
    loss(model(fake.clone().requires_grad_()), 1.0).backward()
    model.train()
    optimizer.zero_grad()


def trained(generator_step: GeneratorStep | None, when: str, **recipe: Any) -> list[Tensor]:
    """Return the discriminator's parameters after some steps; `when` the generator's step comes."""
    model = discriminator()
    options = {"likelihood": "bernoulli", "lr": 0.05, "damping": 0.1, "update": "sgd", **recipe}
    every = {"factor_every": 2, "scale_every": 2, "basis_every": 2}
    optimizer = kfactk.build(curvature="kfac", **every, **options).bind(model)
    manual = recipe.get("observe") == "manual"
    for step in range(STEPS):
        real, fake = batches(step)
        if generator_step is not None and when == "before":
            generator_step(model, optimizer, 3 * fake)
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for x, target in ((real, 1.0), (fake, 0.0)):
            logits = model(x)
            if manual:
                optimizer.observe()
            total = total + loss(logits, target) / 2
        total.backward()
        optimizer.step()
        if generator_step is not None and when == "after":
            generator_step(model, optimizer, 3 * fake)
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("generator_step", "recipe"),
    [
        (frozen, {"fisher": "exact"}),
        (frozen, {"fisher": "empirical"}),
        (frozen, {"fisher": "exact", "basis": {"name": "ekfac", "scale": "running"}}),
        (in_evaluation_mode, {"fisher": "exact"}),
        (in_evaluation_mode, {"fisher": "empirical"}),
        (cleared_by_the_model, {"fisher": "empirical"}),
        (cleared_by_the_model, {"fisher": "exact", "observe": "manual"}),
        (cleared_by_the_optimizer, {"fisher": "empirical"}),
        (cleared_by_the_optimizer, {"fisher": "exact", "observe": "manual"}),
    ],
)
def test_the_generators_step_leaves_no_trace(
    generator_step: GeneratorStep, recipe: dict[str, Any], when: str
) -> None:
    expected = trained(None, when, **recipe)
    for one, other in zip(trained(generator_step, when, **recipe), expected, strict=True):
        torch.testing.assert_close(one, other)
