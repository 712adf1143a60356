"""Two-level link against dense algebra on the whole Fisher matrix, by autograd an example."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CaptureError, CombinationError, KfactkWarning
from kfactk.testing import LinkLaws
from kfactk_stages.likelihood.categorical import Categorical
from kfactk_stages.link.two_level import TwoLevel
from tests.kfactk.dense import Problem, all_preconditioned, categorical_labels, exact_scores
from tests.kfactk.small import F64
from tests.kfactk_stages.link import linking
from tests.kfactk_stages.link.linking import TAU, saved, step

RECIPE: dict[str, Any] = {**linking.RECIPE, "link": "two_level", "curvature": "conv_kfac"}


class TestTwoLevel(LinkLaws):
    stage = "two_level"


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3, bias=False)
    ).to(F64)


def conv() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 3, 2, groups=3), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(12, 3)),
    ).to(F64)


def batch(shape: tuple[int, ...], seed: int = 0, n: int = 6) -> tuple[Tensor, Tensor]:
    return linking.batch(shape, 3, n, seed)


def owner(name: str) -> str:
    return name.rpartition(".")[0]


def coarse(model: nn.Module, inputs: Tensor, *, exact: bool, targets: Tensor) -> Tensor:
    """E of the whole batch: sums of gradients of single examples, by autograd."""
    parameters = dict(model.named_parameters())
    layers = list(dict.fromkeys(map(owner, parameters)))
    sizes = {
        layer: sum(p.numel() for n, p in parameters.items() if owner(n) == layer)
        for layer in layers
    }
    total = torch.zeros(len(layers), len(layers), dtype=F64)
    for n in range(len(inputs)):
        log = F.log_softmax(model(inputs[n : n + 1]), -1)[0]
        losses = [(log[c].exp().item() if exact else 1.0, -log[c]) for c in range(len(log))]
        for weight, loss in losses if exact else [losses[int(targets[n])]]:
            found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
            sums = dict.fromkeys(layers, 0.0)
            for name, gradient in zip(parameters, found, strict=True):
                sums[owner(name)] += float(gradient.sum())
            c = torch.tensor([sums[x] / sizes[x] ** 0.5 for x in layers], dtype=F64)
            total += weight * torch.outer(c, c)
    return total / len(inputs)


def correction(
    model: nn.Module, e: Tensor, tensors: dict[str, Tensor], tau: float = TAU
) -> dict[str, Tensor]:
    """`Z (E + tau I)^-1 Z^T v` with Z written out, one row for each parameter."""
    layers = list(dict.fromkeys(map(owner, tensors)))
    z = torch.cat(
        [
            torch.tensor([[float(owner(n) == x) for x in layers]], dtype=F64).repeat(t.numel(), 1)
            for n, t in tensors.items()
        ]
    )
    z /= z.norm(dim=0)
    v = torch.cat([t.flatten() for t in tensors.values()])
    found = z @ torch.linalg.solve(e + tau * torch.eye(len(layers), dtype=F64), z.T @ v)
    parts = found.split([t.numel() for t in tensors.values()])
    return {n: x.view_as(t) for (n, t), x in zip(tensors.items(), parts, strict=True)}


@pytest.mark.parametrize(("make", "shape"), [(net, (4,)), (conv, (2, 4, 4))], ids=["mlp", "conv"])
def test_step_is_that_of_the_dense_matrix(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, (x, y) = make(), batch(shape)
    before = copy.deepcopy(model)
    problem = Problem(
        before, x, lambda out: F.cross_entropy(out, y), exact_scores(categorical_labels), len(x)
    )
    gradients = problem.gradients()
    e = coarse(before, x, exact=True, targets=y)
    alone = all_preconditioned(
        problem,
        problem.watch((nn.Linear, nn.Conv2d)),
        {},
        spatial="sud",
        basis="kfac",
        tau=TAU,
    )
    more = correction(before, e, gradients)
    step(model, kfactk.build(**RECIPE).bind(model), (x, y))
    for name, parameter in before.named_parameters():
        found = (parameter - dict(model.named_parameters())[name]).detach() / RECIPE["lr"]
        torch.testing.assert_close(found, alone[name] + more[name], rtol=1e-8, atol=1e-10)
    assert max(float(each.abs().max()) for each in more.values()) > 1e-3


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_statistics_decay_over_steps_and_add_over_forwards(fisher: str) -> None:
    model, data = net(), [batch((4,), seed) for seed in range(3)]
    optimizer = kfactk.build(**{**RECIPE, "fisher": fisher, "lr": 0.0}).bind(model)
    step(model, optimizer, data[0])
    optimizer.zero_grad()
    for x, y in data[1:]:
        (F.cross_entropy(model(x), y) / 2).backward()
    optimizer.step()
    exact, scale = fisher == "exact", 1.0 if fisher == "exact" else 0.25  # half the loss, squared
    first, second, third = (coarse(model, x, exact=exact, targets=y) for x, y in data)
    expected = (0.5 * first + scale * (second + third) / 2) / 1.5
    found = optimizer.state[model[0].weight]["kfactk.link.coarse"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Tokens(nn.Module):
    """Embedding, attention, norm, a shared layer, and a layer that runs every other time."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.recurrent = nn.LSTM(4, 3, batch_first=True)
        self.shared = nn.Linear(3, 3)
        self.rare = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.shared(torch.tanh(self.shared(self.recurrent(x)[0])))
        return self.rare(x.sum(1))


def test_sums_of_every_kind_of_layer_are_those_of_autograd() -> None:
    torch.manual_seed(5)
    model = Tokens().to(F64)
    tokens, y = torch.randint(7, (5, 4)), torch.randint(3, (5,))
    recipe = {**RECIPE, "curvature": "all", "fisher": "empirical", "lr": 0.0}
    optimizer = kfactk.build(**recipe).bind(model)
    views = optimizer.layers
    step(model, optimizer, (tokens, y))
    rows = []
    for n in range(len(tokens)):
        loss = F.cross_entropy(model(tokens[n : n + 1]), y[n : n + 1])
        owned = [list(view.layer.tensors().values()) for view in views.values()]
        found = [torch.autograd.grad(loss, each, retain_graph=True) for each in owned]
        rows.append(
            [
                sum(float(g.sum()) for g in each) / sum(g.numel() for g in each) ** 0.5
                for each in found
            ]
        )
    c = torch.tensor(rows, dtype=F64)
    anchor = next(iter(views.values())).layer.anchor
    found = optimizer.state[anchor]["kfactk.link.coarse"]
    assert found.shape == (len(views), len(views))
    torch.testing.assert_close(found, c.T @ c / len(c), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("damping", [TAU, 5 * TAU])
def test_precondition_has_the_damping_of_now(damping: float) -> None:
    model, data = net(), batch((4,))
    optimizer = kfactk.build(**{**RECIPE, "lr": 0.0}).bind(model)
    step(model, optimizer, data)
    optimizer.param_groups[0]["damping"] = damping
    torch.manual_seed(0)
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    alone = {
        f"{name}.{key}": part
        for name, view in optimizer.layers.items()
        for key, part in view.precondition(
            {k: v[f"{name}.{k}"] for k in view.layer.parameters}
        ).items()
    }
    e = optimizer.state[model[0].weight]["kfactk.link.coarse"]
    more = correction(model, e, v, damping)
    found = optimizer.precondition(v)
    for name in v:
        torch.testing.assert_close(found[name], alone[name] + more[name], rtol=1e-9, atol=1e-12)
    some = optimizer.precondition({"0.bias": v["0.bias"]})
    assert some.keys() == v.keys(), "the link answers for all layers"
    zero = {n: t if n == "0.bias" else torch.zeros_like(t) for n, t in v.items()}
    whole = optimizer.precondition(zero)
    for name in v:
        torch.testing.assert_close(some[name], whole[name], rtol=1e-12, atol=1e-14)


def test_frozen_layers_start_the_link_afresh() -> None:
    model, data = net(), batch((4,))
    optimizer = kfactk.build(**{**RECIPE, "lr": 0.0}).bind(model)
    step(model, optimizer, data)
    before = copy.deepcopy(model)
    model[2].requires_grad_(False)
    step(model, optimizer, data)
    found = optimizer.state[model[0].weight]
    whole = coarse(before, data[0], exact=True, targets=data[1])
    torch.testing.assert_close(found["kfactk.link.coarse"], whole[::2, ::2])
    assert float(found["kfactk.link.coarse.weight"]) == 1.0
    model[2].requires_grad_(True)
    model[0].requires_grad_(False)
    step(model, optimizer, data)
    assert optimizer.state[model[2].weight]["kfactk.link.coarse"].shape == (2, 2)


def test_a_forward_with_frozen_layers_measures_nothing_of_the_step() -> None:
    model, data = net(), batch((4,))
    optimizer = kfactk.build(**{**RECIPE, "lr": 0.0}).bind(model)
    model[0].requires_grad_(False)
    F.cross_entropy(model(data[0]), data[1]).backward()
    model[0].requires_grad_(True)
    optimizer.zero_grad()
    F.cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()
    found = optimizer.state[model[0].weight]["kfactk.link.coarse"]
    expected = coarse(model, data[0], exact=True, targets=data[1])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_bad_batch_counts_nothing() -> None:
    model, data = net(), batch((4,))
    optimizer = kfactk.build(**{**RECIPE, "lr": 0.0}).bind(model)
    step(model, optimizer, data)
    before = optimizer.state[model[0].weight]["kfactk.link.coarse"].clone()
    with pytest.warns(KfactkWarning):
        step(model, optimizer, (data[0] * float("nan"), data[1]))
    assert torch.equal(optimizer.state[model[0].weight]["kfactk.link.coarse"], before)
    step(model, optimizer, data)
    torch.testing.assert_close(optimizer.state[model[0].weight]["kfactk.link.coarse"], before)


@attrs.frozen(kw_only=True)
class FailsLate(Categorical):
    """Fails in the second pass over a forward, while `failing` holds anything."""

    failing: ClassVar[list[bool]] = []

    def root(self, view: Tensor) -> Iterator[Tensor]:
        for number, column in enumerate(Categorical.root(self, view)):
            if number and self.failing:
                raise CaptureError("no second pass")
            yield column


def test_a_forward_that_fails_late_counts_nothing() -> None:
    found = []
    for fails in (False, True):
        model = net()
        optimizer = kfactk.build(**RECIPE, likelihood=FailsLate()).bind(model)
        if fails:
            FailsLate.failing.append(True)
            with pytest.raises(CaptureError, match="no second pass"):
                model(batch((4,), seed=1)[0])
            FailsLate.failing.clear()
        step(model, optimizer, batch((4,)))
        found.append(optimizer.state[model[0].weight]["kfactk.link.coarse"])
    torch.testing.assert_close(found[1], found[0])


def test_a_state_of_other_layers_starts_the_link_afresh() -> None:
    model, data = net(), batch((4,))
    step(model, (first := kfactk.build(**RECIPE).bind(model)), data)
    state = saved(first)
    other = copy.deepcopy(model)
    other[2].requires_grad_(False)
    optimizer = kfactk.build(**RECIPE).bind(other)
    with pytest.warns(KfactkWarning, match=r"what another link measured, or .* joins now"):
        optimizer.load_state_dict(state)
    step(other, optimizer, data)
    assert optimizer.state[other[0].weight]["kfactk.link.coarse"].shape == (2, 2)
    without = kfactk.build(**{**RECIPE, "link": None}).bind(copy.deepcopy(model))
    without.load_state_dict(state)
    assert not [k for entry in without.state.values() for k in entry if "link" in k]


def test_a_damaged_statistic_is_refused() -> None:
    model, data = net(), batch((4,))
    step(model, (optimizer := kfactk.build(**RECIPE).bind(model)), data)
    state = saved(optimizer)
    state["state"][0]["kfactk.link.coarse"].neg_()
    with pytest.raises(kfactk.StateError, match=r"kfactk.link.coarse of layer '0'"):
        optimizer.load_state_dict(state)


def test_examples_that_differ_are_refused() -> None:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.head = nn.Linear(4, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            order = torch.randperm(2 * len(x), generator=torch.Generator().manual_seed(0))
            rows = self.rows(x.flatten(0, 1)[order])[order.argsort()]
            return self.head(rows.view(len(x), 6))

    model, (x, y) = Merged().to(F64), batch((2, 4))
    optimizer = kfactk.build(**RECIPE).bind(model)
    with (
        pytest.warns(KfactkWarning, match="layer 'rows'"),
        pytest.raises(CaptureError, match=r"'head' 6, 'rows' 12.*exclude=\[\.\.\.\]"),
    ):
        step(model, optimizer, (x, y))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stagger": True}, r"link 'two_level'.*same batch.*Leave out stagger=True"),
        ({"curvature": "gradient", "basis": "soap"}, r"'gradient' has none.*leave out the link"),
        (
            {"curvature": "gradient", "basis": {"name": "ekfac", "scale": "running"}},
            r"measures layers together on samples",
        ),
    ],
    ids=["stagger", "soap", "gradient"],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CombinationError, match=says):
        kfactk.build(link="two_level", **changes)


def test_coverage_says_what_is_linked() -> None:
    recipe, model = kfactk.build(link="two_level", exclude=["4"]), net()
    assert [row.linked for row in recipe.coverage(model)] == ["two_level"] * 4 + [""]
    assert "block 0 (conv_kfac, ekfac; linked by two_level)" in str(recipe.bind(model).coverage())


def test_the_recipe_is_written_and_read() -> None:
    recipe = kfactk.build(link=TwoLevel())
    assert recipe.to_dict()["link"] == {"name": "two_level"}
    assert kfactk.Recipe.from_dict(recipe.to_dict()) == recipe != kfactk.build()
    assert repr(recipe) == "kfactk.build(link='two_level')"
    assert recipe.evolve(link=None) == kfactk.build()
    assert kfactk.build().to_dict()["link"] is None
