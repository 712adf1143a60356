"""Which parameter is meant, in one process; `test_fully_sharded_loop` tests `fully_shard`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kfactk
from kfactk import KfactkError, KfactkWarning
from kfactk.preconditioner.parameters import ParameterTracker
from tests.kfactk.small import batch, bound, net, train, values


def meta() -> nn.Sequential:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model.double()


def fill(model: nn.Module) -> None:
    truth = net()
    model.to_empty(device="cpu")
    model.load_state_dict(truth.state_dict())


def test_a_model_filled_after_bind_trains_like_one_filled_before() -> None:
    torch.manual_seed(0)
    early, late = meta(), meta()
    fill(early)
    torch.manual_seed(0)
    optimizer = bound(late)
    fill(late)
    other = bound(early)
    for _ in range(2):
        data = batch()
        train(optimizer, late, data)
        train(other, early, data)
    assert all(
        torch.equal(one, same) for one, same in zip(values(late), values(early), strict=True)
    )
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in late.parameters()
    ]
    assert [optimizer.steps, set(optimizer.layers)] == [2, {"0", "2"}]


def test_a_parameter_that_the_user_replaces_is_not_followed() -> None:
    model = net()
    optimizer = bound(model)
    model[0].weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    with pytest.warns(KfactkWarning, match=r"0\.weight of the model are new parameters"):
        train(optimizer, model, batch())
    assert set(optimizer.layers) == {"2"}, (
        "it is not among the optimizer's parameters, as for any optimizer of torch"
    )


def test_a_layer_that_is_not_initialised_yet_has_no_form_to_compare() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    tracker = ParameterTracker(model)
    model(torch.ones(2, 4))
    assert tracker.look() == []
    assert tracker.at(model[0], "weight") is model[0].weight
    assert tracker.at(model[0], "gain") is None


def test_what_is_replaced_in_the_groups_is_meant_in_the_model() -> None:
    model = meta()
    tracker = ParameterTracker(model)
    groups = [{"params": list(model.parameters())}]
    tracker.follow(groups, {})
    params = groups[0]["params"]
    fill(model)
    tracker.follow(groups, {})
    assert groups[0]["params"] is params
    assert all(mine is theirs for mine, theirs in zip(params, model.parameters(), strict=True))


def test_a_state_that_belongs_to_what_was_replaced_is_refused() -> None:
    model = meta()
    tracker = ParameterTracker(model)
    groups = [{"params": list(model.parameters())}]
    tracker.follow(groups, {})
    state = {parameter: {} for parameter in model.parameters()}
    fill(model)
    with pytest.raises(KfactkError, match="after the optimizer's first step"):
        tracker.follow(groups, state)


def test_coverage_names_the_parameters_of_shared_modules_once() -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    assert [row.parameter for row in kfactk.build().coverage(model)] == ["0.weight", "0.bias"]
