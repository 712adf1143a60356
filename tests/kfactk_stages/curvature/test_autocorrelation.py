"""The input factor by autocorrelation is the Gram matrix of patches, built one by one here."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kfactk import Layer, LayerCall
from kfactk_stages.curvature._autocorrelation import (
    applies,
    patch_moment,
    patch_sum,
    pixel_gram,
    wide,
)
from kfactk_stages.curvature._unfold import Window
from kfactk_stages.curvature.conv_kfac import ConvKfac

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution of stride 1, and an input for it."""
    dims, groups = draw(st.sampled_from([1, 2, 2, 2, 3])), draw(st.integers(1, 2))
    each = st.tuples(*[st.integers(1, 5 if dims == 1 else 3)] * dims)
    kernel, dilation, sizes = (
        draw(each),
        draw(st.tuples(*[st.integers(1, 2)] * dims)),
        draw(st.tuples(*[st.integers(1, 7)] * dims)),
    )
    padding: Any = draw(st.one_of(st.just("same"), st.tuples(*[st.integers(0, 2)] * dims)))
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "replicate"]))
    channels = groups * draw(st.integers(1, 2))
    least = (
        [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if padding == "same"
        else padding
    )
    assume(mode != "circular" or all(most <= size for most, size in zip(least, sizes, strict=True)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = CONVOLUTIONS[dims - 1](
            channels,
            groups,
            kernel,
            dilation=dilation,
            padding=padding,
            groups=groups,
            bias=draw(st.booleans()),
            padding_mode=mode,
        )
        inputs = torch.randn(draw(st.integers(1, 3)), channels, *sizes, dtype=torch.float64)
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    pads = list(reach) if padding == "same" else [2 * p for p in padding]
    assume(all(size + pad > most for size, pad, most in zip(sizes, pads, reach, strict=True)))
    return conv.double(), inputs


def patches_of(conv: Any, inputs: Tensor) -> Tensor:
    """Return every patch, `[groups, rows, channels * taps]`, by plain indexing."""
    dims, groups = len(conv.kernel_size), conv.groups
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode)
    reach = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    positions = itertools.product(
        *(
            range(0, size - most, step)
            for size, most, step in zip(padded.shape[2:], reach, conv.stride, strict=True)
        )
    )
    found = []
    for position in positions:
        cut = tuple(
            slice(p, p + most + 1, d)
            for p, most, d in zip(position, reach, conv.dilation, strict=True)
        )
        found.append(padded[(slice(None), slice(None), *cut)].reshape(len(inputs), groups, -1))
    assert dims == inputs.ndim - 2
    return torch.stack(found).flatten(0, 1).transpose(0, 1)


@settings(max_examples=120)
@given(convolutions())
@example(
    (nn.Conv1d(1, 1, 5, padding=2, bias=False).double(), torch.ones(1, 1, 1, dtype=torch.float64))
)
def test_it_is_the_gram_matrix_of_the_patches(case: tuple[Any, Tensor]) -> None:
    conv, inputs = case
    window, patches = Window.of(conv), patches_of(conv, inputs)
    assume(applies(window))
    torch.testing.assert_close(
        patch_moment(inputs, window, conv.groups),
        patches.transpose(1, 2) @ patches,
        rtol=1e-10,
        atol=1e-10,
    )
    torch.testing.assert_close(
        patch_sum(inputs, window, conv.groups), patches.sum(1), rtol=1e-10, atol=1e-10
    )


@settings(max_examples=30)
@given(convolutions())
def test_the_factor_of_the_curvature_is_that_of_the_patches(case: tuple[Any, Tensor]) -> None:
    conv, inputs = case
    rows = patches_of(conv, inputs)
    names: tuple[str, ...] = ("weight",)
    if conv.bias is not None:
        rows, names = F.pad(rows, (0, 1), value=1.0), ("weight", "bias")
    layer, curvature = Layer("conv", conv, names), ConvKfac()
    samples = curvature.samples(
        layer,
        [LayerCall(inputs, torch.zeros_like(conv(inputs)))],
        num_terms=len(inputs),
        first=True,
    )
    found = curvature.factors(layer, samples)["A"]
    assert found.total is not None
    expected = rows.transpose(1, 2) @ rows
    torch.testing.assert_close(
        found.total, expected if conv.groups > 1 else expected[0], rtol=1e-10, atol=1e-10
    )
    assert found.count == len(inputs)


@given(
    n=st.integers(0, 4),
    groups=st.integers(1, 3),
    channels=st.integers(1, 4),
    pixels=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_the_gram_matrix_of_pixels_is_their_sum_of_squares(
    n: int, groups: int, channels: int, pixels: int, seed: int
) -> None:
    """Of few pixels and of many, which are two ways."""
    images = torch.randn(
        n,
        groups,
        channels,
        pixels,
        2,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )
    expected = torch.einsum("ngcst,ngdst->gcd", images, images)
    torch.testing.assert_close(pixel_gram(images), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(1, 1, 3, stride=2),
        nn.Conv2d(1, 1, 1),
        nn.Conv2d(1, 1, 2, padding=2),
        nn.Conv1d(1, 1, 3, padding=(5,)),
    ],
    ids=["strided", "one tap", "padded beyond a patch", "far beyond"],
)
def test_other_convolutions_are_left_to_unfolding(conv: Any) -> None:
    assert not applies(Window.of(conv))


def test_float32_is_as_near_as_unfolding_is() -> None:
    conv, inputs = nn.Conv2d(8, 8, 3, padding=1), torch.randn(16, 8, 12, 12)
    patches = patches_of(conv, inputs)
    truth = patches.double().transpose(1, 2) @ patches.double()
    unfolded = (patches.transpose(1, 2) @ patches - truth).abs().max()
    correlated = (patch_moment(inputs, Window.of(conv), 1) - truth).abs().max()
    assert correlated < 10 * unfolded


@pytest.mark.parametrize(("size", "is_wide"), [(3, False), (4, True), (32, True)])
def test_inputs_of_which_a_tap_sees_little_are_unfolded(size: int, is_wide: bool) -> None:
    assert wide(Window.of(nn.Conv2d(1, 1, 3, padding=1)), (size, 32)) == is_wide


def test_what_no_tap_sees_is_exactly_nothing() -> None:
    """A tap that is off the input everywhere has zeros in the factor, not rounding errors."""
    conv, inputs = nn.Conv1d(1, 1, 2, padding="same", dilation=2), torch.randn(6, 1, 1)
    layer = Layer("conv", conv, ("weight", "bias"))
    samples = ConvKfac().samples(
        layer, [LayerCall(inputs, torch.ones(6, 1, 1))], num_terms=6, first=True
    )
    found = samples.input_moment().total
    assert found is not None
    assert int((found == 0).sum()) >= 3
    assert bool((torch.linalg.eigvalsh(found) > -1e-6).all())
