"""NAG: equation (12) at every schedule; equal to torch's Nesterov at a constant rate alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kfactk import CombinationError, OptionError, StateError
from kfactk.testing import UpdateLaws
from kfactk.testing._support.trajectories import Groups
from kfactk_stages.update.nag import NAG, Nag
from tests.kfactk_stages.update.trajectories import assert_same, gradient, groups, parameters, run

DROP = [1.0] * 6 + [0.1] + [1.0] * 5
UP_AND_DOWN = [1.0, 2.0, 1.5, 0.2, 1.0, 3.0, 0.01, 50.0]


class Literal(torch.optim.Optimizer):
    """Equation (12) in its own variables; the parameter is the look-ahead point theta + alpha v."""

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state, alpha = self.state[p], group["momentum"]
                gradient = p.grad + group["weight_decay"] * p.data
                state["v"] = (
                    alpha * state.get("v", torch.zeros_like(p.data)) - group["lr"] * gradient
                )
                state["theta"] = state.get("theta", p.data.clone()) + state["v"]
                p.data = state["theta"] + alpha * state["v"]


class TestNag(UpdateLaws):
    stage = "nag"

    def counterpart(
        self, groups: Groups, *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        return Literal(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.9})


class TestNagWithoutMomentum(UpdateLaws):
    stage = {"name": "nag", "momentum": 0.0}  # noqa: RUF012

    def counterpart(
        self, groups: Groups, *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=lr, weight_decay=weight_decay)


def literal(
    steps: int, lr_factors: Sequence[float], momenta: Sequence[float], decays: Sequence[float]
) -> list[list[Tensor]]:
    """Look-ahead points by equation (12) in theta and v, with gradients at theta + alpha v."""
    rates = [0.1, 0.003, 0.003]
    thetas = [p.detach().clone() for p in parameters()]
    velocities = [torch.zeros_like(t) for t in thetas]
    history = []
    for step in range(steps):
        alpha, following = momenta[step], momenta[step + 1]
        for k in range(3):
            rates[k] *= lr_factors[step] if step < len(lr_factors) else 1.0
            ahead = thetas[k] + alpha * velocities[k]
            velocities[k] = alpha * velocities[k] - rates[k] * (
                gradient(ahead, step) + decays[k] * ahead
            )
            thetas[k] = thetas[k] + velocities[k]
        history.append([theta + following * v for theta, v in zip(thetas, velocities, strict=True)])
    return history


@pytest.mark.parametrize(
    "lr_factors", [[], DROP, UP_AND_DOWN], ids=["constant", "drop", "up and down"]
)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_is_equation_12(lr_factors: list[float], momentum: float) -> None:
    history = run(
        lambda g: Nag(momentum=momentum).make(g, lr=0.1, weight_decay=0.01), lr_factors=lr_factors
    )
    assert_same(
        history, literal(12, lr_factors, [momentum] * 13, [0.01, 0.2, 0.2]), rtol=1e-11, atol=1e-12
    )


def test_is_equation_12_while_the_momentum_changes() -> None:
    momenta = [0.5, 0.6, 0.9, 0.95, 0.0, 0.7, 0.8]
    params = parameters()
    optimizer = Nag(momentum=0.5).make(groups(params), lr=0.1, weight_decay=0.0)
    history = []
    for step in range(6):
        for group in optimizer.param_groups:
            group["momentum"] = momenta[step + 1]  # of the look-ahead that this step ends with
        for parameter in params:
            parameter.grad = gradient(parameter, step)
        optimizer.step()
        history.append([p.detach().clone() for p in params])
    assert_same(history, literal(6, [], momenta, [0.0, 0.2, 0.2]), rtol=1e-11, atol=1e-12)


def test_torch_nesterov_agrees_at_a_constant_rate_and_differs_after_a_drop() -> None:
    def nesterov(g: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(g, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)

    def nag(g: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return Nag().make(g, lr=0.1, weight_decay=0.01)

    assert_same(run(nag), run(nesterov), rtol=1e-11, atol=1e-12)
    ours, theirs = run(nag, lr_factors=DROP), run(nesterov, lr_factors=DROP)
    assert_same(ours[:6], theirs[:6], rtol=1e-11, atol=1e-12)
    assert not torch.allclose(ours[6][0], theirs[6][0], rtol=1e-3)


def test_hooks_run() -> None:
    params = parameters()
    optimizer = Nag(momentum=0.7).make(groups(params), lr=0.1, weight_decay=0.0)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert calls == ["before", "after"]
    assert list(optimizer.state) == [params[0]]  # parameters without a gradient are left alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_from_its_state_bit_for_bit(dtype: torch.dtype, tmp_path: Any) -> None:
    params = parameters(dtype)
    optimizer = Nag().make(groups(params), lr=0.1, weight_decay=0.01)

    def advance(ps: list[torch.nn.Parameter], opt: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for group in opt.param_groups:
                group["momentum"] = 0.9 - 0.1 * (step % 3)
            for p in ps:
                p.grad = gradient(p, step)
            opt.step()

    advance(params, optimizer, range(5))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    others = copy.deepcopy(params)
    resumed = Nag().make(groups(others), lr=0.1, weight_decay=0.01)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(state["velocity"].dtype == dtype for state in resumed.state.values())
    advance(params, optimizer, range(5, 9))
    advance(others, resumed, range(5, 9))
    assert all(torch.equal(x, y) for x, y in zip(params, others, strict=True))


def test_parameters_of_several_precisions_in_one_group() -> None:
    params = [
        torch.nn.Parameter(torch.ones(3, dtype=dtype))
        for dtype in (torch.float64, torch.bfloat16, torch.float32)
    ]
    optimizer = NAG(params, lr=0.25, momentum=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [p.dtype for p in params] == [torch.float64, torch.bfloat16, torch.float32]
    assert all(torch.equal(p.data, torch.full_like(p, 1 - 1.5 * 0.25)) for p in params)


def test_one_cycle_schedule_moves_its_momentum() -> None:
    params = parameters()
    optimizer = Nag().make([{"params": params}], lr=0.1, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
    for step in range(3):
        for p in params:
            p.grad = gradient(p, step)
        optimizer.step()
        scheduler.step()
    assert all(torch.isfinite(p).all() for p in params)


def test_sparse_gradients_are_refused() -> None:
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = NAG(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(CombinationError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize("momentum", [1.0, -0.1, float("nan"), "0.9", None])
def test_momentum_is_checked(momentum: object) -> None:
    with pytest.raises(OptionError, match="momentum"):
        Nag(momentum=momentum)


def trained() -> tuple[torch.nn.Parameter, NAG]:
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = NAG([parameter], lr=0.1)
    parameter.grad = torch.ones(3, 2)
    optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize(
    "velocity",
    [
        None,
        [1],
        torch.ones(2, 3),
        torch.full((3, 2), float("inf")),
        torch.ones(3, 2) * float("nan"),
        torch.ones(3, 2).to_sparse(),
    ],
    ids=str,
)
def test_a_velocity_that_cannot_be_one_is_refused(velocity: Any) -> None:
    _, optimizer = trained()
    state = optimizer.state_dict()
    state["state"][0]["velocity"] = velocity
    with pytest.raises(StateError, match=r"velocity of a parameter of shape \(3, 2\) is no finite"):
        trained()[1].load_state_dict(state)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan"), 1e30])
@pytest.mark.parametrize("name", ["momentum", "previous_momentum"])
def test_a_saved_momentum_out_of_range_is_refused(name: str, momentum: float) -> None:
    _, optimizer = trained()
    state = optimizer.state_dict()
    state["param_groups"][0][name] = momentum
    with pytest.raises(StateError, match=rf"param_groups\[0\]\['{name}'\] is .*not in \[0, 1\)"):
        trained()[1].load_state_dict(state)
    del state["state"][0], state["param_groups"][0][name]
    trained()[1].load_state_dict(state)
