"""The places of preconditioned gradients: from the gradients of parameters to a layer's, and from its preconditioned form to what the clip
and the update rule see. Shards are made whole on the way in, each rank taking its own part on the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from kfactk.blocks import Blocks
from kfactk.samples import working
from kfactk.shards import is_sharded, shard_of, whole
from kfactk.stages import Layer, Pair, Tensors

Raw = Mapping[str, Mapping[str, Tensor]]
"""By layer name, the gradients of its parameters by their names; those that have one."""


def gradients_of(
    layers: Sequence[Layer], blocks: Blocks, decay: Callable[[nn.Parameter], float] | None = None
) -> tuple[Raw, dict[str, Tensor]]:
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
                found[layer.name][name] = working(whole(gradient.add(parameter, alpha=share) if share else gradient).detach())
    return found, {layer.name: blocks.joined(layer, found[layer.name]) for layer in layers}


def slots(
    layers: Sequence[Layer], raw: Raw, preconditioned: Tensors, blocks: Blocks, lr: Callable[[nn.Parameter], float]
) -> tuple[list[nn.Parameter], list[Pair]]:
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
                pairs.append(Pair(gradient, made[name], lr(tensors[name])))
    return parameters, pairs


def sharded(parameters: Sequence[nn.Parameter], pairs: Sequence[Pair]) -> list[Pair]:
    """This rank's part of each pair, as plain tensors; the pair itself where it is not divided."""

    def part(pair: Pair, parameter: Tensor) -> Pair:
        return Pair(shard_of(pair.gradient, parameter), shard_of(pair.preconditioned, parameter), pair.lr)

    return [part(pair, p) if is_sharded(p) else pair for p, pair in zip(parameters, pairs, strict=True)]
