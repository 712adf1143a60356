"""Masks: entries of parameters whose gradients are zero, after preconditioning too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfactk.distributed.sharding import full_tensor, local_shard, shard_of
from kfactk.errors import OptionError, near_names
from kfactk.stages import GradientPair


class Masks:
    """What gradients are multiplied by, for some parameters.

    Args:
        model: The model.
        given: By parameter name, a tensor of the parameter's shape (of booleans or numbers).

    Raises:
        OptionError: A name is not a parameter's, or a mask has another shape.

    Example:
        >>> import torch
        >>> masks = Masks(nn.Linear(2, 1), {"weight": torch.tensor([[True, False]])})
        >>> Masks(nn.Linear(2, 1), {"weight": torch.ones(2)})
        Traceback (most recent call last):
        kfactk.errors.OptionError: the mask of 'weight' must be a tensor of real numbers...
    """

    def __init__(self, model: nn.Module, given: Mapping[str, Tensor] | None) -> None:
        self._model, self._given = model, dict(given or {})
        parameters = self._parameters()
        names = {id(parameter): name for name, parameter in parameters.items()}
        for name, mask in self._given.items():
            other = names[id(parameters[name])]
            if other != name and not _equal(mask, self._given[other]):
                raise OptionError(
                    f"masks has {name!r} and {other!r}, which are the same parameter: give one "
                    "mask."
                )
            shape = parameters[name].shape
            if not isinstance(mask, Tensor) or mask.shape != shape or mask.is_complex():
                found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise OptionError(
                    f"the mask of {name!r} must be a tensor of real numbers of shape "
                    f"{tuple(shape)}, like the parameter, not {found}."
                )
            self._given[name] = full_tensor(mask.detach())

    def applied(
        self, parameters: Sequence[nn.Parameter], pairs: list[GradientPair]
    ) -> list[GradientPair]:
        """Return pairs of whole gradients with those of masked parameters multiplied.

        Args:
            parameters: The parameter of each pair.
            pairs: The pairs.
        """
        masks = self._by_id()
        if not masks:
            return pairs
        found = []
        for pair, parameter in zip(pairs, parameters, strict=True):
            if (mask := masks.get(id(parameter))) is not None:
                mask = mask.to(pair.gradient)
                masked = pair.gradient * mask, pair.preconditioned * mask
                pair = GradientPair(*masked, pair.lr, pair.damping)
            found.append(pair)
        return found

    def rest(
        self, groups: Sequence[dict[str, Any]], done: Sequence[nn.Parameter], *, decayed: bool
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the masked parameters that are trained plainly, each with this rank's part.

        Args:
            groups: The parameter groups.
            done: The parameters that are preconditioned.
            decayed: Whether gradients are to contain weight decay.
        """
        masks = self._by_id()
        for parameter in done:
            masks.pop(id(parameter), None)
        trained = [(p, group) for group in groups for p in group["params"] if id(p) in masks]
        found = []
        for parameter, group in trained:
            if parameter.grad is not None:
                gradient = local_shard(parameter.grad)
                if decayed and group["weight_decay"]:
                    decay = float(group["weight_decay"])
                    gradient = gradient.add(local_shard(parameter), alpha=decay)
                mask = shard_of(masks[id(parameter)].to(gradient), parameter)
                found.append((parameter, gradient * mask))
        return found

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Return the masked parameters by name.

        Raises:
            OptionError: The model has none of such a name (any more).
        """
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        for name in self._given:
            if name not in parameters:
                raise OptionError(
                    f"masks has {name!r}, which is not a parameter of the model."
                    f"{near_names(str(name), parameters)} Use the names of "
                    "model.named_parameters()."
                )
        return {name: parameters[name] for name in self._given}

    def _by_id(self) -> dict[int, Tensor]:
        """Return the masks by the id of their parameter; parameters may have been replaced."""
        if not self._given:
            return {}
        parameters = self._parameters()
        return {id(parameters[name]): mask for name, mask in self._given.items()}


def _equal(one: Any, other: Any) -> bool:
    return one is other or (
        isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    )
