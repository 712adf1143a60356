"""A step that is interrupted anywhere can be taken again as if nothing had happened."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfactk import PluginError
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.clip.none import NoClip
from kfactk_stages.curvature.kfac import Kfac
from tests.kfactk.optim.test_faults import EACH, batches, close
from tests.kfactk.small import assert_equal, bound, factors, hooks, rule_state, train, values

LAST: dict[str, Any] = {**EACH, "factor_decay": 0.0}
"""Only the last batch counts: a step that is taken again shows no trace of the first attempt."""


class Trap:
    """Raises an error once, at one place, after so many calls."""

    def __init__(self) -> None:
        self.place, self.after = "", 0
        self.error: BaseException | None = None

    def __call__(self, place: str) -> None:
        if self.error is None or place != self.place:
            return
        if self.after == 0:
            error, self.error = self.error, None
            raise error
        self.after -= 1


TRAP = Trap()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        TRAP("forward")
        return self.b(x)


class Curvature(Kfac):
    def gradient_factors(self, layer: Any, samples: Any) -> Any:
        TRAP("Fisher pass")
        return super().gradient_factors(layer, samples)


class Basis(Ekfac):
    def decompose(self, name: str, matrix: Tensor, context: Any) -> Any:
        TRAP("refresh")
        return super().decompose(name, matrix, context)

    def moments(self, decomposition: Any, samples: Any) -> Any:
        TRAP("scale")
        return super().moments(decomposition, samples)

    def operator(self, decomposition: Any, moments: Any, damping: float, matrices: Any) -> Any:
        TRAP("precondition")
        return super().operator(decomposition, moments, damping, matrices)


class Clip(NoClip):
    def clip(self, pairs: Any, dot: Any) -> Any:
        TRAP("clip")
        return super().clip(pairs, dot)


class Rule(torch.optim.Adam):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        TRAP("update")
        super().step()


OFTEN = ("Fisher pass", "refresh", "scale", "precondition")
PLACES = [
    *((place, 0) for place in ("forward", "backward", "clip", "update")),
    *((place, after) for place in OFTEN for after in (0, 1)),
]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(("place", "after"), PLACES)
def test_a_step_that_was_interrupted_is_taken_again(
    place: str, after: int, kind: type[BaseException]
) -> None:
    """Interrupt the first or second call there, repeat the loop's body: the run is unchanged."""
    torch.manual_seed(1)
    model = Model().double()
    twin, data = copy.deepcopy(model), batches(4)
    model.b.weight.register_hook(lambda _: TRAP("backward"))  # the Fisher pass never calls it
    averaged = place in ("precondition", "clip", "update")
    decay = 0.0 if averaged else 0.9
    recipe: dict[str, Any] = {
        "curvature": Curvature(),
        "basis": Basis(scale_decay=decay),
        "clip": Clip(),
        "update": Rule,
        "lr": 0.01,
        **LAST,
    }
    optimizer, other = bound(model, **recipe), bound(twin, **recipe)
    for number, each in enumerate(data):
        train(other, twin, each)
        if number in (0, 2):
            before, rule = values(model), rule_state(optimizer)
            TRAP.place, TRAP.after, TRAP.error = place, after, kind("stop")
            with pytest.raises((kind, PluginError), match="stop"):
                train(optimizer, model, each)
            assert TRAP.error is None
            assert_equal(before, values(model))
            assert rule_state(optimizer) == rule
            assert optimizer.steps == number
        train(optimizer, model, each)
        close(values(model), values(twin))
    assert hooks(model) == 2
    close(factors(optimizer), factors(other))


def test_terms_of_a_forward_whose_pass_failed_are_not_counted() -> None:
    """The running scale is M times the squared gradient."""
    model = Model().double()
    twin, [data] = copy.deepcopy(model), batches(1)
    recipe: dict[str, Any] = {
        "curvature": Curvature(),
        "basis": {"name": "ekfac", "scale": "running"},
        **LAST,
    }
    optimizer, other = bound(model, **recipe), bound(twin, **recipe)
    TRAP.place, TRAP.after, TRAP.error = "Fisher pass", 1, ValueError("stop")
    with pytest.raises(PluginError, match="stop"):
        train(optimizer, model, data)
    train(optimizer, model, data)
    train(other, twin, data)
    for name, view in optimizer.layers.items():
        torch.testing.assert_close(view.scale, other.layers[name].scale)
