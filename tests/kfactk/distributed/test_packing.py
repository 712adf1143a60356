"""Tensors are packed into flat buffers and unpacked exactly; buckets hold what travels together."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from kfactk import Statistic
from kfactk.distributed.packing import (
    TensorSpec,
    buckets,
    common_spec,
    pack,
    pack_symmetric,
    spec_of,
    unpack,
    unpack_symmetric,
)

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def symmetric(*shape: int) -> Tensor:
    """Return a symmetric matrix whose lower triangle has different entries."""
    lower = torch.arange(1.0, torch.Size(shape).numel() + 1, dtype=F64).reshape(shape).tril()
    return lower + lower.tril(-1).mT


@pytest.mark.parametrize("n", range(8))
@pytest.mark.parametrize("lead", [(), (3,), (2, 2), (0,)])
def test_pack_symmetric_takes_each_entry_once_and_is_inverted(
    n: int, lead: tuple[int, ...]
) -> None:
    matrix = symmetric(*lead, n, n)
    packed = pack_symmetric(matrix)
    assert packed.shape == (*lead, n * (n + 1) // 2)
    rows, columns = torch.tril_indices(n, n)
    assert torch.equal(packed.sort(-1).values, matrix[..., rows, columns].sort(-1).values)
    assert torch.equal(unpack_symmetric(packed, n), matrix)


def test_pack_and_unpack_copy() -> None:
    matrix = symmetric(4, 4)
    packed = pack_symmetric(matrix)
    packed += 1
    assert torch.equal(matrix, symmetric(4, 4))
    [back] = unpack(pack([matrix], [TensorSpec.of(matrix)], F64), [TensorSpec.of(matrix)])
    back += 1
    assert torch.equal(matrix, symmetric(4, 4))


def test_pack_symmetric_reads_the_lower_triangle() -> None:
    """So a matrix that rounding has made unsymmetric becomes symmetric."""
    matrix = symmetric(5, 5) + torch.triu(torch.full((5, 5), 0.5, dtype=F64), 1)
    found = unpack_symmetric(pack_symmetric(matrix), 5)
    assert torch.equal(found, found.T)
    assert torch.equal(found[:3, :3].tril(), matrix[:3, :3].tril())


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_pack_makes_a_buffer_of_one_dtype(dtype: torch.dtype) -> None:
    tensors = [
        symmetric(3, 3),
        torch.arange(6.0).reshape(2, 3).T,
        torch.tensor(2.5),
        symmetric(2, 4, 4),
        torch.zeros(0, 3),
    ]
    specs = [TensorSpec.of(tensor, symmetric=tensor.ndim > 1) for tensor in tensors]
    assert [spec.symmetric for spec in specs] == [True, False, False, True, False]
    assert [spec.numel for spec in specs] == [6, 6, 1, 20, 0]
    buffer = pack(tensors, specs, dtype)
    assert (buffer.dtype, buffer.numel()) == (dtype, 33)
    for back, tensor in zip(unpack(buffer, specs), tensors, strict=True):
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)  # every dtype holds small whole numbers


def test_spec_blank_has_its_shape_and_dtype() -> None:
    blank = TensorSpec((2, 3), BF16).blank(torch.device("cpu"))
    assert (blank.shape, blank.dtype) == ((2, 3), BF16)


def test_spec_of_a_statistic_is_symmetric_only_where_square() -> None:
    assert spec_of(Statistic(None, 1.0)) is None
    assert spec_of(Statistic(torch.ones(2, 2), 1.0)) == TensorSpec((2, 2), F32)
    assert spec_of(Statistic(torch.ones(2, 2), 1.0, symmetric=True)) == TensorSpec(
        (2, 2), F32, symmetric=True
    )
    assert spec_of(Statistic(torch.ones(2, 3), 1.0, symmetric=True)) == TensorSpec((2, 3), F32)


def test_what_is_unrounded_has_buckets_of_its_own() -> None:
    spec = spec_of(Statistic(torch.ones(2), 1.0, unrounded=True))
    assert spec == TensorSpec((2,), F32, unrounded=True)
    assert common_spec("x", [spec, TensorSpec((2,), F64)]) == TensorSpec((2,), F64, unrounded=True)
    specs = {"a": TensorSpec((2,), F32), "b": spec, "c": TensorSpec((1,), F32)}
    assert sorted(buckets(specs)) == [["a", "c"], ["b"]]


SPECS = st.lists(
    st.builds(
        TensorSpec,
        st.lists(st.integers(0, 5), max_size=2).map(tuple),
        st.sampled_from([F64, F32, BF16]),
    ),
    max_size=12,
)


@given(
    SPECS.map(lambda specs: {f"n{number}": spec for number, spec in enumerate(specs)}),
    st.integers(0, 200),
)
def test_buckets_hold_everything_once_in_order_up_to_the_limit(
    specs: dict[str, TensorSpec], limit: int
) -> None:
    found = list(buckets(specs, limit))
    assert sorted(itertools.chain(*found)) == sorted(specs)
    for bucket in found:
        assert bucket == sorted(bucket, key=list(specs).index)
        assert len({specs[name].dtype for name in bucket}) == 1
        sizes = [specs[name].numel * specs[name].dtype.itemsize for name in bucket]
        assert sum(sizes) <= limit or len([size for size in sizes if size]) <= 1
    for one, other in itertools.pairwise(found):  # a bucket is as full as it can be
        if specs[one[0]].dtype == specs[other[0]].dtype:
            assert (
                sum(specs[name].numel * specs[name].dtype.itemsize for name in [*one, other[0]])
                > limit
            )
