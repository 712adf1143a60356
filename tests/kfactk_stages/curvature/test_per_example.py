"""Per-example gradients and output factors of convolutions, against autograd and plain sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kfactk import Layer, LayerCall, Samples
from kfactk_stages.curvature._per_example import unfolds
from kfactk_stages.curvature.conv_kfac import ConvKfac

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@st.composite
def used(draw: st.DrawFn) -> tuple[Any, list[LayerCall]]:
    """A convolution with any stride, dilation and padding, and one or two uses of it."""
    dims, groups = draw(st.sampled_from([1, 2, 2, 3])), draw(st.integers(1, 2))
    each = st.tuples(*[st.integers(1, 2)] * dims)
    kernel, stride, dilation = draw(st.tuples(*[st.integers(1, 3)] * dims)), draw(each), draw(each)
    padding: Any = draw(st.one_of(st.just("same"), st.tuples(*[st.integers(0, 2)] * dims)))
    mode = draw(st.sampled_from(["zeros", "zeros", "circular"]))
    channels, outputs = draw(st.sampled_from([(2, 1), (8, 1), (8, 3), (1, 1), (2, 40)]))
    options = {
        "padding": padding,
        "stride": 1 if padding == "same" else stride,
        "dilation": dilation,
        "groups": groups,
    }
    conv = CONVOLUTIONS[dims - 1](
        channels * groups,
        outputs * groups,
        kernel,
        bias=draw(st.booleans()),
        padding_mode=mode,
        **options,
    ).double()
    sizes = draw(st.tuples(*[st.integers(3, 6)] * dims))
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    pads = reach if padding == "same" else [2 * p for p in padding]
    assume(all(size + pad > most for size, pad, most in zip(sizes, pads, reach, strict=True)))
    calls = []
    for scale in draw(st.sampled_from([[1.0], [0.5], [1.0, 2.0]])):
        inputs = torch.randn(3, channels * groups, *sizes, dtype=torch.float64)
        calls.append(LayerCall(inputs, torch.randn_like(conv(inputs)), scale))
    return conv, calls


def samples_of(conv: Any, calls: list[LayerCall]) -> Samples:
    names = ("weight",) if conv.bias is None else ("weight", "bias")
    return ConvKfac().samples(Layer("conv", conv, names), calls, num_terms=3, first=True)


def by_autograd(conv: Any, calls: list[LayerCall]) -> Tensor:
    """The gradient of each example alone, `[n, groups, d_out, d_in]`."""
    found = []
    for example in range(3):
        conv.zero_grad()
        for call in calls:
            (
                conv(call.inputs[example : example + 1])
                * call.gradient[example : example + 1]
                * call.scale
            ).sum().backward()
        matrix = conv.weight.grad.reshape(conv.groups, conv.out_channels // conv.groups, -1)
        if conv.bias is not None:
            matrix = torch.cat([matrix, conv.bias.grad.reshape(conv.groups, -1, 1)], -1)
        found.append(matrix.clone())
    return torch.stack(found)


@settings(max_examples=60)
@given(used(), st.booleans())
def test_per_example_gradients_are_autograds(
    case: tuple[Any, list[LayerCall]], rotated: bool
) -> None:
    conv, calls = case
    truth = by_autograd(conv, calls).transpose(0, 1)
    left = (
        torch.randn(conv.groups, conv.out_channels // conv.groups, 2, dtype=torch.float64)
        if rotated
        else None
    )
    if left is not None:
        truth = left.transpose(-1, -2).unsqueeze(1) @ truth
    if conv.groups == 1:
        truth, left = truth[0], None if left is None else left[0]
    samples = samples_of(conv, calls)
    torch.testing.assert_close(
        samples.per_example_gradients(slice(None), left), truth, rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(
        samples.per_example_gradients(slice(1, 3), left),
        truth[..., 1:3, :, :],
        rtol=1e-10,
        atol=1e-10,
    )


@settings(max_examples=40)
@given(used())
def test_the_output_factor_sums_over_positions(case: tuple[Any, list[LayerCall]]) -> None:
    conv, calls = case
    truth = torch.zeros(
        conv.groups,
        conv.out_channels // conv.groups,
        conv.out_channels // conv.groups,
        dtype=torch.float64,
    )
    for call in calls:
        for position in (
            (call.gradient * call.scale)
            .flatten(2)
            .movedim(1, -1)
            .reshape(-1, conv.groups, conv.out_channels // conv.groups)
        ):
            truth += position.unsqueeze(-1) * position.unsqueeze(-2)
    found = samples_of(conv, calls).grad_moment()
    assert found.total is not None
    torch.testing.assert_close(
        found.total, truth if conv.groups > 1 else truth[0], rtol=1e-10, atol=1e-10
    )
    assert (found.count, found.symmetric) == (3, True)


@settings(max_examples=40)
@given(used())
def test_sums_of_patches_are_those_of_the_unfolded_rows(case: tuple[Any, list[LayerCall]]) -> None:
    samples = samples_of(*case)
    torch.testing.assert_close(
        samples.input_sums(slice(1, 3)), samples.inputs(slice(1, 3)).sum(-2), rtol=1e-10, atol=1e-10
    )


@settings(max_examples=40)
@given(used(), st.sampled_from([1, 2**28]))
def test_the_scale_is_that_of_autograds_gradients(
    case: tuple[Any, list[LayerCall]], chunk_bytes: int
) -> None:
    """Both sides are rotated, whichever comes first, in chunks or at once."""
    conv, calls = case
    truth = by_autograd(conv, calls).transpose(0, 1)
    left, right = (
        torch.randn(conv.groups, side, side, dtype=torch.float64) for side in truth.shape[-2:]
    )
    expected = (left.transpose(-1, -2).unsqueeze(1) @ truth @ right.unsqueeze(1)).square().sum(1)
    if conv.groups == 1:
        expected, left, right = expected[0], left[0], right[0]
    names = ("weight",) if conv.bias is None else ("weight", "bias")
    samples = ConvKfac(chunk_bytes=chunk_bytes).samples(
        Layer("conv", conv, names), calls, num_terms=3, first=True
    )
    found = samples.projected_square(left, right).total
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=60)
@given(used())
def test_rotations_in_bfloat16_move_the_scale_within_their_bound(
    case: tuple[Any, list[LayerCall]],
) -> None:
    conv, calls = case
    samples, truth = samples_of(conv, calls), by_autograd(conv, calls).transpose(0, 1)
    left, right = (
        torch.linalg.qr(torch.randn(conv.groups, side, side, dtype=torch.float64)).Q
        for side in truth.shape[-2:]
    )
    exact = (left.transpose(-1, -2).unsqueeze(1) @ truth @ right.unsqueeze(1)).square().sum(1)
    lengths = (
        (samples.gradients().norm(dim=-1) * samples.inputs().norm(dim=-1)).sum(-1).square().sum(-1)
    )  # of a group
    if conv.groups == 1:
        exact, left, right = exact[0], left[0], right[0]
    found = samples.projected_square(left, right, precision=torch.bfloat16).total
    assert found is not None
    assert found.dtype == torch.float64
    moved = (found.sqrt() - exact.sqrt()).abs().flatten(-2).amax(-1)
    assert bool((moved <= 7 * 2**-8 * lengths.sqrt()).all())


@pytest.mark.parametrize(
    ("kernel", "channels", "outputs", "positions", "expected"),
    [
        ((3, 3), 16, 16, 1024, False),
        ((3, 3), 16, 16, 16, False),
        ((3, 3), 16, 17, 16, True),
        ((3, 3), 7, 16, 1024, True),
        ((3, 3), 8, 16, 1024, False),
        ((3, 3), 1, 1, 1024, False),
        ((1, 1), 16, 16, 1024, True),
    ],
)
def test_one_tap_few_positions_and_few_channels_are_unfolded(
    kernel: tuple[int, ...], channels: int, outputs: int, positions: int, expected: bool
) -> None:
    assert unfolds(kernel, channels, outputs, positions) == expected


def test_scaled_gradients_may_be_known_on_the_device_only() -> None:
    conv, inputs = nn.Conv2d(2, 3, 3), torch.randn(2, 2, 5, 5)
    gradient = torch.randn_like(conv(inputs))
    plain, scaled = (
        samples_of(conv, [LayerCall(inputs, g, s)])
        for g, s in ((gradient * 4, 1.0), (gradient, torch.tensor(4.0)))
    )
    assert torch.equal(plain.per_example_gradients(), scaled.per_example_gradients())
    assert F.mse_loss(plain.grad_moment().total, scaled.grad_moment().total) == 0  # type: ignore[arg-type]
