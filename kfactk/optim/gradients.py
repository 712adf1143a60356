"""The places of preconditioned gradients: from the gradients of parameters to a layer's, and from its preconditioned form to what the clip
and the update rule see. Shards are made whole on the way in, each rank taking its own part on the way out.

Other gradients in place of the user's, for as long as the update rule takes its step; and whether a step can be taken on them.
"""

from __future__ import annotations

import cmath
import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfactk.distributed.sharding import (
    from_local_shard,
    full_tensor,
    is_sharded,
    local_shard,
    shard_of,
    true_on_all_ranks,
)
from kfactk.linalg import as_gradient
from kfactk.preconditioner.block import Blocks
from kfactk.samples import to_working_dtype
from kfactk.stages import GradientPair, Layer, Tensors

NamedGradients = Mapping[str, Mapping[str, Tensor]]
"""By layer name, the gradients of its parameters by their names; those that have one."""


def gradients_of(
    layers: Sequence[Layer], blocks: Blocks, decay: Callable[[nn.Parameter], float] | None = None
) -> tuple[NamedGradients, dict[str, Tensor]]:
    """The gradients of the layers' parameters, whole and in the working precision, and each layer's as its matrix. A collective call
    where parameters are sharded.

    Args:
        layers: The layers.
        blocks: Joins tensors shaped like a layer's parameters to its matrix.
        decay: How much of each parameter is added to its gradient, if any.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for layer in layers:
        found[layer.name] = {}
        for name, parameter in layer.tensors().items():
            gradient, share = parameter.grad, 0.0 if decay is None else decay(parameter)
            if gradient is not None:
                found[layer.name][name] = to_working_dtype(
                    full_tensor(gradient.add(parameter, alpha=share) if share else gradient).detach()
                )
    return found, {layer.name: blocks.joined(layer, found[layer.name]) for layer in layers}


def gradient_pairs(
    layers: Sequence[Layer],
    raw: NamedGradients,
    preconditioned: Tensors,
    blocks: Blocks,
    lr: Callable[[nn.Parameter], float],
) -> tuple[list[nn.Parameter], list[GradientPair]]:
    """The parameters that get a preconditioned gradient, and for each the full pair.

    Args:
        layers: The layers.
        raw: Their gradients.
        preconditioned: By layer name, `[..., d_out, d_in]`; layers may be missing.
        blocks: Takes matrices apart.
        lr: Learning rate of a parameter.
    """
    parameters, pairs = [], []
    for layer in layers:
        if layer.name in preconditioned:
            made, tensors = blocks.parted(layer, preconditioned[layer.name]), layer.tensors()
            for name, gradient in raw[layer.name].items():
                parameters.append(tensors[name])
                pairs.append(GradientPair(gradient, made[name], lr(tensors[name])))
    return parameters, pairs


def sharded(
    parameters: Sequence[nn.Parameter], pairs: Sequence[GradientPair]
) -> list[GradientPair]:
    """This rank's part of each pair, as plain tensors; the pair itself where it is not divided."""

    def part(pair: GradientPair, parameter: Tensor) -> GradientPair:
        return GradientPair(
            shard_of(pair.gradient, parameter), shard_of(pair.preconditioned, parameter), pair.lr
        )

    return [
        part(pair, p) if is_sharded(p) else pair for p, pair in zip(parameters, pairs, strict=True)
    ]


BAD_GRADIENT = "a batch gave NaN or inf in its gradient, and its step was not taken; such batches are skipped and counted"
BAD_STATISTICS = (
    "a batch gave NaN or inf in its curvature statistics; such batches are skipped and counted"
)
BAD_DIRECTION = (
    "the gradient is finite and its preconditioned or clipped form holds NaN or inf: the step was not taken, and was counted. "
    "Raise damping, or load an earlier state"
)
SMALL = 2**16
"""Numbers of a tensor that are copied sooner than they are worth a call of their own."""


@contextlib.contextmanager
def swapped_gradients(
    groups: Sequence[dict[str, Any]],
    replaced: Sequence[tuple[nn.Parameter, Tensor]],
    *,
    decayed: bool,
) -> Iterator[None]:
    """Put gradients in place of the user's; after the block, however it ends, `.grad` and weight decay are as they were.

    Args:
        groups: The parameter groups.
        replaced: Parameters, each with its gradient; with this rank's part of it where the parameter is sharded.
        decayed: Whether weight decay is in these gradients, so that it is added to those of the other parameters too, and the update
            rule adds none.
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
            parameter.grad = from_local_shard(as_gradient(new, local_shard(parameter)), parameter)
        yield
    finally:
        for parameter, gradient, _ in found:
            parameter.grad = gradient
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = decay


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor, dense, sparse or sharded, holds NaN or inf; one transfer from each device.

    A collective call where any is sharded: ranks that share a tensor get the same answer, also where only one rank's part, or a plain
    tensor of one rank, is bad.

    Example:
        >>> all_finite([torch.ones(2), torch.tensor([1.0, float("nan")])])
        False
    """
    values = [
        tensor.coalesce().values() if tensor.is_sparse else local_shard(tensor) for tensor in tensors
    ]
    return true_on_all_ranks(_finite(values), tensors)


def _finite(tensors: list[Tensor]) -> bool:
    alike: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.numel() and not tensor.is_meta:
            alike[tensor.device, tensor.dtype].append(tensor)
    gathered = [_gathered(same) for same in alike.values()]
    squares = (
        [torch.dot(flat, flat) for flat in flats] for flats in gathered
    )  # the cheapest, but may be out of range where they are not
    return all(map(_read, squares)) or all(
        _read([torch.linalg.vector_norm(flat, math.inf) for flat in flats]) for flats in gathered
    )


def _read(numbers: Sequence[Tensor]) -> bool:
    """Whether numbers, each a tensor on the same device, are finite: one transfer."""
    return all(
        map(
            cmath.isfinite,
            [numbers[0].item()] if len(numbers) == 1 else torch.stack(list(numbers)).tolist(),
        )
    )


def _gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers in fewer tensors `[n]`: small ones side by side, since a call takes longer than to copy them."""
    found, room = [], 0
    runs: list[list[Tensor]] = []
    for tensor in tensors:
        flat, count = tensor.reshape(-1), tensor.numel()
        if count > SMALL:
            found.append(flat)
            continue
        if count > room:
            runs.append([])
            room = 16 * SMALL
        runs[-1].append(flat)
        room -= count
    return found + [torch.cat(run) for run in runs]
