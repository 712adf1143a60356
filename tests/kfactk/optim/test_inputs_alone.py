"""Bases that require a layer's inputs alone: no pass is run, no likelihood is read."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CaptureError, CombinationError

F64 = torch.float64
BASIS = {"name": "newton_muon", "precision": "full", "ridge": 0.1}


def recipe(**more: Any) -> kfactk.Recipe:
    given: dict[str, Any] = {
        "curvature": "conv_kfac",
        "basis": BASIS,
        "update": "sgd",
        "lr": 0.02,
        "first_moment": {"decay": 0.9, "nesterov": True},
        "factor_every": 2,
        "basis_every": 4,
    }
    return kfactk.build(**given | more)


@attrs.frozen
class Never:
    """A likelihood that must not be asked."""

    def view(self, output: Tensor) -> Tensor:
        raise AssertionError("the output was read")

    def term_weights(self, view: Tensor, batch: Any) -> Tensor | None:
        raise AssertionError("weights were read")

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        raise AssertionError("targets were drawn")

    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        raise AssertionError("a loss was made")

    def root(self, view: Tensor) -> Iterator[Tensor]:
        raise AssertionError("a root was made")


class Hidden:
    """An output whose tensors nobody can find."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Net(nn.Module):
    def __init__(self, output: str = "tensor") -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)
        self.spare = nn.Linear(4, 3)
        self.output = output

    def forward(self, x: Tensor) -> Any:
        h = self.conv(x).tanh().mean((-1, -2))
        found, _ = self.fc(h), self.spare(h)
        return {"tensor": found, "dict": {"deep": [found]}, "object": Hidden(found)}[self.output]


def net(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options).to(F64)


def images(step: int, count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, 1, 6, 6, dtype=F64, generator=generator)


def value_of(output: Any) -> Tensor:
    if isinstance(output, dict):
        return output["deep"][0]
    return output.value if isinstance(output, Hidden) else output


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        (value_of(model(images(step))) ** 4).sum().backward()
        optimizer.step()


def inputs_of(model: Net, x: Tensor) -> Tensor:
    """A of the last layer, bias included."""
    with torch.no_grad():
        h = model.conv(x).tanh().mean((-1, -2))
    rows = torch.cat([h, torch.ones_like(h[:, :1])], 1)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("output", ["tensor", "dict", "object"])
def test_nothing_is_asked_of_the_output(fisher: str, output: str) -> None:
    model = net(output=output)
    optimizer = recipe(fisher=fisher, likelihood=Never(), factor_every=1).bind(model)
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(1))
    state = optimizer.layers["fc"]
    assert set(state.factors) == {"A"}
    torch.testing.assert_close(state.factors["A"], inputs_of(before, images(0)))
    train(model, optimizer, range(1, 6))
    assert not torch.equal(model.fc.weight, before.fc.weight)


def test_all_forwards_of_a_step_count() -> None:
    model = net()
    before = copy.deepcopy(model)
    optimizer = recipe().bind(model)
    for part in images(0).split([2, 4]):
        (model(part) ** 2).sum().backward()
    optimizer.step()
    found = optimizer.layers["fc"].factors["A"]
    torch.testing.assert_close(found, inputs_of(before, images(0)))


def test_layers_that_the_output_does_not_need_are_not_measured() -> None:
    model = net()
    optimizer = recipe().bind(model)
    train(model, optimizer, range(1))
    assert "A" not in optimizer.layers["spare"].factors


@pytest.mark.parametrize("more", [{}, {"stagger": True}, {"lag": 2}, {"fisher": "empirical"}])
def test_it_resumes_bit_for_bit(more: dict[str, Any]) -> None:
    whole, part = net(), net()
    optimizer = recipe(**more).bind(whole)
    train(whole, optimizer, range(11))
    optimizer = recipe(**more).bind(part)
    train(part, optimizer, range(7))
    file = io.BytesIO()
    torch.save({"model": part.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = net(1)
    again.load_state_dict(saved["model"])
    optimizer = recipe(**more).bind(again)
    optimizer.load_state_dict(saved["optimizer"])
    train(again, optimizer, range(7, 11))
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_a_scaler_is_not_asked_for() -> None:
    model = net()
    optimizer = recipe(fisher="empirical").bind(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale((model(images(step)) ** 2).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert set(optimizer.layers["fc"].factors) == {"A"}


def test_a_batch_that_is_not_finite_moves_nothing() -> None:
    model = net()
    optimizer = recipe(factor_every=1).bind(model)
    train(model, optimizer, range(2))
    kept, before = optimizer.layers["conv"].factors["A"].clone(), copy.deepcopy(model)
    optimizer.zero_grad()
    x = images(3)
    x[0, 0, 0, 0] = torch.inf
    (model(x) ** 2).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    assert torch.equal(optimizer.layers["conv"].factors["A"], kept)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)), name


def test_a_weight_used_past_its_module_is_refused() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x).tanh().mean((-1, -2))
            return self.fc(h) + F.linear(h, self.fc.weight)

    torch.manual_seed(0)
    model = Twice().to(F64)
    optimizer = recipe().bind(model)
    with pytest.raises(CaptureError, match="exclude=\\['fc'\\]"):
        model(images(0))
    assert not optimizer.layers["fc"].factors


def test_beside_blocks_that_are_measured_the_pass_takes_them_along() -> None:
    """The other layer has what it has alone, and so has this one."""
    alone, mixed = net(), net()
    first = recipe(lr=0.0).bind(alone)
    curvature = [kfactk.block("conv_kfac", basis="kfac", layers=["conv"]), "conv_kfac"]
    second = recipe(curvature=curvature, lr=0.0).bind(mixed)
    for model, optimizer in ((alone, first), (mixed, second)):
        optimizer.zero_grad()
        F.cross_entropy(model(images(0)), torch.arange(6) % 3).backward()
        optimizer.step()
    assert set(second.layers["conv"].factors) == {"A", "G"}
    assert set(second.layers["fc"].factors) == {"A"}
    found, known = (each.layers["fc"].factors["A"] for each in (second, first))
    torch.testing.assert_close(found, known)


def test_links_and_clips_that_need_gradients_are_refused() -> None:
    for more in ({"link": "two_level"}, {"clip": "kl"}):
        with pytest.raises(CombinationError, match="newton_muon"):
            recipe(**more)
