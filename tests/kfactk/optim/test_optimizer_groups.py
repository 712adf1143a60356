"""Parameter groups with their own numbers, subsets, and layers frozen and unfrozen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfactk
from kfactk import CombinationError, OptionError
from tests.kfactk import dense
from tests.kfactk.counterparts import RULES, TAU, assert_close, both, pair
from tests.kfactk.small import assert_equal, batch, bound, net, train, values


def test_a_group_added_while_training() -> None:
    """The new layer has no curvature yet, so it is measured at once, whatever the schedule says."""
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    optimizer = kfactk.build(**RULES["momentum"][0] | {"factor_every": 100}).bind(
        model, model[0].parameters()
    )
    plain = torch.optim.SGD(twin[0].parameters(), lr=0.1, momentum=0.9)
    both((model, optimizer), (twin, plain), steps=3)
    assert set(optimizer.layers) == {"0"}
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.05 * TAU})
    plain.add_param_group({"params": list(twin[2].parameters()), "lr": 0.05})
    assert set(optimizer.layers) == {"0", "2"}
    both((model, optimizer), (twin, plain), steps=3)
    assert_close(model, twin)
    assert optimizer.layers["2"].factors
    with pytest.raises(OptionError, match="damping of a parameter group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "damping": -1.0})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model[2].weight]})
    both((model, optimizer), (twin, plain), steps=1)
    assert_close(model, twin)


def test_groups_with_their_own_learning_rate_and_weight_decay() -> None:
    model = net()
    twin = copy.deepcopy(model)

    def groups(one: nn.Sequential, factor: float) -> list[dict[str, Any]]:
        weights, biases = [one[0].weight, one[2].weight], [one[0].bias, one[2].bias]
        return [
            {"params": weights, "weight_decay": 0.3 / factor},
            {"params": biases, "lr": 0.03 * factor},
        ]

    optimizer = kfactk.build(**RULES["momentum"][0]).bind(model, groups(model, TAU))
    plain = torch.optim.SGD(groups(twin, 1.0), lr=0.1, momentum=0.9)
    both((model, optimizer), (twin, plain))
    assert_close(model, twin)


def test_a_block_has_the_damping_of_its_weights_group() -> None:
    model, (x, y) = net(), batch()
    start = values(model)
    seen = dense.watch(
        copy.deepcopy(model), x, dense.exact_scores(dense.categorical_labels), ["0"]
    )["0"]
    groups = [
        {"params": [model[0].weight], "damping": 0.2},
        {"params": [model[0].bias], "damping": 7.0},
        {"params": model[2].parameters()},
    ]
    optimizer = bound(model, groups)
    F.cross_entropy(model(x), y).backward()
    gradient = torch.cat([model[0].weight.grad, model[0].bias.grad.unsqueeze(1)], 1)
    optimizer.step()
    assert optimizer.layers["0"].damping == 0.2
    vectors = {
        name: parts["eigenvectors"] for name, parts in optimizer.layers["0"].decomposition.items()
    }
    truth = dense.preconditioned(
        seen, gradient, spatial="sud", basis="exact", num_terms=6.0, tau=0.2, vectors=vectors
    )
    torch.testing.assert_close(model[0].weight, start[0] - 0.1 * truth[:, :-1])
    torch.testing.assert_close(model[0].bias, start[1] - 0.1 * truth[:, -1])


def test_damping_that_changes() -> None:
    """Damping is a function of the step, a group's own value, or a value set by hand."""
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "damping": 0.7}]
    optimizer = bound(model, groups, damping=lambda step: 1.0 / (1 + step))
    seen = []
    for _ in range(3):
        train(optimizer, model, batch())
        seen.append([group["damping"] for group in optimizer.param_groups])
    assert seen == [[1.0, 0.7], [0.5, 0.7], [1 / 3, 0.7]]
    fixed = bound(model, damping=0.5)
    fixed.param_groups[0]["damping"] = 0.25
    train(fixed, model, batch())
    assert fixed.layers["0"].damping == 0.25
    fixed.param_groups[0]["damping"] = float("nan")
    with pytest.raises(OptionError, match="damping of a parameter group is nan"):
        train(fixed, model, batch())


def test_named_parameters() -> None:
    model = net()
    twin = copy.deepcopy(model)
    recipe = kfactk.build(**RULES["adam"][0])
    optimizer, other = recipe.bind(model, model.named_parameters()), recipe.bind(twin)
    both((model, optimizer), (twin, other))
    assert_equal(values(model), values(twin))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_weight_decay_at_the_gradient_is_the_decay_of_the_loss(rule: str) -> None:
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    recipe, make, _ = RULES[rule]
    optimizer = kfactk.build(**recipe, weight_decay=0.2, weight_decay_at="gradient").bind(model)
    plain = make(twin.parameters())
    plain.param_groups[0]["weight_decay"] = 0.2
    both((model, optimizer), (twin, plain))
    assert_close(model, twin)
    assert optimizer.param_groups[0]["weight_decay"] == 0.2


def test_a_subset_of_the_parameters() -> None:
    model = net()
    before = values(model)
    optimizer = bound(model, [model[0].weight, model[2].bias])
    train(optimizer, model, batch())
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert changed == [True, False, False, True]
    assert {name: view.layer.parameters for name, view in optimizer.layers.items()} == {
        "0": ("weight",)
    }
    assert optimizer.layers["0"].factors["A"].shape == (4, 4)
    reasons = {row.parameter: row.reason for row in optimizer.coverage()}
    assert reasons["0.bias"] == "not among the optimizer's parameters"
    assert reasons["2.bias"] == "the layer's weight is not trained"


def test_layers_frozen_and_unfrozen_while_training() -> None:
    model, optimizer, twin, plain, _ = pair("sgd")
    phases: list[Callable[[nn.Sequential], Any]] = [
        lambda m: m[0].requires_grad_(False),
        lambda m: m[0].requires_grad_(True),
        lambda m: m[2].bias.requires_grad_(False),
        lambda m: m[2].bias.requires_grad_(True),
    ]
    shown = []
    both((model, optimizer), (twin, plain), steps=2)
    for phase in phases:
        phase(model)
        phase(twin)
        both((model, optimizer), (twin, plain), steps=2)
        shown.append({name: view.layer.parameters for name, view in optimizer.layers.items()})
        assert all(view.factors for view in optimizer.layers.values())
        assert_close(model, twin)
    whole = ("weight", "bias")
    assert shown == [
        {"2": whole},
        {"0": whole, "2": whole},
        {"0": whole, "2": ("weight",)},
        {"0": whole, "2": whole},
    ]


def test_a_layer_frozen_from_the_start_is_skipped_and_reported() -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = bound(model)
    before = values(model)
    train(optimizer, model, batch())
    assert_equal(before[:2], values(model)[:2])
    assert set(optimizer.layers) == {"2"}
    assert "0.weight   5x4    not trained: frozen (requires_grad is False)" in str(
        optimizer.coverage()
    )


def test_strict() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    with pytest.raises(CombinationError, match=r"1\.weight, 1\.bias.*drop strict"):
        bound(model, strict=True)
    assert not model._forward_hooks
    bound(model, [*model[0].parameters(), *model[2].parameters()], strict=True)
    model[1].requires_grad_(False)
    bound(model, strict=True)


def test_a_running_scale_is_measured_on_the_gradient_alone() -> None:
    """Weight decay that is preconditioned with the gradient is no part of what the data say."""
    found = []
    for decay in (0.0, 3.0):
        torch.manual_seed(0)
        model = net()
        recipe: dict[str, Any] = {
            "basis": {"name": "ekfac", "scale": "running"},
            "weight_decay": decay,
            "weight_decay_at": "gradient",
        }
        optimizer = bound(model, **recipe)
        train(optimizer, model, batch())
        found.append([scale for view in optimizer.layers.values() for scale in view.scale.values()])
    assert_equal(found[0], found[1])
