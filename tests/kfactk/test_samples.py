"""Samples equal plain loops over per-example matrices, in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from kfactk import Samples, Statistic, project
from kfactk.samples import gram, working_dtype
from kfactk.testing._support import truth
from tests.allocation import LargestAllocation

laws = settings(deadline=None, max_examples=40)
dims = st.integers(1, 4)
leads = st.sampled_from([(), (2,)])
chunks = st.sampled_from([1, 100, 1000, 2**28])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def rows(draw):
    """Draw inputs `[..., N, T, d_in]` and gradients `[..., N, T, d_out]`, T below and above d."""
    lead, n, t = draw(leads), draw(dims), draw(st.integers(1, 30))
    seed = draw(st.integers(0, 1000))
    return normal(*lead, n, t, draw(dims), seed=seed), normal(
        *lead, n, t, draw(dims), seed=seed + 1
    )


def dense(inputs, gradients):
    return torch.einsum("...nto,...nti->...noi", gradients, inputs)


@laws
@given(rows(), chunks)
def test_moments_equal_loops(pair, chunk_bytes):
    a, g = pair
    samples = Samples(a, g, num_terms=7.0, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(samples.input_moment().total, truth.moment(a))
    torch.testing.assert_close(samples.grad_moment().total, truth.moment(g))
    assert samples.input_moment().count == a.shape[-3]
    assert samples.grad_moment().count == 7.0


@laws
@given(rows())
def test_per_example_gradients_are_sums_of_outer_products(pair):
    a, g = pair
    samples = Samples(a, g, num_terms=1.0)
    torch.testing.assert_close(samples.per_example_gradients(), dense(a, g))
    torch.testing.assert_close(
        samples.per_example_gradients(slice(0, 1)), dense(a, g)[..., :1, :, :]
    )


@laws
@given(rows(), chunks, st.booleans(), st.booleans(), dims, dims)
def test_projected_square_equals_the_dense_one(
    pair, chunk_bytes, with_left, with_right, k_out, k_in
):
    a, g = pair
    left = normal(*a.shape[:-3], g.shape[-1], k_out, seed=3) if with_left else None
    right = normal(*a.shape[:-3], a.shape[-1], k_in, seed=4) if with_right else None
    result = Samples(a, g, num_terms=3.0, chunk_bytes=chunk_bytes).projected_square(left, right)
    torch.testing.assert_close(result.total, truth.projected_square(dense(a, g), left, right))
    assert result.count == 3.0


@pytest.mark.parametrize(
    ("t", "d_in", "d_out"), [(1, 5, 4), (3, 5, 4), (3, 5, 2), (3, 2, 5), (9, 4, 5)]
)
@pytest.mark.parametrize("groups", [(), (3,)])
def test_projected_square_is_right_in_every_order_of_contraction(t, d_in, d_out, groups):
    a, g = normal(*groups, 6, t, d_in), normal(*groups, 6, t, d_out, seed=1)
    left, right = normal(*groups, d_out, d_out, seed=2), normal(*groups, d_in, d_in, seed=3)
    for sides in itertools.product((left, None), (right, None)):
        torch.testing.assert_close(
            Samples(a, g, num_terms=1.0, chunk_bytes=1).projected_square(*sides).total,
            truth.projected_square(dense(a, g), *sides),
        )


def orthogonal(*shape, seed):
    return torch.linalg.qr(normal(*shape, seed=seed)).Q


@laws
@given(rows(), chunks, st.booleans(), st.booleans())
def test_projected_square_in_low_precision_is_within_its_bound(
    pair, chunk_bytes, with_left, with_right
):
    a, g = pair
    left = orthogonal(*a.shape[:-3], g.shape[-1], g.shape[-1], seed=3) if with_left else None
    right = orthogonal(*a.shape[:-3], a.shape[-1], a.shape[-1], seed=4) if with_right else None
    found = (
        Samples(a, g, num_terms=1.0, chunk_bytes=chunk_bytes)
        .projected_square(left, right, precision=torch.bfloat16)
        .total
    )
    exact = truth.projected_square(dense(a, g), left, right)
    lengths = (g.norm(dim=-1) * a.norm(dim=-1)).sum(-1).square().sum(-1)[..., None, None]
    assert found.dtype == torch.float64
    assert bool(((found.sqrt() - exact.sqrt()).abs() <= 7 * 2**-8 * lengths.sqrt() + 1e-12).all())


@pytest.mark.parametrize("t", [1, 3, 40])
def test_projected_square_rounds_rotations_only(t):
    a, g = normal(50, t, 8).float(), normal(50, t, 6, seed=1).float()
    samples = Samples(a, g, num_terms=1.0)
    left, right = orthogonal(6, 6, seed=2).float(), orthogonal(8, 8, seed=3).float()
    exact, rounded = (
        samples.projected_square(left, right, precision=p).total
        for p in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(exact, samples.projected_square(left, right).total, rtol=0, atol=0)
    assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 2e-2
    plain = samples.projected_square(None, None, precision=torch.bfloat16).total
    torch.testing.assert_close(plain, samples.projected_square(None, None).total, rtol=0, atol=0)


@pytest.mark.parametrize("examples", [(), (5,)])
def test_project_in_low_precision_rounds_its_operands_and_results(examples):
    matrix, left, right = (
        normal(*examples, 3, 4).float(),
        orthogonal(3, 3, seed=1).float(),
        orthogonal(4, 4, seed=2).float(),
    )
    low = [each.bfloat16() for each in (left, right)]
    found = project(matrix, left, right, per_example=bool(examples), precision=torch.bfloat16)
    exact = left.T @ matrix @ right
    assert found.dtype == torch.float32
    assert 0 < float((found - exact).abs().max()) <= 7 * 2**-8 * float(matrix.norm())
    torch.testing.assert_close(
        project(matrix, *low, per_example=bool(examples), precision=torch.bfloat16),
        found,
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("groups", [(), (2,)])
def test_projected_square_of_large_matrices_equals_the_dense_one(groups):
    a, g = normal(*groups, 3, 5, 150), normal(*groups, 3, 5, 120, seed=1)
    left, right = normal(*groups, 120, 120, seed=2), normal(*groups, 150, 150, seed=3)
    for bound in (1, 2**28):
        found = Samples(a, g, num_terms=1.0, chunk_bytes=bound).projected_square(left, right).total
        torch.testing.assert_close(found, truth.projected_square(dense(a, g), left, right))


@pytest.mark.parametrize(
    ("t", "rotated", "made"),
    [(1, True, 0), (4, True, 0), (5, True, 1), (4, False, 1), (1, False, 0)],
)
def test_projected_square_rotates_rows_where_that_is_cheaper(monkeypatch, t, rotated, made):
    """To rotate rows costs T d_in^2 an example, to rotate its gradient d_out d_in^2."""
    calls, plain = [], Samples.per_example_gradients
    monkeypatch.setattr(
        Samples,
        "per_example_gradients",
        lambda *args, **options: calls.append(1) or plain(*args, **options),
    )
    Samples(normal(2, t, 3), normal(2, t, 4, seed=1), num_terms=2.0).projected_square(
        None, normal(3, 3, seed=2) if rotated else None
    )
    assert len(calls) == made


@given(
    st.integers(0, 40),
    st.integers(1, 50),
    st.sampled_from([1, 100, 1000, 2**28]),
    st.sampled_from([None, 0, 1, 7, 100]),
)
def test_chunks_cover_the_examples_in_equal_parts(n, numbers, chunk_bytes, most):
    found = list(
        Samples(normal(n, 1, 2), normal(n, 1, 2), num_terms=1.0, chunk_bytes=chunk_bytes).chunks(
            numbers, most
        )
    )
    assert [i for rows in found for i in range(rows.start, rows.stop)] == list(range(n))
    lengths = [rows.stop - rows.start for rows in found]
    assert all(
        length == 1 or (length * numbers * 8 <= chunk_bytes and length <= (most or length))
        for length in lengths
    )
    assert len(set(lengths[:-1])) <= 1


@pytest.mark.parametrize("groups", [(), (2,)])
@pytest.mark.parametrize("examples", [(), (5,)])
def test_project_is_left_transposed_matrix_right(groups, examples):
    matrix = normal(*groups, *examples, 3, 4)
    left, right = normal(*groups, 3, 2, seed=1), normal(*groups, 4, 6, seed=2)
    letters = ("g" if groups else ""), ("n" if examples else "")
    group, each = letters
    expected = torch.einsum(
        f"{group}ok,{group}{each}oi,{group}il->{group}{each}kl", left, matrix, right
    )
    torch.testing.assert_close(project(matrix, left, right, per_example=bool(examples)), expected)
    assert project(matrix, None, None, per_example=bool(examples)) is matrix


@laws
@given(rows(), st.randoms(use_true_random=False))
def test_statistics_ignore_order_duplication_and_splitting_of_the_batch(pair, random):
    a, g = pair
    n = a.shape[-3]
    order = list(range(n))
    random.shuffle(order)

    def statistics(index):
        samples = Samples(a[..., index, :, :], g[..., index, :, :], num_terms=float(len(index)))
        return samples.input_moment(), samples.grad_moment(), samples.projected_square(None, None)

    whole = statistics(list(range(n)))
    for one, other in zip(whole, statistics(order), strict=True):
        torch.testing.assert_close(one.total, other.total)
    for one, other in zip(whole, statistics(order + order), strict=True):
        torch.testing.assert_close(one.total / one.count, other.total / other.count)
    cut = random.randrange(n + 1)
    for one, head, tail in zip(
        whole, statistics(order[:cut]), statistics(order[cut:]), strict=True
    ):
        both = head + tail
        torch.testing.assert_close(one.total, both.total)
        assert one.count == both.count


def test_samples_of_later_passes_add_sums_and_no_counts():
    a, g = normal(3, 2, 4), normal(3, 2, 5, seed=1)
    later = Samples(a, g, num_terms=3.0, first=False)
    assert later.input_moment().total is None
    assert later.input_moment().count == 0
    assert later.grad_moment().count == 0
    assert later.projected_square(None, None).count == 0
    torch.testing.assert_close(later.grad_moment().total, truth.moment(g))


def test_samples_of_an_empty_batch_contribute_nothing():
    samples = Samples(normal(0, 2, 4), normal(0, 2, 5), num_terms=0.0)
    for statistic in (
        samples.input_moment(),
        samples.grad_moment(),
        samples.projected_square(None, None),
    ):
        assert statistic.total is None
        assert statistic.count == 0


def test_statistics_add_and_scale():
    one, two, none = (
        Statistic(torch.tensor(1.0), 2.0),
        Statistic(torch.tensor(4.0), torch.tensor(3.0)),
        Statistic(None, 5.0),
    )
    assert ((one + two).total, (one + two).count) == (torch.tensor(5.0), torch.tensor(5.0))
    assert ((one + none).total, (one + none).count) == (torch.tensor(1.0), 7.0)
    assert ((none + one).total, (none + one).count) == (torch.tensor(1.0), 7.0)
    assert ((none + none).total, (none + none).count) == (None, 10.0)
    assert (two.scaled(0.5).total, two.scaled(0.5).count) == (torch.tensor(2.0), torch.tensor(3.0))
    assert none.scaled(0.5).total is None
    assert one.total == 1.0  # unchanged


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_samples_of_half_precision_are_summed_in_float32(half):
    a, g = normal(64, 5, 6).to(half), normal(64, 5, 4, seed=1).to(half)
    left, right = normal(4, 4, seed=2), normal(6, 6, seed=3)
    samples = Samples(a, g, num_terms=1.0)
    results = (
        samples.input_moment().total,
        samples.grad_moment().total,
        samples.projected_square(left, right).total,
    )
    d = dense(a.double(), g.double())
    expected = (
        truth.moment(a.double()),
        truth.moment(g.double()),
        truth.projected_square(d, left, right),
    )
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), value, rtol=1e-5, atol=1e-4)


def test_working_dtype_is_float32_or_float64():
    assert working_dtype(torch.float16, torch.bfloat16) == torch.float32
    assert working_dtype(torch.float32, torch.float64) == torch.float64


def test_samples_do_not_change_their_inputs():
    a, g = normal(4, 1, 3), normal(4, 1, 2, seed=1)
    copies = a.clone(), g.clone()
    samples = Samples(a, g, num_terms=4.0, chunk_bytes=1)
    samples.input_moment(), samples.grad_moment(), samples.projected_square(None, None)
    assert torch.equal(a, copies[0])
    assert torch.equal(g, copies[1])


@pytest.mark.parametrize(
    "shape", [(1, 8, 6), (5, 8, 6), (7, 8, 6), (40, 8, 6), (3, 2, 30), (20, 2, 30)]
)
@pytest.mark.parametrize("groups", [(), (2,)])
def test_samples_keep_temporaries_within_chunk_bytes(shape, groups):
    t, d_in, d_out = shape
    a, g = normal(*groups, 200, t, d_in), normal(*groups, 200, t, d_out, seed=1)
    left, right = normal(*groups, d_out, d_out), normal(*groups, d_in, d_in)
    samples = Samples(a, g, num_terms=1.0, chunk_bytes=20_000)
    assert a.nbytes + g.nbytes > 2 * samples.chunk_bytes or t == 1
    with LargestAllocation() as largest:
        (
            samples.input_moment(),
            samples.grad_moment(),
            samples.projected_square(left, right),
            samples.projected_square(left, None),
        )
    assert 0 < largest.bytes <= samples.chunk_bytes


def test_gram_sums_rows_over_examples_and_positions():
    a = normal(2, 3, 4, 5)
    torch.testing.assert_close(gram(a), truth.moment(a))


def test_project_takes_its_arguments_by_name():
    matrix, left = normal(2, 3), normal(2, 4, seed=1)
    assert torch.equal(project(matrix=matrix, left=left, right=None), project(matrix, left, None))
