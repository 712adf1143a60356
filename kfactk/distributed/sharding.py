"""Parameters that `torch.distributed.fsdp.fully_shard` divides among ranks, and the plain tensors that everything else works on.

A sharded parameter is a DTensor: a mesh of ranks, and for each of its dimensions a placement. `Shard` (and `_StridedShard`) divides a
dimension of the tensor, unevenly where it must, so that a rank may have nothing; `Replicate` (the first dimension of an HSDP mesh) has
the same on each of its ranks. Functions that communicate say so; all ranks of a mesh must call them alike. A plain tensor passes through
all of them without a message. Nothing here imports `torch.distributed.tensor` before there is a DTensor, which takes its time.
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
    """Whether a tensor is divided among ranks, or replicated on a mesh: a DTensor."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, on every rank. A collective call for a DTensor.

    Raises:
        CombinationError: It is distributed in another way than `fully_shard` does it.
    """
    if not is_sharded(tensor):
        return tensor
    division(tensor)
    with torch.no_grad():
        return tensor.full_tensor()


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, as a plain tensor that shares memory with it; it may be empty.

    Raises:
        CombinationError: It is distributed in another way than `fully_shard` does it.
    """
    if not is_sharded(tensor):
        return tensor
    division(tensor)
    with torch.no_grad():
        return tensor.to_local()


def shard_of(full: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a full tensor that every rank has, divided as `parameter` is; in memory of its own if it is divided at all."""
    return local(sharded_like(full, parameter))


def sharded_like(full: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor that every rank has, as a DTensor with the mesh and the placements of `parameter`; without a message.

    Args:
        full: Of the parameter's shape and any dtype, equal on all ranks.
        parameter: With a plain one, `full` is returned.

    Raises:
        CombinationError: The parameter is distributed in another way than `fully_shard` does it.
    """
    if not is_sharded(parameter):
        return full
    from torch.distributed.tensor import distribute_tensor

    division(parameter)
    return distribute_tensor(
        full.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def placed(shard: Tensor, parameter: Tensor) -> Tensor:
    """A shard as the DTensor that it is a part of: the inverse of `local`; without a message."""
    if not is_sharded(parameter):
        return shard
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        shard, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def division(tensor: Tensor) -> Division | None:
    """What divides a tensor; `None` for a plain one.

    Raises:
        CombinationError: It is distributed in another way than `fully_shard` does it.
    """
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if other := [
        placement
        for placement in tensor.placements
        if not isinstance(placement, Shard | _StridedShard | Replicate)
    ]:
        raise CombinationError(
            f"a tensor of shape {tuple(tensor.shape)} is distributed as {other[0]}, and only shards and replicas, as fully_shard makes "
            "them, are understood. Shard the model with torch.distributed.fsdp.fully_shard, or leave that layer alone with exclude=."
        )
    sharded = tuple(
        dim
        for dim, placement in enumerate(tensor.placements)
        if not isinstance(placement, Replicate)
    )
    return tensor.device_mesh, sharded


class ShardedProducts:
    """A `Dot` over shards: local sums, then one message for each mesh, along the dimensions that divide it. A collective call.

    Replicas (HSDP) are counted once. The answer is the same on every rank.

    Args:
        parameters: Those that the tensors belong to, in the order of the clip's pairs.

    Raises:
        CombinationError: A parameter is distributed in another way than `fully_shard` does it.

    Example:
        >>> ShardedProducts([torch.zeros(2)])([torch.ones(2)], [torch.ones(2)])
        tensor([2.])
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._divisions = [division(parameter) for parameter in parameters]

    def __call__(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
        """`<x, y>` pair by pair, `[len]`, on the first one's device.

        Raises:
            PluginError: Tensors of different meshes, and not one for each pair, so that it cannot be told whose shards they are.
        """
        sums = inner_products(xs, ys)
        divisions = self._of(len(sums))
        for each in dict.fromkeys(divisions):
            if each is not None:
                rows = [row for row, other in enumerate(divisions) if other == each]
                sums[rows] = _summed(sums[rows], each)
        return sums

    def _of(self, count: int) -> list[Division | None]:
        if len(set(self._divisions)) == 1:
            return self._divisions[:1] * count
        if count != len(self._divisions):
            raise PluginError(
                f"the clip asked for inner products of {count} tensors where there are {len(self._divisions)} pairs, whose parameters are "
                "divided among ranks in different ways: give dot one tensor for each pair, in their order. Report it to its authors, or "
                "use another clip."
            )
        return self._divisions


def agreed(good: bool, tensors: Sequence[Tensor]) -> bool:
    """Whether `good` is true on all ranks that share any of these tensors. A collective call where any is a DTensor.

    Example:
        >>> agreed(True, [torch.ones(2)])
        True
    """
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if is_sharded(tensor))
    if not meshes:
        return good
    flag = torch.tensor(float(not good))
    for mesh in meshes:
        flag = _summed(flag, (mesh, tuple(range(mesh.ndim))))
    return not bool(flag)


def _summed(values: Tensor, along: Division) -> Tensor:
    """The sum over ranks along some dimensions of a mesh."""
    mesh, dims = along
    there = (
        values.clone() if values.device.type == mesh.device_type else values.to(mesh.device_type)
    )
    for dim in dims:
        dist.all_reduce(there, group=mesh.get_group(dim))
    return there.to(values.device)
