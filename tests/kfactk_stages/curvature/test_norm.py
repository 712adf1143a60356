"""Norm: the laws; scale and shift of every kind of layer against autograd, example by example."""

import copy
import inspect
import math
import re
from typing import ClassVar

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from kfactk import CaptureError, Layer, LayerCall, OptionError
from kfactk.testing import CurvatureLaws
from kfactk.testing._support.strategies import case_of, norm_cases
from kfactk_stages.curvature.norm import Norm, default_eps

IMAGES = {
    1: (nn.BatchNorm1d, nn.InstanceNorm1d),
    2: (nn.BatchNorm2d, nn.InstanceNorm2d),
    3: (nn.BatchNorm3d, nn.InstanceNorm3d),
}
EVERY = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    *(cls for classes in IMAGES.values() for cls in classes),
)
BOTH = ("weight", "bias")


def sizes(most, *, least=0, low=1):
    return st.lists(st.integers(low, 3), min_size=least, max_size=most).map(tuple)


def evaluated(module, seed=0):
    """A copy in evaluation mode, with running statistics that are none of a new module."""
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in module.named_buffers():
        if name != "num_batches_tracked":
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module.eval()


@st.composite
def image_norms(draw):
    """Batch and instance normalisation in evaluation mode, where no example sees another one."""
    axes = draw(st.sampled_from([1, 2, 3]))
    cls = draw(st.sampled_from(IMAGES[axes]))
    tracked = draw(st.booleans()) or cls is IMAGES[axes][0]
    eps = draw(st.sampled_from([1e-5, 0.3]))
    module = cls(draw(st.integers(1, 3)), eps=eps, affine=True, track_running_stats=tracked)
    return evaluated(module, draw(st.integers(0, 9)))


def group_norms():
    return st.builds(
        lambda groups, each, eps: nn.GroupNorm(groups, groups * each, eps=eps),
        st.integers(1, 3),
        st.integers(1, 2),
        st.sampled_from([1e-5, 0.3]),
    )


def trailing_norms():
    layer = st.builds(nn.LayerNorm, sizes(2, least=1, low=2), bias=st.booleans(), eps=st.just(1e-3))
    root = st.builds(nn.RMSNorm, sizes(2, least=1, low=2), eps=st.sampled_from([1e-5, 0.3]))
    return layer | root


def shapes(draw, module):
    """A batch of inputs."""
    n = draw(st.integers(1, 3))
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return (n, *draw(sizes(2)), *module.normalized_shape)
    channels = getattr(module, "num_channels", None) or module.num_features
    if isinstance(module, nn.GroupNorm):
        alone = module.num_groups == channels  # one number would have no deviation
        return (n, channels, *draw(sizes(2, least=alone, low=1 + alone)))
    axes = next(axes for axes, classes in IMAGES.items() if isinstance(module, classes))
    return (n, channels, *(draw(st.integers(2, 3)) for _ in range(axes)))


def cases():
    modules = trailing_norms() | group_norms() | image_norms()
    return case_of(modules, shapes, most_calls=2, freeze=True)


class TestNorm(CurvatureLaws):
    stage = "norm"
    covers: ClassVar = EVERY

    def cases(self):
        return cases() | norm_cases(most_calls=2, freeze=True)


class TestNormSequenceFirst(CurvatureLaws):
    stage: ClassVar = {"name": "norm", "batch_dim": 1}
    covers: ClassVar = EVERY

    def cases(self):
        return case_of(trailing_norms(), shapes, most_calls=2)

    def arranged(self, case, tensor):
        lead = tensor.ndim - len(case.module.normalized_shape)
        return tensor if lead == 1 else tensor.movedim(0, 1)


def layer_of(module, *, shift=True):
    names = [name for name in BOTH if getattr(module, name, None) is not None]
    return Layer("norm", module, tuple(names if shift else names[:1]))


def filled(module, dtype=torch.float64):
    """A copy with normal numbers for its parameters."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.to(dtype)


def example_gradients(module, calls, parameters):
    """d of each example, `[C, N, k]`: autograd on the affine map alone, one example at a time.

    `calls` are pairs of inputs and output gradients. What is normalised is what the module itself
    computes with a weight of 1 and without a shift.
    """
    plain = copy.deepcopy(module)
    with torch.no_grad():
        plain.weight.fill_(1)
        if getattr(plain, "bias", None) is not None:
            plain.bias.fill_(0)
        normalised = [plain(x) for x, _ in calls]

    def spread(leaf, x_hat):
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            return leaf
        return leaf.view(-1, *[1] * (x_hat.ndim - 2))

    found = []
    for n in range(len(normalised[0])):
        leaves = [torch.zeros_like(module.weight, requires_grad=True) for _ in parameters]
        whole = 0
        for x_hat, (_, g) in zip(normalised, calls, strict=True):
            y = spread(leaves[0], x_hat) * x_hat[n : n + 1]
            if len(leaves) > 1:
                y = y + spread(leaves[1], x_hat)
            whole = whole + (y * g[n : n + 1]).sum()
        found.append(torch.stack(torch.autograd.grad(whole, leaves), -1).flatten(0, -2))
    return torch.stack(found, 1)


def dense_blocks(d, terms):
    """`(1/M) sum_n d d^T`, unit by unit, of `[C, N, k]`."""
    return torch.stack([sum(torch.outer(each, each) for each in unit) / terms for unit in d])


def check(module, calls, *, shift=True, terms=3.5, curvature=None, **how):
    """Per-example gradients and U against autograd and a plain sum."""
    curvature = Norm() if curvature is None else curvature
    layer = layer_of(module, shift=shift)
    expected = example_gradients(module, calls, layer.parameters)
    samples = curvature.samples(
        layer, [LayerCall(x, g, **how) for x, g in calls], num_terms=terms, first=True
    )
    torch.testing.assert_close(samples.per_example_gradients().squeeze(-2), expected)
    u = curvature.factors(layer, samples)["U"]
    torch.testing.assert_close(u.total / u.count, dense_blocks(expected, terms))
    return layer, samples


def untracked(module):
    """The module, told not to track the running statistics that it has."""
    module.track_running_stats = False
    return module


NORMS = [
    (nn.BatchNorm1d(3), (5, 3)),
    (nn.BatchNorm1d(3, eps=0.2), (4, 3, 6)),
    (nn.BatchNorm2d(3, momentum=None), (4, 3, 2, 5)),
    (nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 5)),
    (nn.BatchNorm3d(2, momentum=0.7), (3, 2, 2, 3, 2)),
    (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (3, 3, 2, 4)),
    (untracked(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)), (3, 3, 2, 4)),
    (untracked(nn.BatchNorm2d(3)), (4, 3, 2, 5)),
    (nn.GroupNorm(2, 4), (3, 4, 5)),
    (nn.LayerNorm((2, 3)), (3, 4, 2, 3)),
    (nn.RMSNorm(3, eps=0.1), (3, 2, 3)),
]
"""Layers with the shape of a batch; tests take copies."""
norms = pytest.mark.parametrize(("module", "shape"), NORMS, ids=str)


@pytest.mark.parametrize("mode", [True, False])
@norms
def test_an_example_gets_what_flows_through_its_rows(module, shape, mode):
    module = filled(evaluated(module)).train(mode)
    x, g = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    truth = copy.deepcopy(module)
    layer, samples = check(module, [(2 * x + 3, g)])
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name

    parameters = list(truth.parameters())
    whole = torch.autograd.grad((truth(2 * x + 3) * g).sum(), parameters)
    expected = Norm().matrix(layer, dict(zip(layer.parameters, whole, strict=True)))
    torch.testing.assert_close(samples.per_example_gradients().sum(1), expected)


@norms
def test_a_call_remembers_the_mode_of_its_module(module, shape):
    module = filled(evaluated(module)).train()
    calls = [tuple(torch.randn(shape, dtype=torch.float64) for _ in range(2))]
    layer, then = check(module, calls)
    call = LayerCall(*calls[0], training=True)
    module.eval()
    now = Norm().samples(layer, [call], num_terms=1.0, first=True)
    assert torch.equal(now.per_example_gradients(), then.per_example_gradients())
    check(module, calls, training=False)


@norms
def test_a_weight_of_zero_loses_nothing(module, shape):
    module = copy.deepcopy(module).double().train()
    nn.init.zeros_(module.weight)
    check(module, [tuple(torch.randn(shape, dtype=torch.float64) for _ in range(2))])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@norms
def test_half_precision_is_computed_in_float32(module, shape, dtype):
    low = filled(module, torch.float32).train().to(dtype)
    x, g = (10 + torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    samples = Norm(chunk_bytes=64).samples(
        layer_of(low), [LayerCall(x, g)], num_terms=1.0, first=True
    )
    expected = example_gradients(
        copy.deepcopy(low).double(), [(x.double(), g.double())], layer_of(low).parameters
    )
    found = samples.per_example_gradients().squeeze(-2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_batch_statistics_do_not_depend_on_chunks():
    module, x = nn.BatchNorm2d(3).half(), torch.randn(11, 3, 2, 2).half()
    calls = [LayerCall(x + torch.arange(11).half().view(-1, 1, 1, 1), torch.randn_like(x))]
    whole, parts = (
        Norm(chunk_bytes=size).samples(layer_of(module), calls, num_terms=1.0, first=True)
        for size in (2**20, 100)
    )
    torch.testing.assert_close(parts.per_example_gradients(), whole.per_example_gradients())


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    ("module", "shape"), [each for each in NORMS if not isinstance(each[0], nn.RMSNorm)], ids=str
)
def test_a_frozen_shift_is_left_out(module, shape, mode):
    module = filled(module).train(mode)
    module.bias.requires_grad_(False)
    calls = [tuple(torch.randn(shape, dtype=torch.float64) for _ in range(2))]
    _, samples = check(module, calls, shift=False)
    assert samples.per_example_gradients().shape[-2:] == (1, 1)


def test_several_calls_of_other_lengths_add():
    module = filled(nn.LayerNorm(3))
    shapes = [(4, 3), (4, 6, 3), (4, 2, 2, 3)]
    calls = [tuple(torch.randn(shape, dtype=torch.float64) for _ in range(2)) for shape in shapes]
    _, samples = check(module, calls)
    assert samples.positions == 11
    module = filled(nn.BatchNorm1d(3)).train()
    shapes = [(4, 3), (4, 3, 5)]
    check(
        module, [tuple(torch.randn(each, dtype=torch.float64) for _ in range(2)) for each in shapes]
    )


def test_calls_of_different_batch_sizes_are_refused():
    calls = [LayerCall(torch.ones(n, 2), torch.ones(n, 2)) for n in (3, 5)]
    with pytest.raises(CaptureError, match=r"'norm'.*\[3, 5\]"):
        Norm().samples(layer_of(nn.LayerNorm(2)), calls, num_terms=1.0, first=True)


def test_batch_dim_on_the_features_is_refused():
    call = LayerCall(torch.ones(2, 3, 4), torch.ones(2, 3, 4))
    with pytest.raises(CaptureError, match=r"batch_dim=2.*'norm'.*\(2, 3, 4\)"):
        Norm(batch_dim=2).samples(layer_of(nn.LayerNorm(4)), [call], num_terms=1.0, first=True)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.InstanceNorm1d(3, affine=True), (3, 5)),
        (nn.InstanceNorm2d(3, affine=True), (3, 2, 5)),
        (nn.InstanceNorm3d(3, affine=True), (3, 2, 2, 3)),
        (nn.LayerNorm((2, 3)), (2, 3)),
        (nn.RMSNorm(3, eps=0.1), (3,)),
    ],
    ids=str,
)
def test_an_input_without_batch_is_one_example(module, shape):
    module = filled(module)
    x, g = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    layer = layer_of(module)
    samples = Norm().samples(layer, [LayerCall(x, g)], num_terms=1.0, first=True)
    assert samples.examples == 1
    expected = example_gradients(module, [(x[None], g[None])], layer.parameters)
    torch.testing.assert_close(samples.per_example_gradients().squeeze(-2), expected)


def test_any_memory_format_is_taken():
    x, g = (torch.randn(4, 6, 3, 2, dtype=torch.float64) for _ in range(2))
    for module in (nn.BatchNorm2d(6), nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True)):
        module = filled(module)
        last = torch.channels_last
        check(module, [(x.contiguous(memory_format=last), g)])
        check(module, [(x, g.contiguous(memory_format=last))])
        check(module, [(x.movedim(3, 2).contiguous().movedim(2, 3), g)])


@norms
def test_no_examples_give_shapes(module, shape):
    module = copy.deepcopy(module).train()
    none = LayerCall(torch.ones(0, *shape[1:]), torch.ones(0, *shape[1:]))
    samples = Norm().samples(layer_of(module), [none], num_terms=2.0, first=True)
    u = Norm().factors(layer_of(module), samples)["U"]
    assert (u.total, u.count) == (None, 2.0)


@pytest.mark.parametrize("cls", EVERY)
def test_its_blank_call_is_valid_in_training(cls):
    takes = inspect.signature(cls).parameters
    arguments = {"affine": True} if "affine" in takes else {}
    module = cls(2, 2) if cls is nn.GroupNorm else cls(2, **arguments)
    call = Norm().blank(layer_of(module))
    assert module.train()(call.inputs).shape == call.gradient.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_eps_that_torch_chooses_is_followed(dtype):
    module = nn.RMSNorm(4).to(dtype)
    x = (torch.randn(3, 4) * math.sqrt(torch.finfo(dtype).eps)).clamp(min=1e-6).to(dtype)
    call = LayerCall(x, torch.ones_like(x))
    found = Norm().samples(layer_of(module), [call], num_terms=1.0, first=True).inputs()
    torch.testing.assert_close(
        found[..., 0, 0].T.to(dtype), module(x).detach(), rtol=0.01, atol=1e-3
    )
    assert default_eps(torch.float32) == torch.finfo(torch.float32).eps


class Doubled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.SyncBatchNorm(2), "statistics of all ranks.*nn.BatchNorm"),
        (lambda: Doubled(2), "Doubled is a subclass of LayerNorm"),
        (lambda: nn.LazyBatchNorm2d(), "not initialised yet; run one forward"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.LayerNorm(2)), "its weight is param"),
        (lambda: nn.BatchNorm2d(2, affine=False), "it has no weight"),
        (lambda: nn.LayerNorm(2, elementwise_affine=False), "it has no weight"),
        (lambda: nn.Linear(2, 2), "no curvature for Linear"),
        (lambda: nn.Conv2d(2, 2, 1), "no curvature for Conv2d"),
    ],
)
def test_the_reason_against_a_module(make, reason):
    assert re.search(reason, Norm().unsupported(make()))


def test_a_lazy_layer_is_covered_once_it_has_run():
    module = nn.LazyBatchNorm2d()
    module(torch.ones(2, 3, 2, 2))
    assert Norm().unsupported(module) is None


def test_tied_layers_with_other_running_statistics_are_not_the_same():
    one, other = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    assert not Norm().same_call(one, other)
    other.running_mean, other.running_var = one.running_mean, one.running_var
    assert Norm().same_call(one, other)
    assert Norm().same_call(nn.LayerNorm(2), nn.LayerNorm(2))
    assert not Norm().same_call(nn.LayerNorm(2), nn.LayerNorm(2, eps=0.1))


@pytest.mark.parametrize("options", [{"batch_dim": -1}, {"batch_dim": 0.5}, {"chunk_bytes": 0}])
def test_options_that_cannot_work_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        Norm(**options)
