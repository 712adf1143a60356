"""Outputs of a call: views are read as parts of their base, and what is made from what is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kfactk.capture.outputs import OutputView, RecordedOutput, traced_outputs


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("laid", [False, True])
def test_the_gradient_of_a_view_is_its_part_of_the_base(laid: bool) -> None:
    base = leaf(3, 4, 5) * 2
    view = base[1:, :, ::2].transpose(0, 2)
    gradient = torch.arange(60.0).view(3, 4, 5)
    expected = gradient[1:, :, ::2].transpose(0, 2)
    if laid:  # other strides than the base has
        gradient = gradient.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(OutputView.of(view, base).read(gradient), expected)


def test_an_output_that_is_no_view_is_read_as_it_is() -> None:
    gradient = torch.randn(2)
    assert RecordedOutput(gradient.dtype, gradient.shape).read(gradient) is gradient


def test_a_view_of_the_output_has_the_edge_of_its_base() -> None:
    base = leaf(3, 4).exp()
    [record], [edge] = traced_outputs([base.T], frozenset())
    assert edge.node is base.grad_fn
    assert record.shape == (4, 3)
    assert record.view is not None


def test_an_output_made_from_another_is_known() -> None:
    inner = leaf(3).exp()
    outer, beside = inner.tanh(), inner.sum()
    records, _ = traced_outputs([outer, inner, beside], frozenset())
    assert [each.whole for each in records] == [False, True, False]


def test_outputs_of_one_node_are_apart() -> None:
    one, other = leaf(2, 3).unbind(0)
    records, edges = traced_outputs([one, other, other + one], frozenset())
    assert [each.whole for each in records] == [True, True, False]
    assert edges[0].node is edges[1].node
    records, _ = traced_outputs([one, other], frozenset())
    assert [each.whole for each in records] == [False, False]


def test_what_made_the_inputs_is_not_inside_a_call() -> None:
    before = leaf(3).exp()
    cell = nn.LSTMCell(3, 3).double()
    first = cell(before.unsqueeze(0))
    second = cell(first[0], first)
    sources = frozenset(each.grad_fn for each in first if each.grad_fn is not None)
    records, _ = traced_outputs([second[0], second[1]], sources)
    assert [each.whole for each in records] == [False, True]
    nested, _ = traced_outputs([second[0], first[1]], sources)
    assert [each.whole for each in nested] == [False, False]
