"""The options that all our placements have."""

from __future__ import annotations

from typing import Any

import attrs

from kfactk.options import choice

_FLOAT16 = "; float16 is not among them, since sums over a batch overflow it"


@attrs.frozen
class PlacementOptions:
    """Which ranks exchange messages, and in which precision.

    Args:
        process_group: The ranks that share a model, a `torch.distributed` group; `None` for all. It
            cannot be written to JSON.
        wire_dtype: "bfloat16" or "float32" for smaller messages; `None` for each tensor's own
            precision. What is kept and computed with always has its own precision, and all ranks
            continue with the same rounded values.
    """

    process_group: Any = None
    wire_dtype: str | None = attrs.field(
        default=None, validator=choice("bfloat16", "float32", None, hint=_FLOAT16)
    )
