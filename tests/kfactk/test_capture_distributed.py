"""Under DistributedDataParallel: ranks with half batches do what one process does with the whole batch."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kfactk import Optimizer
from tests.kfactk.small import F64, assert_equal, bound, factors, net, train, values

STEPS = 4
CASES: dict[str, dict[str, Any]] = {
    "EKFAC": {"basis": "ekfac", "update": "adam", "lr": 0.01},
    "K-FAC": {"basis": "kfac", "update": "momentum"},
    "running scale": {"basis": {"name": "ekfac", "scale": "running"}, "update": "sgd"},
    "empirical": {"fisher": "empirical", "update": "sgd"},
}
RECIPE: dict[str, Any] = {"factor_every": 1, "scale_every": 2, "basis_every": 3}


def data(step: int, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 4, generator=generator, dtype=F64), torch.randint(3, (n,), generator=generator)


def model() -> nn.Module:
    torch.manual_seed(3)
    return net()


def found(optimizer: Optimizer, net: nn.Module) -> list[Tensor]:
    scales = [scale for view in optimizer.layers.values() for scale in view.scale.values()]
    return [*values(net), *factors(optimizer), *scales]


def two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    saved: dict[str, list[Tensor]] = {}
    for number, (name, recipe) in enumerate(CASES.items()):
        inner = model()
        if number % 2:  # bound before wrapping, and after
            optimizer = bound(inner, **RECIPE, **recipe)
            wrapped = DistributedDataParallel(inner)
        else:
            wrapped = DistributedDataParallel(inner)
            optimizer = bound(wrapped, **RECIPE, **recipe)
        for step in range(STEPS):
            x, y = data(step)
            train(optimizer, wrapped, (x[rank::2], y[rank::2]))
        saved[name] = found(optimizer, inner)
        optimizer.close()
    torch.save(saved, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_with_half_batches_equal_one_process_with_the_whole(tmp_path: Path) -> None:
    mp.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, recipe in CASES.items():
        alone = model()
        optimizer = bound(alone, **RECIPE, **recipe)
        for step in range(STEPS):
            train(optimizer, alone, data(step))
        truth = found(optimizer, alone)
        for rank in range(2):
            assert len(ranks[rank][name]) == len(truth)
            for ours, whole in zip(ranks[rank][name], truth, strict=True):
                torch.testing.assert_close(ours, whole, rtol=1e-8, atol=1e-10)
        for one, other in zip(ranks[0][name], ranks[1][name], strict=True):
            assert torch.equal(one, other)


@pytest.fixture
def alone_in_a_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone_in_a_group")
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_wrapper_changes_nothing(when: str, options: dict[str, Any]) -> None:
    plain = model()
    inner = copy.deepcopy(plain)
    optimizer = bound(inner) if when == "before" else None
    wrapped = DistributedDataParallel(inner, **options)
    optimizer = bound(wrapped) if optimizer is None else optimizer
    other = bound(plain)
    assert list(optimizer.layers) == list(other.layers), "names are those of the wrapped model"
    for step in range(3):
        train(optimizer, wrapped, data(step))
        train(other, plain, data(step))
    assert_equal(found(optimizer, inner), found(other, plain))


@pytest.mark.usefixtures("alone_in_a_group")
def test_accumulation_without_synchronisation() -> None:
    plain = model()
    inner = copy.deepcopy(plain)
    wrapped = DistributedDataParallel(inner)
    optimizer, other = bound(wrapped), bound(plain)
    x, y = data(0)
    with wrapped.no_sync():
        (F.cross_entropy(wrapped(x[:4]), y[:4]) / 2).backward()
    (F.cross_entropy(wrapped(x[4:]), y[4:]) / 2).backward()
    optimizer.step()
    train(other, plain, (x, y))
    for ours, whole in zip(found(optimizer, inner), found(other, plain), strict=True):
        torch.testing.assert_close(ours, whole)
