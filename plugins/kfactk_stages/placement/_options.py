"""The options that every placement of ours has."""

from __future__ import annotations

from typing import Any

import attrs

from kfactk import OptionError

WIRE = (None, "bfloat16", "float32")
"""What may travel: float16 is not among them, since sums leave its range."""


def _wire(placement: Travelling, attribute: attrs.Attribute[str | None], value: str | None) -> None:
    if value not in WIRE:
        raise OptionError(
            f"wire_dtype is {value!r}; what travels between ranks may be 'bfloat16' or 'float32', or keep its precision (None). "
            "float16 is refused because sums over a batch leave its range."
        )


@attrs.frozen
class Travelling:
    """Between whom what travels.

    Args:
        process_group: The ranks that share a model, a `torch.distributed` group; `None` for all. It cannot be written to JSON.
        wire_dtype: "bfloat16" or "float32" for what travels, so that less does; `None` for its own precision. What is kept and computed
            with has its own precision always, and all ranks go on with the same rounded values.
    """

    process_group: Any = None
    wire_dtype: str | None = attrs.field(default=None, validator=_wire)
