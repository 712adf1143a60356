"""Numbers of any size, and data without information: training goes on, or says why it does not.

Each case draws a model, a precision, a recipe, and sizes of weights, inputs and losses, up to the
ends of float32. What must hold after each step: parameters that were finite are finite, and a batch
that was not used was counted. No error comes but those of kfactk.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk.testing import effort

CLASSES, STEPS = 4, 4
MODELS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)),
        (6,),
    ),
    "batch_norm": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)),
        (6,),
    ),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(100, CLASSES)
        ),
        (2, 5, 5),
    ),
    "groups": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, CLASSES)
        ),
        (4, 5, 5),
    ),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, CLASSES)),
        (5, 6),
    ),
}
PRECISIONS = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
CHOICES: dict[str, list[Any]] = {
    "curvature": ["conv_kfac", "all"],
    "basis": [
        "kfac",
        "ekfac",
        {"name": "ekfac", "scale": "running"},
        {"name": "ekfac", "iterate_from": 2},
        {"name": "ekfac", "products": "bfloat16"},
    ],
    "update": ["sgd", "momentum", "nag", "adam", "adamw", "radam"],
    "fisher": ["mc", "exact", "empirical"],
    "clip": ["none", "kl", "norm", {"name": "value", "limit": 1.0}],
    "lr": [1e-6, 1e-3, 0.1, 1.0],
    "damping": [0.0, 1e-38, 1e-20, 1e-8, 1e-3, 1.0, 1e3, 1e20, 1e30],
    "factor_every": [1, 2],
    "scale_every": [1, 2],
    "basis_every": [1, 2, 3],
    "stagger": [False, True],
    "weight_decay": [0.0, 1e-4, 0.1],
    "weight_decay_at": ["update", "gradient"],
    "factor_decay": [0.0, 0.5, 0.95, 1.0],
}
SIZES = {
    "weights": [0, 0, -6, -3, 3, 6],
    "inputs": [0, 0, -37, -20, -10, -4, 4, 10, 18, 37],
    "loss": [0, 0, -20, -8, 8, 20],
}
"""Powers of ten."""


@attrs.frozen
class Case:
    """One drawn case."""

    model: str
    precision: torch.dtype
    examples: int
    data: str
    likelihood: str
    sizes: dict[str, float]
    recipe: dict[str, Any]


def drawn(seed: int) -> Case:
    draw = random.Random(seed)
    model, precision = draw.choice(list(MODELS)), draw.choice(PRECISIONS)
    likelihood = draw.choice(["categorical", "bernoulli", "gaussian"])
    recipe = {name: draw.choice(values) for name, values in CHOICES.items()}
    if model == "sequence":
        recipe["likelihood"] = {"name": likelihood, "class_axis": -1}
    else:
        recipe["likelihood"] = likelihood
    if precision == torch.float16 and recipe["update"] in ("adam", "adamw", "radam"):
        # the usual eps is zero in float16, and 0 / 0 spoils entries without a gradient
        recipe["update"] = {"name": recipe["update"], "eps": 1e-3}
    return Case(
        model,
        precision,
        draw.choice([2, 3, 8, 17] if model == "batch_norm" else [1, 2, 3, 8, 17]),
        draw.choice(["random"] * 4 + ["equal", "zero", "one huge", "NaN", "inf", "no loss"]),
        likelihood,
        {name: 10.0 ** draw.choice(powers) for name, powers in SIZES.items()},
        recipe,
    )


def inputs(case: Case, step: int, generator: torch.Generator) -> Tensor:
    shape = (case.examples, *MODELS[case.model][1])
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if case.data == "equal":
        x = x[:1].expand(shape).clone()
    if case.data == "zero":
        x.zero_()
    if case.data == "one huge":
        x[0] *= 1e6
    x = (x * case.sizes["inputs"]).to(case.precision)
    if case.data in ("NaN", "inf") and step == 1:
        x.view(-1)[0] = float(case.data)
    return x


def loss(case: Case, output: Tensor, generator: torch.Generator) -> Tensor:
    rows = output.reshape(-1, CLASSES)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    drawn = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
    if case.likelihood == "categorical":
        found = F.cross_entropy(rows, drawn.argmax(-1))
    elif case.likelihood == "bernoulli":
        found = F.binary_cross_entropy_with_logits(rows, drawn.gt(0).to(rows))
    else:
        found = (rows - drawn).square().sum(1).mean() / 2
    return found * (0.0 if case.data == "no loss" else case.sizes["loss"])


def finite(model: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore::kfactk.KfactkWarning")
@pytest.mark.parametrize("seed", range(effort(40)))
def test_numbers_of_any_size_lose_no_parameter(seed: int) -> None:
    case = drawn(seed)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = MODELS[case.model][0]().to(case.precision)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(case.sizes["weights"])
    optimizer = kfactk.build(**case.recipe).bind(model)
    for step in range(STEPS):
        skipped, started = optimizer.counters["skipped_batches"], finite(model)
        optimizer.zero_grad()
        loss(case, model(inputs(case, step, generator)), generator).backward()
        sound = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        optimizer.step()
        assert finite(model) or not started
        assert sound or optimizer.counters["skipped_batches"] == skipped + 1
