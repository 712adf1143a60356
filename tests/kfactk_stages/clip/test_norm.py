"""Norm clip: the laws with its bound, and what they do not say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kfactk import GradientPair, OptionError
from kfactk.testing import ClipLaws
from kfactk_stages.clip.norm import NormClip


class TestNorm(ClipLaws):
    stage = "norm"
    limit = 1.0
    idempotent = keeps_direction = keeps_entries = reaches_bound = True

    def bound(
        self, pairs: Sequence[GradientPair], clipped: Sequence[Tensor]
    ) -> tuple[float, float]:
        return math.hypot(*(x for c in clipped for x in c.flatten().tolist())), self.limit


class TestNormOfAnotherLimit(TestNorm):
    stage = NormClip(limit=0.03)
    limit = 0.03


def dot(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)])


def test_agrees_with_torch() -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (3, 50, 7)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    clipped, _ = NormClip(limit=0.5).clip(
        [GradientPair(torch.ones_like(p), p.grad.clone(), lr=0.1) for p in parameters], dot
    )
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    for p, new in zip(parameters, clipped, strict=True):
        torch.testing.assert_close(new, p.grad, rtol=1e-5, atol=0)  # torch adds 1e-6 to the norm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    tensor = torch.full((1000,), 400.0, dtype=dtype)
    clipped, factor = NormClip(limit=1.0).clip([GradientPair(tensor, tensor, lr=0.1)], dot)
    assert factor.item() == pytest.approx(1 / (400 * math.sqrt(1000)), rel=1e-5)
    assert clipped[0].dtype == dtype
    assert torch.equal(tensor, torch.full((1000,), 400.0, dtype=dtype))  # the input is left alone


@pytest.mark.parametrize("limit", [1e-300, 1e300])
def test_limits_beyond_the_precision(limit: float) -> None:
    clipped, factor = NormClip(limit=limit).clip(
        [GradientPair(torch.ones(2), torch.ones(2), lr=0.1)], dot
    )
    assert factor.item() == (1.0 if limit > 1 else 0.0)
    assert torch.isfinite(clipped[0]).all()


def test_norms_that_overflow_give_zero() -> None:
    clipped, factor = NormClip().clip(
        [GradientPair(torch.ones(2), torch.full((2,), 1e30), lr=0.1)], dot
    )
    assert factor.item() == 0.0
    assert torch.equal(clipped[0], torch.zeros(2))


def test_norm_is_never_read() -> None:
    pair = GradientPair(torch.ones(2, device="meta"), torch.ones(2, device="meta"), lr=0.1)
    assert NormClip().clip([pair], dot)[1].is_meta


@pytest.mark.parametrize("limit", [0.0, -2, float("nan"), float("inf"), "1", False])
def test_limit_is_checked(limit: object) -> None:
    with pytest.raises(OptionError, match=r"limit=.* greater than 0, or use clip='none'"):
        NormClip(limit=limit)
