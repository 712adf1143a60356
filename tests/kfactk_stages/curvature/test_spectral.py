"""The correlation of an input with itself, against its definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from kfactk_stages.curvature import _spectral
from kfactk_stages.curvature._spectral import autocorrelation
from kfactk_stages.curvature._unfold import Window

F64 = torch.float64


def correlated(
    inputs: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> Tensor:
    """`sum_{n,q} x_c(q) x_c'(q + offset)`, offset by offset."""
    channels, sizes = inputs.shape[1] // groups, inputs.shape[2:]
    x = inputs.reshape(len(inputs), groups, channels, *sizes)
    offsets = list(itertools.product(*(range(-(taps - 1), taps) for taps in kernel)))
    found = []
    for offset in offsets:
        shifts = [o * d for o, d in zip(offset, dilation, strict=True)]
        here = tuple(
            slice(max(0, -s), max(0, size - max(0, s)))
            for s, size in zip(shifts, sizes, strict=True)
        )
        there = tuple(
            slice(max(0, s), max(0, size + min(0, s)))
            for s, size in zip(shifts, sizes, strict=True)
        )
        one, other = x[(..., *here)].flatten(3), x[(..., *there)].flatten(3)
        found.append(torch.einsum("ngcq,ngdq->gcd", one, other))
    return torch.stack(found).view(*(2 * taps - 1 for taps in kernel), groups, channels, channels)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Window, int]:
    dims = draw(st.integers(1, 3))
    kernel = tuple(
        draw(st.lists(st.integers(1, 4 if dims == 1 else 3), min_size=dims, max_size=dims))
    )
    dilation = tuple(draw(st.lists(st.integers(1, 2), min_size=dims, max_size=dims)))
    sizes = draw(st.lists(st.integers(1, 7), min_size=dims, max_size=dims))
    groups, channels, n = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
    seed = draw(st.integers(0, 2**16))
    inputs = torch.randn(
        n, groups * channels, *sizes, dtype=F64, generator=torch.Generator().manual_seed(seed)
    )
    return inputs, Window(kernel, (1,) * dims, dilation, (0,) * (2 * dims), "constant"), groups


@given(
    case=cases(),
    workspace=st.sampled_from([1, 2**10, 2**26]),
    cached=st.sampled_from([1, 2**10, 2**20]),
)
@settings(deadline=None)
def test_it_is_the_sum_over_the_input(
    case: tuple[Tensor, Window, int], workspace: int, cached: int
) -> None:
    inputs, window, groups = case
    expected = correlated(inputs, window.kernel, window.dilation, groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_spectral, "WORKSPACE", workspace)
        patch.setattr(_spectral, "CACHED", cached)
        found = autocorrelation(inputs, window, groups)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_float32_rounds_as_products_do() -> None:
    """The rounding is some units of the last place of the largest entry, large means or not."""
    torch.manual_seed(0)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), "constant")
    inputs = torch.randn(16, 8, 16, 16, dtype=F64).relu() + 1
    expected = correlated(inputs, window.kernel, window.dilation, 1)
    found = autocorrelation(inputs.float(), window, 1)
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-6
