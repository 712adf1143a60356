"""Block-tridiagonal link against dense inverses of the matrix that it claims to invert."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import KfactkWarning
from kfactk.testing import LinkLaws
from kfactk.testing._support.truth import vec
from kfactk_stages.link.block_tridiagonal import BlockTridiagonal
from tests.kfactk.small import F64
from tests.kfactk_stages.link.linking import TAU, step
from tests.kfactk_stages.link.tridiagonal import (
    RECIPE,
    Seen,
    assert_inverse,
    claimed,
    class_scores,
    data,
    drawn,
    joined,
    net,
)


class TestBlockTridiagonal(LinkLaws):
    stage = "block_tridiagonal"

    def in_recipe(self) -> dict[str, Any]:
        return {"link": self.subject(), "basis": "kfac"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_step_is_the_dense_inverse_of_the_claimed_matrix(depth: int, bias: bool) -> None:
    model, names = net(depth, bias)
    batch = data()
    before = copy.deepcopy(model)
    seen = Seen(before, names, batch[0], class_scores)
    matrix = claimed(seen.moment, names, TAU)
    loss = F.cross_entropy(before(batch[0]), batch[1])
    named = dict(before.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    expected = torch.linalg.solve(matrix, joined(before, names, gradients))
    step(model, kfactk.build(**RECIPE).bind(model), batch)
    moved = {
        n: (p - dict(model.named_parameters())[n]).detach() / RECIPE["lr"] for n, p in named.items()
    }
    found = joined(before, names, moved)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_each_damping_that_a_controller_tries_has_its_own_inverse() -> None:
    model, names = net(2, True)
    x, y = data()
    seen = Seen(model, names, x, class_scores)
    options = {
        "basis": {"name": "kfac", "solver": "eigh"},
        "update": "velocity",
        "lr": 0.003,
        "damping": None,
        "controller": {"name": "quadratic", "model_damping": 3.0, "search_every": 1, "omega": 0.1},
    }
    optimizer = kfactk.build(**{**RECIPE, **options}).bind(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    [group] = optimizer.param_groups
    assert group["damping"] != 3.0  # a neighbour was better
    gradient = {name: p.grad for name, p in model.named_parameters()}
    expected = -torch.linalg.solve(
        claimed(seen.moment, names, group["damping"]), joined(model, names, gradient)
    )
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    torch.testing.assert_close(
        joined(model, names, moved), group["lr"] * expected, rtol=1e-8, atol=1e-12
    )
    assert_inverse(optimizer, model, names, claimed(seen.moment, names, group["damping"]))


def test_statistics_decay_over_steps_add_over_forwards_and_wait_for_the_basis() -> None:
    model, names = net(3, True)
    batches = [data(seed=seed) for seed in range(4)]
    recipe = {**RECIPE, "lr": 0.0, "basis_every": 2}
    optimizer = kfactk.build(**recipe).bind(model)
    step(model, optimizer, batches[0])
    seen = [Seen(model, names, x, class_scores) for x, _ in batches]
    assert_inverse(optimizer, model, names, claimed(seen[0].moment, names, TAU))
    step(model, optimizer, batches[1])  # factors move, the basis does not
    assert_inverse(optimizer, model, names, claimed(seen[0].moment, names, TAU))
    optimizer.zero_grad()
    for x, y in batches[2:]:
        (F.cross_entropy(model(x), y) / 2).backward()
    optimizer.step()

    def mean(side: str, one: str, other: str) -> Tensor:
        a, b, c, d = (each.moment(side, one, other) for each in seen)
        return (0.25 * a + 0.5 * b + (c + d) / 2) / 1.75

    assert_inverse(optimizer, model, names, claimed(mean, names, TAU))


def test_a_deep_linear_network_has_the_claimed_matrix_but_for_damping() -> None:
    """Its Fisher blocks are Kronecker products, and blocks apart follow from those between."""
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3))).to(F64)
    names, (x, _) = ["0", "1", "2"], data(n=9)
    fisher: Any = 0
    for n in range(len(x)):
        for out in model(x[n]):
            found = torch.autograd.grad(out, list(model.parameters()), retain_graph=True)
            row = torch.cat([vec(each) for each in found])
            fisher = fisher + torch.outer(row, row) / len(x)
    errors = []
    for tau in (1e-8, 1e-10):
        other = copy.deepcopy(model)
        recipe = {**RECIPE, "likelihood": "gaussian", "lr": 0.0, "damping": tau}
        optimizer = kfactk.build(**recipe).bind(other)
        (0.5 * (other(x) - 1).square().sum(1).mean()).backward()
        optimizer.step()
        columns = []
        for index in range(27):
            unit = torch.zeros(27, dtype=F64)
            unit[index] = 1
            parts = {
                f"{k}.weight": each.view(3, 3).T
                for k, each in zip(names, unit.split(9), strict=True)
            }
            columns.append(joined(other, names, optimizer.precondition(parts)))
        claim = torch.linalg.inv(torch.stack(columns, 1))
        errors.append(float((claim - fisher).norm() / fisher.norm()))
    assert errors[0] < 1e-3
    assert errors[1] < 0.2 * errors[0], "what is left is not the damping"
    assert float(fisher[:9, 18:].norm() / fisher.norm()) > 0.03, "layers apart are uncorrelated"


def test_blocks_do_not_solve_where_the_link_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from kfactk.preconditioner.block import Block

    solved: list[str] = []
    solve = Block.solve
    monkeypatch.setattr(
        Block, "solve", lambda self, *args: solved.append(self.name) or solve(self, *args)
    )
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    optimizer = kfactk.build(**{**RECIPE, "curvature": ["kfac", "norm"]}).bind(model)
    step(model, optimizer, data())
    assert solved == ["1"]
    model[0].requires_grad_(False)
    step(model, optimizer, data())
    assert solved == ["1", "1", "2"], "a layer alone is its block's"


def test_a_bad_batch_changes_nothing() -> None:
    model, names = net(2, True)
    batch = data()
    optimizer = kfactk.build(**{**RECIPE, "lr": 0.0}).bind(model)
    step(model, optimizer, batch)
    seen = Seen(model, names, batch[0], class_scores)
    with pytest.warns(KfactkWarning):
        step(model, optimizer, (batch[0] * float("nan"), batch[1]))
    assert_inverse(optimizer, model, names, claimed(seen.moment, names, TAU))
    assert optimizer.counters == {"skipped_batches": 1, "failed_decompositions": 0}


def test_heads_that_need_several_passes_are_joined_in_each() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.trunk, self.one, self.other = (
                nn.Linear(3, 4).double(),
                nn.Linear(4, 2).double(),
                nn.Linear(4, 2).double(),
            )

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = torch.tanh(self.trunk(x))
            return {"one": self.one(hidden), "other": self.other(hidden)}

    model, (x, y), names = Heads(), data(), ["trunk", "other"]
    link = {"name": "block_tridiagonal", "layers": names}
    likelihood = {"one": "categorical", "other": "gaussian"}
    recipe = {**RECIPE, "link": link, "likelihood": likelihood, "lr": 0.0, "exclude": ["one"]}
    optimizer = kfactk.build(**recipe).bind(model)
    out = model(x)
    (F.cross_entropy(out["one"], y) + out["other"].square().sum(1).mean()).backward()
    optimizer.step()

    def scores(out: dict[str, Tensor]) -> list[Tensor]:
        return [*class_scores(out["one"]), *out["other"][0]]

    class Watched(Seen):
        def _watch(self, x: Tensor, scores: Any) -> None:
            def safe(out: dict[str, Tensor]) -> list[Tensor]:
                tie = 0.0 * (out["one"].sum() + out["other"].sum())
                return [each + tie for each in scores(out)]

            super()._watch(x, safe)

    seen = Watched(model, names, x, scores)
    v = {n: t for n, t in drawn(model).items() if not n.startswith("one")}
    found = joined(model, names, optimizer.precondition(v))
    expected = torch.linalg.solve(claimed(seen.moment, names, TAU), joined(model, names, v))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_recipe_is_written_and_read() -> None:
    recipe = kfactk.build(basis="kfac", link=BlockTridiagonal(["a", "b"]))
    assert recipe.to_dict()["link"] == {"name": "block_tridiagonal", "layers": ["a", "b"]}
    assert kfactk.Recipe.from_dict(recipe.to_dict()) == recipe
