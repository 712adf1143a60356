"""Embedding: the laws; counts, gradients of the outputs and squares against autograd."""

from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from kfactk import CaptureError, Layer, LayerCall, OptionError
from kfactk.testing import CurvatureLaws, effort
from kfactk.testing._support.strategies import bag_cases, case_of, embedding_cases
from kfactk_stages.curvature._tables import sums_of_runs
from kfactk_stages.curvature.embedding import Embedding

laws = settings(deadline=None, max_examples=effort(30))


def tokens_of(module, shape, generator):
    return torch.randint(module.num_embeddings, shape, generator=generator)


@st.composite
def tables(draw):
    """Embeddings with and without a padding index."""
    rows = draw(st.integers(1, 4))
    padding = draw(st.none() | st.integers(-rows, rows - 1))
    return nn.Embedding(rows, draw(st.integers(1, 3)), padding_idx=padding)


def padded_cases(most_calls=2, most_dims=3):
    shapes = st.lists(st.integers(1, 3), min_size=1, max_size=most_dims).map(tuple)
    return case_of(
        tables(), lambda draw, module: draw(shapes), most_calls=most_calls, fill=tokens_of
    )


class TestEmbedding(CurvatureLaws):
    stage = "embedding"

    def cases(self):
        return embedding_cases(most_calls=2) | padded_cases() | bag_cases(most_calls=2)


class TestEmbeddingSequenceFirst(CurvatureLaws):
    stage: ClassVar = {"name": "embedding", "batch_dim": 1}

    def cases(self):
        return padded_cases()

    def arranged(self, case, tensor):
        lead = tensor.ndim - tensor.is_floating_point()
        return tensor if lead == 1 else tensor.movedim(0, 1)


def layer_of(module):
    return Layer("emb", module, ("weight",))


def samples_of(module, calls, *, terms=1.0, curvature=None, **how):
    curvature = Embedding() if curvature is None else curvature
    calls = [LayerCall(x, g, **how) for x, g in calls]
    return curvature.samples(layer_of(module), calls, num_terms=terms, first=True)


def example_gradients(module, calls):
    """D of each example, `[N, d, V]`, by autograd on one example at a time."""
    found = []
    for n in range(len(calls[0][0])):
        loss = sum((module(x[n : n + 1]) * g[n : n + 1]).sum() for x, g in calls)
        found.append(torch.autograd.grad(loss, module.weight)[0].T)
    return torch.stack(found)


def random_calls(module, *shapes):
    return [
        (
            torch.randint(module.num_embeddings, shape),
            torch.randn(*shape, module.embedding_dim, dtype=torch.float64),
        )
        for shape in shapes
    ]


@laws
@given(padded_cases())
def test_factors_are_counts_and_the_moment_of_gradients(case):
    module, calls = case.module, case.calls
    samples = samples_of(module, calls, terms=2.5)
    counts, g, seen = torch.zeros(module.num_embeddings).double(), 0, 0
    for x, gradient in calls:
        for token, row in zip(x.flatten(), gradient.flatten(0, -2), strict=True):
            if token != module.padding_idx:
                counts[token] += 1
                g, seen = g + torch.outer(row, row), seen + 1
    found = Embedding().factors(layer_of(module), samples)
    torch.testing.assert_close(found["a"].total / found["a"].count, counts / len(case.inputs))
    g = g + torch.zeros(module.embedding_dim, module.embedding_dim).double()
    positions = seen / len(case.inputs)  # of an example, in the mean
    expected = g / positions / 2.5 if seen else g
    torch.testing.assert_close(found["G"].total / found["G"].count, expected)
    torch.testing.assert_close(samples.input_moment().total, torch.diag(counts))


@laws
@given(padded_cases(), st.booleans(), st.sampled_from([1, 2**28]))
def test_squares_are_those_of_whole_gradients(case, turned, chunk_bytes):
    d = example_gradients(case.module, case.calls)
    left = torch.randn(case.module.embedding_dim, 2, dtype=torch.float64) if turned else None
    samples = samples_of(case.module, case.calls, curvature=Embedding(chunk_bytes=chunk_bytes))
    expected = ((d if left is None else left.T @ d) ** 2).sum(0)
    torch.testing.assert_close(samples.projected_square(left, None).total, expected)


def test_equal_tokens_of_one_example_are_added_before_the_square():
    module = nn.Embedding(3, 1).double()
    x, g = torch.tensor([[2, 2, 0], [2, 0, 0]]), torch.ones(2, 3, 1, dtype=torch.float64)
    square = samples_of(module, [(x, g)]).projected_square(None, None)
    assert square.total.tolist() == [[1 + 4, 0, 4 + 1]]


def test_the_padding_row_has_no_part():
    module = nn.Embedding(4, 2, padding_idx=1).double()
    calls = random_calls(module, (5, 6))
    samples = samples_of(module, calls)
    d = example_gradients(module, calls)
    assert not d[..., 1].any()
    torch.testing.assert_close(samples.per_example_gradients(), d)
    factors = Embedding().factors(layer_of(module), samples)
    assert factors["a"].total[1] == 0
    kept = calls[0][1][calls[0][0] != 1]
    found, terms = factors["G"], 1.0
    torch.testing.assert_close(found.total / found.count, kept.T @ kept / terms / (len(kept) / 5))
    assert not samples.projected_square(None, None).total[:, 1].any()


def test_the_length_to_which_examples_are_padded_does_not_matter():
    """Two ranks pad to the longest example of their own, and one process to that of all."""
    module, generator = nn.Embedding(6, 3, padding_idx=0).double(), torch.Generator().manual_seed(0)
    lengths = [2, 3, 1, 7]
    tokens = [torch.randint(1, 6, (n,), generator=generator) for n in lengths]
    rows = [torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in lengths]

    def padded(which, more=0):
        most = max(lengths[n] for n in which) + more
        x, g = torch.zeros(len(which), most).long(), torch.ones(len(which), most, 3).double()
        for place, n in enumerate(which):
            x[place, : lengths[n]], g[place, : lengths[n]] = tokens[n], rows[n]
        samples = samples_of(module, [(x, g)], terms=float(len(which)))
        return Embedding().factors(layer_of(module), samples)

    whole, longer = padded(range(4)), padded(range(4), more=5)
    parts = [padded((0, 1)), padded((2, 3))]
    g = sum(each.T @ each for each in rows) / 4 / (sum(lengths) / 4)
    torch.testing.assert_close(whole["G"].total / whole["G"].count, g)
    for name, each in whole.items():
        joined = parts[0][name] + parts[1][name]
        torch.testing.assert_close(joined.total / joined.count, each.total / each.count)
        torch.testing.assert_close(longer[name].total / longer[name].count, each.total / each.count)


def test_several_calls_of_other_lengths_add():
    module = nn.Embedding(5, 3).double()
    calls = random_calls(module, (4,), (4, 6), (4, 2, 3))
    samples = samples_of(module, calls)
    assert (samples.examples, samples.positions) == (4, 13)
    torch.testing.assert_close(samples.per_example_gradients(), example_gradients(module, calls))
    expected = (example_gradients(module, calls) ** 2).sum(0)
    torch.testing.assert_close(samples.projected_square(None, None).total, expected)


def test_calls_of_different_batch_sizes_are_refused():
    module = nn.Embedding(5, 3).double()
    with pytest.raises(CaptureError, match=r"'emb'.*\[3, 5\]"):
        samples_of(module, random_calls(module, (3, 2), (5, 2)))


def test_batch_dim_that_is_not_there_is_refused():
    module = nn.Embedding(5, 3).double()
    with pytest.raises(CaptureError, match=r"batch_dim=2.*'emb'.*\(3, 2\)"):
        samples_of(module, random_calls(module, (3, 2)), curvature=Embedding(batch_dim=2))


def test_a_single_index_is_one_example():
    module = nn.Embedding(5, 3).double()
    g = torch.randn(3, dtype=torch.float64)
    samples = samples_of(module, [(torch.tensor(4), g)])
    assert (samples.examples, samples.positions) == (1, 1)
    expected = torch.zeros(1, 3, 5, dtype=torch.float64)
    expected[0, :, 4] = g
    torch.testing.assert_close(samples.per_example_gradients(), expected)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, integer):
    module = nn.Embedding(5, 3).double()
    x, g = random_calls(module, (4, 200))[0]
    x, g = x.to(integer), g.to(dtype)
    samples = samples_of(module.to(dtype), [(x, g)], scale=0.5)
    wide = samples_of(module.double(), [(x, g.double() / 2)])
    torch.testing.assert_close(
        samples.projected_square(None, None).total, wide.projected_square(None, None).total.float()
    )
    factors, expected = (Embedding().factors(layer_of(module), each) for each in (samples, wide))
    for name in ("a", "G"):
        found, wide = (each[name].total / each[name].count for each in (factors, expected))
        torch.testing.assert_close(found, wide.float())


def test_rows_that_do_not_occur_cost_nothing_but_their_place():
    rows = 200_000
    module = nn.Embedding(rows, 8)
    x, g = torch.randint(rows, (64, 128)), torch.randn(64, 128, 8)
    samples = samples_of(module, [(x, g)], curvature=Embedding(chunk_bytes=2**18))
    found = samples.projected_square(torch.eye(8), None).total  # `[64, 8, 200000]` would be 400 MB
    assert found.shape == (8, rows)
    torch.testing.assert_close(found.count_nonzero(), x.unique().numel() * torch.tensor(8))


def test_no_examples_and_no_positions_give_shapes():
    module = nn.Embedding(5, 3, padding_idx=0)
    none = samples_of(module, [(torch.zeros(0, dtype=torch.long), torch.zeros(0, 3))])
    factors = Embedding().factors(layer_of(module), none)
    assert factors["a"].total.shape == (5,)
    assert none.projected_square(None, None).total is None
    short = samples_of(module, [(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, 3))])
    assert not short.projected_square(None, None).total.any()
    assert not Embedding().factors(layer_of(module), short)["G"].total.any()


def test_sums_of_runs_follow_the_order():
    rows = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    found = sums_of_runs(rows, torch.tensor([3, 1]), torch.tensor([0, 3, 1, 2]))
    assert found.tolist() == [[11.0], [4.0]]


class Doubled(nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Embedding(3, 2, sparse=True), "use sparse=False"),
        (lambda: nn.Embedding(3, 2, max_norm=1.0), "use max_norm=None"),
        (lambda: nn.Embedding(3, 2, scale_grad_by_freq=True), "use scale_grad_by_freq=False"),
        (lambda: nn.EmbeddingBag(3, 2, mode="max"), "use mode='sum' or mode='mean'"),
        (lambda: nn.EmbeddingBag(3, 2, sparse=True), "use sparse=False"),
        (lambda: Doubled(3, 2), "Doubled is a subclass of Embedding"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Embedding(3, 2)), "is parametrized"),
        (lambda: nn.Embedding(0, 2), "its weight is empty"),
        (lambda: nn.Linear(3, 2), "no curvature for Linear"),
    ],
)
def test_the_reason_against_a_module(make, reason):
    assert reason in Embedding().unsupported(make())


def test_tables_with_another_padding_are_not_the_same():
    assert Embedding().same_call(nn.Embedding(3, 2), nn.Embedding(3, 2))
    assert not Embedding().same_call(nn.Embedding(3, 2), nn.Embedding(3, 2, padding_idx=1))


@pytest.mark.parametrize("options", [{"batch_dim": -1}, {"chunk_bytes": 0}])
def test_options_that_cannot_work_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        Embedding(**options)
