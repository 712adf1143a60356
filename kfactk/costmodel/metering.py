"""`Meter`: counts the operations that torch runs, also on tensors without numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kfactk.costmodel.cost import NOTHING, Amount

SOLVERS = {"eigh": ("eigh", "svd", "eig", "qr", "inv", "lu"), "cholesky": ("cholesky",)}
"""For each solver of a machine profile, the operations counted as it: all but Cholesky as eigh."""
FREE = {"_unsafe_view", "alias", "detach", "empty", "empty_like", "empty_strided"}
FREE |= {"new_empty", "new_empty_strided"}
"""Operations besides views that read and write nothing."""
TRIANGULAR = {torch.ops.aten.cholesky_solve: 2, torch.ops.aten.linalg_solve_triangular: 1}
"""Triangular solves, and the number of triangles of each."""


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that torch runs inside it, their FLOPs and bytes, without views.

    Example:
        >>> with Meter() as meter:
        ...     _ = torch.ones(2, 3, device="meta") @ torch.ones(3, 5, device="meta")
        >>> meter.amount.products
        60.0
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.amount = NOTHING
        self.written = 0
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation, and run it."""
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        self.seen.add(packet.__name__)
        if func.is_view or packet.__name__ in FREE:
            return out
        flops = _flops(packet, args, kwargs or {}, out)
        kind = "convolutions" if "convolution" in packet.__name__ else "products"
        kind = "triangular" if packet in TRIANGULAR else kind
        self.written += (written := _nbytes(out))
        moved = _nbytes((args, kwargs)) + written
        self.amount += Amount(bytes=moved, launches=1, **{kind: flops})
        return out

    def solver(self) -> str:
        """Return the solver that decomposed matrices, or ""."""
        for solver, words in SOLVERS.items():
            if any(word in name.split("_") for name in self.seen for word in words):
                return solver
        return ""


def _nbytes(tree: Any) -> int:
    return sum(each.nbytes for each in tree_leaves(tree) if isinstance(each, Tensor))


def _flops(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the FLOPs of one operation."""
    if packet in TRIANGULAR:  # n^2 for each column and triangle
        return TRIANGULAR[packet] * int(out.shape[-2] * out.numel())
    if packet is torch.ops.aten.convolution_backward:  # torch's own count ignores groups
        gradient, inputs, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
        products = (inputs if transposed else gradient).numel() * math.prod(weight.shape[1:])
        return int(2 * products * sum(wanted[:2]))
    if packet not in flop_registry:  # an in-place operation counts as the other one
        packet = getattr(torch.ops.aten, packet.__name__.removesuffix("_"), packet)
    count = flop_registry.get(packet)
    return int(count(*args, **kwargs, out_val=out)) if count else 0
