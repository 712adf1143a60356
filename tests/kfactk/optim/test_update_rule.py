"""The update rule: before there is one, and its step without hooks of all optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kfactk.optim.update_rule import UnboundRule, without_global_hooks
from tests.kfactk.small import batch, bound, net


def test_an_unbound_rule_has_nothing_yet() -> None:
    rule = UnboundRule()
    assert (rule.defaults, rule.param_groups, dict(rule.state)) == ({}, [], {})
    assert rule.state["anything"] == {}


def test_the_step_runs_no_hook_of_all_optimizers() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    rule, seen = torch.optim.SGD([weight], lr=0.5), []
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append("all"))
    try:
        rule.register_step_pre_hook(lambda *_: seen.append("own"))
        without_global_hooks(rule)()
        assert "all" not in seen
        assert weight.tolist() == [0.5, 0.5]
    finally:
        handle.remove()


def test_a_step_that_an_object_has_of_its_own_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torch.optim.lr_scheduler` wraps it."""
    rule = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.5)
    monkeypatch.setattr(rule, "step", lambda: "mine")
    assert without_global_hooks(rule)() == "mine"


def test_the_rule_gets_other_gradients_than_the_users_which_stay() -> None:
    model, data = net(), batch()
    optimizer = bound(model, update="sgd", lr=1.0)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    F.cross_entropy(model(data[0]), data[1]).backward()
    kept = {name: each.grad for name, each in model.named_parameters()}
    values = {name: each.grad.clone() for name, each in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is kept[name]
        torch.testing.assert_close(parameter.grad, values[name], rtol=0, atol=0)
        assert not torch.allclose(parameter, before[name] - parameter.grad)
