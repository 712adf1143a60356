"""The pace `similar`: its laws, the rule of the paper, and a loop written by hand around it."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F

import kfactk
from kfactk import OptionError
from kfactk.testing import PaceLaws, PipelineLaws
from kfactk_stages.pace.similar import Similar
from tests.kfactk.small import F64, net

DAMPING, LR, DECAY, UNIT, ALPHA = 0.05, 0.3, 0.9, 2, 0.15
Matrices = dict[str, Tensor]


class TestSimilar(PaceLaws):
    stage = "similar"


class TestShortest(PaceLaws):
    stage = Similar(alpha=1e-3, longest=4)


class TestRecipe(PipelineLaws):
    recipe: ClassVar = {"pace": {"name": "similar", "alpha": 0.5}}


def intervals(pace: Similar, steps: int, **changes: list[float]) -> list[int]:
    """The intervals of a block whose statistics stay the same but for `changes`, by refresh."""
    found: list[int] = []
    for number in range(steps):
        known = changes.get(f"at_{number}", [0.0, 0.0])[:number]
        found.append(pace.interval(known, found[: -len(known) - 1 : -1]))
    return found


def test_constant_statistics_give_the_numbers_of_fibonacci() -> None:
    assert intervals(Similar(), 9) == [1, 1, 2, 3, 5, 8, 13, 21, 34]


def test_intervals_halve_hold_and_grow() -> None:
    found = intervals(Similar(), 9, at_5=[0.5, 0.5], at_6=[0.5, 0.5], at_7=[0.05, 0.5])
    assert found == [1, 1, 2, 3, 5, 2, 1, 1, 2]  # 5 // 2, 2 // 2, held, 1 + 1


def test_a_change_of_alpha_is_not_similar() -> None:
    pace = Similar(alpha=0.1)
    assert [pace.interval([c, 0.0], [8, 5]) for c in (0.0999, 0.1, math.inf, math.nan)] == [
        13,
        4,
        4,
        4,
    ]


def test_intervals_stop_at_the_longest() -> None:
    assert intervals(Similar(longest=6), 9) == [1, 1, 2, 3, 5, 6, 6, 6, 6]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"alpha": 0}, "alpha=0 cannot work: it must be a finite number greater than 0"),
        ({"alpha": "much"}, "alpha='much' cannot work"),
        ({"longest": 0}, "longest=0 cannot work: it must be a whole number of at least 1 or None"),
    ],
)
def test_options_are_checked(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        kfactk.build(pace={"name": "similar", **options})


# ------------------------------------------------------------------------------------ by hand


def data(step: int) -> tuple[Tensor, Tensor]:
    """The same examples with a little noise; from step 36 on they are larger."""
    fixed, own = (torch.Generator().manual_seed(seed) for seed in (0, 1 + step))
    x = torch.randn(48, 4, generator=fixed, dtype=F64)
    y = torch.randint(3, (48,), generator=fixed)
    x = x + 0.1 * torch.randn(48, 4, generator=own, dtype=F64)
    return x * (1.0 if step < 36 else 1.5), y


def factors_by_autograd(model: nn.Sequential, x: Tensor) -> dict[str, Matrices]:
    """A and G of both layers: means over examples, G of the exact Fisher matrix."""
    with torch.no_grad():
        inputs = {"0": x, "2": model[:2](x)}
        p = model(x).softmax(1)
    parameters = {name: each.detach() for name, each in model.named_parameters()}

    def output(biases: Matrices, one: Tensor) -> Tensor:
        return functional_call(model, {**parameters, **biases}, (one,))

    biases = {name: each for name, each in parameters.items() if name.endswith("bias")}
    jacobians = vmap(jacrev(output), in_dims=(None, 0))(biases, x)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    found = {}
    for name, each in inputs.items():
        a = torch.cat([each, torch.ones(len(x), 1, dtype=F64)], dim=1)
        j = jacobians[f"{name}.bias"]
        found[name] = {
            "A": a.T @ a / len(x),
            "G": torch.einsum("nco,ncd,ndp->op", j, hessian, j) / len(x),
        }
    return found


class ByHand:
    """K-FAC of one layer, with the rule of the paper; it knows nothing of kfactk."""

    def __init__(self) -> None:
        self.due, self.intervals, self.seen = 0, [1, 1], list[Matrices]()
        self.means: Matrices = {}
        self.weight = 0.0
        self.refreshed: list[int] = []
        self.inverses: Matrices = {}

    def similar(self, new: Matrices, old: Matrices) -> bool:
        return all(
            float((new[n] - old[n]).square().sum().sqrt())
            < ALPHA * float(old[n].square().sum().sqrt())
            for n in new
        )

    def refresh(self, step: int, new: Matrices) -> None:
        last, before = self.intervals
        to = [self.similar(new, old) for old in self.seen[-1:-3:-1]]
        if not to:
            interval = 1
        elif not to[0]:
            interval = max(1, last // 2)
        else:
            interval = last + before if to[1:] == [True] else last
        self.intervals = [interval, last] if to else [1, 1]
        self.seen.append(new)
        self.due = step + UNIT * interval
        self.refreshed.append(step)
        self.weight = DECAY * self.weight + 1
        for n in new:
            mean = self.means.get(n, new[n])
            self.means[n] = mean + (new[n] - mean) / self.weight
        a, g = self.means["A"], self.means["G"]
        pi = math.sqrt(float(a.diagonal().mean() / g.diagonal().mean()))
        tau = math.sqrt(DAMPING)
        self.inverses = {
            "A": torch.linalg.inv(a + pi * tau * torch.eye(len(a), dtype=F64)),
            "G": torch.linalg.inv(g + tau / pi * torch.eye(len(g), dtype=F64)),
        }


def by_hand(steps: int) -> tuple[nn.Sequential, dict[str, ByHand]]:
    torch.manual_seed(0)
    model, layers = net(), {"0": ByHand(), "2": ByHand()}
    for step in range(steps):
        x, y = data(step)
        found = factors_by_autograd(model, x)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name, layer in layers.items():
            if step >= layer.due:
                layer.refresh(step, found[name])
            linear = model[int(name)]
            gradient = torch.cat([linear.weight.grad, linear.bias.grad[:, None]], dim=1)
            p = layer.inverses["G"] @ gradient @ layer.inverses["A"]
            with torch.no_grad():
                linear.weight -= LR * p[:, :-1]
                linear.bias -= LR * p[:, -1]
    return model, layers


def test_a_run_is_that_of_a_loop_written_by_hand() -> None:
    """Statistics drift while the network learns, and jump once."""
    expected, layers = by_hand(60)
    torch.manual_seed(0)
    model = net()
    optimizer = kfactk.build(
        curvature="kfac",
        basis="kfac",
        fisher="exact",
        clip="none",
        update="sgd",
        lr=LR,
        damping=DAMPING,
        factor_decay=DECAY,
        factor_every=UNIT,
        pace={"name": "similar", "alpha": ALPHA},
    ).bind(model)
    refreshed: dict[str, list[int]] = {"0": [], "2": []}
    for step in range(60):
        x, y = data(step)
        before = {name: view.refreshes for name, view in optimizer.layers.items()}
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for name, view in optimizer.layers.items():
            refreshed[name] += [step] if view.refreshes != before[name] else []
    assert refreshed == {name: layer.refreshed for name, layer in layers.items()}
    assert refreshed["0"] != refreshed["2"]
    gaps = [b - a for a, b in itertools.pairwise(refreshed["0"])]
    assert max(gaps) > 3 * UNIT
    assert any(b < a for a, b in itertools.pairwise(gaps)), gaps  # it halves too
    for mine, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
