"""Wide sides on two ranks, each matrix on a rank of its own; truth is one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk.testing._support.ranks import shared_workers
from tests.kfactk.small import F64

pytestmark = pytest.mark.xdist_group("ranks")
RECIPES: dict[str, dict[str, Any]] = {
    f"{basis} {wide}": {"curvature": {"name": "kfac", "max_side": 4, "wide": wide}, "basis": basis}
    for basis in ("kfac", "ekfac")
    for wide in ("diagonal", "blocks", "identity")
}


def trained(rank: int, placement: str) -> dict[str, tuple[list[Tensor], set[str], set[str]]]:
    """Return parameters after training, and what this rank keeps and decomposes, by recipe."""
    found = {}
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for name, recipe in RECIPES.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 9)).double()
        optimizer = kfactk.build(
            **recipe,
            fisher="exact",
            update="sgd",
            lr=0.1,
            clip="none",
            damping=0.02,
            factor_every=1,
            scale_every=1,
            basis_every=2,
            placement=placement,
        ).bind(model)
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(8, 6, generator=generator, dtype=F64)[rank::ranks]
            y = torch.randint(9, (8,), generator=generator)[rank::ranks]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for parameter in model.parameters() if ranks > 1 else ():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks
            optimizer.step()
        blocks = optimizer._preconditioner.blocks.current()
        shapes = {tuple(t.shape) for b in blocks for t in b.state.factor_values().values()}
        assert all(side <= 4 for shape in shapes for side in shape[1:])
        parameters = [parameter.detach().clone() for parameter in model.parameters()]
        kept = {f"{b.name}.{each}" for b in blocks for each in b.state.factors}
        found[name] = parameters, kept, {f"{b.name}.{e}" for b in blocks for e in b.requires}
    return found


@functools.cache
def truth() -> dict[str, Any]:
    return trained(0, "replicated")


@pytest.mark.parametrize("placement", ["replicated", "comm_opt", "mem_opt"])
def test_two_ranks_do_what_one_process_does(placement: str) -> None:
    found = shared_workers().run(2, trained, placement)
    for name, (expected, _, names) in truth().items():
        for parameters, _, _ in (each[name] for each in found):
            for mine, one in zip(parameters, expected, strict=True):
                torch.testing.assert_close(mine, one, rtol=1e-11, atol=1e-13, msg=name)
        one, other = (each[name][1] for each in found)
        assert one | other == names
        if placement != "replicated":
            assert not one & other
        if name.endswith("blocks"):
            assert {"0.A0", "0.A1", "2.G0", "2.G1", "2.G2"} <= names
