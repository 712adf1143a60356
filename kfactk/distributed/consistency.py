"""Check what ranks must agree on before they share work: the recipe, and the process group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from kfactk.distributed.communicator import Communicator
from kfactk.distributed.sharding import is_sharded
from kfactk.errors import CombinationError, OptionError


def check_recipes(fields: Mapping[str, str], ranks: Communicator) -> None:
    """Compare the recipes of all ranks; a collective call.

    Args:
        fields: The fields of this rank's recipe, as text.
        ranks: The ranks that are to share the work.

    Raises:
        OptionError: Two ranks have different recipes.
    """
    if ranks.same(repr(sorted(fields.items()))):
        return
    recipes = ranks.gathered(dict(fields))
    for field in fields:
        for rank, recipe in enumerate(recipes):
            if recipe[field] != recipes[0][field]:
                raise OptionError(
                    f"ranks were given different recipes: {field} is {recipes[0][field]} on rank 0 "
                    f"and {recipe[field]} on rank {rank}. Build the same recipe on all ranks."
                )


def check_group(model: nn.Module, parameters: Iterable[Tensor], ranks: Communicator) -> None:
    """Compare the ranks that share curvature with those of DDP or `fully_shard`.

    Nothing is checked where the placement has a process group.

    Args:
        model: The model, with its wrappers.
        parameters: The trained parameters, sharded where they are.
        ranks: The ranks that are to share the work.

    Raises:
        CombinationError: They are not the same.
    """
    if ranks.group is not None or ranks.size == 1:
        return
    size = dist.get_world_size()
    for wrapper, members in _wrapper_ranks(model, parameters):
        if set(members) != set(range(size)):
            raise CombinationError(
                f"{wrapper} has ranks {', '.join(map(str, members))} of {size} train this model "
                "together, but the placement has no process group, so it would mix in the "
                "curvature of the other ranks. Give it the group of the wrapper: "
                "placement={'name': ..., 'process_group': group}."
            )


def _wrapper_ranks(
    model: nn.Module, parameters: Iterable[Tensor]
) -> Iterator[tuple[str, list[int]]]:
    """Yield the name of each wrapper with the ranks that it spans."""
    active = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    for module in (*([] if active is None else [active]), *model.modules()):
        if isinstance(module, nn.parallel.DistributedDataParallel):
            yield "DistributedDataParallel", dist.get_process_group_ranks(module.process_group)
    meshes: dict[int, Any] = {id(p.device_mesh): p.device_mesh for p in parameters if is_sharded(p)}
    for mesh in meshes.values():
        yield "fully_shard", sorted(mesh.mesh.flatten().tolist())
