"""Figures held back without waiting for the device, and the checks that the trackers' options share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from kfactk import KfactkError, OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

Kind = tuple[torch.device, torch.dtype]


@attrs.frozen
class Row:
    """The figures of one step, as numbers.

    Args:
        step: The step.
        milliseconds: When it was recorded, since the epoch.
        metrics: Numbers by name.
    """

    step: int
    milliseconds: int
    metrics: dict[str, float | int]


@attrs.frozen(eq=False)
class _Held:
    """One step: numbers, and for each device and dtype the names and the stacked values of the tensors."""

    step: int
    milliseconds: int
    order: tuple[str, ...]
    numbers: dict[str, float | int]
    names: dict[Kind, list[str]]
    stacks: dict[Kind, Tensor]


@attrs.define(eq=False)
class Buffer:
    """Steps whose figures have not been written yet.

    Tensors are copied as they come, in one launch for each device and dtype and without waiting for it; `take` fetches all of them with
    one transfer each.
    """

    _held: list[_Held] = attrs.field(factory=list, init=False)

    def __len__(self) -> int:
        return len(self._held)

    def add(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Take in the figures of one step.

        Raises:
            KfactkError: A figure is neither a number nor a tensor of one entry.
        """
        numbers: dict[str, float | int] = {}
        names: dict[Kind, list[str]] = {}
        values: dict[Kind, list[Tensor]] = {}
        for name, figure in metrics.items():
            if isinstance(figure, Tensor) and figure.numel() == 1:
                names.setdefault((figure.device, figure.dtype), []).append(name)
                values.setdefault((figure.device, figure.dtype), []).append(
                    figure.detach().reshape(())
                )
            elif isinstance(figure, int | float):
                numbers[name] = figure
            else:
                what = (
                    f"a tensor of shape {tuple(figure.shape)}"
                    if isinstance(figure, Tensor)
                    else f"a {type(figure).__name__}"
                )
                raise KfactkError(
                    f"the figure {name!r} of step {step} is {what}; only numbers and 0-dimensional tensors can be recorded."
                )
        stacks = {kind: torch.stack(tensors) for kind, tensors in values.items()}
        self._held.append(
            _Held(step, int(time.time() * 1000), tuple(metrics), numbers, names, stacks)
        )

    def take(self) -> list[Row]:
        """Everything held, in the order it came, as numbers; nothing is held afterwards."""
        held, self._held = self._held, []
        fetched: dict[Kind, list[float | int]] = {}
        for kind in {kind for one in held for kind in one.stacks}:
            fetched[kind] = torch.cat(
                [one.stacks[kind] for one in held if kind in one.stacks]
            ).tolist()
        position = dict.fromkeys(fetched, 0)
        rows = []
        for one in held:
            metrics = dict(one.numbers)
            for kind, names in one.names.items():
                start = position[kind]
                position[kind] = start + len(names)
                metrics.update(zip(names, fetched[kind][start : start + len(names)], strict=True))
            rows.append(
                Row(one.step, one.milliseconds, {name: metrics[name] for name in one.order})
            )
        return rows


def at_least_one(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Attrs validator: a whole number, 1 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(
            f"{type(instance).__name__}: {attribute.name}={value!r} cannot work: it must be a whole number, 1 or more."
        )


def text(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Attrs validator: a non-empty string, or `None` where that is the default."""
    if not ((isinstance(value, str) and value) or (value is None and attribute.default is None)):
        raise OptionError(
            f"{type(instance).__name__}: {attribute.name}={value!r} cannot work: it must be a non-empty string."
        )


def any_text(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Attrs validator: a string, empty perhaps."""
    if not isinstance(value, str):
        raise OptionError(
            f"{type(instance).__name__}: {attribute.name}={value!r} cannot work: it must be a string."
        )


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and sequences as one mapping with dotted names; empty ones inside stay as they are.

    Example:
        >>> flattened({"clip": {"name": "kl"}, "betas": [0.9, 0.999]})
        {'clip.name': 'kl', 'betas.0': 0.9, 'betas.1': 0.999}
    """
    if isinstance(value, Mapping) and value:
        items: Sequence[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list | tuple) and value:
        items = list(enumerate(value))
    else:
        return {prefix: value} if prefix else {}
    out: dict[str, Any] = {}
    for name, inner in items:
        out.update(flattened(inner, f"{prefix}.{name}" if prefix else str(name)))
    return out
