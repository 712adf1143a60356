"""How much memory the operations inside a block asked for."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def tensors(value):
    """Tensors in nested arguments and results."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, dict):
        yield from tensors([*value.values()])


class LargestAllocation(TorchDispatchMode):
    """Size in bytes of the largest storage that operations inside made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors(result):
            if tensor.device.type != "meta" and tensor.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def peak_bytes(work: Callable[[], object]) -> int:
    """Bytes that operations of a call hold at once at their most, on the CPU."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    profiler: Any = profile.profiler
    events = sorted(
        (each for each in profiler.kineto_results.events() if each.name() == "[memory]"),
        key=lambda each: each.start_ns(),
    )
    held = most = 0
    for each in events:
        held += each.nbytes()
        most = max(most, held)
    return most
