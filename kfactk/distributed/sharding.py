"""Convert between parameters that `torch.distributed.fsdp.fully_shard` shards and plain tensors.

A sharded parameter is a DTensor: a mesh of ranks, and a placement for each dimension of the mesh.
`Shard` (and `_StridedShard`) divides a dimension of the tensor, unevenly where it must, so a shard
may be empty. `Replicate`, the first dimension of an HSDP mesh, keeps the same on each rank.

Functions that communicate say so; all ranks of a mesh must call them alike. Plain tensors pass
through without a message. `torch.distributed.tensor` is slow to import, so it is imported only
where there is a DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from kfactk.errors import CombinationError, PluginError
from kfactk.linalg import inner_products

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Division = tuple[Any, tuple[int, ...]]
"""The mesh of a DTensor, and the dimensions of the mesh that divide it."""
_PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor: sharded, or replicated on a mesh."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor, on every rank. A collective call for a DTensor.

    Raises:
        CombinationError: Its placements are not those of `fully_shard`.
    """
    if not is_sharded(tensor):
        return tensor
    division(tensor)
    with torch.no_grad():
        return tensor.full_tensor()


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard, as a plain tensor that shares its memory; it may be empty.

    Raises:
        CombinationError: Its placements are not those of `fully_shard`.
    """
    if not is_sharded(tensor):
        return tensor
    division(tensor)
    with torch.no_grad():
        return tensor.to_local()


def shard_of(full: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's shard of a full tensor that every rank has, divided as `parameter` is.

    It has memory of its own where the parameter is sharded.
    """
    return local_shard(sharded_like(full, parameter))


def sharded_like(full: Tensor, parameter: Tensor) -> Tensor:
    """Return a full tensor as a DTensor with the mesh and the placements of `parameter`.

    No message is sent. With a plain parameter, `full` itself is returned.

    Args:
        full: Of the parameter's shape and any dtype, equal on all ranks.
        parameter: The parameter.

    Raises:
        CombinationError: The parameter's placements are not those of `fully_shard`.
    """
    if not is_sharded(parameter):
        return full
    from torch.distributed.tensor import distribute_tensor

    division(parameter)
    return distribute_tensor(
        full.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def from_local_shard(shard: Tensor, parameter: Tensor) -> Tensor:
    """Return the DTensor that a shard is a part of, the inverse of `local_shard`.

    No message is sent.
    """
    if not is_sharded(parameter):
        return shard
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        shard, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def division(tensor: Tensor) -> Division | None:
    """Return what divides a tensor; `None` for a plain one.

    Raises:
        CombinationError: Its placements are not those of `fully_shard`.
    """
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    known = (Shard, _StridedShard, Replicate)
    if other := [each for each in tensor.placements if not isinstance(each, known)]:
        raise CombinationError(
            f"a tensor of shape {tuple(tensor.shape)} is distributed as {other[0]}; only the "
            "shards and replicas that fully_shard makes are supported. Shard the model with "
            "torch.distributed.fsdp.fully_shard, or leave that layer alone with exclude=."
        )
    sharded = tuple(
        dim
        for dim, placement in enumerate(tensor.placements)
        if not isinstance(placement, Replicate)
    )
    return tensor.device_mesh, sharded


class ShardedProducts:
    """A `Dot` over shards: local sums, then one all-reduce for each mesh. A collective call.

    Replicas (HSDP) are counted once. The result is the same on every rank.

    Args:
        parameters: Those that the tensors belong to, in the order of the clip's pairs.

    Raises:
        CombinationError: A parameter's placements are not those of `fully_shard`.

    Example:
        >>> ShardedProducts([torch.zeros(2)])([torch.ones(2)], [torch.ones(2)])
        tensor([2.])
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._divisions = [division(parameter) for parameter in parameters]

    def __call__(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
        """Return `<x, y>` pair by pair, `[len]`, on the first one's device.

        Raises:
            PluginError: Parameters lie on different meshes, and there is not one tensor for each.
        """
        sums = inner_products(xs, ys)
        divisions = self._divisions_of(len(sums))
        for division in dict.fromkeys(divisions):
            if division is not None:
                rows = [row for row, other in enumerate(divisions) if other == division]
                sums[rows] = _sum_over_ranks(sums[rows], division)
        return sums

    def _divisions_of(self, count: int) -> list[Division | None]:
        """Return the division of each of `count` tensors."""
        if len(set(self._divisions)) == 1:
            return self._divisions[:1] * count
        if count != len(self._divisions):
            raise PluginError(
                f"the clip asked for inner products of {count} tensors where there are "
                f"{len(self._divisions)} pairs, whose parameters are sharded in different ways. "
                "The clip must give dot one tensor for each pair, in their order. Report it to its "
                "authors, or use another clip."
            )
        return self._divisions


def true_on_all_ranks(flag: bool, tensors: Sequence[Tensor]) -> bool:
    """Return whether `flag` is true on all ranks that share any of these tensors.

    A collective call where any of them is a DTensor.

    Example:
        >>> true_on_all_ranks(True, [torch.ones(2)])
        True
    """
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if is_sharded(tensor))
    if not meshes:
        return flag
    false = torch.tensor(float(not flag), device="cpu")
    for mesh in meshes:
        false = _sum_over_ranks(false, (mesh, tuple(range(mesh.ndim))))
    return not bool(false)


def _sum_over_ranks(values: Tensor, along: Division) -> Tensor:
    """Return the sum over ranks along some dimensions of a mesh."""
    mesh, dims = along
    on_mesh = (
        values.clone() if values.device.type == mesh.device_type else values.to(mesh.device_type)
    )
    for dim in dims:
        dist.all_reduce(on_mesh, group=mesh.get_group(dim))
    return on_mesh.to(values.device)
