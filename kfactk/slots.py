"""The places of preconditioned gradients: from the gradients of parameters to a layer's, and from its preconditioned form to what the clip
and the update rule see. Shards are made whole on the way in, each rank taking its own part on the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from kfactk.blocks import Blocks
from kfactk.shards import shard_of, whole
from kfactk.stages import Layer, Pair, Tensors


def gradients_of(layers: Sequence[Layer], blocks: Blocks, decay: Callable[[nn.Parameter], float] | None = None) -> dict[str, Tensor]:
    """The gradient of each layer as its matrix. A collective call where parameters are sharded.

    Args:
        layers: The layers.
        blocks: Joins tensors shaped like a layer's parameters to its matrix.
        decay: How much of each parameter is added to its gradient, if any.
    """
    found = {}
    for layer in layers:
        tensors: dict[str, Tensor | None] = {}
        for name, parameter in layer.tensors().items():
            gradient, share = parameter.grad, 0.0 if decay is None else decay(parameter)
            tensors[name] = None if gradient is None else whole(gradient.add(parameter, alpha=share) if share else gradient)
        found[layer.name] = blocks.joined(layer, tensors)
    return found


def slots(
    layers: Sequence[Layer], gradients: Tensors, preconditioned: Tensors, blocks: Blocks, lr: Callable[[nn.Parameter], float]
) -> tuple[list[nn.Parameter], list[Pair]]:
    """The parameters that get a preconditioned gradient, and for each the full pair.

    Args:
        layers: The layers.
        gradients: By layer name, `[..., d_out, d_in]`.
        preconditioned: The same, preconditioned; layers may be missing.
        blocks: Takes matrices apart.
        lr: Learning rate of a parameter.
    """
    parameters, pairs = [], []
    for layer in layers:
        if layer.name in preconditioned:
            plain, made = blocks.parted(layer, gradients[layer.name]), blocks.parted(layer, preconditioned[layer.name])
            for name, parameter in layer.tensors().items():
                if parameter.grad is not None:
                    parameters.append(parameter)
                    pairs.append(Pair(plain[name], made[name], lr(parameter)))
    return parameters, pairs


def sharded(parameters: Sequence[nn.Parameter], pairs: Sequence[Pair]) -> list[Pair]:
    """This rank's part of each pair, as plain tensors."""
    each = zip(parameters, pairs, strict=True)
    return [Pair(shard_of(pair.gradient, p), shard_of(pair.preconditioned, p), pair.lr) for p, pair in each]
