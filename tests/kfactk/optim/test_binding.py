"""What `bind` refuses once the blocks are known: it takes its hooks off again."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import kfactk
from kfactk import CombinationError, KfactkWarning
from tests.kfactk.small import hooks, net

CONTROLLED = {
    "controller": "quadratic",
    "update": "velocity",
    "basis": {"name": "kfac", "solver": "eigh"},
    "weight_decay_at": "gradient",
}


class Scaled(nn.Module):
    """A layer with a parameter that no block takes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(1))

    def forward(self, x: Any) -> Any:
        return self.scale * self.inner(x)


def test_strict_names_what_has_no_block_and_leaves_no_hook() -> None:
    model = Scaled()
    told = r"strict=True, and no block preconditions scale\."
    with pytest.raises(CombinationError, match=told) as caught:
        kfactk.build(strict=True).bind(model)
    assert hooks(model) == 0, "also while the traceback keeps the optimizer"
    del caught
    kfactk.build(strict=True).bind(model, model.inner.parameters())


def test_a_model_without_blocks_is_told_at_the_line_that_binds() -> None:
    with pytest.warns(KfactkWarning, match="no layer is preconditioned") as told:
        kfactk.build(exclude=["*"]).bind(net())
    assert told[0].filename == __file__


@pytest.mark.parametrize("clip", ["trust_region", "kl"])
def test_parameters_past_a_bound_of_the_step_are_told(
    clip: str,
) -> None:
    model, rest = Scaled(), {"scale": torch.full((1,), 0.01)}
    recipe = kfactk.build(basis="kfac", update="sgd", clip=clip)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        recipe.bind(model).close()
        assert len(told) == (clip == "trust_region")
        recipe.bind(model, masks=rest).close()
        recipe.bind(model, model.inner.parameters()).close()
        model.scale.requires_grad_(False)
        recipe.bind(model).close()
    assert [each.filename for each in told] == [__file__] * (clip == "trust_region")
    for each in told:
        assert "no block has scale: such" in str(each.message)
        assert "masks={'scale': torch.full_like(model.get_parameter('scale')" in str(each.message)


def test_a_masked_parameter_steps_by_its_masked_gradient() -> None:
    model = Scaled()
    recipe = kfactk.build(basis="kfac", update="sgd", clip="trust_region", lr=0.5)
    mask = torch.full_like(model.get_parameter("scale"), 0.01)
    optimizer, before = recipe.bind(model, masks={"scale": mask}), model.scale.detach().clone()
    nn.functional.cross_entropy(model(torch.randn(5, 2)), torch.tensor([0, 1, 0, 1, 1])).backward()
    assert model.scale.grad is not None
    gradient = model.scale.grad.clone()
    optimizer.step()
    assert torch.allclose(before - model.scale, 0.005 * gradient, rtol=1e-3, atol=1e-7)


def test_a_controller_and_a_scaler_are_refused_and_leave_no_hook() -> None:
    model = net()
    with pytest.raises(CombinationError, match="GradScaler takes no closure"):
        kfactk.build(**CONTROLLED).bind(model, scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert hooks(model) == 0


def test_only_a_recipe_with_a_controller_is_controlled() -> None:
    assert kfactk.build().bind(net())._control is None
    assert kfactk.build(**CONTROLLED).bind(net())._control is not None
