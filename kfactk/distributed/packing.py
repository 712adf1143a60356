"""Pack tensors into flat buffers: symmetric ones as one triangle, small ones in one message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from kfactk.errors import StateError
from kfactk.samples import Statistic

BUCKET_BYTES = 25 * 2**20
"""Largest size of a message with several tensors."""


@attrs.frozen
class TensorSpec:
    """The shape and dtype of a tensor; whether it travels as one triangle, or unrounded."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    symmetric: bool = False
    unrounded: bool = False

    @classmethod
    def of(cls, tensor: Tensor, *, symmetric: bool = False, unrounded: bool = False) -> TensorSpec:
        """Return the spec of a tensor; `symmetric` is ignored where the tensor is not square."""
        square = tensor.ndim >= 2 and tensor.shape[-1] == tensor.shape[-2]
        return cls(tuple(tensor.shape), tensor.dtype, symmetric and square, unrounded)

    @property
    def numel(self) -> int:
        """Number of elements that travel."""
        if not self.symmetric:
            return torch.Size(self.shape).numel()
        n = self.shape[-1]
        return torch.Size(self.shape[:-2]).numel() * (n * (n + 1) // 2)

    def blank(self, device: torch.device) -> Tensor:
        """Return an uninitialised tensor of this shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Return the lower triangle `[..., n (n + 1) / 2]` of `[..., n, n]`.

    It is made of rectangles, without indices: the lower triangle of the leading half and the upper
    triangle of the trailing half share one; the block between them is the other.

    Example:
        >>> m = torch.tensor([[1.0, 2.0], [2.0, 3.0]])
        >>> pack_symmetric(m), unpack_symmetric(pack_symmetric(m), 2)
        (tensor([1., 3., 2.]), tensor([[1., 2.],
                [2., 3.]]))

    References:
        Gustavson et al. 2010, "Rectangular Full Packed Format for Cholesky's Algorithm",
        arXiv:0901.1696.
    """
    n = matrix.shape[-1]
    head, tail = (n + 1) // 2, n // 2
    shared = matrix.new_zeros(*matrix.shape[:-2], head, tail + 1)
    shared[..., :, :head] = matrix[..., :head, :head].tril()
    shared[..., :tail, 1:] += matrix[..., head:, head:].triu()
    return torch.cat([shared.flatten(-2), matrix[..., head:, :head].flatten(-2)], -1)


def unpack_symmetric(packed: Tensor, n: int) -> Tensor:
    """Return the symmetric matrix `[..., n, n]`, the inverse of `pack_symmetric`."""
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
    """Return tensors with these specs as one flat buffer of `dtype`."""
    parts = [
        pack_symmetric(tensor) if spec.symmetric else tensor
        for tensor, spec in zip(tensors, specs, strict=True)
    ]
    return torch.cat([part.reshape(-1).to(dtype) for part in parts])


def unpack(buffer: Tensor, specs: Sequence[TensorSpec]) -> list[Tensor]:
    """Return the tensors, each in memory of its own, the inverse of `pack`."""
    tensors = []
    for part, spec in zip(torch.split(buffer, [spec.numel for spec in specs]), specs, strict=True):
        if spec.symmetric:
            triangles = part.to(spec.dtype).reshape(*spec.shape[:-2], -1)
            tensors.append(unpack_symmetric(triangles, spec.shape[-1]))
        else:
            tensors.append(part.to(spec.dtype, copy=True).reshape(spec.shape))
    return tensors


def buckets(specs: Mapping[str, TensorSpec], limit: int = BUCKET_BYTES) -> Iterator[list[str]]:
    """Yield the names in buckets of at most `limit` bytes; a larger tensor is alone.

    Those of a bucket have one dtype, and all or none of them travel unrounded.

    Example:
        >>> sizes = {"a": 1, "b": 2, "c": 9}
        >>> specs = {name: TensorSpec((n,), torch.float32) for name, n in sizes.items()}
        >>> list(buckets(specs, limit=16))
        [['a', 'b'], ['c']]
    """
    kinds = {(spec.dtype, spec.unrounded) for spec in specs.values()}
    for kind in sorted(kinds, key=str):
        bucket: list[str] = []
        size = 0
        for name, spec in specs.items():
            if (spec.dtype, spec.unrounded) != kind:
                continue
            nbytes = spec.numel * spec.dtype.itemsize
            if bucket and size + nbytes > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append(name)
            size += nbytes
        if bucket:
            yield bucket


def spec_of(statistic: Statistic) -> TensorSpec | None:
    """Return the spec of a statistic's total; `None` without one."""
    if statistic.total is None:
        return None
    return TensorSpec.of(
        statistic.total, symmetric=statistic.symmetric, unrounded=statistic.unrounded
    )


def common_spec(name: str, specs: Iterable[TensorSpec | None]) -> TensorSpec | None:
    """Return the spec that the total of every rank fits into; `None` where no rank has one.

    Raises:
        StateError: Their shapes differ.
    """
    common: TensorSpec | None = None
    for spec in specs:
        if common is None or spec is None:
            common = common or spec
            continue
        if spec.shape != common.shape:
            raise StateError(
                f"ranks disagree on the shape of {name!r}: {common.shape} and {spec.shape}. Every "
                "rank must hold the same model, bound in the same way; check what differs."
            )
        dtype = torch.promote_types(common.dtype, spec.dtype)
        symmetric = common.symmetric and spec.symmetric
        common = TensorSpec(common.shape, dtype, symmetric, common.unrounded or spec.unrounded)
    return common


def sum_of_bits(tensor: Tensor) -> int:
    """Return a number that equal tensors share, and different ones hardly ever."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    bits = tensor.contiguous().view(kinds[tensor.itemsize])
    return int(bits.sum(dtype=torch.int64))
