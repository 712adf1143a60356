"""Ranks that share a model by `fully_shard` do what one process does with the whole batch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import kfactk
from kfactk.testing._support.ranks import shared_workers
from tests.covering import covering
from tests.kfactk.sharded import (
    F64,
    WAYS,
    data,
    deviation,
    found,
    grid,
    line,
    net,
    parameters,
    part,
    train,
)

pytestmark = pytest.mark.xdist_group("ranks")

STEPS = 4
SCHEDULE: dict[str, Any] = {
    "factor_every": 1,
    "scale_every": 2,
    "basis_every": 3,
    "damping": 0.05,
    "lr": 0.05,
    "fisher": "exact",
}
GRADIENTS: dict[str, Any] = {
    "curvature": "gradient",
    "update": "sgd",
    "fisher": "mc",
    "damping": None,
    "lr": 0.01,
}
"""No Fisher pass, and no damping: `eps` stands for it, at a size that rounding does not reach."""
CASES: dict[str, dict[str, Any]] = {
    "EKFAC, KL clip, Adam": {
        "curvature": "conv_kfac",
        "basis": "ekfac",
        "clip": {"name": "kl", "limit": 1e-3},
        "update": "adam",
    },
    "sua, K-FAC, norm clip, momentum": {
        "curvature": {"name": "conv_kfac", "spatial": "sua"},
        "basis": "kfac",
        "clip": {"name": "norm", "limit": 0.1},
        "update": "momentum",
        "weight_decay": 0.1,
    },
    "reduce, running EKFAC, value clip, NAG": {
        "curvature": {"name": "conv_kfac", "spatial": "reduce"},
        "basis": {"name": "ekfac", "scale": "running"},
        "clip": {"name": "value", "limit": 0.02},
        "update": "nag",
    },
    "linear layers only, AdamW": {
        "curvature": "kfac",
        "basis": "ekfac",
        "clip": "none",
        "update": "adamw",
        "weight_decay": 0.1,
    },
    "decay at the gradient, trust region, RAdam, empirical": {
        "curvature": "conv_kfac",
        "basis": "kfac",
        "clip": {"name": "trust_region", "radius": 5e-4},
        "update": "radam",
        "weight_decay": 0.1,
        "weight_decay_at": "gradient",
        "fisher": "empirical",
    },
    "Shampoo": GRADIENTS | {"basis": {"name": "shampoo", "eps": 0.01}},
    "KL-Shampoo": GRADIENTS | {"basis": {"name": "kl", "eps": 0.01}, "first_moment": 0.9},
    "SOAP": GRADIENTS
    | {
        "curvature": {"name": "gradient", "counts": "next"},
        "basis": {"name": "soap", "eps": 0.1},
        "first_moment": 0.9,
    },
}


def alone(case: str) -> dict[str, Tensor]:
    model = net()
    optimizer = kfactk.build(**(SCHEDULE | CASES[case])).bind(model)
    for step in range(STEPS):
        train(optimizer, model, data(step))
    return found(optimizer, model)


LAYOUTS: dict[str, tuple[int, str, int, dict[str, Any]]] = {
    "1 nested": (1, "nested", 0, {}),
    "2 root only": (2, "root only", 0, {}),
    "3 nested, kept whole": (3, "nested", 0, {"reshard_after_forward": False}),
    "4 in part, resharded": (4, "in part", 0, {"reshard_after_forward": True}),
    "2 x 2 nested": (4, "nested", 2, {}),
    "2 x 2 root only, kept whole": (4, "root only", 2, {"reshard_after_forward": False}),
    "4 nested, resharded in pairs": (4, "nested", 0, {"reshard_after_forward": 2}),
}
"""Ranks, the way to divide, replicas, and options of `fully_shard`."""


def divided_run(
    rank: int, way: str, replicas: int, options: dict[str, Any], recipe: dict[str, Any]
) -> dict[str, Tensor]:
    model = net()
    WAYS[way](model, grid(replicas) if replicas else line(), **options)
    optimizer = kfactk.build(**(SCHEDULE | recipe)).bind(model)
    for step in range(STEPS):
        train(optimizer, model, part(step))
    return found(optimizer, model)


@covering(strength=1, layout=LAYOUTS, case=CASES)
def test_ranks_equal_one_process(layout: str, case: str) -> None:
    ranks, *divided = LAYOUTS[layout]
    truth = alone(case)
    for ours in shared_workers().run(ranks, divided_run, *divided, CASES[case]):
        assert deviation(ours, truth) < 1e-10


def placed(rank: int, names: list[str]) -> dict[str, dict[str, Tensor]]:
    results = {}
    for name in names:
        model = WAYS["in part"](net(), line())
        optimizer = kfactk.build(**(SCHEDULE | CASES["EKFAC, KL clip, Adam"]), placement=name).bind(
            model
        )
        for step in range(STEPS):
            train(optimizer, model, part(step))
        assert optimizer.placement.strategy == name
        results[name] = parameters(model)
        optimizer.close()
    return results


def test_placements_divide_the_curvature_of_a_divided_model() -> None:
    model = net()
    optimizer = kfactk.build(**(SCHEDULE | CASES["EKFAC, KL clip, Adam"])).bind(model)
    for step in range(STEPS):
        train(optimizer, model, data(step))
    truth = parameters(model)
    names = ["comm_opt", "mem_opt", "hybrid"]
    for ours in shared_workers().run(4, placed, names):
        for name in names:
            assert deviation(ours[name], truth) < 1e-10, name


class Projections(nn.Module):
    """Three square matrices side by side, whose rows two ranks share unevenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList([nn.ModuleDict({"qkv": nn.Linear(4, 12)})])
        self.head = nn.Linear(4, 3)
        self.to(F64)

    def forward(self, x: Tensor) -> Tensor:
        parts: Tensor = self.blocks[0]["qkv"](x)  # type: ignore[index]
        return self.head(torch.tanh(parts).unflatten(-1, (3, 4)).prod(-2))


def projected(rank: int, *, divided: bool) -> dict[str, Tensor]:
    model = Projections()
    if divided:
        fully_shard(model.blocks[0]["qkv"], mesh=line())  # type: ignore[index]
        fully_shard(model, mesh=line())
    muon, rest = kfactk.preset("transformer").curvature
    full = kfactk.block(muon.curvature, {"name": "muon", "precision": "full"}, muon.layers)
    optimizer = kfactk.preset("transformer", curvature=[full, rest]).bind(model)
    for step in range(STEPS):
        x, y = torch.linspace(-1, 1, 48, dtype=F64).sin().roll(step).view(12, 4), torch.arange(12)
        if divided:
            x, y = x[rank::2], y[rank::2]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y % 3).backward()
        optimizer.step()
    return parameters(model)


def test_a_preset_for_transformers_takes_projections_that_ranks_share() -> None:
    truth = projected(0, divided=False)
    for ours in shared_workers().run(2, functools.partial(projected, divided=True)):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


class Residual(nn.Module):
    """The residual of Poisson's equation, by derivatives that a jet carries."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.middle, self.last = nn.Linear(2, 6), nn.Linear(6, 5), nn.Linear(5, 1)
        self.to(F64)

    def forward(self, points: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(kfactk.jet(points)))
        u = self.last(torch.tanh(self.middle(hidden)))
        return u.laplacian + points.sum(-1, keepdim=True)


def jets(rank: int, *, way: str | None) -> dict[str, Tensor]:
    model = Residual()
    if way:
        WAYS[way](model, line())
    recipe: dict[str, Any] = {"curvature": "taylor", "basis": "ekfac", "update": "adam"}
    optimizer = kfactk.build(**(SCHEDULE | recipe), likelihood="gaussian").bind(model)
    for step in range(STEPS):
        points = torch.linspace(0, 7, 24, dtype=F64).sin().roll(step).view(12, 2)
        if way:
            points = points[rank::2]
        optimizer.zero_grad()
        (model(points).square().mean() / 2).backward()
        optimizer.step()
    return found(optimizer, model)


@pytest.mark.parametrize("way", ["root only", "nested"])
def test_jets_pass_through_layers_that_ranks_share(way: str) -> None:
    truth = jets(0, way=None)
    for ours in shared_workers().run(2, functools.partial(jets, way=way)):
        assert deviation(ours, truth) < 1e-10
