"""Factors of inputs alone: staggered steps take them without a Fisher pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import Layer, Samples, Statistic
from kfactk_stages.curvature.kfac import Kfac
from tests.kfactk.small import F64, batch, bound, net, train

STAGGERED: dict[str, Any] = {
    "stagger": True,
    "factor_every": 4,
    "scale_every": 4,
    "basis_every": 40,
    "factor_decay": 0.5,
}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many inputs each call of `torch.autograd.grad` had."""
    made: list[int] = []
    grad = torch.autograd.grad

    def counted(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(len(inputs))
        return grad(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return made


def rows(model: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    """Each layer's inputs, with the bias' one."""
    seen = {"0": x, "2": model[:2](x).detach()}
    return {
        name: torch.cat([each, torch.ones(len(each), 1, dtype=F64)], 1)
        for name, each in seen.items()
    }


def test_input_factors_come_between_passes_and_without_one(passes: list[int]) -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = bound(model, **STAGGERED, fisher="mc")
    expected, outputs = {}, {}
    for step in range(7):
        x, y = batch()
        moments = {name: a.T @ a / len(a) for name, a in rows(model, x).items()}
        passes.clear()
        train(optimizer, model, (x, y))
        # All at 0; the later layer's first scale at 1, and the earlier layer's part at 1 and 5.
        wanted = step in (0, 1, 4, 5)
        made = [1] * (wanted + 4 * (step == 0))  # the first follows four on the layout
        assert passes == made, f"Fisher passes to {passes} at step {step}"
        if step == 0:
            expected = moments
        elif step in (2, 6):
            weight = {2: 1.5, 6: 1.75}[step]  # 1 + 1/2 (+ 1/4)
            expected = {
                name: expected[name] + (moments[name] - expected[name]) / weight
                for name in expected
            }
        for name, view in optimizer.layers.items():
            torch.testing.assert_close(view.factors["A"], expected[name])
            if step not in {"0": (0, 1, 5), "2": (0, 4)}[name]:
                assert torch.equal(view.factors["G"], outputs[name]), f"G changed at step {step}"
            elif step:
                assert not torch.equal(view.factors["G"], outputs[name]), f"G stayed at step {step}"
            outputs[name] = view.factors["G"].clone()


class Detour(nn.Module):
    """A layer used twice, once for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        self.fc(100 * x)
        out: Tensor = self.fc(x)
        return out


def test_a_call_that_leads_nowhere_is_not_counted() -> None:
    torch.manual_seed(0)
    model = Detour()
    optimizer = bound(model, **{**STAGGERED, "factor_decay": 0.0})
    x = torch.randn(6, 4, dtype=F64)
    for step in range(3):
        x = torch.randn(6, 4, dtype=F64)
        train(optimizer, model, (x, torch.arange(6) % 4))
        if step in (0, 2):
            a = torch.cat([x, torch.ones(6, 1, dtype=F64)], 1)
            torch.testing.assert_close(optimizer.layers["fc"].factors["A"], a.T @ a / 6)


def test_micro_batches_add_up() -> None:
    torch.manual_seed(0)
    one, other = net(), net()
    other.load_state_dict(one.state_dict())
    options = {**STAGGERED, "fisher": "exact"}
    whole, parted = bound(one, **options), bound(other, **options)
    for _ in range(4):
        x, y = batch(6)
        train(whole, one, (x, y))
        parted.zero_grad()
        for part in (slice(0, 2), slice(2, 6)):
            (F.cross_entropy(other(x[part]), y[part], reduction="sum") / 6).backward()
        parted.step()
        for name, view in whole.layers.items():
            for key, factor in view.factors.items():
                torch.testing.assert_close(
                    parted.layers[name].factors[key], factor, msg=f"{key} of {name}"
                )


def test_overdue_input_factors_are_saved_and_taken_later() -> None:
    """A layer that did not run when its inputs were due gives them at the next forward.

    It does so after a resume too.
    """
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}).double()

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.name = model, "ab"

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.parts[key](x) for key in self.name]).sum(0)

    chosen = Chosen()
    optimizer = bound(chosen, **{**STAGGERED, "factor_decay": 0.0})
    for step in range(4):
        x, y = batch()
        chosen.name = "b" if step == 2 else "ab"
        train(optimizer, chosen, (x, y))
        if step == 2:
            before = optimizer.layers["parts.a"].factors["A"].clone()
            saved = optimizer.state_dict()
            optimizer = bound(chosen, **{**STAGGERED, "factor_decay": 0.0})
            optimizer.load_state_dict(saved)
    a = torch.cat([x, torch.ones(6, 1, dtype=F64)], 1)
    assert not torch.equal(before, optimizer.layers["parts.a"].factors["A"])
    torch.testing.assert_close(optimizer.layers["parts.a"].factors["A"], a.T @ a / 6)


class Whole(Kfac):
    """Takes all its factors with the gradients."""

    def input_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        return {}

    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        inputs = super().input_factors(layer, samples)
        return {**inputs, **super().gradient_factors(layer, samples)}


def test_a_curvature_without_input_factors_takes_all_with_the_gradients(
    passes: list[int],
) -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = bound(model, **STAGGERED, curvature=Whole(), fisher="mc")
    seen = []
    for _ in range(6):
        passes.clear()
        before = [view.factors.get("A") for view in optimizer.layers.values()]
        train(optimizer, model, batch())
        after = [view.factors["A"] for view in optimizer.layers.values()]
        changed = any(
            old is None or not torch.equal(old, new) for old, new in zip(before, after, strict=True)
        )
        seen.append((len(passes), changed))
    # The first follows four passes on the layout of examples.
    assert seen == [(5, True), (1, True), (0, False), (0, False), (1, True), (1, True)]


def test_a_listening_fisher_takes_inputs_with_the_users_backward() -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = bound(model, **{**STAGGERED, "factor_decay": 0.0}, fisher="empirical")
    for _ in range(3):
        x, y = batch()
        model(torch.randn(9, 4, dtype=F64))  # no backward follows
        a = rows(model, x)
        train(optimizer, model, (x, y))
    for name, view in optimizer.layers.items():
        torch.testing.assert_close(view.factors["A"], a[name].T @ a[name] / 6)


def test_the_recipe_is_the_same_with_kfactk_build() -> None:
    assert kfactk.build(stagger=True).schedule.due(6).inputs


class Watched(torch.autograd.Function):
    """The identity, which notes when a backward passes it."""

    passed = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Watched.passed += 1
        return gradient


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Watched.apply(x)
        return found


def test_the_pass_of_the_later_layers_goes_no_deeper() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), Gate(), nn.Linear(5, 6), Gate(), nn.Linear(6, 3)
    ).double()
    optimizer = bound(model, **STAGGERED, fisher="mc")
    depths = []
    for _ in range(10):
        x, y = batch()
        optimizer.zero_grad()
        Watched.passed = 0
        loss = F.cross_entropy(model(x), y)  # our own pass runs right after the forward
        depths.append(Watched.passed)
        loss.backward()
        optimizer.step()
    # The first comes twice: one pass is on the layout of examples.
    assert depths == [10, 2, 0, 0, 1, 2, 0, 0, 1, 2]
