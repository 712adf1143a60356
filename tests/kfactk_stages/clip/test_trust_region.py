"""Trust region: laws, the whole joint Fisher matrix of two heads as truth, degenerate cases."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CombinationError, GradientPair, OptionError
from kfactk.testing import ClipLaws
from kfactk_stages.clip.kl import KlClip
from kfactk_stages.clip.trust_region import TrustRegion
from tests.situations.by_hand import EVERY, draw, root

VARIANCE, WEIGHT = 0.7, 0.3
HEADS = [
    kfactk.head("policy", "categorical"),
    kfactk.head("value", {"name": "gaussian", "variance": VARIANCE}, WEIGHT),
]


class TestTrustRegion(ClipLaws):
    stage = "trust_region"
    radius = 0.001
    keeps_direction = keeps_entries = reaches_bound = True

    def bound(
        self, pairs: Sequence[GradientPair], clipped: Sequence[Tensor]
    ) -> tuple[float, float]:
        whole = length(pairs, [p.preconditioned for p in pairs])
        return length(pairs, clipped), math.sqrt(2 * self.radius * whole)


class TestTrustRegionOfAnotherRadius(TestTrustRegion):
    stage = TrustRegion(radius=1e-7)
    radius = 1e-7


def length(pairs: Sequence[GradientPair], steps: Sequence[Tensor]) -> float:
    """`sum_l mu_l^2 <g_l - tau_l p_l, x_l>`, summed by Python."""
    numbers = [
        (p, p.gradient.flatten().tolist(), p.preconditioned.flatten().tolist(), x.flatten())
        for p, x in zip(pairs, steps, strict=True)
    ]
    return math.fsum(
        p.lr**2 * part
        for p, gradient, before, step in numbers
        for a, b, c in zip(gradient, before, step.tolist(), strict=True)
        for part in (a * c, -p.damping * b * c)
    )


def dot(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    assert all(x.dtype == y.dtype and x.dtype.itemsize >= 4 for x, y in zip(xs, ys, strict=True))
    return torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)])


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(3, 4)
        self.policy, self.value = nn.Linear(4, 3), nn.Linear(4, 1)
        self.double()

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(states).tanh()
        return {"policy": self.policy(hidden), "value": self.value(hidden)}


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.both = nn.Linear(4, 3).double()

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        found = self.both(states)
        return {"policy": found[:, :2], "value": found[:, 2:]}


def loss_of(output: dict[str, Tensor]) -> Tensor:
    policy = F.cross_entropy(output["policy"], torch.tensor([1]), reduction="sum")
    return policy + WEIGHT * (output["value"] - 2.0).square().sum() / (2 * VARIANCE)


def joint_fisher(model: nn.Module, layer: nn.Module, state: Tensor) -> Tensor:
    """The joint Fisher matrix of a layer for one state, from the gradients of both outputs."""
    output = model(state)
    logits, value = output["policy"][0], output["value"][0]
    p = logits.softmax(0).detach()
    columns = (p.diag() - p.outer(p)) @ torch.eye(len(p), dtype=p.dtype)
    losses = [*(root(columns).T @ logits), *(value * (WEIGHT / VARIANCE) ** 0.5)]
    rows = []
    for loss in losses:
        found = torch.autograd.grad(
            loss, list(layer.parameters()), retain_graph=True, materialize_grads=True
        )
        rows.append(torch.cat([each.flatten() for each in found]))
    return torch.stack(rows).T @ torch.stack(rows)


def stepped(model: nn.Module, state: Tensor, **options: object) -> kfactk.Optimizer:
    """Take one step with a trust region, of plain SGD."""
    given = {"basis": "ekfac", "damping": 0.05, "lr": 10.0, **options}
    recipe = kfactk.build(
        **{"curvature": "kfac", "fisher": "exact", "update": "sgd", "likelihood": HEADS, **EVERY},
        **given,
    )
    optimizer = recipe.bind(model)
    loss_of(model(state)).backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("radius", [1e-4, 0.03, 1e4])
def test_step_is_that_of_the_dense_joint_fisher(radius: float) -> None:
    """With one state, A kron G is the Fisher matrix of a layer, of both heads together."""
    model, twin, state, tau, lr = ActorCritic(), ActorCritic(), draw(1, 3, seed=3), 0.05, 10.0
    stepped(model, state, clip={"name": "trust_region", "radius": radius}, damping=tau, lr=lr)
    layers = list(twin.children())
    fishers = [joint_fisher(twin, layer, state) for layer in layers]
    loss_of(twin(state)).backward()
    steps, square = [], 0.0
    for layer, fisher in zip(layers, fishers, strict=True):
        g = torch.cat([p.grad.flatten() for p in layer.parameters()])
        p = torch.linalg.solve(fisher + tau * torch.eye(len(fisher), dtype=g.dtype), g)
        steps.append(p)
        square += float(p @ fisher @ p)
    eta = min(lr, math.sqrt(2 * radius / square))
    assert (eta == lr) == (radius == 1e4)
    for layer, new, p in zip(layers, model.children(), steps, strict=True):
        old = torch.cat([each.detach().flatten() for each in layer.parameters()])
        found = torch.cat([each.detach().flatten() for each in new.parameters()])
        torch.testing.assert_close(found, old - eta * p, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("damping", [1e-3, 10.0])
def test_divergence_of_predictions_is_the_radius(damping: float) -> None:
    """What the predictions really move by: the policy's divergence and the value's, weighted."""
    model, state, radius = OneLayer(), draw(1, 4, seed=4), 1e-6
    with torch.no_grad():
        before = model(state)
    stepped(model, state, clip={"name": "trust_region", "radius": radius}, damping=damping, lr=1e3)
    with torch.no_grad():
        after = model(state)
    old, new = before["policy"].log_softmax(-1), after["policy"].log_softmax(-1)
    policy = (old.exp() * (old - new)).sum()
    value = (before["value"] - after["value"]).square().sum() / (2 * VARIANCE)
    assert float(policy + WEIGHT * value) == pytest.approx(radius, rel=0.01)


def test_kl_with_twice_the_radius_is_the_same_without_damping() -> None:
    pairs = [GradientPair(draw(3, seed=k), draw(3, seed=k).exp(), lr=0.1 * k) for k in (1, 2)]
    pairs = [GradientPair(p.preconditioned, p.preconditioned * 3, p.lr) for p in pairs]
    (found, factor), (wanted, other) = (
        clip.clip(pairs, dot) for clip in (TrustRegion(radius=0.01), KlClip(limit=0.02))
    )
    assert factor == other < 1
    assert all(map(torch.equal, found, wanted))


def test_groups_count_with_their_own_rate_and_damping() -> None:
    pairs = [
        GradientPair(torch.tensor([3.0]), torch.tensor([2.0]), lr=0.1, damping=0.5),
        GradientPair(torch.tensor([5.0]), torch.tensor([4.0]), lr=0.2, damping=0.25),
    ]
    clipped, factor = TrustRegion(radius=0.01).clip(pairs, dot)
    expected = math.sqrt(0.02 / (0.1**2 * (6 - 0.5 * 4) + 0.2**2 * (20 - 0.25 * 16)))
    assert factor.item() == pytest.approx(expected)
    assert [c.item() for c in clipped] == pytest.approx([2 * expected, 4 * expected])


def test_length_below_rounding_is_a_share_of_the_damped_one() -> None:
    pair = GradientPair(torch.tensor([4.0]), torch.tensor([2.0]), lr=1.0, damping=2.0)  # F = 0
    _, factor = TrustRegion(radius=1e-4).clip([pair], dot)
    assert factor.item() == pytest.approx(math.sqrt(2e-4 / (1e-3 * 8)))


def test_lengths_that_overflow_give_zero_steps() -> None:
    large = torch.tensor([1e25])
    clipped, factor = TrustRegion().clip([GradientPair(large, large, lr=1.0, damping=0.5)], dot)
    assert factor.item() == clipped[0].item() == 0.0


def test_zero_rate_changes_nothing() -> None:
    pair = GradientPair(torch.tensor([1e4]), torch.tensor([7e4]), lr=0.0, damping=0.1)
    clipped, factor = TrustRegion().clip([pair], dot)
    assert factor.item() == 1.0
    assert torch.equal(clipped[0], pair.preconditioned)


def test_factor_is_never_read() -> None:
    pairs = [
        GradientPair(torch.ones(2, device="meta"), torch.ones(2, device="meta"), lr, 0.1)
        for lr in (0.1, 0.2)
    ]
    clipped, factor = TrustRegion().clip(pairs, dot)  # a meta tensor has no value to be read
    assert factor.is_meta
    assert clipped[1].shape == (2,)


@pytest.mark.parametrize("radius", [0, -1.0, float("nan"), float("inf"), "0.1", True, None])
def test_radius_is_checked(radius: object) -> None:
    with pytest.raises(OptionError, match=r"radius=.* greater than 0, or use clip='none'"):
        TrustRegion(radius=radius)


def test_basis_that_is_no_damped_inverse_is_refused() -> None:
    with pytest.raises(CombinationError, match=r"'trust_region' needs .*'soap' waives"):
        kfactk.build(curvature="gradient", basis="soap", clip="trust_region")
