"""Layers that only some examples reach have the curvature of the whole batch, however divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfactk.testing._support.ranks import shared_workers
from tests.kfactk.small import bound
from tests.training_loops.loops import F64, accumulate, assert_near, left

pytestmark = pytest.mark.xdist_group("ranks")


class Experts(nn.Module):
    """Two experts, each for the examples of one sign; one that has none is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.out = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 5)]), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 5)
        for expert, mine in zip(self.experts, (x[:, 0] > 0, x[:, 0] <= 0), strict=True):
            if bool(mine.any()):
                hidden = hidden.index_put((mine.nonzero()[:, 0],), torch.tanh(expert(x[mine])))
        out: Tensor = self.out(hidden)
        return out


def expert_run(rank: int, parts: int, ranks: int, recipe: dict[str, Any]) -> dict[str, Tensor]:
    """Take four steps; each half of a batch goes to another expert."""
    torch.manual_seed(6)
    model: nn.Module = Experts().double()
    called = DistributedDataParallel(model, find_unused_parameters=True) if ranks > 1 else model
    optimizer = bound(called, **recipe)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x, y = (
            torch.randn(8, 4, generator=generator, dtype=F64),
            torch.randint(3, (8,), generator=generator),
        )
        x[:, 0] = x[:, 0].abs() * torch.tensor([1.0] * 4 + [-1.0] * 4, dtype=F64)
        here = list(
            zip(x.chunk(ranks)[rank].chunk(parts), y.chunk(ranks)[rank].chunk(parts), strict=True)
        )
        accumulate(optimizer, called, here)
    return left(optimizer, model, decompositions=False)


@pytest.mark.parametrize("basis", ["ekfac", "kfac"])
@pytest.mark.parametrize(
    ("ranks", "parts", "fisher"),
    [(1, 2, "exact"), (1, 4, "exact"), (2, 1, "exact"), (2, 2, "exact"), (2, 1, "empirical")],
)
def test_experts_that_few_examples_reach_count_all_terms(
    ranks: int, parts: int, fisher: str, basis: str
) -> None:
    """An expert's factors are those of the whole batch, including examples that went elsewhere."""
    recipe = {
        "basis": basis,
        "fisher": fisher,
        "update": "sgd",
        "factor_every": 1,
        "scale_every": 2,
        "basis_every": 2,
    }
    truth = expert_run(0, 1, 1, recipe)
    found = shared_workers().run(ranks, expert_run, parts, ranks, recipe)
    assert_near({name: found[0][name] for name in truth}, truth)
