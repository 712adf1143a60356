"""What the laws draw: cases and their transformations, kinds of layers, modules to be refused."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import Phase, find, given, settings, strategies as st
from hypothesis.errors import NoSuchExample
from torch import nn

from kfactk.testing import effort
from kfactk.testing._support.strategies import (
    CONV,
    LAZY,
    Case,
    foreign_modules,
    kinds,
    layer_cases,
    linear_cases,
    single_row_cases,
    tampered,
)

few = settings(deadline=None, max_examples=effort(40))
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
first = functools.partial(
    find,
    settings=settings(max_examples=4000, database=None, derandomize=True, phases=[Phase.generate]),
)
"""The first one drawn that is as wanted."""
all_cases = st.one_of([kind.cases for kind in kinds()])


@few
@given(all_cases)
def test_a_case_is_a_use_of_its_layer(case):
    for inputs, gradient in case.calls:
        assert case.output(inputs).shape == gradient.shape
        assert len(inputs) == len(case.inputs) > 0
        assert gradient.dtype == torch.float64
    assert next(iter(case.layer.parameters)) == "weight"
    assert set(case.layer.parameters) == {
        name for name, p in case.module.named_parameters() if p.requires_grad
    }
    assert case.layer.bias == (case.bias and case.module.bias.requires_grad)


@few
@given(single_row_cases())
def test_a_single_row_has_one_output_position(case):
    assert case.gradient.numel() == len(case.gradient) * len(case.module.weight)
    assert not case.further


@pytest.mark.parametrize(
    "wanted",
    [
        lambda case: len(case.calls) == 3,
        lambda case: case.inputs.shape[1:] != case.calls[-1][0].shape[1:],
        lambda case: case.bias and not case.layer.bias,
        lambda case: isinstance(case.module, nn.Linear) and case.inputs.ndim == 4,
        lambda case: isinstance(case.module, nn.Conv3d) and case.module.padding_mode == "reflect",
        lambda case: getattr(case.module, "groups", 1) == 3 and case.module.padding == "same",
        lambda case: isinstance(case.module, nn.LayerNorm) and not case.bias,
        lambda case: isinstance(case.module, nn.Embedding) and case.inputs.ndim == 2,
    ],
)
def test_there_are_cases_with(wanted):
    first(all_cases, wanted)


def test_without_being_asked_there_is_one_use_and_nothing_is_frozen():
    plain = settings(max_examples=effort(100), database=None)
    with pytest.raises(NoSuchExample):
        find(
            layer_cases(),
            lambda case: bool(case.further) or case.bias != case.layer.bias,
            settings=plain,
        )


@few
@given(all_cases, st.randoms(use_true_random=False))
def test_rows_are_taken_of_every_use(case, random):
    order = [random.randrange(len(case.inputs)) for _ in range(random.randrange(4))]
    for (inputs, gradient), (before, g) in zip(case.rows(order).calls, case.calls, strict=True):
        assert len(inputs) == len(gradient) == len(order)
        for i, n in enumerate(order):
            assert torch.equal(inputs[i], before[n])
            assert torch.equal(gradient[i], g[n])


def test_precision_and_scale_change_copies():
    case = first(
        linear_cases(most_calls=2, freeze=True),
        lambda c: bool(c.further) and c.bias and not c.layer.bias,
    )
    half = case.to(torch.float16)
    assert (
        {t.dtype for call in half.calls for t in call}
        == {half.module.weight.dtype}
        == {torch.float16}
    )
    assert half.layer.parameters == case.layer.parameters
    assert case.module.weight.dtype == torch.float64
    scaled = case.times(inputs=2.0, gradients=3.0)
    for (x, g), (y, h) in zip(case.calls, scaled.calls, strict=True):
        assert torch.equal(2 * x, y)
        assert torch.equal(3 * g, h)


def test_indices_keep_their_type():
    case = (
        Case(nn.Embedding(2, 1), torch.tensor([0, 1]), torch.ones(2, 1))
        .to(torch.float16)
        .times(gradients=2.0)
    )
    assert case.inputs.dtype == torch.long
    assert torch.equal(case.gradient, torch.full((2, 1), 2.0, dtype=torch.float16))


def test_a_case_prints_what_it_takes_to_make_it_again():
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    case = Case(
        module, torch.ones(4, 3), torch.ones(4, 2), ((torch.ones(4, 5, 3), torch.ones(4, 5, 2)),), 7
    )
    expected = (
        "Case(Linear(in_features=3, out_features=2, bias=True), called [4, 3] -> [4, 2], "
        "[4, 5, 3] -> [4, 5, 2], torch.float32, bias frozen, seed 7)"
    )
    assert repr(case) == expected


def test_foreign_modules_are_many_and_new_each_time():
    one, two = list(foreign_modules()), list(foreign_modules())
    assert len({type(module) for module in one}) > 20
    assert {type(module) for module in one} >= {
        nn.Linear,
        *CONV.values(),
        nn.BatchNorm2d,
        nn.Embedding,
        nn.MultiheadAttention,
    }
    assert not {id(module) for module in one} & {id(module) for module in two}


@pytest.mark.parametrize("plain", [probe for kind in kinds() for probe in kind.probes], ids=str)
def test_tampered_layers_are_no_longer_plain(plain):
    found = dict(tampered(plain))
    names = [name for name, _ in plain.named_parameters()]
    assert len(found) == 4 + 2 * len(names) + (type(plain) in LAZY) + (type(plain) is nn.Linear)
    for what, module in found.items():
        weight = module._parameters.get("weight")
        plain_weight = (
            isinstance(weight, nn.Parameter)
            and not isinstance(weight, nn.UninitializedParameter)
            and weight.is_floating_point()
        )
        bias_is_own = "bias" in module._parameters or not hasattr(plain, "bias")
        assert not (
            type(module) is type(plain)
            and plain_weight
            and bias_is_own
            and "forward" not in vars(module)
        ), what
        assert type(plain).__name__ in what or "MultiheadAttention" in what
    assert [name for name, _ in plain.named_parameters()] == names
