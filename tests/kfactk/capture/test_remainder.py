"""Gradients that come past the calls of a forward are told, and those of penalties are not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfactk
from kfactk import Optimizer
from tests.kfactk.small import F64

X, Z = (torch.linspace(-1, 1, 6 * d, dtype=F64).reshape(6, d).sin() for d in (4, 5))
Y = torch.arange(6) % 3
Term = Callable[[Any, Tensor], Any]


class Model(nn.Module):
    """A trunk and a projection; each forward may run them several times."""

    def __init__(self, runs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.trunk, self.proj, self.runs = nn.Linear(4, 5), nn.Linear(5, 3), runs

    def forward(self, x: Tensor) -> Tensor:
        outs = (self.proj(torch.tanh(self.trunk(x.roll(run, 0)))) for run in range(self.runs))
        return sum(outs, torch.zeros(()))


def stepped(term: Term, model: Model, **how: Any) -> tuple[list[str], dict[str, Tensor]]:
    """What two steps warn of, and the gradients."""
    options: dict[str, Any] = {"curvature": "kfac", "fisher": "empirical", "lr": 0.0}
    options |= {"damping": 0.1, "factor_every": 1, **how.pop("recipe", {})}
    optimizer = kfactk.build(**options).bind(model)
    told = losses(term, model, optimizer, **how)
    return told, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def losses(
    term: Term, model: Model, optimizer: Any, forwards: int = 1, autocast: bool = False
) -> list[str]:
    dtype = model.proj.weight.dtype
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outs = [model(X.to(dtype).roll(n, 1)) for n in range(forwards)]
                loss = F.cross_entropy(sum(outs, torch.zeros(())), Y)
                loss = loss + term(model, Z.to(dtype))
            loss.backward()
            optimizer.step()
    texts = [str(each.message) for each in caught]
    return [each for each in texts if "part of the gradient" in each]


PAST: dict[str, Term] = {
    "a call": lambda m, z: m.proj(z).square().mean(),
    "a weight that is read": lambda m, z: F.linear(z, m.proj.weight).square().mean(),
    "a bias that is read": lambda m, z: (z[:, :3] * m.proj.bias).mean(),
    "a call of a part": lambda m, z: m.proj(torch.tanh(m.trunk(z[:, :4]))).logsumexp(1).mean(),
}
OWN: dict[str, Term] = {
    "nothing": lambda m, z: 0.0,
    "L2": lambda m, z: 1e-3 * sum(p.square().sum() for p in m.parameters()),
    "L1": lambda m, z: 1e-2 * m.proj.weight.abs().sum(),
    "both": lambda m, z: m.proj.weight.abs().sum() + m.proj.weight.square().sum(),
    "what nobody differentiates": lambda m, z: m.proj(z).detach().mean(),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "once": {},
    "three runs": {"runs": 3},
    "two forwards": {"forwards": 2},
    "float32": {"dtype": torch.float32, "runs": 3},
    "autocast": {"dtype": torch.float32, "autocast": True, "runs": 2},
}


def model_of(setting: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
    rest = dict(setting)
    return Model(rest.pop("runs", 1)).to(rest.pop("dtype", F64)), rest


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_comes_past_the_calls_is_told_once(setting: str) -> None:
    for name, term in PAST.items():
        model, how = model_of(SETTINGS[setting])
        told, _ = stepped(term, model, **how)
        assert len(told) == 1, name
        layers = "'trunk', 'proj'" if "part" in name else "'proj'"
        assert f"gradient of layers {layers} came past" in told[0]
        assert f"exclude=[{layers}]" in told[0]


@pytest.mark.parametrize("setting", SETTINGS)
def test_penalties_on_weights_are_silent(setting: str) -> None:
    for name, term in OWN.items():
        model, how = model_of(SETTINGS[setting])
        assert stepped(term, model, **how)[0] == [], name


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_are_those_of_an_unbound_model(setting: str) -> None:
    for term in (PAST["a call"], OWN["both"]):
        model, how = model_of(SETTINGS[setting])
        twin, _ = model_of(SETTINGS[setting])
        found = stepped(term, model, **how)[1]
        losses(term, twin, torch.optim.SGD(twin.parameters(), lr=0.0), **how)
        for name, parameter in twin.named_parameters():
            assert torch.equal(found[name], parameter.grad)


def test_what_the_remedies_say_is_silent() -> None:
    for recipe in ({"exclude": ["proj"]}, {"fisher": "mc"}, {"observe": "manual"}):
        options = {"curvature": "kfac", "fisher": "empirical", "lr": 0.0, **recipe}
        model = Model().double()
        optimizer = kfactk.build(**options, factor_every=1).bind(model)
        assert isinstance(optimizer, Optimizer)
        out = model(X)
        optimizer.observe()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (F.cross_entropy(out, Y) + PAST["a call"](model, Z)).backward()
            optimizer.step()


def test_a_backward_that_is_thrown_away_tells_nothing() -> None:
    model = Model().double()
    optimizer = kfactk.build(curvature="kfac", fisher="empirical", lr=0.0).bind(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (F.cross_entropy(model(X), Y) + PAST["a call"](model, Z)).backward()
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def test_a_hook_on_a_parameter_is_no_remainder() -> None:
    """As of a mask, or of a bound on gradients."""
    model = Model().double()
    model.proj.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    assert stepped(OWN["nothing"], model)[0] == []


def test_checkpointing_and_several_backwards_are_no_remainder() -> None:
    model = Model(2).double()
    optimizer = kfactk.build(curvature="kfac", fisher="empirical", lr=0.0).bind(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", kfactk.KfactkWarning)
        out = checkpoint(model, X, use_reentrant=False)
        F.cross_entropy(out[:3], Y[:3], reduction="sum").div(6).backward(retain_graph=True)
        F.cross_entropy(out[3:], Y[3:], reduction="sum").div(6).backward()
        optimizer.step()


class Recurrent(nn.Module):
    """Its input side and its hidden side are two layers, and one node where torch fuses them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rnn = nn.LSTM(4, 5, 2, batch_first=True, dtype=dtype)
        self.proj = nn.Linear(5, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.rnn(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_a_recurrent_layer_are_of_its_call(
    dtype: torch.dtype,
) -> None:
    recipe = {"curvature": ["rnn", "kfac"]}
    model: Any = Recurrent(dtype)
    assert stepped(lambda m, z: 0.0, model, recipe=recipe)[0] == []
    reads: Term = lambda m, z: (z[:, :5].mean(0) @ m.rnn.weight_hh_l0.T).logsumexp(0)  # noqa: E731
    [told] = stepped(reads, Recurrent(dtype), recipe=recipe)[0]  # type: ignore[arg-type]
    assert "layers 'rnn[hh_l0]' came past" in told
