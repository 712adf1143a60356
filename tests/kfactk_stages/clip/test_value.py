"""Value clip: the laws with its bound, and every entry against Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from kfactk import GradientPair, OptionError
from kfactk.testing import ClipLaws, effort
from kfactk_stages.clip.value import ValueClip


class TestValue(ClipLaws):
    stage = "value"
    limit = 1.0
    idempotent = keeps_entries = reaches_bound = True

    def bound(
        self, pairs: Sequence[GradientPair], clipped: Sequence[Tensor]
    ) -> tuple[float, float]:
        return max(abs(x) for c in clipped for x in c.flatten().tolist()), self.limit


class TestValueOfAnotherLimit(TestValue):
    stage = ValueClip(limit=0.03)
    limit = 0.03


def dot(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)])


entries = st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=6)


@settings(max_examples=effort(100), deadline=None)
@given(st.lists(entries, min_size=1, max_size=3), st.floats(1e-6, 1e7))
def test_entries_equal_those_of_python(values: list[list[float]], limit: float) -> None:
    pairs = [
        GradientPair(
            torch.ones(len(v), dtype=torch.float64), torch.tensor(v, dtype=torch.float64), lr=0.1
        )
        for v in values
    ]
    clipped, factor = ValueClip(limit=limit).clip(pairs, dot)
    expected = [[max(-limit, min(limit, x)) for x in v] for v in values]
    for found, entries_ in zip(clipped, expected, strict=True):
        truth = torch.tensor(entries_, dtype=torch.float64)
        torch.testing.assert_close(found, truth, rtol=0, atol=0)
    again, second = ValueClip(limit=limit).clip(
        [GradientPair(p.gradient, c, lr=0.1) for p, c in zip(pairs, clipped, strict=True)], dot
    )
    assert [c.tolist() for c in again] == expected
    assert second.item() == 1.0
    before, after = (math.hypot(*(x for v in vs for x in v)) for vs in (values, expected))
    assert factor.item() == pytest.approx(after / before if before > 1e-100 else 1.0, rel=1e-9)


def test_half_precision() -> None:
    tensor = torch.tensor([60000.0, -300.0], dtype=torch.float16)
    untouched, factor = ValueClip(limit=1e9).clip(
        [GradientPair(tensor, tensor, lr=0.1)], dot
    )  # a limit float16 cannot hold
    assert torch.equal(untouched[0], tensor)
    assert factor.item() == 1.0
    clipped, factor = ValueClip(limit=300).clip([GradientPair(tensor, tensor, lr=0.1)], dot)
    assert clipped[0].tolist() == [300.0, -300.0]
    assert clipped[0].dtype == torch.float16
    assert factor.item() == pytest.approx(
        math.hypot(300, 300) / math.hypot(tensor[0].item(), 300), rel=1e-5
    )
    assert tensor[1].item() == -300.0


def test_values_are_never_read() -> None:
    pair = GradientPair(torch.ones(2, device="meta"), torch.ones(2, device="meta"), lr=0.1)
    assert ValueClip().clip([pair], dot)[1].is_meta


@pytest.mark.parametrize("limit", [0.0, -2, float("nan"), float("inf"), "1", False])
def test_limit_is_checked(limit: object) -> None:
    with pytest.raises(OptionError, match=r"limit=.* greater than 0, or use clip='none'"):
        ValueClip(limit=limit)
