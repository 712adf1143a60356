"""Gradients on their way through a step: read for each block, paired, swapped for the update rule.

Shards are made whole on the way in. On the way out each rank takes its own part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor, nn

from kfactk.distributed.sharding import (
    from_local_shard,
    full_tensor,
    is_sharded,
    local_shard,
    shard_of,
)
from kfactk.linalg import as_gradient
from kfactk.preconditioner.block import Block
from kfactk.samples import to_working_dtype
from kfactk.stages import GradientPair, Tensors

Groups = Mapping[int, Mapping[str, Any]]
"""The parameter group of each trained parameter, by the parameter's id."""


@attrs.frozen(eq=False)
class BlockGradients:
    """The gradients of the blocks' parameters, whole and in the working precision.

    Args:
        named: By layer name, the gradients of its parameters by their names.
        matrices: By layer name, `[..., d_out, d_in]`.
    """

    named: Mapping[str, Mapping[str, Tensor]]
    matrices: dict[str, Tensor]


def read(
    blocks: Sequence[Block], groups: Groups, *, decayed: Collection[Block] = ()
) -> BlockGradients:
    """Read the gradients of the blocks whose anchor has one; a collective call with shards.

    Args:
        blocks: The blocks.
        groups: The parameter groups.
        decayed: The blocks to whose gradients their group's weight decay is added.
    """
    named: dict[str, dict[str, Tensor]] = {}
    matrices: dict[str, Tensor] = {}
    for block in blocks:
        tensors = block.layer.tensors()
        if tensors[block.layer.parameters[0]].grad is None:
            continue
        found: dict[str, Tensor] = {}
        for name, parameter in tensors.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            decay = float(groups[id(parameter)]["weight_decay"]) if block in decayed else 0.0
            gradient = gradient.add(parameter, alpha=decay) if decay else gradient
            found[name] = to_working_dtype(full_tensor(gradient).detach())
        named[block.name], matrices[block.name] = found, block.matrix(found)
    return BlockGradients(named, matrices)


def averaged(
    blocks: Sequence[Block], gradients: BlockGradients, matrices: Mapping[str, Tensor]
) -> BlockGradients:
    """Return gradients with other matrices in place of their own.

    Args:
        blocks: The blocks.
        gradients: As `read` returned them.
        matrices: By layer name, what is to be preconditioned.
    """
    named = {}
    for block in blocks:
        if (old := gradients.named.get(block.name)) is not None:
            made = block.tensors(matrices[block.name])
            named[block.name] = {name: made[name] for name in old}
    return BlockGradients(named, dict(matrices))


def paired(
    blocks: Sequence[Block], gradients: BlockGradients, preconditioned: Tensors, groups: Groups
) -> tuple[list[nn.Parameter], list[GradientPair]]:
    """Return the parameters that get a preconditioned gradient, and the full pair of each.

    Args:
        blocks: The blocks.
        gradients: As `read` returned them.
        preconditioned: By layer name, `[..., d_out, d_in]`; layers may be missing.
        groups: The parameter groups.
    """
    parameters, pairs = [], []
    for block in blocks:
        if block.name not in preconditioned:
            continue
        made, tensors = block.tensors(preconditioned[block.name]), block.layer.tensors()
        damping = float(groups[id(block.layer.anchor)]["damping"])
        for name, gradient in gradients.named[block.name].items():
            parameter = tensors[name]
            parameters.append(parameter)
            lr = float(groups[id(parameter)]["lr"])
            pairs.append(GradientPair(gradient, made[name], lr, damping))
    return parameters, pairs


def local_parts(
    parameters: Sequence[nn.Parameter], pairs: Sequence[GradientPair]
) -> list[GradientPair]:
    """Return this rank's part of each pair; the pair itself where its parameter is not sharded."""
    found = []
    for pair, p in zip(pairs, parameters, strict=True):
        if is_sharded(p):
            parts = shard_of(pair.gradient, p), shard_of(pair.preconditioned, p)
            pair = GradientPair(*parts, pair.lr, pair.damping)
        found.append(pair)
    return found


def as_applied(parameters: Sequence[nn.Parameter], clipped: Sequence[Tensor]) -> list[Tensor]:
    """Return clipped gradients as the update rule gets them: what is finite may be inf in float16.

    Args:
        parameters: Their parameters.
        clipped: For each its gradient, or this rank's part of it.
    """
    pairs = zip(clipped, parameters, strict=True)
    return [as_gradient(gradient, local_shard(parameter)) for gradient, parameter in pairs]


def completed(
    groups: Sequence[dict[str, Any]],
    replaced: Sequence[tuple[nn.Parameter, Tensor]],
    *,
    decayed: bool,
) -> list[tuple[nn.Parameter, Tensor]]:
    """Return what the update rule sees in `swapped`: of each parameter with a gradient, one.

    Args:
        groups: As for `swapped`.
        replaced: Likewise.
        decayed: Likewise.
    """
    known, found = {id(parameter) for parameter, _ in replaced}, list(replaced)
    for group in groups:
        decay = float(group["weight_decay"]) if decayed else 0.0
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None and id(parameter) not in known:
                gradient = gradient.add(parameter, alpha=decay) if decay else gradient
                found.append((parameter, gradient))
    return found


@contextlib.contextmanager
def swapped(
    groups: Sequence[dict[str, Any]],
    replaced: Sequence[tuple[nn.Parameter, Tensor]],
    *,
    decayed: bool,
) -> Iterator[None]:
    """Put gradients in place of the user's; restore `.grad` and weight decay after the block.

    Args:
        groups: The parameter groups.
        replaced: Parameters, each with its gradient as `as_applied` gives it.
        decayed: Whether these gradients contain weight decay. It is then added to the gradients of
            the other parameters too, and the update rule adds none.
    """
    found = [
        (parameter, parameter.grad, float(group["weight_decay"]))
        for group in groups
        for parameter in group["params"]
    ]
    decays = [group["weight_decay"] for group in groups]
    try:
        if decayed:
            for parameter, gradient, decay in found:
                if gradient is not None and decay:
                    parameter.grad = gradient.add(parameter, alpha=decay)
            for group in groups:
                group["weight_decay"] = 0.0
        for parameter, new in replaced:
            parameter.grad = from_local_shard(new, parameter)
        yield
    finally:
        for parameter, gradient, _ in found:
            parameter.grad = gradient
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = decay
