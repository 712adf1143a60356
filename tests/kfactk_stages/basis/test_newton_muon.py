"""Newton-Muon: the laws that are left; its step against dense algebra on the layers' inputs."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import kfactk
from kfactk import OptionError
from kfactk.testing import BasisLaws
from kfactk_stages.basis.muon import Muon
from kfactk_stages.basis.newton_muon import NewtonMuon

F64 = torch.float64
EXACT = {"name": "newton_muon", "steps": 0, "scale": "none"}


class TestNewtonMuon(BasisLaws):
    stage: ClassVar[Any] = {"name": "newton_muon", "precision": "full"}


class TestNewtonMuonRoot(BasisLaws):
    stage: ClassVar[Any] = {"name": "newton_muon", "precision": "full", "power": 0.5}


def recipe(curvature: Any = "conv_kfac", **basis: Any) -> kfactk.Recipe:
    periods = {"factor_every": 1, "basis_every": 1, "factor_decay": 0.0}
    return kfactk.build(curvature=curvature, basis=EXACT | basis, update="sgd", lr=1.0, **periods)


def truth(rows: Tensor, gradient: Tensor, power: float, ridge: float) -> Tensor:
    """The orthogonal factor of `V (A + r mean I)^-p`, by dense algebra.

    Args:
        rows: What the layer sees, `[..., d_in]`, the bias column included.
        gradient: V, `[d_out, d_in]`.
        power: p.
        ridge: r.
    """
    flat = rows.flatten(0, -2)
    a = flat.T @ flat / len(rows)
    values, vectors = torch.linalg.eigh(a + ridge * a.diagonal().mean() * torch.eye(len(a)).to(a))
    left, _, right = torch.linalg.svd(
        gradient @ vectors @ torch.diag(values**-power) @ vectors.T, full_matrices=False
    )
    return left @ right


def with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


def moved(layer: nn.Module, before: nn.Module) -> Tensor:
    """What a step of lr 1 took from weight and bias, as a matrix."""
    weight, bias = (getattr(before, n) - getattr(layer, n) for n in ("weight", "bias"))
    return torch.cat([weight.detach().flatten(1), bias.detach()[:, None]], 1)


def matrix(layer: Any) -> Tensor:
    return torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)


@pytest.mark.parametrize(("power", "ridge"), [(1.0, 0.01), (1.0, 3.0), (0.5, 0.1)])
def test_the_step_is_that_of_dense_algebra(power: float, ridge: float) -> None:
    """For linear layers on sequences and a strided convolution, with a loss of no likelihood."""
    model = nn.Sequential(
        nn.Conv1d(2, 5, 3, stride=2, padding=1), nn.Tanh(), nn.Linear(4, 6), nn.Tanh()
    ).to(F64)
    before = copy.deepcopy(model)
    optimizer = recipe(power=power, ridge=ridge).bind(model)
    x = torch.randn(7, 2, 8, dtype=F64)
    (model(x) ** 4).sum().backward()
    gradients = matrix(model[0]), matrix(model[2])
    optimizer.step()
    patches = nn.functional.pad(x, (1, 1)).unfold(2, 3, 2)  # [N, C, T, taps]
    rows = with_ones(patches.transpose(1, 2).flatten(2))
    found = truth(rows, gradients[0], power, ridge)
    torch.testing.assert_close(moved(model[0], before[0]), found)
    hidden = with_ones(before[:2](x).detach())
    torch.testing.assert_close(
        moved(model[2], before[2]), truth(hidden, gradients[1], power, ridge)
    )


@pytest.mark.parametrize("wide", ["blocks", "diagonal"])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_wide_sides_are_divided_by_what_stands_for_them(wide: str, power: float) -> None:
    model = nn.Sequential(nn.Linear(6, 3)).to(F64)
    before = copy.deepcopy(model)
    curvature = {"name": "kfac", "max_side": 4, "wide": wide}
    optimizer = recipe(curvature, power=power, ridge=0.1).bind(model)
    x = torch.randn(9, 6, dtype=F64)
    (model(x) ** 2).sum().backward()
    optimizer.step()
    rows = with_ones(x)
    a = rows.T @ rows / len(rows)
    kept = torch.diag(a.diagonal())
    if wide == "blocks":
        kept = torch.block_diag(a[:4, :4], a[4:, 4:])
    root = kept + 0.1 * a.diagonal().mean() * torch.eye(7, dtype=F64)
    values, vectors = torch.linalg.eigh(root)
    whitened = matrix(model[0]) @ vectors @ torch.diag(values**-power) @ vectors.T
    left, _, right = torch.linalg.svd(whitened, full_matrices=False)
    torch.testing.assert_close(moved(model[0], before[0]), left @ right)


def test_a_large_ridge_leaves_muon() -> None:
    v, a = torch.randn(4, 6, dtype=F64), torch.randn(6, 6, dtype=F64)
    stage = NewtonMuon(steps=0, ridge=1e9)
    context = kfactk.FactorContext(0.1, {"A": (a @ a.T).diagonal().mean()}, None)
    made = {"A": stage.decompose("A", a @ a.T, context)}
    found = stage.operator(made, {}, 0.1, {}).solve(v)
    torch.testing.assert_close(found, Muon(steps=0).operator({}, {}, 0.1, {}).solve(v))


@pytest.mark.parametrize("option", [{"power": 0.0}, {"power": 1.5}, {"ridge": 0.0}, {"steps": -1}])
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(option))}="):
        NewtonMuon(**option)
