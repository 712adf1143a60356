"""Gradients that are kept and hooks on gradients: they see the user's backward alone.

Truth is the same model under `torch.optim.SGD`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

import kfactk
from kfactk.capture.user_hooks import UserHooks

Seen = list[Any]
Way = Callable[["Probed", Seen], Callable[[Tensor], Tensor] | None]


class Probed(nn.Module):
    """Two layers; `inside` sees the hidden tensor and may replace it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Linear(4, 5), nn.Linear(5, 3)
        self.inside: Callable[[Tensor], Tensor] | None = None
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = torch.tanh(self.a(x))
        if self.inside is not None:
            self.hidden = self.inside(self.hidden)
        output: Tensor = self.c(self.hidden)
        return output


def retained(model: Probed, seen: Seen) -> Callable[[Tensor], Tensor]:
    def inside(hidden: Tensor) -> Tensor:
        hidden.retain_grad()
        return hidden

    return inside


def tensor_hook(model: Probed, seen: Seen) -> Callable[[Tensor], Tensor]:
    def inside(hidden: Tensor) -> Tensor:
        hidden.register_hook(lambda gradient: seen.append(gradient.clone()))
        return hidden

    return inside


def replacing_hook(model: Probed, seen: Seen) -> Callable[[Tensor], Tensor]:
    def inside(hidden: Tensor) -> Tensor:
        hidden.register_hook(lambda gradient: 3 * gradient)
        return hidden

    return inside


def hook_on_several(model: Probed, seen: Seen) -> Callable[[Tensor], Tensor]:
    def inside(hidden: Tensor) -> Tensor:
        several = [hidden, hidden * 1]
        torch.autograd.graph.register_multi_grad_hook(
            several, lambda found: seen.append(len(found))
        )
        return several[0] + several[1]

    return inside


def in_a_checkpoint(model: Probed, seen: Seen) -> Callable[[Tensor], Tensor]:
    def part(hidden: Tensor) -> Tensor:
        hidden = hidden * 2
        hidden.register_hook(lambda gradient: seen.append(gradient.clone()))
        return torch.sin(hidden)

    return lambda hidden: checkpoint(part, hidden, use_reentrant=False)


def full_backward_hook(model: Probed, seen: Seen) -> None:
    model.a.register_full_backward_hook(lambda module, inner, outer: seen.append(outer[0].clone()))


def full_backward_pre_hook(model: Probed, seen: Seen) -> None:
    model.c.register_full_backward_pre_hook(lambda module, outer: seen.append(outer[0].clone()))


def old_backward_hook(model: Probed, seen: Seen) -> None:
    model.c.register_backward_hook(lambda module, inner, outer: seen.append(outer[0].clone()))


WAYS: list[Way] = [
    retained,
    tensor_hook,
    replacing_hook,
    hook_on_several,
    in_a_checkpoint,
    full_backward_hook,
    full_backward_pre_hook,
    old_backward_hook,
]


def loop(way: Way, make: Callable[[nn.Module], Any]) -> tuple[Seen, list[Tensor]]:
    """Return what was seen in three steps, and the gradients of the parameters."""
    model, seen = Probed(), []
    model.inside = way(model, seen)
    optimizer = make(model)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(6, 4, generator=generator)
        loss = F.cross_entropy(model(x), torch.arange(6) % 3)
        assert model.hidden is not None
        seen.append(model.hidden.grad if model.hidden.retains_grad else None)
        model.zero_grad()
        loss.backward()
        seen.append(model.hidden.grad.clone() if model.hidden.retains_grad else None)
        optimizer.observe() if hasattr(optimizer, "observe") else None
    return seen, [parameter.grad for parameter in model.parameters()]


def measuring(fisher: str) -> Callable[[nn.Module], Any]:
    every = {"factor_every": 1, "scale_every": 1, "basis_every": 1}
    return kfactk.build(curvature="kfac", fisher=fisher, **every).bind


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_is_seen_is_that_of_the_users_backward(way: Way, fisher: str) -> None:
    found, truth = (
        loop(way, make) for make in (measuring(fisher), lambda m: torch.optim.SGD(m.parameters()))
    )
    torch.testing.assert_close(found, truth, rtol=0, atol=0)


def test_global_backward_hooks_see_the_users_backward_alone() -> None:
    counts = []
    for make in (measuring("exact"), lambda m: torch.optim.SGD(m.parameters())):
        seen: Seen = []
        handle = torch_module.register_module_full_backward_hook(
            lambda module, inner, outer, seen=seen: seen.append(type(module).__name__)
        )
        try:
            loop(lambda model, _: None, make)
        finally:
            handle.remove()
        counts.append(seen)
    assert counts[0] == counts[1] != []


def test_a_hook_that_replaces_gradients_does_not_change_the_curvature() -> None:
    factors = []
    for way in (replacing_hook, lambda model, seen: None):
        model = Probed()
        model.inside = way(model, [])
        optimizer = measuring("exact")(model)
        x, y = torch.ones(6, 4), torch.arange(6) % 3
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        factors.append(optimizer.layers["a"].factors["G"])
    torch.testing.assert_close(*factors, rtol=0, atol=0)


def test_an_output_retained_before_observe_keeps_its_gradient() -> None:
    model = Probed()
    optimizer = kfactk.build(curvature="kfac", observe="manual").bind(model)
    output = model(torch.ones(6, 4))
    output.retain_grad()
    optimizer.observe()
    assert output.grad is None
    output.sum().backward()
    torch.testing.assert_close(output.grad, torch.ones(6, 3))


def test_hooks_are_the_users_own_again_after_the_forward() -> None:
    model, methods = Probed(), (Tensor.retain_grad, Tensor.register_hook)
    handle = model.a.register_full_backward_hook(lambda *given: None)
    before = dict(model.a._backward_hooks)
    optimizer = measuring("mc")(model)
    model(torch.ones(6, 4))
    assert dict(model.a._backward_hooks) == before
    handle.remove()
    assert not model.a._backward_hooks
    assert (Tensor.retain_grad, Tensor.register_hook) == methods
    assert optimizer.steps == 0


def test_an_interrupted_forward_leaves_no_method_replaced() -> None:
    def interrupt(hidden: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model, methods = Probed(), (Tensor.retain_grad, Tensor.register_hook)
    optimizer = measuring("mc")(model)
    model.inside = interrupt
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(6, 4))
    optimizer.close()
    assert (Tensor.retain_grad, Tensor.register_hook) == methods


def test_hooks_that_gather_parameters_run_in_our_passes() -> None:
    def gather(gradient: Tensor) -> None:
        seen.append(gradient)

    gather.__module__ = "torch.distributed.fsdp"
    hooks, seen = UserHooks(), []
    x = torch.ones(2, requires_grad=True)
    hooks.start()
    y = x * 3
    y.register_hook(gather)
    hooks.stop()
    with hooks.left_alone():
        torch.autograd.grad(y.sum(), x)
    assert len(seen) == 1
