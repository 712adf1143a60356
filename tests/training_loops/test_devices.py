"""Training on a device equals training on a CPU: parameters and factors, in float64.

Without a GPU the same code runs on the CPU. Its eigensolver then differs from that of the truth in
what another device may do otherwise: signs, rounding, and the eigenvectors of equal eigenvalues.
So do the numbers that a Fisher pass draws. Cases with neither are then the same run twice. No case
depends on what is drawn: those with BatchNorm take the gradient of the loss.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from experiments.models import gpt, lstm
from kfactk.recipe import PRESETS
from tests.kfactk import ordinary

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STEPS, CLASSES, LENGTH = 8, 7, 5
GENERATOR = torch.Generator
ROOTS = 1e-8
"""How near roots of factors can be that are singular, since they come from few gradients."""


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def rows(step: int) -> tuple[Tensor, Tensor]:
    generator = GENERATOR().manual_seed(step)
    return torch.randn(12, 5, generator=generator), torch.arange(12) % 3


def images(step: int) -> tuple[Tensor, Tensor]:
    generator = GENERATOR().manual_seed(step)
    return torch.randn(6, 2, 4, 4, generator=generator), torch.arange(6) % 3


def transformer() -> nn.Module:
    return gpt(channels=LENGTH, classes=CLASSES, width=8, depth=2, heads=2)


def recurrent() -> nn.Module:
    return lstm(channels=LENGTH, classes=CLASSES, width=6)


def text(step: int) -> tuple[Tensor, Tensor]:
    generator = GENERATOR().manual_seed(step)
    tokens = torch.randint(CLASSES, (4, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


@attrs.frozen
class Case:
    """A small model, its data, how it is trained, and how near devices must be.

    Args:
        near: The largest difference, relative to the largest entry of a tensor.
    """

    model: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    recipe: dict[str, Any]
    near: float = 1e-9


def preset_in_full_precision() -> dict[str, Any]:
    """Return the preset transformer; products in bfloat16 are rounded otherwise elsewhere."""
    recipe = copy.deepcopy(dict(PRESETS["transformer"]))
    recipe["curvature"][0]["basis"]["precision"] = "full"
    return recipe


RULE = {"update": "momentum", "lr": 0.05}
SAMPLED = {"fisher": "exact", "damping": 0.05, "factor_every": 1, "basis_every": 4}
KFAC = {**RULE, **SAMPLED, "curvature": "kfac", "basis": "kfac"}
EIGH = {"name": "kfac", "solver": "eigh"}
EKFAC = {**KFAC, "curvature": "all", "basis": "ekfac", "scale_every": 2}
OF_LOSS = {**EKFAC, "fisher": "empirical"}
GRADIENT = {"curvature": "gradient", "update": "sgd", "first_moment": 0.9, "lr": 0.05}
OF_TEXT = {"curvature": "all", "likelihood": {"name": "categorical", "class_axis": -1}}
STATIONARY = {"name": "conv_kfac", "spatial": "stationary"}
TAPS = {"name": "ekfac", "inputs": "channels+taps"}
CONTROL = {"name": "quadratic", "model_damping": 1.0, "adapt_every": 2}
CASES = {
    "linear, ekfac": Case(perceptron, rows, EKFAC),
    "linear, inverse": Case(perceptron, rows, KFAC),
    "linear, eigh, kl": Case(perceptron, rows, {**KFAC, "basis": EIGH, "clip": "kl"}),
    "convolution": Case(ordinary.net, images, OF_LOSS),
    "convolution, staggered": Case(ordinary.net, images, {**OF_LOSS, "stagger": True}),
    "convolution, stationary": Case(
        ordinary.net, images, {**OF_LOSS, "curvature": STATIONARY, "basis": TAPS}
    ),
    "transformer": Case(transformer, text, {**EKFAC, **OF_TEXT}),
    "recurrent": Case(recurrent, text, {**KFAC, **OF_TEXT}),
    "preset transformer": Case(transformer, text, preset_in_full_precision()),
    "soap": Case(perceptron, rows, {**GRADIENT, "basis": "soap"}, ROOTS),
    "shampoo": Case(perceptron, rows, {**GRADIENT, "basis": "shampoo"}, ROOTS),
    "lag": Case(perceptron, rows, {**EKFAC, "lag": 2}),
    "lag, staggered": Case(ordinary.net, images, {**OF_LOSS, "lag": 1, "stagger": True}),
    "two_level": Case(perceptron, rows, {**KFAC, "link": "two_level"}),
    "block_tridiagonal": Case(perceptron, rows, {**KFAC, "link": "block_tridiagonal"}),
    "quadratic": Case(
        perceptron,
        rows,
        {
            **SAMPLED,
            "curvature": "kfac",
            "basis": EIGH,
            "update": "velocity",
            "controller": CONTROL,
        },
    ),
}


def trained(case: Case, device: str) -> tuple[dict[str, Tensor], list[float]]:
    """Return parameters and factors by name, and the losses, after a few steps on a device."""
    torch.manual_seed(0)
    model = case.model().double().to(device)
    optimizer = kfactk.build(**case.recipe).bind(model)
    losses = []
    for step in range(STEPS):
        x, y = (part.to(device) for part in case.data(step))
        if x.is_floating_point():
            x = x.double()

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for layer, view in optimizer.layers.items():
        for name, matrix in view.block.matrices().items():
            found[f"factor {name} of {layer}"] = matrix
    return {name: value.cpu() for name, value in found.items()}, losses


class Others(torch.Generator):
    """Draws other numbers for the same seed, as each kind of device does."""

    def manual_seed(self, seed: int) -> torch.Generator:
        return super().manual_seed(seed + 1)


@pytest.fixture
def as_elsewhere() -> Iterator[Callable[[], None]]:
    """Let a function replace the eigensolver by an equally good one, and what is drawn."""
    usual, patch = torch.linalg.eigh, pytest.MonkeyPatch()

    def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = usual(matrix.flip(-2, -1))
        return values, -vectors.flip(-2)

    def replace() -> None:
        patch.setattr(torch.linalg, "eigh", eigh)
        patch.setattr(torch, "Generator", Others)

    yield replace
    patch.undo()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_a_device_trains_as_a_cpu(name: str, device: str, as_elsewhere: Callable[[], None]) -> None:
    case = CASES[name]
    truth, losses = trained(case, "cpu")
    if device == "cpu":
        as_elsewhere()
    found, seen = trained(case, device)
    assert set(found) == set(truth)
    far = {
        key: float((found[key] - value).abs().max() / value.abs().max())
        for key, value in truth.items()
    }
    assert {key: distance for key, distance in far.items() if not distance <= case.near} == {}
    assert seen == pytest.approx(losses, rel=case.near)
    assert any(key.startswith("factor") for key in truth) or "preset" in name
    assert all(one != other for one, other in itertools.pairwise(losses))
