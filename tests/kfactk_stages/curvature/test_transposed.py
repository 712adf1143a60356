"""Transposed convolutions of ConvKfac against autograd and plain loops in float64.

The laws of `test_conv_kfac` draw them too.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from kfactk import Layer, LayerCall
from kfactk.testing import effort
from kfactk.testing._support import truth
from kfactk.testing._support.strategies import TRANSPOSED, transposed_cases
from kfactk_stages.curvature._transposed import phases, window_of
from kfactk_stages.curvature.conv_kfac import ConvKfac
from tests.allocation import LargestAllocation

laws = settings(deadline=None, max_examples=effort(40))
cases = st.one_of([transposed_cases(dims) for dims in TRANSPOSED])
spatials = st.sampled_from(["sud", "sua", "reduce", "stationary"])
F64 = torch.float64


def samples_of(module, inputs, gradient, curvature=None, num_terms=1.0):
    names = tuple(name for name, _ in module.named_parameters())
    layer = Layer("layer", module, names)
    call = LayerCall(inputs, gradient)
    samples = (curvature or ConvKfac()).samples(layer, [call], num_terms=num_terms, first=True)
    return layer, samples


def matrices_of(module, inputs, gradient, curvature, num_terms=1.0):
    layer, samples = samples_of(module, inputs, gradient, curvature, num_terms)
    means = {n: s.total / s.count for n, s in curvature.factors(layer, samples).items()}
    return curvature.assemble(layer, means)


def numbers(module, *spatial, examples=3):
    """Normal numbers for an input, and for the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    module = module.double()
    inputs = torch.randn(examples, module.in_channels, *spatial, generator=generator, dtype=F64)
    with torch.no_grad():
        shape = module(inputs).shape
    return inputs, torch.randn(shape, generator=generator, dtype=F64)


@laws
@given(cases, st.sampled_from([1, 500, 2**28]))
def test_rows_are_what_each_output_sees(case, chunk_bytes):
    curvature = ConvKfac(chunk_bytes=chunk_bytes)
    layer, samples = samples_of(case.module, case.inputs, case.gradient, curvature)
    a = truth.input_rows(case.module, case.inputs, bias=case.bias)
    g = truth.output_rows(case.module, case.gradient)
    torch.testing.assert_close(samples.inputs(), a, rtol=0, atol=0)
    torch.testing.assert_close(samples.gradients(), g, rtol=0, atol=0)
    torch.testing.assert_close(samples.input_sums(), a.sum(-2))
    torch.testing.assert_close(samples.input_moment().total, truth.moment(a))
    torch.testing.assert_close(samples.grad_moment().total, truth.moment(g))
    d = truth.module_gradients(case.module, case.inputs, case.gradient)
    torch.testing.assert_close(samples.per_example_gradients(), d)
    turn = torch.randn(*a.shape[:-3], a.shape[-1], 2, dtype=F64)
    found = samples.input_rotation(turn)(slice(1, None))
    torch.testing.assert_close(found, a[..., 1:, :, :] @ turn.unsqueeze(-3))
    parameters = {name: each.detach() for name, each in case.module.named_parameters()}
    matrix = curvature.matrix(layer, parameters)
    torch.testing.assert_close(matrix, truth.as_matrix(case.module, parameters), rtol=0, atol=0)
    with torch.no_grad():
        outputs = truth.output_rows(case.module, case.module(case.inputs))
    torch.testing.assert_close(a @ matrix.mT.unsqueeze(-3), outputs)


@laws
@given(cases, spatials, st.sampled_from([1.0, 3.5]))
def test_factors_are_the_loops(case, spatial, num_terms):
    curvature = ConvKfac(spatial=spatial)
    found = matrices_of(case.module, case.inputs, case.gradient, curvature, num_terms)
    a, g = explicit_factors(case, spatial, num_terms)
    torch.testing.assert_close(found["A"], a)
    torch.testing.assert_close(found["G"], g)


def explicit_factors(case, spatial, num_terms):
    """A and G from rows read off index by index."""
    module = case.module
    a = truth.input_rows(module, case.inputs, bias=case.bias)
    g = truth.output_rows(module, case.gradient)
    n, t = a.shape[-3], a.shape[-2]
    if spatial == "reduce":
        mean, total = a.mean(-2, keepdim=True), g.sum(-2, keepdim=True)
        return truth.moment(mean) / n, truth.moment(total) / num_terms
    big_g = truth.moment(g) / (num_terms * t)
    if spatial == "sud":
        return truth.moment(a) / n, big_g
    size, taps = module.in_channels // module.groups, math.prod(module.kernel_size)
    blocks = []
    for k in range(module.groups):
        images = case.inputs[:, k * size : (k + 1) * size]
        omega = truth.moment(images.flatten(2).transpose(1, 2)) / n
        k_of_taps = torch.eye(taps, dtype=F64) if spatial == "sua" else correlation(module, images)
        block = truth.dense_kron(omega, k_of_taps)
        border = [torch.tensor([[float(t)]], dtype=F64)] if case.bias else []
        blocks.append(torch.block_diag(block, *border))
    return (torch.stack(blocks) if module.groups > 1 else blocks[0]), big_g


def correlation(module, images):
    """r(distance) / r(0) of each pair of taps, in an image with the stride's zeros between pixels.

    It is multiplied over the axes.
    """
    sizes = [(n - 1) * step + 1 for n, step in zip(images.shape[2:], module.stride, strict=True)]
    spread = images.new_zeros(*images.shape[:2], *sizes)
    for s in itertools.product(*map(range, images.shape[2:])):
        there = tuple(i * step for i, step in zip(s, module.stride, strict=True))
        spread[(..., *there)] = images[(..., *s)]

    def product(axis, distance):
        kept = max(sizes[axis] - distance, 0)
        one = spread.narrow(2 + axis, 0, kept)
        return float((one * spread.narrow(2 + axis, sizes[axis] - kept, kept)).sum())

    found = torch.ones(1, 1, dtype=F64)
    for axis, taps in enumerate(module.kernel_size):
        step, whole = module.dilation[axis], product(axis, 0)
        lags = [product(axis, k * step) / whole if whole else float(k == 0) for k in range(taps)]
        pairs = [[lags[abs(i - j)] for j in range(taps)] for i in range(taps)]
        found = truth.dense_kron(found, torch.tensor(pairs, dtype=F64))
    return found


@pytest.mark.parametrize("extra", [(0, 0), (1, 0), (1, 2)])
def test_an_output_size_given_in_the_call_is_followed(extra):
    module = nn.ConvTranspose2d(2, 3, 3, stride=(2, 3), padding=1).double()
    inputs = torch.randn(3, 2, 3, 2, dtype=F64)
    least = module(inputs).shape[2:]
    size = [n + more for n, more in zip(least, extra, strict=True)]
    gradient = torch.randn(3, 3, *size, dtype=F64)
    expected = []
    for n in range(3):
        output = module(inputs[n : n + 1], output_size=size)
        assert list(output.shape[2:]) == size
        value = (output * gradient[n]).sum()
        parameters = dict(module.named_parameters())
        found = torch.autograd.grad(value, list(parameters.values()))
        expected.append(truth.as_matrix(module, dict(zip(parameters, found, strict=True))))
    _, samples = samples_of(module, inputs, gradient)
    torch.testing.assert_close(samples.per_example_gradients(), torch.stack(expected))
    a, g = samples.inputs(), samples.gradients()
    torch.testing.assert_close(g.mT @ a, torch.stack(expected))
    torch.testing.assert_close(samples.input_moment().total, truth.moment(a))


def test_an_unbatched_input_is_one_example():
    module = nn.ConvTranspose1d(2, 3, 3, stride=2)
    inputs, gradient = numbers(module, 4)
    _, samples = samples_of(module, inputs[0], gradient[0])
    expected = truth.module_gradients(module, inputs[:1], gradient[:1])
    torch.testing.assert_close(samples.per_example_gradients(), expected)


def test_taps_of_disjoint_patches_do_not_correlate():
    """Where the kernel is as large as the stride, "sua" without bias is "sud"."""
    module = nn.ConvTranspose2d(3, 2, 2, stride=2, bias=False)
    inputs, gradient = numbers(module, 3, 4)
    sud, sua = (
        matrices_of(module, inputs, gradient, ConvKfac(spatial=each)) for each in ("sud", "sua")
    )
    torch.testing.assert_close(sud["A"], sua["A"])
    torch.testing.assert_close(sud["K"], torch.eye(4, dtype=F64))
    torch.testing.assert_close(sud["C"], sua["C"])


def test_stride_one_is_a_convolution_with_the_kernel_turned_round():
    module = nn.ConvTranspose2d(2, 3, 3, padding=1, groups=1).double()
    conv = nn.Conv2d(2, 3, 3, padding=1).double()
    inputs, gradient = numbers(module, 4, 5)
    ours, theirs = (matrices_of(each, inputs, gradient, ConvKfac())["A"] for each in (module, conv))
    turned = torch.arange(18).view(2, 9).flip(1).flatten()
    turned = torch.cat([turned, torch.tensor([18])])
    torch.testing.assert_close(ours, theirs[turned][:, turned])


@laws
@given(cases)
def test_phases_hold_each_tap_once_at_most(case):
    """A tap is in one phase; those in none see nothing at any output."""
    sizes, outs = case.inputs.shape[2:], case.gradient.shape[2:]
    window = window_of(case.module, sizes, outs)
    for dim, (size, out) in enumerate(zip(sizes, outs, strict=True)):
        taps = [tap for phase in phases(window, dim, size, out) for tap in phase.taps]
        assert len(set(taps)) == len(taps)
        step, stride = window.dilation[dim], window.stride[dim]
        start = window.padding[dim][0]
        reached = {
            tap
            for tap in range(window.kernel[dim])
            if any(0 <= s * stride - start + tap * step < out for s in range(size))
        }
        assert reached <= set(taps)


@pytest.mark.parametrize("spatial", ["sud", "sua", "reduce", "stationary"])
def test_temporaries_stay_within_chunk_bytes(spatial):
    module = nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1, groups=1).double()
    inputs, gradient = numbers(module, 4, 4, examples=240)
    curvature = ConvKfac(spatial=spatial, chunk_bytes=40_000)
    layer, samples = samples_of(module, inputs, gradient, curvature)
    left, right, channels = (torch.ones(d, d, dtype=F64) for d in (3, samples.d_in, 4))
    with LargestAllocation() as largest:
        curvature.factors(layer, samples)
        samples.projected_square(left, right)
        samples.projected_square_of_channels(left, channels)
    rows = samples.positions * (samples.d_in + samples.d_out) + samples.d_in * samples.d_out
    assert 0 < largest.bytes <= max(40_000, 2 * 8 * rows, 8 * samples.d_in**2)


@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (5, 1)])
def test_a_rotation_in_bfloat16_stays_within_its_bound(kernel, stride):
    module = nn.ConvTranspose2d(4, 6, kernel, stride=stride, padding=1)
    inputs, gradient = (each.float() for each in numbers(module, 3, 3))
    _, samples = samples_of(module.float(), inputs, gradient)
    left, right = (torch.linalg.qr(torch.randn(d, d))[0] for d in (6, samples.d_in))
    exact = samples.projected_square(left, right).total
    low = samples.projected_square(left, right, precision=torch.bfloat16).total
    size = samples.gradients().norm(dim=-1) * samples.inputs().norm(dim=-1)
    bound = 7 * 2**-8 * size.sum(-1).square().sum().sqrt()
    assert 0 < (low.sqrt() - exact.sqrt()).abs().max() < bound
