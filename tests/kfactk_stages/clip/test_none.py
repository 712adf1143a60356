"""No clip."""

from __future__ import annotations

import torch

from kfactk import GradientPair
from kfactk.testing import ClipLaws
from kfactk_stages.clip.none import NoClip, kfactk_clips


class TestNone(ClipLaws):
    stage = "none"
    idempotent = keeps_direction = keeps_entries = True


def test_none_changes_nothing() -> None:
    pairs = [
        GradientPair(torch.ones(2), torch.tensor([1e30, float("nan")]), lr=0.1),
        GradientPair(torch.ones(1), torch.zeros(1), lr=0.0),
    ]
    clipped, factor = NoClip().clip(pairs, dot=lambda xs, ys: torch.zeros(0))
    assert all(new is pair.preconditioned for new, pair in zip(clipped, pairs, strict=True))
    assert factor.item() == 1.0


def test_steps_are_the_preconditioned_gradients() -> None:
    pairs = [GradientPair(*torch.randn(2, 3, 4, dtype=torch.float64), lr=10.0) for _ in range(2)]
    truth = [pair.preconditioned.clone() for pair in pairs]
    clipped, _ = NoClip().clip(pairs, dot=lambda xs, ys: torch.zeros(0))
    torch.testing.assert_close(clipped, truth, rtol=0, atol=0)


def test_registered() -> None:
    assert kfactk_clips() == {"none": NoClip}
