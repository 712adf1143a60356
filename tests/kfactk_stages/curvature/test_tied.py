"""Embeddings tied to output layers: the laws; moments and squares against autograd."""

import attrs
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from kfactk import CaptureError, Layer, LayerCall
from kfactk.testing import CurvatureLaws, effort
from kfactk.testing._support.strategies import Case, case_of
from kfactk_stages.curvature.embedding import Embedding
from tests.allocation import LargestAllocation

F64 = torch.float64
laws = settings(deadline=None, max_examples=effort(30))


class Table(nn.Embedding):
    """A table as both modules use it, so that a case of the laws can call it."""

    def forward(self, x):
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class TiedCase(Case):
    """A table that an output layer has too."""

    @property
    def layer(self):
        return tied(self.module)


def tied(table, bias=False):
    """The layer of a table and of an output layer with the same weight."""
    head = nn.Linear(table.embedding_dim, table.num_embeddings, bias=bias, device="meta")
    head.weight = table.weight
    return Layer("emb", table, ("weight",), sites=(table, head))


def layer_calls(layer, calls, scales=None):
    head, scales = layer.sites[1], [1.0] * len(calls) if scales is None else scales
    return [
        LayerCall(x, g, scale, module=head if x.is_floating_point() else layer.module)
        for (x, g), scale in zip(calls, scales, strict=True)
    ]


@st.composite
def tables(draw):
    rows = draw(st.integers(1, 5))
    return Table(
        rows, draw(st.integers(2, 3)), padding_idx=draw(st.none() | st.integers(0, rows - 1))
    )


def of_either_kind(module, shape, generator):
    if torch.rand((), generator=generator) < 0.5:
        return torch.randn(*shape, module.embedding_dim, generator=generator, dtype=F64)
    return torch.randint(module.num_embeddings, shape, generator=generator)


def tied_cases():
    """Draw one to three calls of either kind, of the same examples and of their own lengths."""
    shapes = st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple)
    cases = case_of(tables(), lambda draw, _: draw(shapes), most_calls=3, fill=of_either_kind)
    return cases.map(lambda case: TiedCase(**attrs.asdict(case, recurse=False)))


class TestTied(CurvatureLaws):
    stage = "embedding"

    def cases(self):
        return tied_cases()

    def samples(self, case, *, scales=None, num_terms=None, first=True):
        calls = layer_calls(case.layer, case.calls, scales)
        num_terms = float(len(case.inputs)) if num_terms is None else num_terms
        return self.curvature.samples(case.layer, calls, num_terms=num_terms, first=first)


def samples_of(table, calls, **options):
    layer = tied(table)
    curvature = Embedding(**options)
    return curvature.samples(layer, layer_calls(layer, calls), num_terms=2.5, first=True)


def random_calls(table, examples=3, lengths=(4, 2)):
    """A lookup and an output layer."""
    tokens = torch.randint(table.num_embeddings, (examples, lengths[0]))
    hidden = torch.randn(examples, lengths[1], table.embedding_dim, dtype=F64)
    return [(x, torch.randn(table(x).shape, dtype=F64)) for x in (tokens, hidden)]


@laws
@given(tied_cases())
def test_factors_are_sums_over_positions_of_both_kinds(case):
    table, layer = case.module, case.layer
    a, g = torch.zeros(table.num_embeddings).double(), 0.0
    for x, gradient in case.calls:
        width = gradient.shape[-1]
        rows = x.reshape(-1, table.embedding_dim) if x.is_floating_point() else x.flatten()
        for row, grad in zip(rows, gradient.reshape(-1, width), strict=True):
            if x.is_floating_point():
                a += row.square().sum() * grad.square()
                g = g + grad.square().sum() * torch.outer(row, row)
            elif row != table.padding_idx:
                a[row] += grad.square().sum()
                g = g + torch.outer(grad, grad)
    samples = samples_of(table, case.calls)
    factors = Embedding().factors(layer, samples)
    assert all(factor.count == 2.5 for factor in factors.values())
    torch.testing.assert_close(factors["a"].total, a)
    torch.testing.assert_close(factors["G"].total, g + torch.zeros_like(factors["G"].total))
    assert not Embedding().input_factors(layer, samples)
    means = {name: factor.total / factor.count for name, factor in factors.items()}
    assembled = Embedding().assemble(layer, means)
    expected = g / a.sum() if a.any() else torch.zeros_like(means["G"])
    torch.testing.assert_close(assembled["G"], expected)


def test_the_product_of_both_kinds_is_in_the_square():
    table = Table(3, 1).double()
    tokens, hidden = torch.tensor([[2, 0]]), torch.ones(1, 1, 1, dtype=F64)
    calls = [
        (tokens, torch.tensor([[[5.0], [7.0]]], dtype=F64)),
        (hidden, torch.tensor([[[-6.0, 1.0, 4.0]]], dtype=F64)),
    ]
    square = samples_of(table, calls).projected_square(None, None)
    assert square.total.tolist() == [[(7 - 6) ** 2, 1, (5 + 4) ** 2]]


@pytest.mark.parametrize("chunk_bytes", [1, 700, 2**28])
@pytest.mark.parametrize("right", [False, True])
def test_squares_in_slices_are_those_of_whole_gradients(chunk_bytes, right):
    table = Table(11, 3, padding_idx=2).double()
    calls = [*random_calls(table), *random_calls(table, lengths=(1, 3))]
    d = sum(
        torch.stack(
            [
                torch.autograd.grad((table(x[n : n + 1]) * g[n : n + 1]).sum(), table.weight)[0].T
                for n in range(3)
            ]
        )
        for x, g in calls
    )
    left = torch.randn(3, 2, dtype=F64)
    other = torch.randn(11, 4, dtype=F64) if right else None
    found = samples_of(table, calls, chunk_bytes=chunk_bytes).projected_square(left, other)
    whole = left.T @ d if other is None else left.T @ d @ other
    torch.testing.assert_close(found.total, whole.square().sum(0))


def test_no_temporary_holds_the_gradients_of_all_examples():
    rows, examples = 20_000, 8
    table = Table(rows, 8)
    calls = [(x, g.float()) for x, g in random_calls(table.double(), examples, (16, 4))]
    calls = [(x.float() if x.is_floating_point() else x, g) for x, g in calls]
    samples = samples_of(table.float(), calls, chunk_bytes=2**18)
    with LargestAllocation() as largest:
        samples.projected_square(torch.eye(8), None)
        samples.moments()
    assert largest.bytes <= 4 * 8 * rows  # the result; [examples, 8, rows] is 8 times as large


def test_calls_of_one_kind_alone_are_enough():
    table = Table(5, 3).double()
    lookup, head = random_calls(table)
    for calls in ([lookup], [head]):
        samples = samples_of(table, calls)
        x, g = calls[0]
        (expected,) = torch.autograd.grad((table(x) * g).sum(), table.weight)
        torch.testing.assert_close(samples.per_example_gradients().sum(0), expected.T)
        # What the probe of the layout reads.
        assert torch.equal(samples.call_gradients().flatten(), g.flatten())


def test_calls_of_different_batch_sizes_are_refused():
    table = Table(5, 3).double()
    lookup, _ = random_calls(table, examples=3)
    _, head = random_calls(table, examples=4)
    with pytest.raises(CaptureError, match=r"'emb'.* 3 examples.* 4 rows.*exclude=\['emb'\]"):
        samples_of(table, [lookup, head])


def test_sequence_first_models_are_read_with_batch_dim():
    table = Table(5, 3).double()
    calls = random_calls(table)
    first = [(x.transpose(0, 1), g.transpose(0, 1)) for x, g in calls]
    found = samples_of(table, first, batch_dim=1).per_example_gradients()
    torch.testing.assert_close(found, samples_of(table, calls).per_example_gradients())


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (nn.Linear(2, 3), True),
        (nn.Linear(2, 3, bias=False), True),
        (nn.EmbeddingBag(3, 2), False),
        (nn.Conv1d(2, 3, 1), False),
        (type("Named", (nn.Linear,), {})(2, 3), True),
        (type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * x})(2, 3), False),
    ],
)
def test_which_modules_may_share_a_table(other, same):
    assert Embedding().same_call(nn.Embedding(3, 2), other) == same
    assert not Embedding().same_call(nn.EmbeddingBag(3, 2), nn.Linear(2, 3))
