"""Tensors as flat buffers and back, exactly; and which of them travel together."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from kfactk import Statistic
from kfactk.packing import Form, buckets, form_of, pack, pack_symmetric, unpack, unpack_symmetric

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def symmetric(*shape: int) -> Tensor:
    """Each entry of one triangle another number."""
    lower = torch.arange(1.0, torch.Size(shape).numel() + 1, dtype=F64).reshape(shape).tril()
    return lower + lower.tril(-1).mT


@pytest.mark.parametrize("n", range(8))
@pytest.mark.parametrize("lead", [(), (3,), (2, 2), (0,)])
def test_a_triangle_travels_once_and_comes_back(n: int, lead: tuple[int, ...]) -> None:
    matrix = symmetric(*lead, n, n)
    packed = pack_symmetric(matrix)
    assert packed.shape == (*lead, n * (n + 1) // 2)
    rows, columns = torch.tril_indices(n, n)
    assert torch.equal(packed.sort(-1).values, matrix[..., rows, columns].sort(-1).values)  # every number of it, none twice
    assert torch.equal(unpack_symmetric(packed, n), matrix)


def test_what_is_packed_is_a_copy() -> None:
    matrix = symmetric(4, 4)
    packed = pack_symmetric(matrix)
    packed += 1
    assert torch.equal(matrix, symmetric(4, 4))
    [back] = unpack(pack([matrix], [Form.of(matrix)], F64), [Form.of(matrix)])
    back += 1
    assert torch.equal(matrix, symmetric(4, 4))


def test_the_lower_triangle_is_what_counts() -> None:
    """A product that rounding has made unsymmetric is symmetric again afterwards."""
    matrix = symmetric(5, 5) + torch.triu(torch.full((5, 5), 0.5, dtype=F64), 1)
    found = unpack_symmetric(pack_symmetric(matrix), 5)
    assert torch.equal(found, found.T)
    assert torch.equal(found[:3, :3].tril(), matrix[:3, :3].tril())


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_buffers_of_one_dtype(dtype: torch.dtype) -> None:
    tensors = [symmetric(3, 3), torch.arange(6.0).reshape(2, 3).T, torch.tensor(2.5), symmetric(2, 4, 4), torch.zeros(0, 3)]
    forms = [Form.of(tensor, symmetric=tensor.ndim > 1) for tensor in tensors]
    assert [form.symmetric for form in forms] == [True, False, False, True, False]
    assert [form.numel for form in forms] == [6, 6, 1, 20, 0]
    buffer = pack(tensors, forms, dtype)
    assert (buffer.dtype, buffer.numel()) == (dtype, 33)
    for back, tensor in zip(unpack(buffer, forms), tensors, strict=True):
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)  # small whole numbers, which every dtype holds


def test_a_blank_has_the_form() -> None:
    blank = Form((2, 3), BF16).blank(torch.device("cpu"))
    assert (blank.shape, blank.dtype) == ((2, 3), BF16)


def test_the_form_of_a_statistic() -> None:
    assert form_of(Statistic(None, 1.0)) is None
    assert form_of(Statistic(torch.ones(2, 2), 1.0)) == Form((2, 2), F32)
    assert form_of(Statistic(torch.ones(2, 2), 1.0, symmetric=True)) == Form((2, 2), F32, symmetric=True)
    assert form_of(Statistic(torch.ones(2, 3), 1.0, symmetric=True)) == Form((2, 3), F32)  # cannot be


FORMS = st.lists(st.builds(Form, st.lists(st.integers(0, 5), max_size=2).map(tuple), st.sampled_from([F64, F32, BF16])), max_size=12)


@given(FORMS.map(lambda forms: {f"n{number}": form for number, form in enumerate(forms)}), st.integers(0, 200))
def test_buckets_hold_everything_once_in_order_and_no_more_than_they_may(forms: dict[str, Form], limit: int) -> None:
    runs = list(buckets(forms, limit))
    assert sorted(itertools.chain(*runs)) == sorted(forms)
    for run in runs:
        assert run == sorted(run, key=list(forms).index)
        assert len({forms[name].dtype for name in run}) == 1
        sizes = [forms[name].numel * forms[name].dtype.itemsize for name in run]
        assert sum(sizes) <= limit or len([size for size in sizes if size]) <= 1
    for one, other in itertools.pairwise(runs):  # none is begun too early
        if forms[one[0]].dtype == forms[other[0]].dtype:
            assert sum(forms[name].numel * forms[name].dtype.itemsize for name in [*one, other[0]]) > limit
