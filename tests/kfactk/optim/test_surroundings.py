"""What is around an optimizer: default devices, hooks on all optimizers, odd forwards, idling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from kfactk import CaptureError
from tests.kfactk.small import assert_equal, batch, bound, net, train, values

RECIPES: dict[str, dict[str, Any]] = {
    "default": {"update": "sgd"},
    "kfac": {"basis": "kfac", "update": "momentum"},
    "running": {"basis": {"name": "ekfac", "scale": "running"}, "update": "sgd"},
    "norms": {"curvature": "all", "clip": "kl"},
    "mc": {"fisher": "mc", "likelihood": {"name": "categorical"}},
    "empirical": {"fisher": "empirical", "update": "momentum"},
    "stationary": {
        "curvature": {"name": "conv_kfac", "spatial": "stationary"},
        "basis": {"name": "ekfac", "inputs": "channels"},
    },
}


def model_and_data() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.LayerNorm(3), nn.Flatten(), nn.Linear(27, 3))
    data = [(torch.randn(5, 2, 4, 4), torch.arange(5) % 3) for _ in range(4)]
    return model.double(), [(x.double(), y) for x, y in data]


def run(recipe: dict[str, Any], device: str | None) -> list[Tensor]:
    """Bind, train, save, load and train again; with `device` as the default, `None` for none."""
    model, data = model_and_data()
    with torch.device(device) if device else torch.device("cpu"):
        optimizer = bound(model, **recipe)
        for each in data[:2]:
            train(optimizer, model, each)
        saved = optimizer.state_dict()
        optimizer.close()
        optimizer = bound(model, **recipe)
        optimizer.load_state_dict(saved)
        for each in data[2:]:
            train(optimizer, model, each)
        [*views] = optimizer.layers.values()
        assert all(view.condition() is not None for view in views)
    return values(model)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_default_device_changes_nothing(recipe: str) -> None:
    """Its own tensors lie where they belong."""
    options = RECIPES[recipe] | {"factor_every": 1, "scale_every": 1, "basis_every": 2}
    assert_equal(run(options, "meta"), run(options, None))


@pytest.fixture
def counted() -> Iterator[list[tuple[str, torch.optim.Optimizer]]]:
    seen: list[tuple[str, torch.optim.Optimizer]] = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o))),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append(("post", o))),
    ]
    yield seen
    for handle in handles:
        handle.remove()


class Bare(torch.optim.SGD):
    """With a step of its own, which calls the one of its base."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(
    "update", ["sgd", "momentum", "nag", "adam", "adamw", "radam", torch.optim.Adagrad]
)
def test_hooks_on_all_optimizers_run_once(
    update: Any, counted: list[tuple[str, torch.optim.Optimizer]]
) -> None:
    model = net()
    optimizer = bound(model, update=update)
    own: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: own.append("pre"))
    optimizer.register_step_post_hook(lambda *_: own.append("post"))
    for _ in range(2):
        train(optimizer, model, batch())
    assert [kind for kind, _ in counted] == ["pre", "post"] * 2 == own
    assert all(each is optimizer for _, each in counted)


@pytest.mark.filterwarnings("ignore:no layer is preconditioned")
@pytest.mark.parametrize("update", ["sgd", Bare])
def test_a_step_without_those_hooks_is_the_same_step(update: Any) -> None:
    one, other = net(), net()
    other.load_state_dict(one.state_dict())
    optimizer = bound(one, update=update, exclude=["*"])
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    data = batch()
    for model, rule in ((one, optimizer), (other, plain)):
        rule.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        rule.step()
    assert_equal(values(one), values(other))


class Keeps(nn.Module):
    """Returns nothing, and keeps its logits; may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fails = nn.Linear(4, 3).double(), False
        self.logits = torch.empty(0)

    def forward(self, x: Tensor) -> None:
        self.logits = self.layer(x)
        if self.fails:
            raise ValueError("no")


@pytest.mark.parametrize("handling", [False, True])
def test_a_forward_that_returns_nothing(handling: bool) -> None:
    """Also while an exception is handled; a forward that raises does not count."""
    torch.manual_seed(0)
    model, (x, y) = Keeps(), batch()
    optimizer = bound(model, output=lambda _: model.logits, basis="kfac", curvature="kfac")

    def forward() -> None:
        model.fails = True
        with pytest.raises(ValueError, match="no"):
            model(torch.randn(6, 4).double())
        model.fails = False
        model(x)

    if handling:
        try:
            raise KeyError
        except KeyError:
            forward()
    else:
        forward()
    F.cross_entropy(model.logits, y).backward()
    p = model.logits.detach().softmax(-1)
    optimizer.step()
    truth = (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)).mean(0)
    torch.testing.assert_close(optimizer.layers["layer"].factors["G"], truth)


def test_a_transform_around_the_model_is_named() -> None:
    model, (x, y) = net(), batch()
    optimizer = bound(model)
    F.cross_entropy(torch.func.vmap(model)(x), y).backward()
    with pytest.raises(CaptureError, match=r"inside a transform \(torch.func.vmap, grad\)"):
        optimizer.step()
