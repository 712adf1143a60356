"""Conversions between DTensors and plain tensors equal what torch gathers, divides and sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from kfactk import CombinationError, PluginError
from kfactk.distributed.sharding import (
    ShardedProducts,
    from_local_shard,
    full_tensor,
    is_sharded,
    local_shard,
    shard_of,
    sharded_like,
    true_on_all_ranks,
)
from kfactk.testing._support.ranks import shared_workers
from tests.kfactk.sharded import F64, grid, line

pytestmark = pytest.mark.xdist_group("ranks")

SHAPES = [(5, 3), (4, 2, 3, 3), (3,), (1, 2), (7,), (0, 2)]
"""With 4 ranks: uneven, even, and fewer rows than ranks."""


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=F64) for shape in SHAPES]


def layouts(ranks: int) -> list[tuple[DeviceMesh, list[Any]]]:
    found: list[tuple[DeviceMesh, list[Any]]] = [(line(), [Shard(0)]), (line(), [Replicate()])]
    if ranks == 4:
        found += [
            (grid(), [Replicate(), Shard(0)]),
            (grid(), [_StridedShard(0, split_factor=2), Shard(0)]),
        ]
    return found


def chunk(full: Tensor, dim: int, mesh_dim: int, mesh: DeviceMesh) -> Tensor:
    """Return this rank's chunk of `torch.chunk`, which divides as `fully_shard` does."""
    chunks = full.chunk(mesh.size(mesh_dim), dim)
    place = mesh.get_local_rank(mesh_dim)
    return chunks[place] if place < len(chunks) else full.narrow(dim, 0, 0)


def there_and_back(rank: int, ranks: int) -> None:
    for mesh, placements in layouts(ranks):
        for full in tensors():
            parameter = distribute_tensor(
                torch.zeros_like(full), mesh, placements, src_data_rank=None
            )  # torch scatters no uneven strides
            made = sharded_like(full, parameter)
            assert isinstance(made, DTensor)
            assert (made.device_mesh, made.placements, made.shape) == (
                mesh,
                tuple(placements),
                full.shape,
            )
            assert torch.equal(made.full_tensor(), full)
            assert torch.equal(full_tensor(made), full)
            part = local_shard(made)
            assert not is_sharded(part)
            if placements[-1] == Shard(0) and not isinstance(placements[0], _StridedShard):
                assert torch.equal(part, chunk(full, 0, mesh.ndim - 1, mesh))
            own = shard_of(full, parameter)
            assert torch.equal(own, part)
            assert own.untyped_storage().nbytes() == own.nbytes, (
                "a shard must not keep the full tensor alive"
            )
            again = from_local_shard(part, parameter)
            assert (again.placements, again.shape, again.stride()) == (
                parameter.placements,
                parameter.shape,
                parameter.stride(),
            )
            assert torch.equal(again.full_tensor(), full)


def along_columns(rank: int) -> None:
    full = torch.arange(30.0, dtype=F64).reshape(3, 10)
    parameter = distribute_tensor(torch.zeros_like(full), line(), [Shard(1)])
    assert torch.equal(shard_of(full, parameter), chunk(full, 1, 0, line()))
    assert torch.equal(full_tensor(sharded_like(full, parameter)), full)


def without_a_message(rank: int) -> None:
    """Convert on one rank only: a message would wait, or receive the next one of the others."""
    full = torch.arange(10.0).reshape(5, 2)
    parameter = distribute_tensor(torch.zeros(5, 2), line(), [Shard(0)])
    if rank == 0:
        made = sharded_like(full, parameter)
        assert torch.equal(
            local_shard(from_local_shard(local_shard(made), parameter)), shard_of(full, parameter)
        )
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    assert float(total) == sum(range(dist.get_world_size()))


def products(rank: int, ranks: int) -> list[Tensor]:
    found = []
    for mesh, placements in layouts(ranks):
        xs = tensors()
        ys = [x + 1 for x in xs]
        parameters = [distribute_tensor(x, mesh, placements, src_data_rank=None) for x in xs]
        dot = ShardedProducts(parameters)
        parts = [
            [shard_of(each, p) for each, p in zip(all_of, parameters, strict=True)]
            for all_of in (xs, ys)
        ]
        truth = torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)])
        answer = dot(*parts)
        torch.testing.assert_close(answer, truth, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(
            dot(parts[0][1:3], parts[1][1:3]), truth[1:3], rtol=1e-13, atol=1e-13
        )
        torch.testing.assert_close(
            dot([parts[0][1].float()], [parts[1][1].float()]), truth[1:2].float()
        )
        found.append(answer)
    return found


def of_several_meshes(rank: int) -> None:
    full = torch.arange(10.0, dtype=F64)
    one, other = (
        distribute_tensor(full, line(), [Shard(0)]),
        distribute_tensor(full, grid(), [Replicate(), Shard(0)]),
    )
    plain = full.clone()
    parameters = [plain, one, other, one]
    dot = ShardedProducts(parameters)
    parts = [shard_of(full, parameter) for parameter in parameters]
    assert torch.equal(dot(parts, parts), torch.full((4,), float(full.square().sum()), dtype=F64))
    with pytest.raises(PluginError, match="2 tensors where there are 4 pairs"):
        dot(parts[:2], parts[:2])


def flags(rank: int) -> tuple[bool, ...]:
    parameters = [torch.zeros(2), distribute_tensor(torch.zeros(5), line(), [Shard(0)])]
    if dist.get_world_size() == 4:
        parameters.append(distribute_tensor(torch.zeros(5), grid(), [Replicate(), Shard(0)]))
    last = dist.get_world_size() - 1
    return (
        true_on_all_ranks(True, parameters),
        true_on_all_ranks(rank != last, parameters),
        true_on_all_ranks(rank != last, parameters[:1]),
    )


def refused(rank: int) -> None:
    partial = DTensor.from_local(torch.ones(2), line(), [Partial()])
    for call in (
        full_tensor,
        local_shard,
        lambda each: sharded_like(torch.ones(2), each),
        lambda each: ShardedProducts([each]),
    ):
        with pytest.raises(CombinationError, match="fully_shard"):
            call(partial)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shards_are_those_of_torch(ranks: int) -> None:
    shared_workers().run(ranks, there_and_back, ranks)
    shared_workers().run(ranks, along_columns)


def test_sharded_like_sends_no_message() -> None:
    shared_workers().run(3, without_a_message)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_sharded_products_are_those_of_full_tensors_on_all_ranks(ranks: int) -> None:
    first, *others = shared_workers().run(ranks, products, ranks)
    for other in others:
        assert all(torch.equal(one, same) for one, same in zip(first, other, strict=True))


def test_sharded_products_over_several_meshes() -> None:
    shared_workers().run(4, of_several_meshes)


@pytest.mark.parametrize("ranks", [2, 4])
def test_true_on_all_ranks_asks_the_ranks_of_a_mesh(ranks: int) -> None:
    found = shared_workers().run(ranks, flags)
    assert found == [(True, False, True)] * (ranks - 1) + [(True, False, False)], (
        "a plain tensor has no other ranks"
    )


def test_partial_tensors_are_refused() -> None:
    shared_workers().run(2, refused)


def test_plain_tensors_pass_through_unchanged() -> None:
    tensor = torch.ones(2, 3)
    for answer in (
        full_tensor(tensor),
        local_shard(tensor),
        sharded_like(tensor, tensor),
        shard_of(tensor, tensor),
        from_local_shard(tensor, tensor),
    ):
        assert answer is tensor
    assert not is_sharded(tensor)
    assert torch.equal(
        ShardedProducts([tensor])([tensor, tensor], [tensor, 2 * tensor]), torch.tensor([6.0, 12.0])
    )
