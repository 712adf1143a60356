"""The controller `quadratic`, against a loop written by hand with dense matrices in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import Optimizer, OptionError, QuadraticModel
from kfactk.testing import ControllerLaws
from kfactk_stages.controller.quadratic import Quadratic, minimum
from tests.kfactk.small import F64, net

EIGH = {"name": "kfac", "solver": "eigh"}
FRESH = {"factor_every": 1, "basis_every": 1, "factor_decay": 0.0}


class TestQuadratic(ControllerLaws):
    stage: ClassVar = {"name": "quadratic", "model_damping": 3.0, "adapt_every": 2}


class TestOtherOptions(ControllerLaws):
    stage: ClassVar = {
        "name": "quadratic",
        "search_every": 3,
        "omega": 0.8,
        "damped_ratio": False,
        "least": 1e-3,
        "most": 1e3,
    }


def recipe(**options: Any) -> kfactk.Recipe:
    controller = {"name": "quadratic", **options.pop("controller", {})}
    given = {"curvature": "kfac", "basis": EIGH, "fisher": "exact", "update": "velocity"}
    return kfactk.build(**{**given, **FRESH, "controller": controller, **options})


def closure_of(optimizer: Optimizer, model: nn.Module, x: Tensor, y: Tensor) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def batches(number: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(number):
        x = torch.randn(12, 4, generator=generator, dtype=F64)
        noise = torch.randn(12, 3, generator=generator, dtype=F64)
        yield x, (x[:, :3] + 0.5 * noise).argmax(1)


@attrs.define
class Hand:
    """K-FAC as Martens & Grosse write it, for two layers and a softmax, with dense matrices."""

    weights: list[Tensor]
    eta: float
    damping: float
    gamma: float
    every: int
    search: int
    omega: float = 19 / 20
    last: Tensor | None = None
    lr: float = 0.0
    momentum: float = 0.0

    def output(self, flat: Tensor, x: Tensor) -> Tensor:
        w1, w2 = flat[:25].reshape(5, 5), flat[25:].reshape(3, 6)
        hidden = torch.tanh(x @ w1[:, :4].T + w1[:, 4])
        return hidden @ w2[:, :5].T + w2[:, 5]

    def loss(self, flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.output(flat, x), y) + self.eta * flat.square().sum() / 2

    def factors(self, flat: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        w1, w2 = flat[:25].reshape(5, 5), flat[25:].reshape(3, 6)
        ones = torch.ones(len(x), 1, dtype=F64)
        a1 = torch.cat([x, ones], 1)
        hidden = torch.tanh(a1 @ w1.T)
        a2 = torch.cat([hidden, ones], 1)
        p = (a2 @ w2.T).softmax(1)
        g1, g2 = torch.zeros(5, 5, dtype=F64), torch.zeros(3, 3, dtype=F64)
        for n in range(len(x)):
            for c in range(3):
                at_output = p[n, c].sqrt() * (torch.eye(3, dtype=F64)[c] - p[n])
                at_hidden = (w2[:, :5].T @ at_output) * (1 - hidden[n] ** 2)
                g2 += torch.outer(at_output, at_output) / len(x)
                g1 += torch.outer(at_hidden, at_hidden) / len(x)
        return [(a1.T @ a1 / len(x), g1), (a2.T @ a2 / len(x), g2)]

    def direction(self, gradient: Tensor, factors: Any, gamma: float) -> Tensor:
        found = []
        for (a, g), part in zip(factors, gradient.split([25, 18]), strict=True):
            pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
            damped_a = a + pi * gamma * torch.eye(len(a), dtype=F64)
            damped_g = g + gamma / pi * torch.eye(len(g), dtype=F64)
            v = part.reshape(len(g), len(a))
            found.append(-(damped_g.inverse() @ v @ damped_a.inverse()).flatten())
        return torch.cat(found)

    def fisher(self, flat: Tensor, x: Tensor) -> Tensor:
        p = self.output(flat, x).softmax(1)
        jacobian = torch.autograd.functional.jacobian(lambda w: self.output(w, x), flat)
        inner = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        return torch.einsum("nci,ncd,ndj->ij", jacobian, inner, jacobian) / len(x)

    def step(self, number: int, flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        flat = flat.detach().requires_grad_()
        [gradient] = torch.autograd.grad(self.loss(flat, x, y), flat)
        factors = self.factors(flat.detach(), x)
        b = self.fisher(flat.detach(), x)
        b = b + (self.damping + self.eta) * torch.eye(len(flat), dtype=F64)
        gammas = [self.gamma]
        if number % self.search == 0:
            omega2 = self.omega ** (self.search / 2)
            gammas += [omega2 * self.gamma, self.gamma / omega2]
        tried = []
        for gamma in gammas:
            delta = self.direction(gradient, factors, gamma)
            if self.last is None:
                sizes = torch.tensor([-(gradient @ delta) / (delta @ b @ delta), 0.0], dtype=F64)
                step = sizes[0] * delta
            else:
                both = torch.stack([delta, self.last], 1)
                sizes = torch.linalg.solve(both.T @ b @ both, -(both.T @ gradient))
                step = both @ sizes
            change = (gradient @ step + step @ b @ step / 2).item()
            tried.append((change, gamma, sizes, step))
        change, self.gamma, sizes, step = min(tried, key=lambda each: each[0])
        self.lr, self.momentum = sizes.tolist()
        before, after = self.loss(flat, x, y), self.loss(flat + step, x, y)
        if number % self.every == 0:
            ratio = (after - before).item() / change
            if ratio > 3 / 4:
                self.damping *= self.omega**self.every
            elif ratio < 1 / 4:
                self.damping /= self.omega**self.every
        self.last = step.detach()
        return (flat + step).detach()


def flattened(model: nn.Module) -> Tensor:
    return torch.cat(
        [
            torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1).flatten()
            for layer in (model[0], model[2])
        ]
    ).detach()


@pytest.mark.parametrize("eta", [0.0, 0.02])
def test_equals_the_loop_by_hand(eta: float) -> None:
    torch.manual_seed(1)
    model = net()
    made = recipe(controller={"model_damping": 0.5}, weight_decay=eta, weight_decay_at="gradient")
    optimizer = made.bind(model)
    assert optimizer.param_groups[0]["damping"] == 0.5 + eta
    hand = Hand([], eta, 0.5, math.sqrt(0.5 + eta), every=5, search=20)
    flat, dampings = flattened(model), set()
    for number, (x, y) in enumerate(batches(80), 1):
        optimizer.step(closure_of(optimizer, model, x, y))
        flat = hand.step(number, flat, x, y)
        [group] = optimizer.param_groups
        found = [group[name] for name in ("lr", "momentum", "model_damping", "damping")]
        expected = [hand.lr, hand.momentum, hand.damping, hand.gamma**2]
        assert found == pytest.approx(expected, rel=1e-6), f"step {number}"
        torch.testing.assert_close(flattened(model), flat, rtol=1e-7, atol=1e-9)
        dampings.add((round(group["model_damping"], 9), round(group["damping"], 9)))
    assert len({one for one, _ in dampings}) > 4
    assert len({other for _, other in dampings}) > 2


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_is_the_minimum_of_a_quadratic_loss(eta: float) -> None:
    """A linear model with squared errors: the model of the loss, and of its decay, is the loss."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    x, y = torch.randn(20, 4, dtype=F64), torch.randn(20, 2, dtype=F64)
    columns = torch.cat([x, torch.ones(20, 1, dtype=F64)], 1)

    def loss_at(w: Tensor) -> Tensor:
        return (columns @ w.T - y).square().sum() / 40 + eta * w.square().sum() / 2

    seen: list[Any] = []

    @attrs.frozen
    class Watched(Quadratic):
        def reduction_ratio(self, *arguments: Any) -> float:
            found = super().reduction_ratio(*arguments)
            seen.append(found)
            return found

    watched = Watched(model_damping=1e-3, damped_ratio=False, adapt_every=1)
    decay = {"weight_decay": eta, "weight_decay_at": "gradient"}
    made = recipe(likelihood="gaussian", **decay).evolve(controller=watched)
    optimizer = made.bind(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum() / 40
        loss.backward()
        return loss

    last = None
    for _ in range(3):
        before = torch.cat([model.weight, model.bias.unsqueeze(1)], 1).detach().clone()
        optimizer.step(closure)
        after = torch.cat([model.weight, model.bias.unsqueeze(1)], 1).detach()
        step = after - before
        for other in (step * 0.99, step * 1.01, *(() if last is None else (step + 0.01 * last,))):
            damped = 1e-3 / 2 * (other.square().sum() - step.square().sum())
            assert loss_at(before + other) + damped > loss_at(after)
        last = step.clone()
    assert seen == pytest.approx([1.0, 1.0, 1.0], rel=1e-7)


def test_lambda_follows_the_ratio() -> None:
    stage = Quadratic(model_damping=2.0, adapt_every=5)
    model = QuadraticModel((-1.0, 0.0), ((1.0, 0.0), (0.0, 0.0)), ((1.0, 0.0), (0.0, 0.0)))
    numbers = {"lr": 0.5, "momentum": 0.0, "damping": 4.0, "model_damping": 2.0}
    predicted = -0.5 + 3 * 0.25 / 2  # M(d) - M(0) with lambda
    for ratio, factor in (
        (0.76, 0.95**5),
        (0.74, 1.0),
        (0.26, 1.0),
        (0.24, 0.95**-5),
        (-3.0, 0.95**-5),
    ):
        found = stage.adapt(1.0, 1.0 + ratio * predicted, model, numbers)
        assert found == {"model_damping": pytest.approx(2.0 * factor)}
    for lost in (math.inf, math.nan):
        assert stage.adapt(1.0, lost, model, numbers)["model_damping"] > 2.0
    assert stage.adapt(1.0, 1.0, model, {**numbers, "lr": 0.0}) == {"model_damping": 2.0}
    bounded = Quadratic(model_damping=2.0, least=1.9, most=2.1)
    assert bounded.adapt(1.0, 1.0 + predicted, model, numbers) == {"model_damping": 1.9}
    assert bounded.adapt(1.0, 2.0, model, numbers) == {"model_damping": 2.1}


def test_gamma_is_tried_every_so_many_steps() -> None:
    stage, numbers = Quadratic(search_every=20), {"damping": 4.0}
    assert stage.dampings(18, numbers) == [4.0]
    factor = math.sqrt(19 / 20) ** 20
    expected = [2.0**2, (2 * factor) ** 2, (2 / factor) ** 2]
    assert stage.dampings(19, numbers) == pytest.approx(expected)
    assert Quadratic(most=150.0).dampings(19, {"damping": 150.0}) == [
        150.0,
        pytest.approx(150.0 * factor**2),
    ]


def test_parallel_directions_use_one() -> None:
    parallel = QuadraticModel((-2.0, -4.0), ((1.0, 2.0), (2.0, 4.0)), ((1.0, 2.0), (2.0, 4.0)))
    assert minimum(parallel, 1.0) == (1.0, 0.0)
    nothing = QuadraticModel((0.0, -4.0), ((0.0, 0.0), (0.0, 4.0)), ((0.0, 0.0), (0.0, 4.0)))
    assert minimum(nothing, 1.0) == (0.0, 0.5)
    assert minimum(QuadraticModel((0.0, 0.0), *[((0.0, 0.0), (0.0, 0.0))] * 2), 1.0) == (0.0, 0.0)


@pytest.mark.parametrize(
    "options", [{"least": 200.0}, {"most": 1.0}, {"omega": 1.0}, {"adapt_every": 0}]
)
def test_refuses_what_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="Quadratic"):
        Quadratic(**options)
