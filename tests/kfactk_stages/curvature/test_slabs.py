"""The input factor of slabs is the Gram matrix of the patches, at any stride."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kfactk import Layer, LayerCall
from kfactk_stages.curvature import _rows, _slabs
from kfactk_stages.curvature._plan import costs_of
from kfactk_stages.curvature._slabs import slab_moment, slabs_of
from kfactk_stages.curvature._unfold import Window
from kfactk_stages.curvature.conv_kfac import ConvKfac
from tests.kfactk_stages.curvature.test_autocorrelation import CONVOLUTIONS, patches_of


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, Tensor]:
    """Draw a convolution of any stride, and an input of any size, even smaller than the kernel."""
    dims, groups = draw(st.sampled_from([1, 2, 2, 2, 3])), draw(st.integers(1, 2))

    def each(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * dims))

    kernel, stride, dilation, padding = (
        each(1, 4 if dims < 3 else 2),
        each(1, 3),
        each(1, 2),
        each(0, 3),
    )
    sizes, mode = (
        each(1, 14 if dims < 3 else 6),
        draw(st.sampled_from(["zeros", "zeros", "circular", "replicate"])),
    )
    assume(
        all(
            size + 2 * pad > d * (k - 1)
            for size, pad, d, k in zip(sizes, padding, dilation, kernel, strict=True)
        )
    )
    assume(mode != "circular" or all(pad <= size for pad, size in zip(padding, sizes, strict=True)))
    channels = groups * draw(st.integers(1, 2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {
            "stride": stride,
            "dilation": dilation,
            "padding": padding,
            "groups": groups,
            "padding_mode": mode,
        }
        conv = CONVOLUTIONS[dims - 1](channels, groups, kernel, bias=draw(st.booleans()), **options)
        inputs = torch.randn(draw(st.integers(1, 4)), channels, *sizes, dtype=torch.float64)
    return conv.double(), inputs


@settings(max_examples=150)
@given(convolutions(), st.sampled_from([1, 2000, 2**22]), st.sampled_from([1, 128]))
def test_it_is_the_gram_matrix_of_the_patches(
    case: tuple[Any, Tensor], chunk_bytes: int, split: int
) -> None:
    conv, inputs = case
    patches = patches_of(conv, inputs)
    with mock.patch.object(_slabs, "SPLIT", split):
        found = slab_moment(inputs, Window.of(conv), conv.groups, torch.float64, chunk_bytes)
    torch.testing.assert_close(found, patches.transpose(1, 2) @ patches, rtol=1e-10, atol=1e-10)


@settings(max_examples=60)
@given(convolutions())
def test_every_way_that_applies_gives_the_factor_of_the_patches(case: tuple[Any, Tensor]) -> None:
    conv, inputs = case
    rows, names = patches_of(conv, inputs), ("weight",) if conv.bias is None else ("weight", "bias")
    rows = rows if conv.bias is None else F.pad(rows, (0, 1), value=1.0)
    expected = rows.transpose(1, 2) @ rows
    for way in costs_of(
        Window.of(conv), tuple(inputs.shape[2:]), inputs.shape[1] // conv.groups, len(inputs)
    ):
        samples = ConvKfac().samples(
            Layer("conv", conv, names),
            [LayerCall(inputs, conv(inputs).detach())],
            num_terms=len(inputs),
            first=True,
        )
        with mock.patch.object(_rows, "cheapest", lambda *_, way=way: way):
            found = samples.input_moment()
        assert found.total is not None
        torch.testing.assert_close(
            found.total, expected if conv.groups > 1 else expected[0], rtol=1e-10, atol=1e-10
        )
        assert (found.count, found.symmetric) == (len(inputs), True)


@pytest.mark.parametrize("size", [2, 9])
@pytest.mark.parametrize(
    "options", [{}, {"stride": (2, 3)}, {"groups": 2, "stride": 2, "bias": False}], ids=str
)
def test_kernels_of_one_tap_are_the_gram_matrix_of_the_pixels_they_see(
    options: dict[str, Any], size: int
) -> None:
    conv = nn.Conv2d(4, 2, 1, **options).double()
    inputs = torch.randn(5, 4, size, size, dtype=torch.float64)
    assert list(costs_of(Window.of(conv), (size, size), 4 // conv.groups, 5)) == ["pixels"]
    rows, names = patches_of(conv, inputs), ("weight",) if conv.bias is None else ("weight", "bias")
    rows = rows if conv.bias is None else F.pad(rows, (0, 1), value=1.0)
    samples = ConvKfac().samples(
        Layer("conv", conv, names),
        [LayerCall(inputs, conv(inputs).detach())],
        num_terms=5,
        first=True,
    )
    expected = rows.transpose(1, 2) @ rows
    torch.testing.assert_close(
        samples.input_moment().total,
        expected if conv.groups > 1 else expected[0],
        rtol=1e-10,
        atol=1e-10,
    )


def test_an_empty_batch_has_an_empty_moment() -> None:
    found = slab_moment(
        torch.zeros(0, 2, 6, 6), Window.of(nn.Conv2d(2, 3, 3, stride=2)), 1, torch.float32, 2**20
    )
    assert found.shape == (1, 18, 18)
    assert not found.any()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_the_precision_wanted(half: torch.dtype) -> None:
    conv, inputs = nn.Conv2d(3, 2, 3, stride=2, padding=1), torch.randn(5, 3, 9, 9).to(half)
    patches = patches_of(conv, inputs.double())
    found = slab_moment(inputs, Window.of(conv), 1, torch.float32, 2**12)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), patches.transpose(1, 2) @ patches, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(("size", "stride"), [(12, 2), (13, 3), (4, 1), (2, 1)])
def test_float32_is_as_near_as_unfolding_is(size: int, stride: int) -> None:
    conv, inputs = nn.Conv2d(8, 8, 3, padding=1, stride=stride), torch.randn(16, 8, size, size)
    patches = patches_of(conv, inputs)
    truth = patches.double().transpose(1, 2) @ patches.double()
    unfolded = (patches.transpose(1, 2) @ patches - truth).abs().max()
    assert (
        slab_moment(inputs, Window.of(conv), 1, torch.float32, 2**16) - truth
    ).abs().max() < 10 * unfolded


@pytest.mark.parametrize("size", [1, 2, 5])
def test_what_no_tap_sees_is_exactly_nothing(size: int) -> None:
    """A tap that is off the input everywhere has zeros in the factor."""
    conv, inputs = nn.Conv1d(1, 1, 3, padding=4, dilation=4, stride=1), torch.randn(6, 1, size)
    patches = patches_of(conv, inputs)[0]
    moment = slab_moment(inputs, Window.of(conv), 1, torch.float32, 2**20)[0]
    assert bool((moment[patches.T @ patches == 0] == 0).all())


def test_what_a_tap_does_not_see_leaves_no_rounding() -> None:
    """The last tap sees the second of two pixels only, which is small beside the first."""
    inputs = torch.tensor([[[1e4, 1.0]]])
    moment = slab_moment(inputs, Window.of(nn.Conv1d(1, 1, 5, padding=3)), 1, torch.float32, 2**20)[
        0
    ]
    assert float(moment[4, 4]) == 1.0


def test_products_leave_out_what_a_tap_does_not_see() -> None:
    """Of four pixels and a pixel of padding the first tap sees three, so products have 3 rows."""
    slabs = slabs_of(Window.of(nn.Conv1d(1, 1, 3, padding=1)), (4,))
    rows = {
        pair: [(at.stop - at.start, sign) for key, _, at, sign in slabs.summands if key == pair]
        for pair in slabs.pairs
    }
    assert rows == {
        (0, 0): [(3, 1)],
        (0, 1): [(3, 1)],
        (0, 2): [(2, 1)],
        (1, 1): [(1, 1)],
        (1, 2): [],
        (2, 2): [(1, -1)],
    }


def test_pairs_of_taps_a_stride_apart_share_their_rows() -> None:
    """A 3 x 3 kernel of stride 2 has 5 products, one of stride 1 has 3, a small input all 6."""

    def products(stride: int, size: int) -> int:
        return list(
            slabs_of(
                Window.of(nn.Conv2d(1, 1, 3, stride=stride, padding=1)), (size, size)
            ).pairs.values()
        ).count(None)

    assert (products(2, 16), products(1, 16), products(2, 3)) == (5, 3, 6)
