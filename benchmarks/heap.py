"""Keep the heap from growing and shrinking while steps are timed."""

from __future__ import annotations

import torch

LARGEST = 2**25 - 2**16
"""Bytes of the largest block that raises glibc's trim threshold, which is twice the size of the
block: glibc returns free memory at the end of the heap above that threshold."""


def keep_freed() -> None:
    """Let the allocator keep 64 MiB of freed memory, by freeing one large block.

    A process that returns memory and takes it again pays for each page again. Whether that happens
    in a step depends on where blocks happen to lie; here it made differences of up to 15 %.
    """
    torch.empty(LARGEST, dtype=torch.uint8)
