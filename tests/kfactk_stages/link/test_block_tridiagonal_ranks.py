"""The block-tridiagonal link on several ranks."""

from __future__ import annotations

import warnings
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

import kfactk
from kfactk.testing._support.division import equal_on_ranks
from kfactk.testing._support.ranks import RankError, shared_workers
from kfactk.testing._support.training import Training
from kfactk_stages.link.block_tridiagonal import BlockTridiagonal
from tests.kfactk_stages.link.linking import step
from tests.kfactk_stages.link.tridiagonal import (
    RECIPE,
    data,
    net,
)


def bind_on_ranks(rank: int, placement: Any) -> bool:
    optimizer = kfactk.build(**{**RECIPE, "placement": placement}).bind(net(2, True)[0])
    return all(row.linked for row in optimizer.coverage())


@pytest.mark.xdist_group("ranks")
def test_every_rank_must_keep_the_matrices() -> None:
    assert shared_workers().run(2, bind_on_ranks, "replicated") == [True, True]
    for placement, what in (
        ("comm_opt", r"reads A and G of layer '0'.* 'comm_opt' keeps them on some ranks alone"),
        ("mem_opt", r"'mem_opt' has layer '0' on some ranks alone"),
    ):
        with pytest.raises(RankError, match=rf"{what}.*replicated"):
            shared_workers().run(2, bind_on_ranks, placement)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    "recipe",
    [
        {"fisher": "exact"},
        {"fisher": "empirical", "first_moment": 0.9},
        {
            "curvature": {"name": "conv_kfac", "spatial": "reduce"},
            "clip": {"name": "norm", "limit": 0.1},
        },
    ],
    ids=["exact", "empirical", "reduce"],
)
def test_two_ranks_do_what_one_process_does(recipe: dict[str, Any]) -> None:
    options = {"link": "block_tridiagonal", "basis": "kfac", "update": torch.optim.SGD, "lr": 0.05}
    equal_on_ranks(Training(), {**options, "damping": 0.01, **recipe})


class Uneven(BlockTridiagonal):
    """Makes something else on rank 1, as another processor may, or nothing on rank 0."""

    def prepare(self, layers: Any, statistics: Any) -> Any:
        found = super().prepare(layers, statistics)
        rank = torch.distributed.get_rank()
        if rank == 0 and not self.layers:
            raise kfactk.DecompositionError("rank 0 alone")
        if rank == 1 and self.layers == ("2", "0"):
            raise ValueError("rank 1 alone")
        return attrs.evolve(found, tensors={n: t * (1 + rank) for n, t in found.tensors.items()})


def prepared_on_ranks(rank: int, layers: Any) -> Tensor:
    model = net(2, True)[0]
    optimizer = kfactk.build(**{**RECIPE, "link": Uneven(layers)}).bind(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(model, optimizer, data())
    found: Tensor = optimizer.state[model[0].weight]["kfactk.prepared.weights.0"]
    return found.clone()


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(("layers", "factor"), [(["0", "2"], 1.0), (None, 2.0)])
def test_ranks_go_on_with_the_same_bits(layers: Any, factor: float) -> None:
    one, two = shared_workers().run(2, prepared_on_ranks, layers)
    assert torch.equal(one, two)
    model = net(2, True)[0]
    optimizer = kfactk.build(**RECIPE).bind(model)
    step(model, optimizer, data())
    alone = optimizer.state[model[0].weight]["kfactk.prepared.weights.0"]
    torch.testing.assert_close(one, factor * alone)


@pytest.mark.xdist_group("ranks")
def test_a_rank_that_fails_stops_all() -> None:
    says = "rank 1 alone"
    with pytest.raises(RankError, match=says):
        shared_workers().run(2, prepared_on_ranks, ["2", "0"])
