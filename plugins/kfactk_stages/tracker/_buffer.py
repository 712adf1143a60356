"""A buffer of metrics that does not wait for the device, and names for nested options."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from kfactk import KfactkError

Kind = tuple[torch.device, torch.dtype]
"""Tensors of one kind are stacked and fetched together."""


@attrs.frozen
class Row:
    """The metrics of one step, as numbers.

    Args:
        step: The step.
        milliseconds: Time of the record, since the epoch.
        metrics: Numbers by name.
    """

    step: int
    milliseconds: int
    metrics: dict[str, float | int]


@attrs.frozen(eq=False)
class _BufferedStep:
    """The metrics of one step: numbers, and stacked tensors with their names, by kind."""

    process: int
    step: int
    milliseconds: int
    order: tuple[str, ...]
    numbers: dict[str, float | int]
    names: dict[Kind, list[str]]
    stacks: dict[Kind, Tensor]


@attrs.define(eq=False)
class Buffer:
    """Steps whose metrics are not written yet.

    `add` copies tensors in one launch for each device and dtype, and does not wait for it. `take`
    fetches all of them with one transfer for each device and dtype. In a fork of the process, the
    steps that were added before stay the parent's.
    """

    _steps: list[_BufferedStep] = attrs.field(factory=list, init=False)

    def __len__(self) -> int:
        return len(self._own())

    def add(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Add the metrics of one step.

        Raises:
            KfactkError: A metric is neither a number nor a tensor of one entry.
        """
        numbers: dict[str, float | int] = {}
        names: dict[Kind, list[str]] = {}
        tensors: dict[Kind, list[Tensor]] = {}
        for name, value in metrics.items():
            if isinstance(value, Tensor) and value.numel() == 1:
                kind = value.device, value.dtype
                names.setdefault(kind, []).append(name)
                tensors.setdefault(kind, []).append(value.detach().reshape(()))
            elif isinstance(value, int | float):
                numbers[name] = value
            else:
                what = type(value).__name__
                if isinstance(value, Tensor):
                    what += f" of shape {tuple(value.shape)}"
                raise KfactkError(
                    f"the metric {name!r} of step {step} is a {what}; it must be a number or "
                    "a tensor of one entry."
                )
        stacks = {kind: torch.stack(found) for kind, found in tensors.items()}
        now = int(time.time() * 1000)
        self._steps.append(
            _BufferedStep(os.getpid(), step, now, tuple(metrics), numbers, names, stacks)
        )

    def take(self) -> list[Row]:
        """Return all steps in order, as numbers, and empty the buffer."""
        steps, self._steps = self._own(), []
        fetched: dict[Kind, list[float | int]] = {}
        for kind in {kind for one in steps for kind in one.stacks}:
            stacks = [one.stacks[kind] for one in steps if kind in one.stacks]
            fetched[kind] = torch.cat(stacks).tolist()
        position = dict.fromkeys(fetched, 0)
        rows = []
        for one in steps:
            metrics = dict(one.numbers)
            for kind, names in one.names.items():
                start = position[kind]
                position[kind] = start + len(names)
                metrics.update(zip(names, fetched[kind][start : start + len(names)], strict=True))
            ordered = {name: metrics[name] for name in one.order}
            rows.append(Row(one.step, one.milliseconds, ordered))
        return rows

    def _own(self) -> list[_BufferedStep]:
        if self._steps and self._steps[0].process != os.getpid():
            process = os.getpid()
            self._steps = [one for one in self._steps if one.process == process]
        return self._steps


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings and sequences as one mapping with dotted names.

    Empty mappings and sequences inside stay as they are.

    Example:
        >>> flattened({"clip": {"name": "kl"}, "betas": [0.9, 0.999]})
        {'clip.name': 'kl', 'betas.0': 0.9, 'betas.1': 0.999}
    """
    if isinstance(value, Mapping) and value:
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple) and value:
        items = enumerate(value)
    else:
        return {prefix: value} if prefix else {}
    out: dict[str, Any] = {}
    for name, inner in items:
        out.update(flattened(inner, f"{prefix}.{name}" if prefix else str(name)))
    return out
