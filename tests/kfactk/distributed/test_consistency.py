"""Bind refuses different recipes on ranks, and curvature shared by more ranks than gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import kfactk
from kfactk.testing._support.ranks import Workers, shared_workers

pytestmark = pytest.mark.xdist_group("ranks")

DIFFERENT: list[tuple[str, Any, Any]] = [
    ("basis_every", 10, 20),
    ("factor_every", 5, 10),
    ("basis", "kfac", "ekfac"),
    ("basis", {"name": "ekfac", "scale": "running"}, "ekfac"),
    ("damping", 0.1, 0.01),
    ("factor_decay", 0.9, 0.95),
    ("update", "sgd", "adam"),
    ("lr", 0.1, 0.2),
    ("exclude", ["0"], []),
    ("placement", "mem_opt", "comm_opt"),
    ("placement", {"name": "mem_opt", "wire_dtype": "bfloat16"}, "mem_opt"),
]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def bind_message(rank: int, field: str, one: Any, other: Any) -> str:
    try:
        kfactk.build(**{field: other if rank == 1 else one}).bind(net())
    except kfactk.KfactkError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(("field", "one", "other"), DIFFERENT)
def test_check_recipes_refuses_different_ones_on_every_rank(
    field: str, one: Any, other: Any
) -> None:
    found = shared_workers().run(3, bind_message, field, one, other)
    assert len(set(found)) == 1
    name = "wire_dtype" if isinstance(one, dict) and "wire_dtype" in one else field
    assert found[0].startswith(f"OptionError: ranks were given different recipes: {name} is ")
    assert "on rank 0 and" in found[0]
    assert "on rank 1. Build the same recipe" in found[0]


def bind_own_things(rank: int) -> str:
    """Bind a recipe with fields that may differ or that cannot be compared."""
    recipe = kfactk.build(
        damping=lambda step: 0.1,
        output=(lambda out: out) if rank else None,
        tracker=None,
        placement={"name": "mem_opt", "process_group": dist.new_group([0, 1])},
    )
    return recipe.bind(net()).placement.strategy


def test_check_recipes_ignores_what_may_differ() -> None:
    assert shared_workers().run(2, bind_own_things) == ["mem_opt", "mem_opt"]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Start separate processes: torch keeps its meshes, and would reuse them in a later job."""
    with Workers() as found:
        yield found


def pairs(rank: int, wrapper: str, when: str, named: bool) -> str:
    """Train two models on four ranks, each of them wrapped for two."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, model = groups[rank // 2], net()
    recipe = kfactk.build(
        placement={"name": "replicated", "process_group": mine} if named else "replicated"
    )
    optimizer = recipe.bind(model) if when == "before" else None
    called = model
    if wrapper == "ddp":
        called = DistributedDataParallel(model, process_group=mine)
    else:
        fully_shard(model, mesh=DeviceMesh.from_group(mine, "cpu"))
    try:
        optimizer = optimizer or recipe.bind(called)
        F.cross_entropy(called(torch.randn(4, 3)), torch.randint(2, (4,))).backward()
        optimizer.step()
    except kfactk.CombinationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("wrapper", "name"), [("ddp", "DistributedDataParallel"), ("sharded", "fully_shard")]
)
def test_check_group_refuses_a_missing_process_group(
    workers: Workers, wrapper: str, name: str, when: str
) -> None:
    found = workers.run(4, pairs, wrapper, when, False)
    assert [text.partition(" of 4 train this model together")[0] for text in found] == [
        f"{name} has ranks 0, 1",
        f"{name} has ranks 0, 1",
        f"{name} has ranks 2, 3",
        f"{name} has ranks 2, 3",
    ]
    assert all("placement={'name': ..., 'process_group': group}" in text for text in found)


@pytest.mark.parametrize("wrapper", ["ddp", "sharded"])
def test_check_group_accepts_a_named_process_group(workers: Workers, wrapper: str) -> None:
    assert workers.run(4, pairs, wrapper, "after", True) == [""] * 4


def answers(rank: int, placement: str, sharded: bool) -> dict[str, str]:
    """Ask for products with the weight of the only layer, and return the answers or errors."""
    model: nn.Module = nn.Sequential(nn.Linear(3, 2))
    if sharded:
        fully_shard(model)
    optimizer = kfactk.build(placement=placement).bind(model)
    called = model if sharded else DistributedDataParallel(model)
    F.cross_entropy(called(torch.randn(4, 3)), torch.randint(2, (4,))).backward()
    optimizer.step()
    vectors = {"0.weight": model.get_parameter("0.weight").detach().clone()}
    found = {}
    for name in ("fisher_product", "precondition"):
        try:
            getattr(optimizer, name)(vectors)
        except kfactk.KfactkError as error:
            found[name] = str(error)
        else:
            found[name] = "answered"
    return found


def test_fisher_product_refuses_factors_on_different_ranks() -> None:
    for rank, found in enumerate(shared_workers().run(2, answers, "comm_opt", False)):
        assert found["precondition"] == "answered", rank
        refused = found["fisher_product"]
        assert "the factors of layer '0' are on different ranks (A on rank" in refused
        assert "so no rank can answer. Use placement='replicated'" in refused


def test_precondition_names_the_rank_that_can_answer() -> None:
    found = [each["precondition"] for each in shared_workers().run(2, answers, "mem_opt", False)]
    assert sorted(text == "answered" for text in found) == [False, True]
    assert any(
        "does not have the decompositions of layer '0'" in text and "Ask on rank" in text
        for text in found
    )


@pytest.mark.parametrize("placement", ["mem_opt", "comm_opt"])
def test_sharded_products_are_answered_on_all_ranks_or_on_none(placement: str) -> None:
    first, second = shared_workers().run(2, answers, placement, True)
    assert first == second
    assert "sharded tensors need all ranks to answer together" in first["fisher_product"]
    assert (first["precondition"] == "answered") == (placement == "comm_opt")
