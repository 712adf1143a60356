"""KL clip: the laws with its bound, each group's own learning rate, and the degenerate cases."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kfactk import GradientPair, OptionError
from kfactk.testing import ClipLaws
from kfactk_stages.clip.kl import KlClip


class TestKl(ClipLaws):
    stage = "kl"
    limit = 0.01
    keeps_direction = keeps_entries = reaches_bound = True

    def bound(
        self, pairs: Sequence[GradientPair], clipped: Sequence[Tensor]
    ) -> tuple[float, float]:
        return length(pairs, clipped), math.sqrt(
            self.limit * length(pairs, [p.preconditioned for p in pairs])
        )


class TestKlOfAnotherLimit(TestKl):
    stage = KlClip(limit=1e-7)
    limit = 1e-7


def length(pairs: Sequence[GradientPair], steps: Sequence[Tensor]) -> float:
    """`sum_l mu_l^2 <g_l, x_l>`, summed by Python."""
    numbers = [
        (p.lr, p.gradient.flatten().tolist(), x.flatten().tolist())
        for p, x in zip(pairs, steps, strict=True)
    ]
    return math.fsum(
        lr**2 * a * b for lr, gradient, step in numbers for a, b in zip(gradient, step, strict=True)
    )


def dot(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    assert all(x.dtype == y.dtype and x.dtype.itemsize >= 4 for x, y in zip(xs, ys, strict=True))
    return torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)])


def test_groups_count_with_their_own_learning_rate() -> None:
    pairs = [
        GradientPair(*torch.tensor([[3.0], [2.0]], dtype=torch.float64), lr=0.1),
        GradientPair(*torch.tensor([[5.0], [4.0]], dtype=torch.float64), lr=0.2),
    ]
    clipped, factor = KlClip(limit=0.01).clip(pairs, dot)
    expected = math.sqrt(0.01 / (0.1**2 * 6 + 0.2**2 * 20))
    assert factor.item() == pytest.approx(expected, rel=1e-12)
    truth = torch.tensor([2 * expected, 4 * expected], dtype=torch.float64)
    torch.testing.assert_close(torch.cat(clipped), truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("gradient", "lr"), [([1e4, -1e4], 0.0), ([1e-30, 0.0], 1e-20)], ids=["lr 0", "underflow"]
)
def test_zero_lengths_change_nothing(gradient: list[float], lr: float) -> None:
    pair = GradientPair(torch.tensor(gradient), 7 * torch.tensor(gradient), lr=lr)
    clipped, factor = KlClip().clip([pair], dot)
    assert factor.item() == 1.0
    assert torch.equal(clipped[0], pair.preconditioned)


def test_huge_lengths_are_reduced_to_the_limit() -> None:
    large = torch.tensor([1e18])  # limit / length, 1e-46, is beyond float32; its root is not
    clipped, factor = KlClip(limit=1e-10).clip([GradientPair(large, large, lr=1.0)], dot)
    assert factor.item() == pytest.approx(1e-23, rel=1e-6)
    assert clipped[0].item() == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    gradient = torch.full(
        (300,), 300.0, dtype=dtype
    )  # its square is beyond float16, and the sum beyond bfloat16's digits
    pair = GradientPair(gradient, gradient.clone(), lr=1.0)
    clipped, factor = KlClip(limit=1.0).clip([pair], dot)
    assert factor.item() == pytest.approx(1 / math.sqrt(300 * float(gradient[0]) ** 2), rel=1e-5)
    assert factor.dtype == torch.float32
    assert clipped[0].dtype == dtype


def test_factor_is_never_read() -> None:
    pairs = [
        GradientPair(torch.ones(2, device="meta"), torch.ones(2, device="meta"), lr=lr)
        for lr in (0.1, 0.2)
    ]
    clipped, factor = KlClip().clip(pairs, dot)  # a meta tensor has no value that could be read
    assert factor.is_meta
    assert factor.shape == ()
    assert clipped[1].shape == (2,)


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), float("inf"), "0.1", True, None])
def test_limit_is_checked(limit: object) -> None:
    with pytest.raises(OptionError, match=r"limit=.* greater than 0, or use clip='none'"):
        KlClip(limit=limit)
