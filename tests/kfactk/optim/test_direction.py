"""From gradients to what the update rule is given: preconditioned, masked, clipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfactk

DAMPING = 0.1


def moved(masks: dict[str, Tensor] | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Return by how much one step moves a layer, and `(F + tau I)^-1 g` by dense algebra.

    With one example, F is the Kronecker product of its two factors.
    """
    torch.manual_seed(0)
    model = nn.Linear(2, 3).double()
    x, y = torch.randn(1, 2).double(), torch.tensor([1])
    made = {"curvature": "kfac", "basis": "ekfac", "fisher": "exact"}
    made |= {"update": "sgd", "clip": "none", "lr": 1.0, "damping": DAMPING}
    optimizer = kfactk.build(**made | options).bind(model, masks=masks)
    scores = model(x)
    F.cross_entropy(scores, y).backward()
    p, a = scores.detach().softmax(-1)[0], torch.cat([x[0], torch.ones(1).double()])
    gradient = torch.outer(p - F.one_hot(y[0], 3), a).flatten()
    fisher = torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(a, a))
    before = joined(model)
    optimizer.step()
    damped = fisher + DAMPING * torch.eye(9).double()
    return before - joined(model), torch.linalg.solve(damped, gradient).reshape(3, 3)


def joined(model: nn.Linear) -> Tensor:
    return torch.cat([model.weight, model.bias[:, None]], 1).detach()


def test_the_rule_is_given_the_natural_gradient() -> None:
    step, truth = moved()
    torch.testing.assert_close(step, truth)


def test_masks_multiply_it_before_it_is_clipped() -> None:
    mask = torch.tensor([0.0, 1.0, 1.0])
    step, truth = moved({"bias": mask}, clip={"name": "norm", "limit": 0.5})
    truth[:, 2] *= mask
    assert truth.norm() > 0.5
    torch.testing.assert_close(step, truth * 0.5 / truth.norm())


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_the_factor_of_the_clip_is_recorded(limit: float) -> None:
    told: list[float] = []

    class Kept:
        every = 1

        def start(self, recipe: Any) -> None: ...
        def record(self, step: int, metrics: Any) -> None:
            told.append(float(metrics["clip_factor"]))

        def flush(self) -> None: ...
        def close(self) -> None: ...

    _, truth = moved(clip={"name": "norm", "limit": limit}, tracker=Kept())
    assert told == pytest.approx([min(1.0, limit / truth.norm().item())])
