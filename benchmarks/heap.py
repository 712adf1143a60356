"""The heap, kept from growing and shrinking while steps are timed."""

from __future__ import annotations

import torch

LARGEST = 2**25 - 2**16
"""Bytes of the largest block that glibc learns from: it gives back what is free at the end of the heap once that is twice as much."""


def keep_freed() -> None:
    """Have the allocator keep 64 MiB of what is freed.

    A process that gives memory back and takes it again pays for each page anew. Whether that happens in a step, in whose step it does, and
    how often, depends on where blocks happen to lie: on luck, that is, of up to 15 % here. A large block that comes and goes settles it.
    """
    torch.empty(LARGEST, dtype=torch.uint8)
