"""Tensors in flat buffers for the wire: symmetric ones as one triangle, many small ones in one message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from kfactk.errors import StateError
from kfactk.samples import Statistic

BUCKET_BYTES = 25 * 2**20
"""Size at which a message is sent off, and the next one begun."""


@attrs.frozen
class TensorSpec:
    """What has to be known of a tensor to take it out of a buffer.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        symmetric: Whether it travels as one triangle.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    symmetric: bool = False

    @classmethod
    def of(cls, tensor: Tensor, *, symmetric: bool = False) -> TensorSpec:
        """The form of a tensor."""
        return cls(
            tuple(tensor.shape),
            tensor.dtype,
            symmetric and tensor.ndim >= 2 and tensor.shape[-1] == tensor.shape[-2],
        )

    @property
    def numel(self) -> int:
        """How many numbers travel."""
        if not self.symmetric:
            return torch.Size(self.shape).numel()
        n = self.shape[-1]
        return torch.Size(self.shape[:-2]).numel() * (n * (n + 1) // 2)

    def blank(self, device: torch.device) -> Tensor:
        """A tensor of this form, without values."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


def pack_symmetric(matrix: Tensor) -> Tensor:
    """The lower triangle `[..., n (n + 1) / 2]` of `[..., n, n]`, as rectangles: no index is needed.

    The leading half's lower triangle and the trailing half's upper one share a rectangle, and the block between them follows.

    Example:
        >>> m = torch.tensor([[1.0, 2.0], [2.0, 3.0]])
        >>> pack_symmetric(m), unpack_symmetric(pack_symmetric(m), 2)
        (tensor([1., 3., 2.]), tensor([[1., 2.],
                [2., 3.]]))

    References:
        Gustavson et al. 2010, "Rectangular Full Packed Format for Cholesky's Algorithm", arXiv:0901.1696.
    """
    n = matrix.shape[-1]
    head, tail = (n + 1) // 2, n // 2
    shared = matrix.new_zeros(*matrix.shape[:-2], head, tail + 1)
    shared[..., :, :head] = matrix[..., :head, :head].tril()
    shared[..., :tail, 1:] += matrix[..., head:, head:].triu()
    return torch.cat([shared.flatten(-2), matrix[..., head:, :head].flatten(-2)], -1)


def unpack_symmetric(packed: Tensor, n: int) -> Tensor:
    """Inverse of `pack_symmetric`, `[..., n, n]`."""
    head, tail = (n + 1) // 2, n // 2
    lead = packed.shape[:-1]
    first, last = torch.split(packed, [head * (tail + 1), tail * head], -1)
    shared, between = first.reshape(*lead, head, tail + 1), last.reshape(*lead, tail, head)
    matrix = packed.new_empty(*packed.shape[:-1], n, n)
    lower, upper = shared[..., :, :head].tril(), shared[..., :tail, 1:].triu()
    matrix[..., :head, :head] = lower + lower.tril(-1).mT
    matrix[..., head:, head:] = upper + upper.triu(1).mT
    matrix[..., head:, :head] = between
    matrix[..., :head, head:] = between.mT
    return matrix


def pack(tensors: Sequence[Tensor], specs: Sequence[TensorSpec], dtype: torch.dtype) -> Tensor:
    """Tensors of these forms as one flat buffer of `dtype`."""
    flat = [
        pack_symmetric(tensor) if form.symmetric else tensor
        for tensor, form in zip(tensors, specs, strict=True)
    ]
    return torch.cat([each.reshape(-1).to(dtype) for each in flat])


def unpack(buffer: Tensor, specs: Sequence[TensorSpec]) -> list[Tensor]:
    """Inverse of `pack`; the tensors own their memory."""
    found = []
    for part, form in zip(torch.split(buffer, [form.numel for form in specs]), specs, strict=True):
        if form.symmetric:
            found.append(
                unpack_symmetric(part.to(form.dtype).reshape(*form.shape[:-2], -1), form.shape[-1])
            )
        else:
            found.append(part.to(form.dtype, copy=True).reshape(form.shape))
    return found


def buckets(specs: Mapping[str, TensorSpec], limit: int = BUCKET_BYTES) -> Iterator[list[str]]:
    """Names in runs whose tensors together do not exceed `limit` bytes, each run of one dtype; a larger tensor goes alone.

    Example:
        >>> specs = {name: TensorSpec((n,), torch.float32) for name, n in {"a": 1, "b": 2, "c": 9}.items()}
        >>> list(buckets(specs, limit=16))
        [['a', 'b'], ['c']]
    """
    for dtype in sorted({form.dtype for form in specs.values()}, key=str):
        run: list[str] = []
        size = 0
        for name, form in specs.items():
            if form.dtype != dtype:
                continue
            bytes_ = form.numel * form.dtype.itemsize
            if run and size + bytes_ > limit:
                yield run
                run, size = [], 0
            run.append(name)
            size += bytes_
        if run:
            yield run


def spec_of(statistic: Statistic) -> TensorSpec | None:
    """The form of a statistic's total; `None` without one."""
    return (
        None
        if statistic.total is None
        else TensorSpec.of(statistic.total, symmetric=statistic.symmetric)
    )


def widest(name: str, specs: Iterable[TensorSpec | None]) -> TensorSpec | None:
    """The form that all ranks' totals of one name fit into; `None` where nobody has one.

    Raises:
        StateError: Their shapes differ.
    """
    found: TensorSpec | None = None
    for form in specs:
        if found is None or form is None:
            found = form if found is None else found
            continue
        if form.shape != found.shape:
            raise StateError(
                f"ranks disagree on the shape of {name!r}: {found.shape} and {form.shape}. "
                "Each rank must hold the same model, bound in the same way; check what differs between them."
            )
        found = TensorSpec(
            found.shape,
            torch.promote_types(found.dtype, form.dtype),
            found.symmetric and form.symmetric,
        )
    return found
