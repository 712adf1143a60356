"""What ranks have to agree on before they share work: the recipe, and who shares it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from kfactk.distributed.communicator import Communicator
from kfactk.distributed.sharding import is_sharded
from kfactk.errors import CombinationError, OptionError


def check_recipes(fields: Mapping[str, str], ranks: Communicator) -> None:
    """Compare the ranks' recipes; a collective call.

    Args:
        fields: This rank's, field by field, as text.
        ranks: Those that are to share the work.

    Raises:
        OptionError: Two ranks have different ones.
    """
    if ranks.same(repr(sorted(fields.items()))):
        return
    every = ranks.gathered(dict(fields))
    for field in fields:
        if other := next(
            (rank for rank, theirs in enumerate(every) if theirs[field] != every[0][field]), None
        ):
            raise OptionError(
                f"ranks were given different recipes: {field} is {every[0][field]} on rank 0 and {every[other][field]} on rank {other}. "
                "Build the same recipe on all ranks."
            )


def check_group(model: nn.Module, parameters: Iterable[Tensor], ranks: Communicator) -> None:
    """Hold the ranks that share curvature against those that a wrapper has share gradients or parameters, where no group was named.

    Args:
        model: The model, with wrappers that are around it or inside.
        parameters: Those that are trained, sharded where they are.
        ranks: Those that are to share the work.

    Raises:
        CombinationError: They are not the same.
    """
    if ranks.group is not None or ranks.size == 1:
        return
    for wrapper, members in _wrappers(model, parameters):
        size = dist.get_world_size()
        if set(members) != set(range(size)):
            raise CombinationError(
                f"{wrapper} has ranks {', '.join(map(str, members))} of {size} train this model together, and the placement was "
                "given no process group, so it would mix in the curvature of the others. Give it the wrapper's: "
                "placement={'name': ..., 'process_group': group}."
            )


def _wrappers(model: nn.Module, parameters: Iterable[Tensor]) -> Iterator[tuple[str, list[int]]]:
    active = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    for module in (*([] if active is None else [active]), *model.modules()):
        if isinstance(module, nn.parallel.DistributedDataParallel):
            yield "DistributedDataParallel", dist.get_process_group_ranks(module.process_group)
    meshes: dict[int, Any] = {id(p.device_mesh): p.device_mesh for p in parameters if is_sharded(p)}
    for mesh in meshes.values():
        yield "fully_shard", sorted(mesh.mesh.flatten().tolist())
