"""Statistics of gradients on several ranks: nothing is summed; truth is one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kfactk
from kfactk import Optimizer
from kfactk.testing._support.ranks import shared_workers
from tests.kfactk.preconditioner.test_preconditioner_ranks import batch, len_ranks, step
from tests.kfactk.small import F64

pytestmark = pytest.mark.xdist_group("ranks")
MIX = [
    kfactk.block("gradient", basis="muon", layers=["2"]),
    kfactk.block("conv_kfac", basis="kfac", layers=["0"]),
    kfactk.block("gradient", basis={"name": "soap", "eps": 1e-3}),
]
RECIPES: dict[str, dict[str, Any]] = {
    "soap": {"curvature": "gradient", "basis": {"name": "soap", "eps": 1e-3}},
    "next": {
        "curvature": {"name": "gradient", "counts": "next"},
        "basis": {"name": "soap", "eps": 1e-3},
    },
    "shampoo": {"curvature": "gradient", "basis": "shampoo"},
    "muon": {"curvature": "gradient", "basis": "muon"},
    "mix": {"curvature": MIX},
}
STEPS = 6


def bound(model: nn.Module, name: str, placement: Any) -> Optimizer:
    return kfactk.build(
        **RECIPES[name],
        update="sgd",
        fisher="exact",
        lr=0.02,
        first_moment={"decay": 0.9, "corrected": False, "nesterov": True},
        factor_every=1,
        scale_every=1,
        basis_every=2,
        placement=placement,
    ).bind(model)


def trained(rank: int, name: str, placement: Any, then: Any) -> tuple[list[Any], dict[str, float]]:
    """Train, save in the middle, and go on under another placement."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model.to(F64)
    optimizer = bound(model, name, placement)
    for number in range(STEPS // 2):
        step(model, optimizer, number)
    optimizer.consolidate_state_dict(to=None)
    state, moved = optimizer.state_dict(), optimizer.moved_bytes
    optimizer.close()
    resumed = bound(model, name, then)
    resumed.load_state_dict(state)
    for number in range(STEPS // 2, STEPS):
        step(model, resumed, number)
    return [parameter.detach().clone() for parameter in model.parameters()], moved


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("placement", "then"),
    [("comm_opt", "replicated"), ("mem_opt", "comm_opt")],
)
def test_gradients_on_two_ranks_equal_one_process(name: str, placement: str, then: str) -> None:
    expected, _ = trained(0, name, "replicated", "replicated")
    answers = shared_workers().run(2, trained, name, placement, then)
    for found, moved in answers:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
        if name != "mix":
            assert not moved.get("sums")
            assert not moved.get("moments")
    assert all(map(torch.equal, answers[0][0], answers[1][0]))


def sharded(rank: int) -> list[Any]:
    """Train a model whose parameters are divided among ranks, whole where there is one."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(F64)
    if len_ranks() > 1:
        fully_shard(model)
    optimizer = bound(model, "soap", "replicated")
    for number in range(4):
        x, y = batch(number)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rank :: len_ranks()]), y[rank :: len_ranks()])
        loss.backward()
        optimizer.step()
    found = [parameter.detach() for parameter in model.parameters()]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for p in found]


def test_gradients_of_divided_parameters_are_made_whole() -> None:
    expected = sharded(0)
    for found in shared_workers().run(2, sharded):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def wrapped(rank: int) -> list[Any]:
    """Train behind DistributedDataParallel, on this rank's part of each batch."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(F64)
    network = DistributedDataParallel(model) if len_ranks() > 1 else model
    optimizer = bound(network, "shampoo", "mem_opt")
    for number in range(4):
        x, y = batch(number)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x[rank :: len_ranks()]), y[rank :: len_ranks()])
        loss.backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_gradients_that_ddp_has_averaged_are_measured() -> None:
    expected = wrapped(0)
    for found in shared_workers().run(2, wrapped):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
