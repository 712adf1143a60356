"""Flattened tokens are measured by example, as where nothing was flattened; else the user is told.

Truth is per-example autograd in float64 and dense algebra: the step is `-(F + damping I)^-1 g`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk.capture import row_orders

N, T, D, C, DAMPING = 4, 3, 4, 3, 0.02
WAYS = ("whole", "inside", "output", "sequence first")


class Tokens(nn.Module):
    """A model of sequences that mixes positions, and may flatten tokens in one of `WAYS`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.table = way, nn.Embedding(7, D)
        self.mix, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.up, self.down, self.head = nn.Linear(D, 5), nn.Linear(5, D), nn.Linear(D, C)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.table(x)
        hidden = hidden + torch.tanh(self.mix(hidden)).cumsum(1)
        given = self.flat(hidden)
        found = self.down(torch.tanh(self.up(self.norm(given))))
        logits: Tensor = self.head(torch.tanh(given + found))
        if self.way == "sequence first":
            return logits.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1).contiguous()
        return logits.view(*x.shape, C) if self.way == "inside" else logits

    def flat(self, hidden: Tensor) -> Tensor:
        if self.way == "whole":
            return hidden
        return (hidden.transpose(0, 1) if self.way == "sequence first" else hidden).reshape(-1, D)


def data(examples: int = N, length: int = T, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = examples, length
    return torch.randint(7, shape, generator=generator), torch.randint(
        C, shape, generator=generator
    )


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, C), y.reshape(-1))


def trained(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], **recipe: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """Return how far each parameter moves in steps, and what was told."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {"update": "sgd", "lr": 1.0, "clip": "none", "damping": DAMPING, **recipe}
    settings.setdefault("likelihood", {"name": "categorical", "class_axis": -1})
    optimizer = kfactk.build(factor_every=1, scale_every=1, basis_every=1, **settings).bind(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in batches:
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()
    optimizer.close()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return moved, [str(each.message) for each in caught]


def deviation(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[n] - other[n]).norm() / other[n].norm()) for n in other)


def scores(model: Tokens, names: Sequence[str], x: Tensor, y: Tensor, fisher: str) -> list[Tensor]:
    """Return for each example the gradients `[k, P]` whose outer products make M F."""
    parameters, found = [model.get_parameter(name) for name in names], []
    for n in range(len(x)):
        logits = model(x[n : n + 1]).reshape(-1, C)
        if fisher == "empirical":
            columns = [F.cross_entropy(logits, y[n], reduction="sum")]
        else:
            p = logits.detach().softmax(-1)
            root = p.sqrt().diag_embed() - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)
            columns = [logits[s] @ root[s, :, c] for s in range(len(logits)) for c in range(C)]
        rows = [torch.autograd.grad(each, parameters, retain_graph=True) for each in columns]
        found.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    return found


def expected(
    model: Tokens, names: Sequence[str], x: Tensor, y: Tensor, fisher: str, kept: Tensor
) -> dict[str, Tensor]:
    """Return the step of the block of these parameters, F kept where `kept` says so."""
    parameters = {name: model.get_parameter(name) for name in names}
    d = torch.cat(scores(model, names, x, y, fisher))
    dense = (d.T @ d / x.numel()) * kept
    plain = torch.autograd.grad(loss_of(model(x), y), list(parameters.values()))
    gradient = torch.cat([each.flatten() for each in plain])
    step = -torch.linalg.solve(dense + DAMPING * torch.eye(len(dense)).double(), gradient)
    parts = step.split([each.numel() for each in parameters.values()])
    return {
        name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)
    }


BLOCKS: dict[str, tuple[dict[str, Any], Callable[[], Tensor]]] = {
    "up": (
        {"curvature": "rows", "basis": {"name": "cg", "tolerance": 1e-12, "iterations": 200}},
        lambda: torch.ones(5 * D + 5, 5 * D + 5).double(),
    ),
    "norm": (
        {"curvature": "norm", "basis": "unitwise"},
        lambda: torch.eye(D).repeat(2, 2).double(),
    ),
}


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("layer", BLOCKS)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_that_of_the_fisher_of_examples(way: str, layer: str, fisher: str) -> None:
    model, (x, y) = Tokens(way), data()
    stages, kept = BLOCKS[layer]
    names = [f"{layer}.weight", f"{layer}.bias"]
    truth = expected(model, names, x, y, fisher, kept())
    moved, told = trained(model, [(x, y)], fisher=fisher, **stages)
    assert told == []
    assert deviation({name: moved[name] for name in names}, truth) < 1e-9


RECIPES: dict[str, dict[str, Any]] = {
    "ekfac": {"curvature": "all", "basis": "ekfac"},
    "running": {"curvature": "all", "basis": {"name": "ekfac", "scale": "running"}},
    "reduce": {"curvature": {"name": "kfac", "spatial": "reduce"}, "basis": "kfac"},
    "sud": {"curvature": "kfac", "basis": "kfac"},
    "rows": {"curvature": "rows", "basis": "cg"},
    "link": {"curvature": "kfac", "basis": "kfac", "link": "two_level"},
}


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("way", WAYS[1:])
def test_steps_are_those_of_the_model_that_flattens_nothing(
    way: str, recipe: str, fisher: str
) -> None:
    batches = [data(seed=1), data(3, 5, seed=2), data(1, 4, seed=3)]
    settings = {**RECIPES[recipe], "fisher": fisher, "lr": 0.1}
    truth, _ = trained(Tokens("whole"), batches, **settings)
    moved, told = trained(Tokens(way), batches, **settings)
    assert told == []
    assert deviation(moved, truth) < 1e-7


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**RECIPES["ekfac"], "fisher": "mc"}
    truth, _ = trained(Tokens("whole"), [data()], **settings)
    monkeypatch.setattr(row_orders.RowOrders, "unfolded", lambda self, layer, calls, rows: calls)
    moved, _ = trained(Tokens("inside"), [data()], **settings)
    assert deviation(moved, truth) > 0.05
