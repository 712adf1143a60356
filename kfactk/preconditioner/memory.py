"""How much memory the curvature of a model needs at its peak, and how much is free."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from kfactk.preconditioner.footprint import Footprint, LinkFootprint


def peak_bytes(
    footprints: Sequence[Footprint],
    *,
    slots: int = 1,
    lags: bool = False,
    link: LinkFootprint | None = None,
) -> int:
    """Return the bytes of the curvature in the step that needs most.

    Kept are factors, decompositions, moments and running means of gradients. A refresh adds the
    sums of the step and their means, the new decompositions of the layers that are due, and what
    one decomposition needs at a time. With a lag, decompositions work on copies. A link adds its
    statistics, their sums and means, what it prepares beside what it had, and what that needs.

    Args:
        footprints: Those of all layers.
        slots: Slots of the staggered schedule; 1 where all layers are decomposed at once.
        lags: Whether decompositions run beside the steps.
        link: That of the link, as far as it tells; `None` without one.
    """
    made = [each.decomposition for each in footprints]
    new = sum(made) if slots == 1 else max(made, default=0)
    return (
        sum(each.kept + 2 * each.factors for each in footprints)
        + new
        + max((each.workspace for each in footprints), default=0)
        + (sum(each.factors for each in footprints) if lags else 0)
        + (0 if link is None else link_peak(link))
    )


def link_peak(link: LinkFootprint) -> int:
    """Return the bytes of a link in the step that prepares it, as far as it tells them."""
    return 3 * (link.statistics or 0) + 2 * (link.prepared or 0) + (link.workspace or 0)


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device; `None` where that cannot be known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return None
    found = [_available(), _within_group(), _within_limit()]
    return min((each for each in found if each is not None), default=None)


def _available() -> int | None:
    """Return what the kernel says can be had without swapping."""
    return _read_table("/proc/meminfo").get("MemAvailable")


def _within_group() -> int | None:
    """Return what is left of the memory of this control group; `None` without a limit."""
    root = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            most = int((root / limit).read_text())
            stat = (root / limit).parent.joinpath("memory.stat").read_text().split()
            cached = int(stat[stat.index("inactive_file") + 1])
            return max(0, most - int((root / used).read_text()) + cached)
    return None


def _within_limit() -> int | None:
    """Return what is left of the process's address space (`ulimit -v`); `None` without a limit."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _read_table("/proc/self/status").get("VmSize")
    return None if limit == resource.RLIM_INFINITY or used is None else max(0, limit - used)


def _read_table(path: str) -> dict[str, int]:
    """Return the rows "Name:  number kB" of a file, in bytes; nothing where there is none."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            name, _, rest = line.partition(":")
            words = rest.split()
            if len(words) == 2 and words[1] == "kB":
                found[name] = int(words[0]) * 1024
    return found


def local_ranks() -> int:
    """Return how many ranks share the memory of this machine, as `torchrun` tells them."""
    with contextlib.suppress(KeyError, ValueError):
        return max(1, int(os.environ["LOCAL_WORLD_SIZE"]))
    return 1
