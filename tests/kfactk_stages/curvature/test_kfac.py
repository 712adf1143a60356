"""Kfac: the laws; inputs of any rank, the example dimension, shared modules, options.

Explicit factors are in test_conv_kfac.py.
"""

from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from kfactk import CaptureError, Layer, LayerCall, OptionError
from kfactk.testing import CurvatureLaws, effort
from kfactk.testing._support import truth
from kfactk.testing._support.strategies import linear_cases
from kfactk_stages.curvature.kfac import Kfac

laws = settings(deadline=None, max_examples=effort(30))
BOTH = ("weight", "bias")


class TestKfac(CurvatureLaws):
    stage = "kfac"


class TestKfacReduce(CurvatureLaws):
    stage: ClassVar = {"name": "kfac", "spatial": "reduce"}


class TestKfacSequenceFirst(CurvatureLaws):
    stage: ClassVar = {"name": "kfac", "batch_dim": 1}

    def arranged(self, case, tensor):
        return tensor if tensor.ndim == 2 else tensor.movedim(0, 1)


def averaged(statistics):
    return {name: s.total / s.count for name, s in statistics.items()}


@laws
@given(linear_cases(max_rank=5))
def test_any_rank_has_the_first_dimension_as_examples(case):
    layer = Layer("fc", case.module, BOTH if case.bias else ("weight",))
    samples = Kfac().samples(
        layer, [LayerCall(case.inputs, case.gradient)], num_terms=1.0, first=True
    )
    assert samples.examples == len(case.inputs)
    assert samples.positions == case.inputs[0].numel() // case.inputs.shape[-1]
    torch.testing.assert_close(
        samples.per_example_gradients(),
        truth.module_gradients(case.module, case.inputs, case.gradient),
    )


def test_a_vector_is_one_example():
    module = nn.Linear(3, 2).double()
    a, g = torch.randn(3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    samples = Kfac().samples(
        Layer("fc", module, BOTH), [LayerCall(a, g)], num_terms=1.0, first=True
    )
    assert (samples.examples, samples.positions) == (1, 1)
    torch.testing.assert_close(
        samples.per_example_gradients(), truth.module_gradients(module, a[None], g[None])
    )


def test_batch_dim_on_the_features_is_refused():
    call = LayerCall(torch.ones(2, 3, 4), torch.ones(2, 3, 5))
    with pytest.raises(CaptureError, match=r"batch_dim=2.*'fc'.*\(2, 3, 4\)"):
        Kfac(batch_dim=2).samples(
            Layer("fc", nn.Linear(4, 5), BOTH), [call], num_terms=1.0, first=True
        )


class Recurrent(nn.Module):
    """A linear layer used three times in one forward, the last time on more rows an example."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(3, 3)

    def forward(self, x):
        h = self.shared(self.shared(x).tanh()).tanh()
        return self.shared(torch.stack([h, h**2], 1)).sin().sum(1)


@pytest.mark.parametrize("spatial", ["sud", "reduce"])
def test_a_shared_module_sums_over_its_uses(spatial):
    torch.manual_seed(0)
    model = Recurrent().double()
    inputs, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    loss = nn.CrossEntropyLoss(reduction="sum")
    calls = []
    handle = model.shared.register_forward_hook(
        lambda _, args, output: calls.append((args[0].detach(), output))
    )
    value = loss(model(inputs), labels)
    handle.remove()
    calls = [
        LayerCall(x, g)
        for (x, _), g in zip(calls, torch.autograd.grad(value, [y for _, y in calls]), strict=True)
    ]

    layer, curvature = Layer("shared", model.shared, BOTH), Kfac(spatial=spatial)
    samples = curvature.samples(layer, calls, num_terms=5.0, first=True)
    assert samples.positions == 4
    d = truth.layer_gradients(model, "shared", inputs, labels, loss)
    torch.testing.assert_close(samples.per_example_gradients(), d)
    torch.testing.assert_close(samples.projected_square(None, None).total, (d**2).sum(0))
    a = torch.cat([truth.input_rows(model.shared, call.inputs, bias=True) for call in calls], 1)
    g = torch.cat([truth.output_rows(model.shared, call.gradient) for call in calls], 1)
    if spatial == "reduce":
        expected = {
            "A": truth.moment(a.mean(1, keepdim=True)) / 5,
            "G": truth.moment(g.sum(1, keepdim=True)) / 5,
        }
    else:
        expected = {"A": truth.moment(a) / 5, "G": truth.moment(g) / 20}
    torch.testing.assert_close(averaged(curvature.factors(layer, samples)), expected)


def test_uses_of_different_batch_sizes_are_refused():
    calls = [LayerCall(torch.ones(n, 2), torch.ones(n, 1)) for n in (3, 5)]
    with pytest.raises(CaptureError, match=r"'fc'.*\[3, 5\]"):
        Kfac().samples(Layer("fc", nn.Linear(2, 1), BOTH), calls, num_terms=1.0, first=True)


def test_deep_linear_network_is_exact():
    """With T = 1, linear layers and unit Gaussian outputs, A kron G is the Fisher information."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2), nn.Linear(2, 3)).double()
    inputs = torch.randn(6, 3, dtype=torch.float64)
    for name in ("0", "1", "2"):
        module = model.get_submodule(name)
        layer = Layer(name, module, BOTH if module.bias is not None else ("weight",))
        sums = None
        gradients = []
        for c in range(3):
            calls = []
            handle = module.register_forward_hook(
                lambda _, args, output, calls=calls: calls.append((args[0].detach(), output))
            )
            value = model(inputs)[:, c].sum()
            handle.remove()
            (g,) = torch.autograd.grad(value, [calls[0][1]])
            samples = Kfac().samples(
                layer, [LayerCall(calls[0][0], g)], num_terms=6.0, first=c == 0
            )
            factors = Kfac().factors(layer, samples)
            sums = factors if sums is None else {key: sums[key] + factors[key] for key in sums}
            gradients.append(
                truth.layer_gradients(
                    model, name, inputs, inputs, lambda output, _, c=c: output[:, c].sum()
                )
            )
        matrices = averaged(sums)
        fisher = truth.dense_fisher(torch.cat(gradients), 6.0)
        torch.testing.assert_close(truth.dense_kron(matrices["A"], matrices["G"]), fisher)


def test_no_copy_of_a_plain_input():
    a, g = torch.randn(4, 3), torch.randn(4, 2)
    samples = Kfac().samples(
        Layer("fc", nn.Linear(3, 2, bias=False), ("weight",)),
        [LayerCall(a, g)],
        num_terms=1.0,
        first=True,
    )
    assert samples.inputs().data_ptr() == a.data_ptr()
    assert samples.gradients().data_ptr() == g.data_ptr()


@pytest.mark.parametrize("rows", [0, 1])
def test_examples_or_rows_may_be_none(rows):
    layer = Layer("fc", nn.Linear(3, 2), BOTH)
    for shape in ((0, rows), (rows, 0)):
        samples = Kfac().samples(
            layer,
            [LayerCall(torch.ones(*shape, 3), torch.ones(*shape, 2))],
            num_terms=1.0,
            first=True,
        )
        for statistic in Kfac().factors(layer, samples).values():
            assert statistic.total is None or torch.equal(
                statistic.total, torch.zeros_like(statistic.total)
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatial": "sua"}, "Kfac: spatial='sua'.*'sud', 'reduce'"),
        ({"batch_dim": -1}, "batch_dim=-1.*from the front"),
        ({"batch_dim": True}, "batch_dim=True"),
        ({"batch_dim": 1.0}, "batch_dim=1.0"),
        ({"chunk_bytes": 0}, "chunk_bytes=0.*at least 1"),
        ({"chunk_bytes": 1e6}, "chunk_bytes=1000000.0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(OptionError, match=message):
        Kfac(**options)
