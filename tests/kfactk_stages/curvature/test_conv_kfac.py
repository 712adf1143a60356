"""ConvKfac, and what it shares with Kfac, against autograd and plain loops in float64."""

import itertools
import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from kfactk import CaptureError, Layer, LayerCall, OptionError
from kfactk.testing import CurvatureLaws, effort
from kfactk.testing._support import truth
from kfactk.testing._support.strategies import (
    CONV,
    MODES,
    Case,
    case_of,
    conv_cases,
    layer_cases,
    linear_cases,
)
from kfactk_stages.curvature.conv_kfac import ConvKfac
from kfactk_stages.curvature.kfac import Kfac
from tests.allocation import LargestAllocation
from tests.covering import covering

laws = settings(deadline=None, max_examples=effort(40))
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
spatials = st.sampled_from(["sud", "sua", "reduce", "stationary"])
chunks = st.sampled_from([1, 500, 5000, 2**28])


class TestConvKfac(CurvatureLaws):
    stage = "conv_kfac"


class TestConvKfacReduce(CurvatureLaws):
    stage: ClassVar = {"name": "conv_kfac", "spatial": "reduce"}


class TestConvKfacSua(CurvatureLaws):
    stage: ClassVar = {"name": "conv_kfac", "spatial": "sua"}

    def single_row_cases(self):
        """Its A leaves out what taps and bias have in common."""
        convs = st.builds(
            nn.Conv2d, st.integers(1, 3), st.integers(1, 3), st.just(1), bias=st.just(False)
        )
        return linear_cases(max_rank=2) | case_of(
            convs, lambda draw, m: (draw(st.integers(1, 3)), m.in_channels, 1, 1)
        )


class TestConvKfacStationary(TestConvKfacSua):
    stage: ClassVar = {"name": "conv_kfac", "spatial": "stationary"}


def layer_of(case: Case, *, frozen_bias: bool = False) -> Layer:
    return Layer(
        "layer", case.module, ("weight", "bias") if case.bias and not frozen_bias else ("weight",)
    )


def samples_of(case, curvature=None, *, index=slice(None), num_terms=1.0, first=True, **kwargs):
    call = LayerCall(case.inputs[index], case.gradient[index])
    return (curvature or ConvKfac()).samples(
        layer_of(case, **kwargs), [call], num_terms=num_terms, first=first
    )


def factors_of(case, curvature, *, index=slice(None), num_terms=1.0, first=True):
    return curvature.factors(
        layer_of(case), samples_of(case, curvature, index=index, num_terms=num_terms, first=first)
    )


def averaged(statistics):
    return {name: s.total / s.count for name, s in statistics.items()}


def fixed(module, *spatial, examples=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    module = module.to(dtype)
    inputs = torch.randn(
        examples, module.in_channels, *spatial, generator=generator, dtype=torch.float64
    ).to(dtype)
    with torch.no_grad():
        gradient = torch.randn(module(inputs).shape, generator=generator, dtype=torch.float64).to(
            dtype
        )
    return Case(module, inputs, gradient)


def explicit_factors(case, spatial, num_terms):
    """A and G from rows read off index by index."""
    a = truth.input_rows(case.module, case.inputs, bias=case.bias)
    g = truth.output_rows(case.module, case.gradient)
    n, t = a.shape[-3], a.shape[-2]
    if spatial == "reduce":
        abar = sum(a[..., i : i + 1, :] for i in range(t)) / t
        gsum = sum(g[..., i : i + 1, :] for i in range(t))
        return truth.moment(abar) / n, truth.moment(gsum) / num_terms
    big_g = truth.moment(g) / (num_terms * t)
    if spatial == "sud" or isinstance(case.module, nn.Linear):
        return truth.moment(a) / n, big_g
    groups, taps = case.module.groups, math.prod(case.module.kernel_size)
    size = case.module.in_channels // groups
    blocks = []
    for k in range(groups):
        x = case.inputs[:, k * size : (k + 1) * size].flatten(2).transpose(1, 2)
        omega = t * truth.moment(x) / (n * x.shape[1])
        images = case.inputs[:, k * size : (k + 1) * size]
        correlation = (
            torch.eye(taps, dtype=omega.dtype)
            if spatial == "sua"
            else explicit_correlation(case.module, images)
        )
        block = truth.dense_kron(omega, correlation)
        blocks.append(
            torch.block_diag(block, torch.tensor([[float(t)]], dtype=omega.dtype))
            if case.bias
            else block
        )
    return (torch.stack(blocks) if groups > 1 else blocks[0]), big_g


def explicit_correlation(module, images):
    """Return `prod_axes r(distance along it) / r(0)` for each pair of taps, pixel by pixel."""
    places = list(itertools.product(*map(range, images.shape[2:])))

    def mean_product(offset):
        pairs = [(s, tuple(i + d for i, d in zip(s, offset, strict=True))) for s in places]
        pairs = [(s, other) for s, other in pairs if other in places]
        return sum(float((images[(..., *s)] * images[(..., *other)]).sum()) for s, other in pairs)

    taps = list(itertools.product(*map(range, module.kernel_size)))
    out = torch.ones(len(taps), len(taps), dtype=images.dtype)
    nearest = mean_product((0,) * len(module.kernel_size))
    for i, one in enumerate(taps):
        for j, other in enumerate(taps):
            for axis, (a, b) in enumerate(zip(one, other, strict=True)):
                offset = [0] * len(one)
                offset[axis] = abs(a - b) * module.dilation[axis]
                out[i, j] *= mean_product(offset) / nearest if nearest else float(a == b)
    return out


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ["same", "valid", (2, 1, 0)])
def test_every_padding_and_mode(dims, mode, padding):
    padding = padding if isinstance(padding, str) else padding[:dims]
    module = CONV[dims](
        2, 2, (2, 3, 2)[:dims], padding=padding, dilation=(3, 1, 1)[:dims], padding_mode=mode
    )
    case = fixed(module, *(4, 5, 3)[:dims])
    torch.testing.assert_close(
        samples_of(case).per_example_gradients(),
        truth.module_gradients(case.module, case.inputs, case.gradient),
    )


@laws
@given(layer_cases())
def test_rows_are_the_patches(case):
    samples = samples_of(case)
    a, g = (
        truth.input_rows(case.module, case.inputs, bias=case.bias),
        truth.output_rows(case.module, case.gradient),
    )
    torch.testing.assert_close(samples.inputs(), a)
    torch.testing.assert_close(samples.gradients(), g)
    torch.testing.assert_close(samples.inputs(slice(0, 1)), a[..., :1, :, :])
    torch.testing.assert_close(samples.gradients(slice(0, 1)), g[..., :1, :, :])
    assert (samples.examples, samples.positions, samples.d_in, samples.d_out) == (
        *a.shape[-3:],
        g.shape[-1],
    )
    assert samples.groups == getattr(case.module, "groups", 1)


@laws
@given(layer_cases(), spatials, chunks, st.sampled_from([1.0, 3.5]))
def test_factors_are_the_loops(case, spatial, chunk_bytes, num_terms):
    curvature = ConvKfac(spatial=spatial, chunk_bytes=chunk_bytes)
    matrices = curvature.assemble(
        layer_of(case), averaged(factors_of(case, curvature, num_terms=num_terms))
    )
    a, g = explicit_factors(case, spatial, num_terms)
    assert set(matrices) == curvature.provides
    torch.testing.assert_close(matrices["A"], a)
    torch.testing.assert_close(matrices["G"], g)


@pytest.mark.parametrize("mode", MODES)
def test_blank_leaves_room_for_the_padding(mode):
    module = nn.Conv2d(2, 3, 1, padding=(2, 0), padding_mode=mode)
    blank = ConvKfac().blank(Layer("layer", module, ("weight", "bias")))
    assert module(blank.inputs).shape == blank.gradient.shape


@laws
@given(conv_cases())
def test_an_unbatched_input_is_one_example(case):
    layer = layer_of(case)
    unbatched = ConvKfac().samples(
        layer, [LayerCall(case.inputs[0], case.gradient[0])], num_terms=1.0, first=True
    )
    torch.testing.assert_close(
        unbatched.per_example_gradients(),
        truth.module_gradients(case.module, case.inputs[:1], case.gradient[:1]),
    )


@laws
@given(linear_cases(), spatials)
def test_linear_layers_are_treated_as_kfac_treats_them(case, spatial):
    own, other = ConvKfac(spatial=spatial), Kfac(spatial="reduce" if spatial == "reduce" else "sud")
    one, two = factors_of(case, own), factors_of(case, other)
    assert set(one) == set(two) == {"A", "G"}
    for name in one:
        assert torch.equal(one[name].total, two[name].total)
        assert one[name].count == two[name].count


class Repeated(nn.Module):
    """A convolution used at two resolutions in one forward."""

    def __init__(self, conv):
        super().__init__()
        self.shared = conv

    def forward(self, x):
        y = self.shared(x).tanh()
        return self.shared(nn.functional.avg_pool2d(y, 2)).flatten(1).sin()


def captured_calls(model, module, inputs, loss):
    """Return the calls of `module` in one forward, with the gradients of `loss(output)`."""
    calls = []
    handle = module.register_forward_hook(
        lambda _, args, output: calls.append((args[0].detach(), output))
    )
    value = loss(model(inputs))
    handle.remove()
    gradients = torch.autograd.grad(value, [output for _, output in calls])
    return [LayerCall(x, g) for (x, _), g in zip(calls, gradients, strict=True)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spatial", ["sud", "sua", "reduce"])
@pytest.mark.parametrize("chunk_bytes", [1, 2**28])
def test_a_shared_module_sums_over_its_uses(groups, bias, spatial, chunk_bytes):
    torch.manual_seed(0)
    model = Repeated(nn.Conv2d(2, 2, 3, padding=1, groups=groups, bias=bias)).double()
    inputs = torch.randn(4, 2, 4, 6, dtype=torch.float64)
    layer = Layer("shared", model.shared, ("weight", "bias") if bias else ("weight",))
    calls = captured_calls(model, model.shared, inputs, lambda output: output.sum())
    assert len(calls) == 2
    curvature = ConvKfac(spatial=spatial, chunk_bytes=chunk_bytes)
    samples = curvature.samples(layer, calls, num_terms=4.0, first=True)
    d = truth.layer_gradients(model, "shared", inputs, inputs, lambda output, _: output.sum())
    torch.testing.assert_close(samples.per_example_gradients(), d)
    torch.testing.assert_close(
        samples.projected_square(None, None).total, truth.projected_square(d, None, None)
    )

    matrices = curvature.assemble(layer, averaged(curvature.factors(layer, samples)))
    a = torch.cat([truth.input_rows(model.shared, call.inputs, bias=bias) for call in calls], -2)
    g = torch.cat([truth.output_rows(model.shared, call.gradient) for call in calls], -2)
    if spatial == "reduce":
        expected = (
            truth.moment(a.mean(-2, keepdim=True)) / 4,
            truth.moment(g.sum(-2, keepdim=True)) / 4,
        )
    else:
        expected = truth.moment(a) / 4, truth.moment(g) / (4 * a.shape[-2])
    torch.testing.assert_close(matrices["G"], expected[1])
    if spatial != "sua":
        torch.testing.assert_close(matrices["A"], expected[0])
    else:
        each = [
            explicit_factors(Case(model.shared, call.inputs, call.gradient), "sua", 4.0)[0]
            for call in calls
        ]
        torch.testing.assert_close(matrices["A"], each[0] + each[1])


def test_uses_of_different_batch_sizes_are_refused():
    module = nn.Conv1d(1, 1, 1)
    calls = [LayerCall(torch.ones(n, 1, 3), torch.ones(n, 1, 3)) for n in (2, 4)]
    with pytest.raises(CaptureError, match=r"'layer'.*\[2, 4\].*exclude=\['layer'\]"):
        ConvKfac().samples(
            Layer("layer", module, ("weight", "bias")), calls, num_terms=1.0, first=True
        )


def test_resolutions_average_in_sua():
    module = nn.Conv2d(2, 3, 3, padding=1)
    cases = [fixed(module, 4, 4, examples=1), fixed(module, 2, 2, examples=3, seed=1)]
    curvature = ConvKfac(spatial="sua")
    one, two = (factors_of(case, curvature) for case in cases)
    a = curvature.assemble(
        layer_of(cases[0]), averaged({name: one[name] + two[name] for name in one})
    )["A"]
    each = [explicit_factors(case, "sua", 1.0)[0] for case in cases]
    torch.testing.assert_close(a, (each[0] + 3 * each[1]) / 4)


def test_sua_is_sud_where_a_pixel_is_a_patch():
    case = fixed(nn.Conv2d(3, 2, 1, bias=False), 4, 5)
    sua, sud = (averaged(factors_of(case, ConvKfac(spatial=spatial))) for spatial in ("sua", "sud"))
    torch.testing.assert_close(sua["Omega"], sud["A"])


def test_sua_keeps_a_small_factor():
    case = fixed(nn.Conv2d(3, 2, 5, padding=2), 6, 6)
    shapes = {
        name: tuple(s.total.shape) for name, s in factors_of(case, ConvKfac(spatial="sua")).items()
    }
    assert shapes == {"Omega": (3, 3), "positions": (), "G": (2, 2)}
    stationary = {
        name: tuple(s.total.shape)
        for name, s in factors_of(case, ConvKfac(spatial="stationary")).items()
    }
    assert stationary == {**shapes, "lags": (8,)}


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_taps_of_constant_images(value):
    """All taps see the same, up to the border; where they see nothing, K is the identity."""
    module = nn.Conv2d(1, 1, (2, 1), bias=False).double()
    images = torch.full((2, 1, 4, 3), value, dtype=torch.float64)
    case = Case(module, images, torch.ones_like(module(images)).detach())
    for spatial, off in (("stationary", 3 / 4), ("sud", 1.0), ("sua", 0.0)):
        curvature = ConvKfac(spatial=spatial)
        k = curvature.assemble(layer_of(case), averaged(factors_of(case, curvature)))["K"]
        expected = torch.tensor([[1.0, off * value], [off * value, 1.0]], dtype=torch.float64)
        torch.testing.assert_close(k, expected)


@laws
@given(conv_cases())
def test_channels_and_taps_are_the_partial_traces_of_patches(case):
    matrices = ConvKfac().assemble(layer_of(case), averaged(factors_of(case, ConvKfac())))
    taps = math.prod(case.module.kernel_size)
    for k in range(case.module.groups) if case.module.groups > 1 else [...]:
        a, c, correlation = (matrices[name][k] for name in ("A", "C", "K"))
        for i in range(len(c)):
            for j in range(len(c)):
                mean = sum(a[i * taps + tap, j * taps + tap] for tap in range(taps)) / taps
                torch.testing.assert_close(c[i, j], mean)
        trace = float(c.trace())
        for one in range(taps):
            for other in range(taps):
                total = float(sum(a[i * taps + one, i * taps + other] for i in range(len(c))))
                assert float(correlation[one, other]) == pytest.approx(
                    total / trace if trace else float(one == other)
                )


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spatial", ["sud", "sua", "reduce", "stationary"])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_half_precision_computes_in_float32(half, spatial, mode):
    case = fixed(
        nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode=mode), 8, 8, examples=8, dtype=half
    )
    exact = Case(case.module.double(), case.inputs.double(), case.gradient.double())
    curvature = ConvKfac(spatial=spatial)
    matrices = curvature.assemble(
        layer_of(case), averaged(factors_of(case, curvature, num_terms=8.0))
    )
    for matrix, expected in zip(
        (matrices["A"], matrices["G"]), explicit_factors(exact, spatial, 8.0), strict=True
    ):
        assert matrix.dtype == torch.float32
        torch.testing.assert_close(matrix.double(), expected, rtol=1e-5, atol=1e-5)


MEMORY_CASES = [
    (nn.Conv2d(4, 8, 3, padding=1), (6, 6)),
    (nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2, padding_mode="circular"), (6, 6)),
    (nn.Conv2d(8, 8, 3, padding=1, groups=8), (6, 6)),
    (nn.Conv2d(4, 2, 1, stride=4, padding=4), (5, 5)),
    (nn.Conv1d(2, 64, 3, groups=2), (9,)),
    (nn.Conv3d(2, 3, 2, padding=1, padding_mode="reflect"), (3, 3, 3)),
]


MEMORY_FORMS = [
    ("sud", torch.contiguous_format),
    ("sud", torch.channels_last),
    ("sua", torch.contiguous_format),
    ("stationary", torch.contiguous_format),
    ("stationary", torch.channels_last),
    ("reduce", torch.contiguous_format),
]


@covering(strength=1, number=range(len(MEMORY_CASES)), form=MEMORY_FORMS)
def test_temporaries_stay_within_chunk_bytes(number, form):
    (module, size), (spatial, memory_format) = MEMORY_CASES[number], form
    case = fixed(module, *size, examples=240)
    if len(size) == 2:
        case = Case(
            module,
            case.inputs.to(memory_format=memory_format),
            case.gradient.to(memory_format=memory_format),
        )
    chunk_bytes = 20_000

    def largest(chunk_bytes):
        curvature = ConvKfac(spatial=spatial, chunk_bytes=chunk_bytes)
        with LargestAllocation() as largest:
            samples = samples_of(case, curvature)
            curvature.factors(layer_of(case), samples)
            samples.projected_square(left, right)
            samples.projected_square_of_channels(left, channels)
        return largest.bytes

    rows = samples_of(case)
    lead = (rows.groups,) if rows.groups > 1 else ()
    left, right = (torch.ones(*lead, d, d, dtype=torch.float64) for d in (rows.d_out, rows.d_in))
    channels = torch.ones(
        *lead,
        module.in_channels // module.groups,
        module.in_channels // module.groups,
        dtype=torch.float64,
    )
    one_example = (
        2 * (rows.positions * (rows.d_in + rows.d_out) + rows.d_in * rows.d_out) * rows.groups * 8
    )
    result = max(rows.d_in, rows.d_out) ** 2 * rows.groups * 8
    assert 0 < largest(chunk_bytes) <= max(chunk_bytes, one_example, result)
    assert largest(2**28) > 2 * max(chunk_bytes, one_example, result)


def test_geometry_is_read_when_the_layer_is_used():
    module = nn.Conv2d(2, 2, 3, padding=1)
    module.stride, module.padding, module.dilation = 2, 2, (2,)
    case = fixed(module, 5, 5)
    torch.testing.assert_close(
        samples_of(case).per_example_gradients(),
        truth.module_gradients(case.module, case.inputs, case.gradient),
    )


def test_options_are_checked():
    with pytest.raises(OptionError, match=r"spatial='expand'.*'sud', 'sua', 'reduce'"):
        ConvKfac(spatial="expand")
    assert ConvKfac(spatial="reduce") == ConvKfac(spatial="reduce") != ConvKfac()
