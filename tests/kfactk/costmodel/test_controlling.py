"""What a controller costs: truth is what torch counts in real steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import kfactk
from kfactk import CaptureError, PluginError
from kfactk.assignment import grid
from kfactk.costmodel.cost import ControlCost, TrainingLoad, cost
from kfactk.costmodel.counting import meta_batch, training_load
from kfactk.costmodel.hardware import H100
from kfactk_stages.controller.quadratic import Quadratic
from tests.allocation import peak_bytes

N = 16
SIZES = ((20, 40), (40, 30), (30, 5))
RECIPE: dict[str, Any] = {
    "curvature": "kfac",
    "basis": {"name": "kfac", "solver": "eigh"},
    "update": "velocity",
    "clip": "none",
}
OFTEN = {"name": "quadratic", "adapt_every": 2, "search_every": 3}


def net(width: int = 40) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, 30), nn.Tanh(), nn.Linear(30, 5))
    )


def loaded(controller: Any = OFTEN, width: int = 40, exclude: Sequence[str] = ()) -> TrainingLoad:
    recipe = kfactk.build(**RECIPE, controller=controller, exclude=exclude)
    return training_load(net(width).to("meta"), recipe, meta_batch("20", N))


def control_of(load: TrainingLoad) -> ControlCost:
    assert load.control is not None
    return load.control


def steps_of(controller: Any, width: int = 40, exclude: Sequence[str] = ()) -> Callable[[], object]:
    """Return what takes a step on one batch."""
    model = net(width)
    optimizer = kfactk.build(**RECIPE, controller=controller, exclude=exclude).bind(model)
    x, y = torch.randn(N, 20), torch.randint(5, (N,))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def step() -> object:
        if controller is not None:
            return optimizer.step(closure)
        closure()
        return optimizer.step()

    return step


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_rates_are_those_of_the_periods() -> None:
    rates = control_of(loaded()).rates
    assert dict(rates.tries) == pytest.approx({1: 2 / 3, 3: 1 / 3}, abs=1e-3)
    assert rates.evaluations == 0.5
    usual = control_of(loaded("quadratic")).rates
    assert (usual.evaluations, usual.directions) == (0.2, pytest.approx(2.1))


def test_a_direction_takes_the_products_of_primal_and_tangent() -> None:
    """`W x`, `dW x` and `W dx` in each layer: three times a forward."""
    found = control_of(loaded()).direction.products
    assert found == 3 * sum(2 * N * i * o for i, o in SIZES)


def test_steps_take_the_flops_that_are_counted() -> None:
    """Of six steps, those without a refresh: against a step of the same recipe without it."""
    load = loaded()
    control, plain, step = control_of(load), steps_of(None), steps_of(OFTEN)
    for each in (plain, step):
        each()
    usual = flops(plain)
    solving = sum(layer.precondition.products for layer in load.layers.values())
    training = load.forward_backward.products
    for number in range(1, 6):
        tries = 3 if (number + 1) % 3 == 0 else 1
        evaluates = (number + 1) % 2 == 0
        products = control.products[tries].products / 2  # as torch counts: without their precision
        expected = (tries + 1) * control.direction.products + products
        expected += (tries - 1) * solving + evaluates * training
        assert flops(step) - usual == pytest.approx(expected, rel=1e-4), number


def test_parts_have_the_shares_of_the_rates() -> None:
    load = loaded()
    control = control_of(load)
    costs = cost(load, grid(load.workload, 1, 1, "one"), 1, H100)
    again = costs.compute["loss again"]
    assert again.mean == pytest.approx(again.worst / 2)
    trials = costs.compute["trials of damping"]
    solving = costs.compute["preconditioning"].mean
    assert trials.worst == pytest.approx(2 * solving)
    assert trials.mean == pytest.approx(solving * (control.rates.mean_tries - 1))
    one, three = (
        (tries + 1) * control.direction.seconds(H100, "tf32")
        + control.products[tries].seconds(H100)
        for tries in (1, 3)
    )
    model = costs.compute["quadratic model"]
    assert model.worst == pytest.approx(three)
    assert model.mean == pytest.approx((2 * one + three) / 3, rel=1e-3)


def test_messages_of_gradients_and_averages_are_repeated() -> None:
    load = loaded()
    plain = attrs.evolve(load, control=None)
    assignment = grid(load.workload, 2, 1, "one rank each")
    one, other = (cost(each, assignment, 2, H100) for each in (plain, load))
    mean = control_of(load).rates.mean_tries
    assert other.moved["gradients"] == pytest.approx(mean * one.moved["gradients"])
    assert other.worst_moved["gradients"] == pytest.approx(3 * one.worst_moved["gradients"])
    assert other.moved["sums"] == one.moved["sums"]
    name = "averaging gradients"
    assert other.communication[name].mean == pytest.approx(1.5 * one.communication[name].mean)


def test_a_step_needs_about_the_bytes_that_are_counted() -> None:
    """Of a model whose parameters are most of what there is: the peak over that without it."""
    width, wide = 20_000, ("0", "2")
    peaks = []
    for controller in (None, OFTEN):
        step = steps_of(controller, width, wide)
        for _ in range(2):
            step()  # bases, and the last step
        peaks.append(max(peak_bytes(step) for _ in range(4)))
    predicted = control_of(loaded(OFTEN, width, wide)).temporary
    assert 0.5 * (peaks[1] - peaks[0]) <= predicted <= 2 * (peaks[1] - peaks[0])


def test_operations_without_a_derivative_are_refused_as_in_a_step() -> None:
    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(20, 5)

        def forward(self, x: Tensor) -> Tensor:
            return Other.apply(self.fc(x))

    recipe = kfactk.build(**RECIPE, controller="quadratic")
    with pytest.raises(CaptureError, match="needs the derivative of the model's output along"):
        training_load(Model().to("meta"), recipe, meta_batch("20", N))


@attrs.frozen
class Idle(Quadratic):
    """Tries no damping."""

    def dampings(self, step: int, numbers: Mapping[str, float]) -> Sequence[float]:
        return []


def test_a_controller_without_a_damping_is_named() -> None:
    with pytest.raises(PluginError, match=r"Idle.* tries no damping in some steps"):
        loaded(Idle())
