"""Layers that do not run at every step, that are left alone, or whose input is overwritten."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CaptureError, OptionError
from tests.kfactk.small import F64, batch, bound, net, train, values


class Switch(nn.Module):
    """Two linear layers, and a third in between when it is told so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.sometimes, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, use: bool = False) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.sometimes(x)) if use else x)


def use(optimizer: kfactk.Optimizer, model: Switch, with_it: bool) -> dict[str, Tensor]:
    """One step; how `sometimes` moved, over the learning rate, beside its plain gradient."""
    before = model.sometimes.weight.detach().clone()
    optimizer.zero_grad()
    x, y = batch(8)
    F.cross_entropy(model(x, with_it), y).backward()
    gradient = model.sometimes.weight.grad
    optimizer.step()
    return {"moved": (before - model.sometimes.weight.detach()) / 0.1, "plain": torch.zeros_like(before) if gradient is None else gradient}


def test_a_layer_that_does_not_run_is_followed_on_schedule_only_and_takes_its_plain_gradient_until_then() -> None:
    torch.manual_seed(0)
    model = Switch().double()
    optimizer = bound(model, factor_every=4, scale_every=4, basis_every=4)
    followed = []
    handle = model.sometimes.register_forward_pre_hook(lambda *_: followed.append(len(model.sometimes._forward_hooks)))
    for step in range(12):
        found = use(optimizer, model, with_it=step in (5, 8, 9))
        preconditioned = not torch.allclose(found["moved"], found["plain"], rtol=1e-6, atol=1e-12)
        assert preconditioned == (step in (8, 9)), step
    handle.remove()
    assert followed == [0, 1, 0]


def test_a_layer_that_is_unfrozen_is_followed_at_once() -> None:
    torch.manual_seed(0)
    model = Switch().double()
    model.first.requires_grad_(False)
    optimizer = bound(model, factor_every=100, scale_every=100, basis_every=100)
    use(optimizer, model, with_it=False)
    model.first.requires_grad_(True)
    use(optimizer, model, with_it=False)
    assert set(optimizer.layers["first"].factors) == {"A", "G"}


@pytest.mark.parametrize("due", [0, 4])
def test_an_input_overwritten_before_the_step_that_still_reads_it_is_an_error_and_changes_nothing(due: int) -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = bound(model, factor_every=4, scale_every=4, basis_every=4)
    for _ in range(due):
        train(optimizer, model, batch())
    x, y = batch()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    x.normal_()
    before = values(model)
    with pytest.raises(CaptureError, match="modified in place"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))
    assert optimizer.steps == due


def test_excluded_layers_take_their_plain_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))).to(F64)
    recipe = kfactk.build(exclude=["1"], update="sgd", clip="none", lr=0.1)
    assert recipe.coverage(model).covered == ("0.weight", "0.bias")
    assert {row.reason for row in recipe.coverage(model) if row.block is None} == {"excluded (exclude='1')"}
    optimizer, before = recipe.bind(model), values(model)
    train(optimizer, model, batch())
    for old, parameter in list(zip(before, model.parameters(), strict=True))[2:]:
        torch.testing.assert_close(parameter.detach(), old - 0.1 * parameter.grad, rtol=1e-12, atol=0)
    assert kfactk.build(exclude=["1.*"]).coverage(model).covered == recipe.coverage(model).covered
    assert kfactk.Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_pattern_that_matches_nothing_names_what_there_is() -> None:
    with pytest.raises(OptionError, match=r"exclude='tail' matches no module.*Its modules are: first, sometimes, last"):
        kfactk.build(exclude=["tail"]).bind(Switch())
    with pytest.raises(OptionError, match="list of names"):
        kfactk.build(exclude="head")


@pytest.mark.parametrize("name", ["lr", "damping", "weight_decay"])
def test_infinite_numbers_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} is inf"):
        kfactk.build(**{name: float("inf")})
