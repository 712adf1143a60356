"""What the clips share: the check of a limit, the precision of a norm, and scaling by a factor that stays on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kfactk import OptionError

if TYPE_CHECKING:
    import attrs

NARROW = (torch.float16, torch.bfloat16)


def positive(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Attrs validator: a positive finite number.

    Raises:
        OptionError: Anything else.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (math.isfinite(value) and value > 0):
        raise OptionError(
            f"{type(instance).__name__}: {attribute.name}={value!r} is not a positive finite number, and nothing could be bounded by it. "
            "Give a number such as 0.01, or leave the gradients unbounded with clip='none'."
        )


def widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in a precision in which squares can be summed: half precisions as float32, the others as they are."""
    return [t.float() if t.dtype in NARROW else t for t in tensors]


def scaled(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """New tensors `factor * t`, of the same dtypes and devices; `factor` is 0-dimensional and is never read by the host."""
    return [
        (t * factor.to(t.device)).to(t.dtype) for t in tensors
    ]  # of 0-dimensional ones the wider dtype would win


def one(tensors: Sequence[Tensor]) -> Tensor:
    """The factor 1, on the device of the first tensor."""
    return torch.ones((), device=tensors[0].device if tensors else None)
