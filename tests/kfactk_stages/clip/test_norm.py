"""Norm clip: one norm over everything, direction kept."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from kfactk import OptionError, Pair
from kfactk_stages.clip.norm import NormClip


def dot(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)])


numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
gradients = st.lists(st.lists(numbers, min_size=1, max_size=4), min_size=1, max_size=3)


def pairs_of(values: list[list[float]]) -> list[Pair]:
    return [Pair(torch.ones(len(v), dtype=torch.float64), torch.tensor(v, dtype=torch.float64), lr=0.1) for v in values]


def norm(values: list[Tensor]) -> float:
    return math.hypot(*(x for v in values for x in v.tolist()))


@settings(deadline=None)
@given(gradients, st.floats(1e-5, 1e8))
def test_bounds_the_norm_and_keeps_the_direction(values: list[list[float]], limit: float) -> None:
    pairs = pairs_of(values)
    before = norm([p.preconditioned for p in pairs])
    clipped, factor = NormClip(limit=limit).clip(pairs, dot)
    assert norm(clipped) <= min(limit, before) * (1 + 1e-12)
    if before > limit * (1 + 1e-12):
        assert norm(clipped) == pytest.approx(limit, rel=1e-12)
    elif before < limit * (1 - 1e-12):
        assert factor.item() == 1.0
    assert 0 < factor <= 1
    for pair, new in zip(pairs, clipped, strict=True):
        torch.testing.assert_close(new, factor.item() * pair.preconditioned, rtol=1e-12, atol=0)


@settings(deadline=None)
@given(gradients, st.floats(1e-5, 1e8))
def test_idempotent(values: list[list[float]], limit: float) -> None:
    clip = NormClip(limit=limit)
    once, _ = clip.clip(pairs_of(values), dot)
    twice, factor = clip.clip(pairs_of([v.tolist() for v in once]), dot)
    assert factor.item() == pytest.approx(1.0, abs=1e-12)
    for x, y in zip(once, twice, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=0)


def test_agrees_with_torch() -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (3, 50, 7)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    clipped, _ = NormClip(limit=0.5).clip([Pair(torch.ones_like(p), p.grad.clone(), lr=0.1) for p in parameters], dot)
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    for p, new in zip(parameters, clipped, strict=True):
        torch.testing.assert_close(new, p.grad, rtol=1e-5, atol=0)  # torch adds 1e-6 to the norm


def test_zero_stays_zero() -> None:
    clipped, factor = NormClip(limit=1e-30).clip([Pair(torch.ones(2), torch.zeros(2), lr=0.1)], dot)
    assert factor.item() == 1.0
    assert torch.equal(clipped[0], torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    tensor = torch.full((1000,), 400.0, dtype=dtype)
    clipped, factor = NormClip(limit=1.0).clip([Pair(tensor, tensor, lr=0.1)], dot)
    assert factor.item() == pytest.approx(1 / (400 * math.sqrt(1000)), rel=1e-5)
    assert clipped[0].dtype == dtype
    assert torch.equal(tensor, torch.full((1000,), 400.0, dtype=dtype))  # the input is left alone


@pytest.mark.parametrize("limit", [1e-300, 1e300])
def test_limits_beyond_the_precision(limit: float) -> None:
    clipped, factor = NormClip(limit=limit).clip([Pair(torch.ones(2), torch.ones(2), lr=0.1)], dot)
    assert factor.item() == (1.0 if limit > 1 else 0.0)
    assert torch.isfinite(clipped[0]).all()


def test_too_large_to_measure_gives_zero() -> None:
    clipped, factor = NormClip().clip([Pair(torch.ones(2), torch.full((2,), 1e30), lr=0.1)], dot)
    assert factor.item() == 0.0
    assert torch.equal(clipped[0], torch.zeros(2))


def test_never_reads_the_norm() -> None:
    pair = Pair(torch.ones(2, device="meta"), torch.ones(2, device="meta"), lr=0.1)
    assert NormClip().clip([pair], dot)[1].is_meta


def test_no_pairs() -> None:
    clipped, factor = NormClip().clip([], dot)
    assert clipped == []
    assert factor.item() == 1.0


@pytest.mark.parametrize("limit", [0.0, -2, float("nan"), float("inf"), "1", False])
def test_limit_is_checked(limit: object) -> None:
    with pytest.raises(OptionError, match=r"limit.*positive"):
        NormClip(limit=limit)
