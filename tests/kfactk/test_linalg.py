"""Linear algebra equals dense truth in float64; decompositions handle degenerate input."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from kfactk import DecompositionError, linalg

F64 = torch.float64
sizes = st.integers(1, 4)
leading = st.sampled_from([(), (1,), (3,), (2, 3)])
seeds = st.integers(0, 2**31)
scales = st.sampled_from([1e-20, 1e-6, 1.0, 1e6, 1e20])


def draw(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def spd(seed: int, *lead: int, n: int, rank: int | None = None, dtype: torch.dtype = F64) -> Tensor:
    x = draw(seed, *lead, n, n if rank is None else rank)
    extra = torch.eye(n, dtype=F64) if rank is None else 0.0
    return (x @ x.mT + extra).to(dtype)


def rotation(seed: int, n: int) -> Tensor:
    return torch.linalg.qr(draw(seed, n, n)).Q


def test_block_diagonal_and_jitter_take_leading_dimensions() -> None:
    a, b = draw(0, 2, 5, 3, 3), draw(1, 2, 5, 4, 4)
    pairs = zip(a.flatten(0, 1), b.flatten(0, 1), strict=True)
    assert torch.equal(
        linalg.block_diagonal(a, b).flatten(0, 1),
        torch.stack([torch.block_diag(x, y) for x, y in pairs]),
    )
    assert torch.equal(
        linalg.jitter(a).flatten(), torch.stack([linalg.jitter(x) for x in a.flatten(0, 1)])
    )
    torch.testing.assert_close(
        linalg.jitter(a[0, 0]), a[0, 0].abs().max() * 3 * torch.finfo(F64).eps
    )


@settings(deadline=None)
@given(seed=seeds, m=sizes, n=sizes, p=sizes, q=sizes, lead=leading)
def test_kron_is_torch_kron_of_each_pair(
    seed: int, m: int, n: int, p: int, q: int, lead: tuple[int, ...]
) -> None:
    a, b = draw(seed, *lead, m, n), draw(seed + 1, *lead, p, q)
    pairs = zip(a.reshape(-1, m, n), b.reshape(-1, p, q), strict=True)
    expected = torch.stack([torch.kron(x, y) for x, y in pairs]).reshape(*lead, m * p, n * q)
    assert torch.equal(linalg.kron(a, b), expected)


def test_kron_broadcasts_leading_dimensions() -> None:
    a, b = draw(0, 3, 2, 2), draw(1, 2, 4)
    assert torch.equal(linalg.kron(a, b), torch.stack([torch.kron(x, b) for x in a]))


@settings(deadline=None)
@given(seed=seeds, m=sizes, n=sizes, k=sizes, p=sizes, lead=leading)
def test_kron_satisfies_the_mixed_product(
    seed: int, m: int, n: int, k: int, p: int, lead: tuple[int, ...]
) -> None:
    a, c = draw(seed, *lead, m, n), draw(seed + 1, *lead, n, k)
    b, d = draw(seed + 2, *lead, k, p), draw(seed + 3, *lead, p, m)
    torch.testing.assert_close(linalg.kron(a, b) @ linalg.kron(c, d), linalg.kron(a @ c, b @ d))


@settings(deadline=None)
@given(seed=seeds, o=sizes, i=sizes, p=sizes, q=sizes, lead=leading)
def test_vec_satisfies_the_vec_trick(
    seed: int, o: int, i: int, p: int, q: int, lead: tuple[int, ...]
) -> None:
    left, v, right = (
        draw(seed, *lead, p, o),
        draw(seed + 1, *lead, o, i),
        draw(seed + 2, *lead, q, i),
    )
    dense = (linalg.kron(right, left) @ linalg.vec(v).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(linalg.vec(left @ v @ right.mT), dense)
    assert torch.equal(linalg.unvec(linalg.vec(v), o, i), v)


def test_vec_stacks_columns() -> None:
    assert linalg.vec(torch.tensor([[1, 2], [3, 4], [5, 6]])).tolist() == [1, 3, 5, 2, 4, 6]


@settings(deadline=None)
@given(seed=seeds, o=sizes, i=sizes, lead=leading)
def test_kron_has_the_inverse_and_eigenbasis_of_its_factors(
    seed: int, o: int, i: int, lead: tuple[int, ...]
) -> None:
    a, g = spd(seed, *lead, n=i), spd(seed + 1, *lead, n=o)
    dense = linalg.kron(a, g)
    torch.testing.assert_close(
        torch.linalg.inv(dense), linalg.kron(torch.linalg.inv(a), torch.linalg.inv(g))
    )
    (s_a, u_a), (s_g, u_g) = linalg.eigh(a), linalg.eigh(g)
    u = linalg.kron(u_a, u_g)
    s = linalg.kron(s_a.unsqueeze(-1), s_g.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(u.mT @ u, torch.eye(i * o, dtype=F64).expand_as(dense))
    torch.testing.assert_close(u @ torch.diag_embed(s) @ u.mT, dense)


def test_diagonals_and_symmetrise_equal_dense() -> None:
    a, b = draw(0, 3, 2, 2), draw(1, 3, 4, 4)
    joined = linalg.block_diagonal(a, b)
    assert torch.equal(
        joined, torch.stack([torch.block_diag(x, y) for x, y in zip(a, b, strict=True)])
    )
    torch.testing.assert_close(linalg.mean_diagonal(b), torch.stack([x.trace() / 4 for x in b]))
    assert torch.equal(linalg.symmetrise(b), linalg.symmetrise(b).mT)
    before = b.clone()
    each = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    torch.testing.assert_close(
        linalg.add_diagonal(b, each), before + each[:, None, None] * torch.eye(4, dtype=F64)
    )
    torch.testing.assert_close(
        linalg.add_diagonal(b, torch.tensor(2.0)), before + 2 * torch.eye(4, dtype=F64)
    )
    assert torch.equal(b, before), "add_diagonal must not change its input"
    once = torch.eye(2).expand(3, 2, 2)
    assert torch.equal(linalg.add_diagonal(once, 1.0), 2 * torch.eye(2).expand(3, 2, 2))


@settings(deadline=None)
@given(
    seed=seeds,
    n=st.integers(1, 12),
    rank=st.integers(0, 12),
    scale=scales,
    dtype=st.sampled_from([torch.float32, F64]),
)
def test_eigh_handles_rank_deficiency_at_every_scale(
    seed: int, n: int, rank: int, scale: float, dtype: torch.dtype
) -> None:
    matrix = (spd(seed, n=n, rank=min(rank, n)) * scale / n).to(dtype)
    values, vectors = linalg.eigh(matrix)
    assert values.dtype == vectors.dtype == dtype
    assert bool((values >= 0).all())
    assert bool((values.diff() >= 0).all())
    slack = 50 * n * torch.finfo(dtype).eps
    largest = max(float(matrix.abs().max()), 1e-37)
    back = (vectors * values) @ vectors.mT
    torch.testing.assert_close(back, matrix, rtol=0, atol=slack * largest)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(n, dtype=dtype), rtol=0, atol=slack)


@settings(deadline=None)
@given(
    seed=seeds,
    n=st.integers(1, 12),
    rank=st.integers(0, 12),
    scale=scales,
    dtype=st.sampled_from([torch.float32, F64]),
)
def test_cholesky_handles_rank_deficiency_at_every_scale(
    seed: int, n: int, rank: int, scale: float, dtype: torch.dtype
) -> None:
    matrix = (spd(seed, n=n, rank=min(rank, n)) * scale / n).to(dtype)
    lower = linalg.cholesky(matrix, 0.0)
    assert lower.dtype == dtype
    assert torch.equal(lower, lower.tril())
    assert bool(torch.isfinite(lower).all())
    room = 100 * n * torch.finfo(dtype).eps * float(matrix.abs().max()) + 1e-36
    torch.testing.assert_close(lower @ lower.mT, matrix, rtol=0, atol=room)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_cholesky_handles_a_matrix_made_indefinite_by_rounding(dtype: torch.dtype) -> None:
    rows = 1 + 1e-3 * draw(0, 8, 512)
    matrix = rows.to(dtype).T @ rows.to(dtype)
    assert torch.linalg.cholesky_ex(matrix)[1] > 0, "the case must be indefinite"
    lower = linalg.cholesky(matrix, 0.0)
    torch.testing.assert_close(
        lower @ lower.T,
        matrix,
        rtol=0,
        atol=100 * 512 * torch.finfo(dtype).eps * float(matrix.max()),
    )


def test_cholesky_takes_a_shift_for_each_matrix() -> None:
    matrix, shift = spd(0, 2, n=3), torch.tensor([0.5, 2.0], dtype=F64)
    lower = linalg.cholesky(matrix, shift)
    torch.testing.assert_close(
        lower @ lower.mT, matrix + shift[:, None, None] * torch.eye(3, dtype=F64)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_decompositions_refuse_what_is_not_finite(bad: float) -> None:
    matrix = torch.eye(3)
    matrix[0, 1] = matrix[1, 0] = bad
    with pytest.raises(DecompositionError, match="NaN or inf"):
        linalg.eigh(matrix)
    with pytest.raises(DecompositionError, match="NaN or inf"):
        linalg.cholesky(matrix, 1.0)


def test_cholesky_refuses_an_indefinite_matrix() -> None:
    with pytest.raises(DecompositionError, match="positive semi-definite"):
        linalg.cholesky(torch.diag(torch.tensor([1.0, -1.0])), 0.1)


@pytest.mark.parametrize("failures", [1, 2, 3])
@pytest.mark.parametrize("kind", [torch.linalg.LinAlgError, NotImplementedError, TypeError])
def test_eigh_retries_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, failures: int, kind: type[Exception]
) -> None:
    real, seen = torch.linalg.eigh, []

    def flaky(matrix: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(matrix.dtype)
        if len(seen) <= failures:
            raise kind("did not converge")
        values, vectors = real(matrix)
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", flaky)
    matrix = spd(3, n=6, rank=2, dtype=torch.float32)
    values, vectors = linalg.eigh(matrix)
    assert seen == [torch.float32, torch.float32, F64, F64][: failures + 1]
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close((vectors * values) @ vectors.mT, matrix, rtol=0, atol=1e-4)
    assert int(linalg.null_mask(values).sum()) == 4, "the jitter must not fill the null space"


@pytest.mark.parametrize("kind", [NotImplementedError, TypeError])
def test_cholesky_retries_where_a_device_lacks_it(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    real, calls = torch.linalg.cholesky_ex, []

    def flaky(matrix: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(matrix.dtype)
        if len(calls) <= 2:
            raise kind("not on this device")
        lower, info = real(matrix)
        return lower, info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", flaky)
    matrix = spd(3, n=4, dtype=torch.float32)
    lower = linalg.cholesky(matrix, 0.0)
    assert calls == [torch.float32, torch.float32, F64]
    torch.testing.assert_close(lower @ lower.T, matrix, rtol=0, atol=2e-4)


def test_eigh_retries_after_a_nonfinite_result(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = torch.linalg.eigh, []

    def flaky(matrix: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(matrix)
        values, vectors = real(matrix)
        return values, vectors * (float("nan") if len(calls) == 1 else 1.0)

    monkeypatch.setattr(torch.linalg, "eigh", flaky)
    assert bool(torch.isfinite(linalg.eigh(torch.eye(3))[1]).all())
    assert len(calls) == 2


def test_eigh_reports_every_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(matrix: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.linalg.LinAlgError(f"no luck in {matrix.dtype}\nsecond line")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(
        DecompositionError,
        match=r"no luck in torch.float32; no luck in torch.float32; no luck in torch.float64",
    ) as caught:
        linalg.eigh(torch.eye(2))
    assert "second line" not in str(caught.value)


def test_eigh_makes_one_attempt_where_it_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Tensor) -> Tensor:
        raise AssertionError("this matrix needs no other precision or device")

    monkeypatch.setattr(Tensor, "double", never)
    monkeypatch.setattr(Tensor, "cpu", never)
    values, vectors = linalg.eigh(torch.eye(3))
    assert values.shape == (3,)
    assert vectors.shape == linalg.cholesky(torch.eye(3), 0.1).shape == (3, 3)


def test_eigh_refuses_eigenvalues_beyond_the_range_of_the_precision() -> None:
    with pytest.raises(DecompositionError, match="not finite"):
        linalg.eigh(torch.full((16, 16), 1e38))


def test_tikhonov_pi_is_one_without_curvature() -> None:
    a = torch.tensor([4.0, 0.0, 4.0, 0.0, float("nan")], dtype=F64)
    g = torch.tensor([9.0, 9.0, 0.0, 0.0, 1.0], dtype=F64)
    torch.testing.assert_close(
        linalg.tikhonov_pi(a, g), torch.tensor([2 / 3, 1, 1, 1, 1], dtype=F64)
    )
    extreme = linalg.tikhonov_pi(torch.tensor(1e30), torch.tensor(1e-30))
    torch.testing.assert_close(extreme, torch.tensor(1e30))


@settings(deadline=None)
@given(seed=seeds, n=st.integers(2, 30), data=st.data(), scale=st.sampled_from([1e-20, 1.0, 1e20]))
def test_null_mask_finds_the_null_space_at_every_scale(
    seed: int, n: int, data: st.DataObject, scale: float
) -> None:
    rank = data.draw(st.integers(0, n))
    u = rotation(seed, n)
    exact = (
        torch.cat([torch.zeros(n - rank, dtype=F64), torch.linspace(0.5, 1, rank, dtype=F64)])
        * scale
    )
    for dtype in (F64, torch.float32):
        values, _ = linalg.eigh(((u * exact) @ u.T).to(dtype))
        assert linalg.null_mask(values).tolist() == [True] * (n - rank) + [False] * rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_null_tolerance_of_low_precision_grows_with_the_root_of_the_dimension(
    dtype: torch.dtype,
) -> None:
    eps = torch.finfo(dtype).eps
    assert [linalg.null_tolerance(dtype, n) for n in (1, 9, 64)] == [4 * eps, 12 * eps, 32 * eps]


def test_null_mask_of_float64_has_an_exact_threshold() -> None:
    threshold = 4 * 1e-12
    values = torch.tensor([-1.0, 0.99 * threshold, 1.01 * threshold, 1.0], dtype=F64)
    assert linalg.null_mask(values).tolist() == [True, True, False, False]
    assert linalg.null_mask(torch.zeros(2, 3)).all()


@settings(deadline=None)
@given(seed=seeds, o=st.integers(2, 6), i=st.integers(2, 6), data=st.data())
def test_pool_null_ignores_the_basis_of_the_null_space(
    seed: int, o: int, i: int, data: st.DataObject
) -> None:
    null_o, null_i = data.draw(st.integers(0, o)), data.draw(st.integers(0, i))
    gradients = draw(seed, 5, o, i)

    def pooled(u_g: Tensor, u_a: Tensor) -> Tensor:
        scale = (u_g.T @ gradients @ u_a).square().mean(0)
        scale = linalg.pool_null(scale, torch.arange(i) < null_i, -1)
        return linalg.pool_null(scale, torch.arange(o) < null_o, -2)

    u_g, u_a = rotation(seed + 1, o), rotation(seed + 2, i)
    other_g, other_a = u_g.clone(), u_a.clone()
    other_g[:, :null_o] = u_g[:, :null_o] @ rotation(seed + 3, null_o) if null_o else u_g[:, :0]
    other_a[:, :null_i] = u_a[:, :null_i] @ rotation(seed + 4, null_i) if null_i else u_a[:, :0]
    first, second = pooled(u_g, u_a), pooled(other_g, other_a)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first.sum(), gradients.square().sum() / 5)


def test_pool_null_averages_rows_and_columns() -> None:
    values = torch.tensor([[1.0, 3.0, 10.0], [5.0, 7.0, 20.0]])
    columns = linalg.pool_null(values, torch.tensor([True, True, False]), -1)
    assert columns.tolist() == [[2, 2, 10], [6, 6, 20]]
    rows = linalg.pool_null(values, torch.tensor([True, True]), -2)
    assert rows.tolist() == [[3, 5, 15], [3, 5, 15]]
    assert torch.equal(linalg.pool_null(values, torch.tensor([False, False, False]), -1), values)
    batched = linalg.pool_null(
        values.expand(2, 2, 3), torch.tensor([[True, True, False], [False, True, True]]), -1
    )
    assert batched.tolist() == [[[2, 2, 10], [6, 6, 20]], [[1, 6.5, 6.5], [5, 13.5, 13.5]]]


@settings(deadline=None)
@given(mean=st.floats(0, 2.0**100, width=32), gradient=st.floats(-(2.0**20), 2.0**20, width=32))
def test_damping_floor_keeps_divisions_finite_and_is_small(mean: float, gradient: float) -> None:
    floor = linalg.damping_floor(torch.tensor(mean))
    assert bool(floor > 0)
    assert bool(torch.isfinite(torch.tensor(gradient) / floor))
    if mean > 1e-10:
        assert bool(floor <= 1e-6 * mean)
    assert linalg.damping_floor(torch.tensor([mean, 2.0])).shape == (2,)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t.clone(memory_format=torch.contiguous_format),
    "columns": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last": lambda t: t.clone(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("there", LAYOUTS)
@pytest.mark.parametrize("here", LAYOUTS)
def test_as_gradient_takes_layout_and_precision_of_the_parameter(here: str, there: str) -> None:
    values = torch.arange(48, dtype=torch.float64).reshape(2, 3, 2, 4)
    parameter = LAYOUTS[there](torch.zeros(2, 3, 2, 4, dtype=torch.float32))
    made = linalg.as_gradient(LAYOUTS[here](values), parameter)
    assert (made.dtype, made.stride()) == (torch.float32, parameter.stride())
    assert torch.equal(made, values.float())


def test_as_gradient_does_not_broadcast() -> None:
    assert linalg.as_gradient(torch.ones(()), torch.zeros(2, 3)).shape == ()


def psd(n: int, seed: int, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return a matrix with distinct eigenvalues, its ascending eigenvalues, its eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    values = torch.arange(1, n + 1, dtype=torch.float64) ** spread
    return vectors @ torch.diag(values) @ vectors.mT, values, vectors


@given(n=st.integers(1, 9), seed=st.integers(0, 999))
def test_orthogonal_iteration_keeps_eigenvectors(n: int, seed: int) -> None:
    matrix, values, vectors = psd(n, seed)
    found, basis = linalg.orthogonal_iteration(matrix, vectors)
    torch.testing.assert_close(found, values)
    torch.testing.assert_close(basis, vectors, rtol=1e-6, atol=1e-6)


@given(n=st.integers(1, 7), seed=st.integers(0, 999), groups=st.integers(1, 3))
def test_orthogonal_iteration_converges_to_the_eigenvectors(n: int, seed: int, groups: int) -> None:
    cases = [psd(n, seed + k) for k in range(groups)]
    matrix, values = torch.stack([m for m, _, _ in cases]), torch.stack([v for _, v, _ in cases])
    basis = torch.linalg.qr(
        torch.randn(
            groups, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
    )[0]
    for _ in range(200):
        found, basis = linalg.orthogonal_iteration(matrix, basis)
        torch.testing.assert_close(
            basis.mT @ basis, torch.eye(n, dtype=torch.float64).expand(groups, n, n)
        )
    torch.testing.assert_close(found, values)
    torch.testing.assert_close(
        basis.mT @ matrix @ basis, torch.diag_embed(values), rtol=1e-8, atol=1e-6
    )


@given(n=st.integers(2, 8), seed=st.integers(0, 999), size=st.floats(1e-4, 1e-2))
def test_orthogonal_iteration_follows_a_changed_matrix_in_one_step(
    n: int, seed: int, size: float
) -> None:
    """The off-diagonal part shrinks by half."""
    matrix, _, vectors = psd(n, seed, spread=6.0)
    upper = torch.triu(torch.full((n, n), size, dtype=torch.float64), 1)
    moved = vectors @ torch.linalg.matrix_exp(upper - upper.mT)
    before = moved.mT @ matrix @ moved
    _, basis = linalg.orthogonal_iteration(matrix, moved)
    after = basis.mT @ matrix @ basis

    def off_diagonal(found: Tensor) -> float:
        return float((found - torch.diag(found.diagonal())).norm())

    assert off_diagonal(after) < 0.5 * off_diagonal(before)


def test_orthogonal_iteration_handles_zero_and_refuses_what_is_not_finite() -> None:
    values, vectors = linalg.orthogonal_iteration(torch.zeros(3, 3), torch.eye(3))
    assert values.tolist() == [0, 0, 0]
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(3))
    with pytest.raises(DecompositionError, match="NaN or inf"):
        linalg.orthogonal_iteration(torch.full((2, 2), float("nan")), torch.eye(2))


def test_inner_products_use_the_wider_precision() -> None:
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1e-9], dtype=F64)
    assert linalg.inner_products([x, y], [y, x]).tolist() == [1.0 + 2e-9] * 2


# ---------------------------------------------------------------------------- orthogonal iteration


@settings(deadline=None)
@given(seed=seeds, n=st.integers(2, 9), rank=st.integers(0, 9), more=st.integers(0, 9))
def test_iteration_does_not_depend_on_which_vectors_span_the_null_space(
    seed: int, n: int, rank: int, more: int
) -> None:
    """Projectors on the directions, each weighed by its eigenvalue, are those of other vectors."""
    last = spd(seed, n=n, rank=min(rank, n))
    new = last + spd(seed + 1, n=n, rank=min(more, n))
    values, vectors = linalg.eigh(last)
    null = int(linalg.null_mask(values).sum())
    turned = vectors.clone()
    turned[:, :null] = vectors[:, :null] @ rotation(seed + 2, null) if null else vectors[:, :0]
    weights = draw(seed + 3, n, n).square()

    def pooled(found: tuple[Tensor, Tensor]) -> Tensor:
        """Return a diagonal operator with the scale of `weights`, as EKFAC pools it."""
        scale = (found[1].T @ weights @ found[1]).diagonal().unsqueeze(0)
        scale = linalg.pool_null(scale, linalg.null_mask(found[0]), -1)
        return found[1] * scale @ found[1].T

    one, other = (linalg.orthogonal_iteration(new, each, values) for each in (vectors, turned))
    torch.testing.assert_close(pooled(one), pooled(other), rtol=1e-6, atol=1e-6)


def test_iteration_that_fails_decomposes_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(matrix: Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    matrix = spd(0, n=4)
    monkeypatch.setattr(torch, "geqrf", fails)
    values, vectors = linalg.orthogonal_iteration(matrix, torch.eye(4, dtype=F64))
    torch.testing.assert_close(vectors * values @ vectors.T, matrix)


def test_iteration_from_a_matrix_of_higher_rank_decomposes_anew() -> None:
    """What is left of a lost direction is rounding, which would turn the other vectors."""
    values, vectors = linalg.eigh(spd(0, n=6))
    lower = spd(1, n=6, rank=3)
    found = linalg.orthogonal_iteration(lower, vectors, values)
    for a, b in zip(found, linalg.eigh(lower), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_followed_keeps_each_vector_in_its_column(lead: tuple[int, ...]) -> None:
    n = 5
    rows = torch.randn(*lead, n, 2 * n, dtype=torch.float64)
    matrix = rows @ rows.mT
    values, vectors = torch.linalg.eigh(matrix)
    order = torch.randperm(n)
    step = linalg.followed(matrix, vectors[..., order], values[..., order])
    assert step is not None
    torch.testing.assert_close(step[0], values[..., order])
    torch.testing.assert_close(step[1], vectors[..., order])
    further = linalg.followed(2 * matrix + torch.eye(n).double(), *reversed(step))
    assert further is not None
    torch.testing.assert_close(further[0], 2 * values[..., order] + 1)


def test_followed_is_one_step_in_the_order_of_the_new_matrix() -> None:
    first, second = (torch.randn(4, 9, dtype=torch.float64) for _ in range(2))
    values, vectors = torch.linalg.eigh(first @ first.T)
    matrix = second @ second.T
    order = (vectors * (matrix @ vectors)).sum(0).argsort(descending=True)
    expected = torch.linalg.qr(matrix @ vectors[:, order])[0]
    step = linalg.followed(matrix, vectors, values)
    assert step is not None
    torch.testing.assert_close(step[1][:, order].abs(), expected.abs())


def test_followed_does_not_depend_on_which_vectors_span_the_null_space() -> None:
    rows = torch.randn(5, 3, dtype=torch.float64)
    values, vectors = linalg.eigh(rows @ rows.T)
    turned = vectors.clone()
    turned[:, :2] = vectors[:, :2] @ torch.linalg.qr(torch.randn(2, 2).double())[0]
    matrix = rows @ rows.T + 0.1 * torch.eye(5).double() + torch.diag(torch.rand(5).double())
    found = [linalg.followed(matrix, each, values) for each in (vectors, turned)]
    for one, other in zip(*(step for step in found if step is not None), strict=True):
        torch.testing.assert_close(one.abs(), other.abs())


def test_followed_gives_up_where_rank_is_lost_or_was_never_there() -> None:
    rows = torch.randn(4, 1, dtype=torch.float64)
    low, eye = rows @ rows.T, torch.eye(4, dtype=torch.float64)
    assert linalg.followed(eye, *reversed(linalg.eigh(low))) is None
    assert linalg.followed(low, eye, torch.ones(4, dtype=torch.float64)) is None
    with pytest.raises(DecompositionError, match="NaN or inf"):
        linalg.followed(float("nan") * eye, eye, torch.ones(4))
