"""What torch's rules keep passes as they make it; what they could not have made is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kfactk import StateError
from kfactk.optim.rule_state import KEPT, check_entries, owned
from kfactk.preconditioner.damage import Damage
from kfactk.registry.torch_optimizer import UNSUPPORTED

VARIANTS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    *((rule, {}) for rule in KEPT),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
]


def stepped(
    rule: type[torch.optim.Optimizer], dtype: torch.dtype, steps: int, size: float, **options: Any
) -> torch.optim.Optimizer:
    shapes = [(2, 3)] if rule is getattr(torch.optim, "Muon", None) else [(2, 3), (3,), (2, 1, 2)]
    parameters = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    optimizer = rule(parameters, lr=0.01, **options)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape).mul(size).to(dtype)
        optimizer.step()
    return optimizer


def faults(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], sparse: frozenset[int] = frozenset()
) -> str:
    damage, groups = Damage(), optimizer.param_groups
    saved = state["param_groups"]
    check_entries(type(optimizer), state["state"], saved, groups, sparse, damage)
    try:
        damage.refuse()
    except StateError as error:
        return str(error)
    return ""


def test_every_rule_of_torch_is_known() -> None:
    """Add a rule that torch has gained, and what it keeps."""
    rules = {
        each
        for each in vars(torch.optim).values()
        if isinstance(each, type) and issubclass(each, torch.optim.Optimizer)
    }
    assert rules - {torch.optim.Optimizer, *UNSUPPORTED} == set(KEPT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rule", "options"), VARIANTS)
def test_what_a_rule_has_made_passes(
    rule: type[torch.optim.Optimizer], options: dict[str, Any], dtype: torch.dtype
) -> None:
    for steps, size in ((0, 1.0), (1, 0.0), (3, 1.0), (3, 1e-7), (3, 300.0)):
        optimizer = stepped(rule, dtype, steps, size, **options)
        values = optimizer.param_groups[0]["params"]
        if not all(bool(value.isfinite().all()) for value in values):
            assert dtype == torch.float16
            continue  # it has diverged
        state = copy.deepcopy(optimizer.state_dict())
        assert faults(optimizer, state) == ""
        optimizer.load_state_dict(state)
        assert faults(optimizer, optimizer.state_dict()) == ""


@pytest.mark.parametrize(("rule", "options"), VARIANTS)
def test_what_a_rule_could_not_have_made_is_refused(
    rule: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    optimizer = stepped(rule, torch.float32, 2, 1.0, **options)
    good = optimizer.state_dict()
    for key, value in good["state"].get(0, {}).items():
        if not isinstance(value, Tensor):
            continue
        bad: list[Any] = [value.double() * math.nan, "text", value.to("meta"), [value]]
        bad += [value[None], value + 1j, value.to_sparse()] if value.ndim else [value.repeat(2)]
        if key not in ("exp_avg", "momentum_buffer", "prev", "ax", "grad_avg"):
            bad += [-1 - value]
        if key in ("exp_avg", "momentum_buffer", "step", "ax"):
            bad += [value.double() + math.inf]
        if key in ("exp_avg", "momentum_buffer", "prev", "ax"):
            bad += [value.double() + 1e300]
        for each in bad:
            state = copy.deepcopy(good)
            state["state"][0][key] = each
            assert f"state[0]['{key}']" in faults(optimizer, state), (key, each)
        state = copy.deepcopy(good)
        del state["state"][0][key]
        assert faults(optimizer, state) or key == "momentum_buffer"


def test_squares_may_have_overflowed() -> None:
    """A gradient of 300 has a square beyond float16; its entries then take steps of zero."""
    optimizer = stepped(torch.optim.Adam, torch.float16, 2, 1e4)
    assert optimizer.state_dict()["state"][0]["exp_avg_sq"].isinf().any()
    assert faults(optimizer, optimizer.state_dict()) == ""


def test_a_state_that_adagrad_needs_must_be_there() -> None:
    optimizer = stepped(torch.optim.Adagrad, torch.float32, 1, 1.0)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0] = {}
    del state["state"][1]
    assert "state[0]['step'] is missing, which Adagrad needs" in faults(optimizer, state)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.requires_grad_(False)
    assert faults(optimizer, state) == ""


def test_sparse_momentum_belongs_to_sparse_gradients() -> None:
    optimizer = stepped(torch.optim.SGD, torch.float32, 1, 1.0, momentum=0.9)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["momentum_buffer"] = torch.eye(2, 3).to_sparse()
    assert "no dense tensor" in faults(optimizer, state)
    first = optimizer.param_groups[0]["params"][0]
    assert faults(optimizer, state, frozenset({id(first)})) == ""


class Other(torch.optim.SGD):
    """A rule that may keep anything."""


def test_other_rules_keep_what_they_like_but_nan() -> None:
    optimizer = stepped(Other, torch.float32, 0, 1.0)
    entry: dict[Any, Any] = {
        "codes": torch.tensor([255], dtype=torch.uint8),
        "small": torch.ones(2).to(torch.float8_e4m3fn),
        0: {"m": [torch.ones(7), None, "text", 3]},
        "inf": torch.tensor(math.inf),
        "none": None,
    }
    state = {**optimizer.state_dict(), "state": {0: entry}}
    assert faults(optimizer, state) == ""
    entry[0]["m"][0] = torch.tensor([math.nan])
    assert "state[0][0]['m'][0] holds NaN" in faults(optimizer, state)
    entry[0]["m"][0] = torch.ones(1, device="meta")
    assert "without data" in faults(optimizer, state)
    entry[0] = math.nan
    assert "state[0][0] is NaN" in faults(optimizer, state)


def test_tensors_that_a_rule_changes_are_its_own() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    whole = torch.arange(6.0).view(3, 2)
    leaf = torch.ones(3, 2, requires_grad=True)
    entry = {
        "plain": whole,
        "shared": whole.view(3, 2),
        "strided": torch.arange(6.0).view(2, 3).mT,
        "expanded": torch.ones(()).expand(3, 2),
        "leaf": leaf,
        "row": torch.ones(()).expand(3),
        "number": 3,
    }
    found = owned({0: entry, "mine": {"a": 1}, "all": 5}, {0: parameter})
    assert found["mine"] == {"a": 1}
    assert found["all"] == 5
    assert found[0]["plain"] is whole
    for key, value in entry.items():
        mine = found[0][key]
        if not isinstance(value, Tensor):
            assert mine == value
            continue
        assert torch.equal(mine, value)
        assert not mine.requires_grad
        if value.shape == parameter.shape:
            assert mine.stride() == parameter.stride()
    for mine in found[0].values():
        mine += 1
    assert torch.equal(whole, torch.arange(1.0, 7.0).view(3, 2)), "torch does not copy either"
    assert torch.equal(found[0]["shared"], whole)
