"""KL clip: its bound, each group's own learning rate, and the degenerate cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from kfactk import OptionError, Pair
from kfactk_stages.clip.kl import KlClip


def dot(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    assert all(x.dtype == y.dtype and x.dtype.itemsize >= 4 for x, y in zip(xs, ys, strict=True))
    return torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)])


@st.composite
def preconditioned(draw: st.DrawFn) -> list[Pair]:
    """Pairs whose preconditioner is a random positive definite matrix, each with a learning rate of its own."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pairs = []
    for size in draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)):
        scale = 10.0 ** draw(st.integers(-6, 6))
        gradient = scale * torch.randn(size, generator=generator, dtype=torch.float64)
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        matrix = root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)
        pairs.append(Pair(gradient, matrix @ gradient, lr=draw(st.sampled_from([0.0, 1e-4, 0.03, 0.3, 1.0]))))
    return pairs


def length(pairs: list[Pair], steps: list[Tensor]) -> float:
    """`sum_l mu_l^2 <g_l, x_l>`, summed by Python."""
    return math.fsum(
        p.lr**2 * a * b for p, x in zip(pairs, steps, strict=True) for a, b in zip(p.gradient.tolist(), x.tolist(), strict=True)
    )


@settings(deadline=None)
@given(preconditioned(), st.sampled_from([1e-30, 1e-4, 0.01, 1.0, 1e30]))
def test_bounds_the_squared_fisher_length_and_never_enlarges(pairs: list[Pair], limit: float) -> None:
    clipped, factor = KlClip(limit=limit).clip(pairs, dot)
    before, after = length(pairs, [p.preconditioned for p in pairs]), length(pairs, clipped)
    assert 0 <= factor <= 1
    assert after <= math.sqrt(limit * before) * (1 + 1e-9)
    assert factor.item() * after <= limit * (1 + 1e-9)
    assert factor.item() == pytest.approx(1.0 if before <= limit else math.sqrt(limit / before), rel=1e-9)
    for pair, new in zip(pairs, clipped, strict=True):
        torch.testing.assert_close(new, pair.preconditioned * factor.item(), rtol=1e-12, atol=0)


def test_every_group_counts_with_its_own_learning_rate() -> None:
    pairs = [Pair(torch.tensor([3.0]), torch.tensor([2.0]), lr=0.1), Pair(torch.tensor([5.0]), torch.tensor([4.0]), lr=0.2)]
    clipped, factor = KlClip(limit=0.01).clip(pairs, dot)
    expected = math.sqrt(0.01 / (0.1**2 * 6 + 0.2**2 * 20))
    assert factor.item() == pytest.approx(expected)
    assert [c.item() for c in clipped] == pytest.approx([2 * expected, 4 * expected])


@pytest.mark.parametrize(
    ("gradient", "lr"), [([0.0, 0.0], 0.1), ([1e4, -1e4], 0.0), ([1e-30, 0.0], 1e-20)], ids=["zero gradient", "lr 0", "underflow"]
)
def test_nothing_to_bound_leaves_everything(gradient: list[float], lr: float) -> None:
    pair = Pair(torch.tensor(gradient), 7 * torch.tensor(gradient), lr=lr)
    clipped, factor = KlClip().clip([pair], dot)
    assert factor.item() == 1.0
    assert torch.equal(clipped[0], pair.preconditioned)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    gradient = torch.full((300,), 300.0, dtype=dtype)  # its square is beyond float16, and the sum beyond bfloat16's digits
    pair = Pair(gradient, gradient.clone(), lr=1.0)
    clipped, factor = KlClip(limit=1.0).clip([pair], dot)
    assert factor.item() == pytest.approx(1 / math.sqrt(300 * float(gradient[0]) ** 2), rel=1e-5)
    assert factor.dtype == torch.float32
    assert clipped[0].dtype == dtype


def test_inputs_are_not_modified() -> None:
    pair = Pair(torch.ones(3), torch.full((3,), 100.0), lr=1.0)
    clipped, _ = KlClip().clip([pair], dot)
    assert torch.equal(pair.preconditioned, torch.full((3,), 100.0))
    assert torch.equal(pair.gradient, torch.ones(3))
    assert not torch.equal(clipped[0], pair.preconditioned)


def test_never_reads_the_factor() -> None:
    pairs = [Pair(torch.ones(2, device="meta"), torch.ones(2, device="meta"), lr=lr) for lr in (0.1, 0.2)]
    clipped, factor = KlClip().clip(pairs, dot)  # a meta tensor has no value that could be read
    assert factor.is_meta
    assert factor.shape == ()
    assert clipped[1].shape == (2,)


def test_shards_are_summed_by_dot() -> None:
    whole = torch.tensor([3.0, 4.0, 12.0])
    full, expected = KlClip().clip([Pair(whole, whole, lr=0.1)], dot)
    other = whole[2:]

    def sharded(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
        return dot(xs, ys) + dot([other], [other])

    mine, factor = KlClip().clip([Pair(whole[:2], whole[:2], lr=0.1)], sharded)
    assert factor == expected
    assert torch.equal(mine[0], full[0][:2])


def test_no_pairs() -> None:
    clipped, factor = KlClip().clip([], dot)
    assert clipped == []
    assert factor.item() == 1.0


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), float("inf"), "0.1", True, None])
def test_limit_is_checked(limit: object) -> None:
    with pytest.raises(OptionError, match=r"limit.*positive"):
        KlClip(limit=limit)
