"""Several heads and losses, heads that rest in a step, and experts that see a part of the rows.

Truth is EKFAC written again, of the examples that each layer sees.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.situations.by_hand import (
    LR,
    Hand,
    assert_same,
    bound,
    categorical,
    draw,
    gaussian,
    sgd,
    take,
)

EXAMPLES, STEPS = 8, 4


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.kind, self.size = nn.Linear(6, 3), nn.Linear(6, 2)
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(x)
        return {"logits": self.kind(hidden), "size": self.size(hidden)}


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        draw(EXAMPLES, 4, seed=step),
        (torch.arange(EXAMPLES) + step) % 3,
        draw(EXAMPLES, 2, seed=50 + step),
    )


def losses(out: dict[str, Tensor], kinds: Tensor, sizes: Tensor) -> list[Tensor]:
    size = (out["size"] - sizes).square().sum(-1).mean()
    return [F.cross_entropy(out["logits"], kinds), size]


def both(model: nn.Module, fisher: str, x: Tensor, kind: Tensor, size: Tensor) -> list[Tensor]:
    out = model(x[None])
    if fisher == "exact":
        return categorical(out["logits"])
    return [torch.stack(losses(out, kind[None], size[None])).sum()]


@pytest.mark.parametrize(
    ("fisher", "way"),
    [
        ("exact", "one backward"),
        ("exact", "two backwards"),
        ("exact", "two forwards"),
        ("empirical", "one backward"),
        ("empirical", "two backwards"),
    ],
)
def test_two_heads_with_their_own_losses(fisher: str, way: str) -> None:
    """`exact` reads the first head, and the second is plain; the loss counts for both."""
    model = TwoHeads()
    twin = copy.deepcopy(model)
    names = ["trunk.0", "kind"] + (["size"] if fisher == "empirical" else [])
    exclude = [] if fisher == "empirical" else ["size"]
    optimizer, rule = bound(model, fisher=fisher, exclude=exclude), sgd(twin)
    for step in range(STEPS):
        x, kinds, sizes = batch(step)
        optimizer.zero_grad()
        one, other = losses(model(x), kinds, sizes)
        if way == "one backward":
            (one + other).backward()
        elif way == "two backwards":
            one.backward(retain_graph=True)
            other.backward()
        else:
            one.backward()
            losses(model(x), kinds, sizes)[1].backward()
        optimizer.step()
        hand = Hand(twin, names)
        for example in zip(x, kinds, sizes, strict=True):
            hand.example(both, twin, fisher, *example)
        take(rule, hand, torch.stack(losses(twin(x), kinds, sizes)).sum())
    assert_same(model, twin)


@pytest.mark.parametrize("own", ["kind", "size"])
def test_one_loss_for_each_of_two_optimizers(own: str) -> None:
    """Both read the same forward; each has its own output, likelihood and parameters."""
    model = TwoHeads()
    twin = copy.deepcopy(model)
    groups = {"kind": model.kind.parameters(), "size": model.size.parameters()}
    groups[own] = [*model.trunk.parameters(), *groups[own]]
    optimizers = [
        bound(model, groups["kind"]),
        bound(model, groups["size"], likelihood="gaussian", output=lambda out: out["size"]),
    ]
    rule = sgd(twin)
    for step in range(STEPS):
        x, kinds, sizes = batch(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(losses(model(x), kinds, sizes)).backward()  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.step()
        trunk = ["trunk.0"]
        kind = Hand(twin, ["kind", *(trunk if own == "kind" else [])])
        size = Hand(twin, ["size", *(trunk if own == "size" else [])])
        for row in x:
            kind.example(lambda row: categorical(twin(row[None])["logits"]), row)
            size.example(lambda row: gaussian(twin(row[None])["size"]), row)
        loss = torch.stack(losses(twin(x), kinds, sizes)).sum()
        rule.zero_grad()
        kind.fill(loss)
        size.fill(loss)
        rule.step()
    assert_same(model, twin)


class Tasks(nn.Module):
    """One head a task; a forward calls one of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 2)})
        self.double()

    def forward(self, x: Tensor, task: str) -> Tensor:
        out: Tensor = self.heads[task](self.trunk(x))
        return out


def task_loss(model: nn.Module, task: str, step: int, which: slice = slice(None)) -> Tensor:
    x, kinds, _ = batch(step)
    return F.cross_entropy(model(x[which], task), kinds[which] % (3 if task == "a" else 2))


def task_example(model: nn.Module, fisher: str, task: str, step: int, n: int) -> list[Tensor]:
    which = slice(n, n + 1)
    if fisher == "exact":
        return categorical(model(batch(step)[0][which], task))
    return [task_loss(model, task, step, which)]


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_head_that_rests_in_some_steps(fisher: str, to_none: bool) -> None:
    """Tasks take turns; the resting head has no gradient, or zeros where these are kept."""
    model = Tasks()
    twin = copy.deepcopy(model)
    optimizer, rule = bound(model, fisher=fisher), sgd(twin)
    for step in range(STEPS):
        task = "ab"[step % 2]
        optimizer.zero_grad(set_to_none=to_none)
        task_loss(model, task, step).backward()
        optimizer.step()
        hand = Hand(twin, ["trunk.0", "heads.a", "heads.b"])
        for n in range(EXAMPLES):
            hand.example(task_example, twin, fisher, task, step, n)
        take(rule, hand, task_loss(twin, task, step))
    assert_same(model, twin)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_head_that_rests_whenever_curvature_is_due(fisher: str) -> None:
    """It is measured in the step after; the trunk is measured when it is due."""
    model = Tasks()
    twin = copy.deepcopy(model)
    every = {"factor_every": 2, "scale_every": 2, "basis_every": 2}
    optimizer, rule = bound(model, fisher=fisher, **every), sgd(twin)
    trunk = Hand(twin, [])
    for step in range(6):
        task = "ab"[step % 2]
        optimizer.zero_grad()
        task_loss(model, task, step).backward()
        optimizer.step()
        hand = Hand(twin, ["trunk.0", f"heads.{task}"])
        for n in range(EXAMPLES):
            hand.example(task_example, twin, fisher, task, step, n)
        trunk = trunk if step % 2 else hand
        loss = task_loss(twin, task, step)
        rule.zero_grad()
        hand.fill(loss)
        trunk.fill(loss, only=["trunk.0"])
        rule.step()
    assert_same(model, twin)


@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_both_tasks_in_each_step(fisher: str, backwards: int) -> None:
    """Two forwards, one for each task: each example is one of its own task."""
    model = Tasks()
    twin = copy.deepcopy(model)
    optimizer, rule = bound(model, fisher=fisher), sgd(twin)
    for step in range(STEPS):
        optimizer.zero_grad()
        if backwards == 2:
            for task in "ab":
                task_loss(model, task, step).backward()
        else:
            sum(task_loss(model, task, step) for task in "ab").backward()  # type: ignore[union-attr]
        optimizer.step()
        hand = Hand(twin, ["trunk.0", "heads.a", "heads.b"])
        for task in "ab":
            for n in range(EXAMPLES):
                hand.example(task_example, twin, fisher, task, step, n)
        take(rule, hand, sum(task_loss(twin, task, step) for task in "ab"))  # type: ignore[arg-type]
    assert_same(model, twin)


def without_conflict(gradients: list[Tensor]) -> Tensor:
    """Return the sum of two gradients, each without what opposes the other (PCGrad)."""
    one, other = gradients
    product = (one @ other).clamp(max=0.0)
    return one - product / other.square().sum() * other + other - product / one.square().sum() * one


def surgery(model: nn.Module, parts: list[Tensor]) -> dict[Tensor, Tensor]:
    """Return the gradient of each parameter after conflicts are projected out."""
    parameters = list(model.parameters())
    found = []
    for part in parts:
        gradients = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
        given = zip(parameters, gradients, strict=True)
        found.append(torch.cat([(0 * p if g is None else g).flatten() for p, g in given]).detach())
    split = without_conflict(found).split([parameter.numel() for parameter in parameters])
    return {p: g.view_as(p) for p, g in zip(parameters, split, strict=True)}


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_gradients_that_the_loop_makes_itself(fisher: str) -> None:
    """As PCGrad: `torch.autograd.grad` for each loss, and `.grad` is what became of them."""
    model = TwoHeads()
    twin = copy.deepcopy(model)
    names = ["trunk.0", "kind"] + (["size"] if fisher == "empirical" else [])
    exclude = [] if fisher == "empirical" else ["size"]
    optimizer, rule = bound(model, fisher=fisher, exclude=exclude), sgd(twin)
    for step in range(STEPS):
        x, kinds, sizes = batch(step)
        optimizer.zero_grad()
        for parameter, gradient in surgery(model, losses(model(x), kinds, sizes)).items():
            parameter.grad = gradient.clone()
        optimizer.step()
        hand = Hand(twin, names)
        for example in zip(x, kinds, sizes, strict=True):
            hand.example(both, twin, fisher, *example)
        made = surgery(twin, losses(twin(x), kinds, sizes))
        take(rule, hand, sum((p * gradient).sum() for p, gradient in made.items()))  # type: ignore[arg-type]
    assert_same(model, twin)


def weighed(out: dict[str, Tensor], weights: Tensor, kinds: Tensor, sizes: Tensor) -> Tensor:
    return ((-weights).exp() * torch.stack(losses(out, kinds, sizes)) + weights).sum()


@pytest.mark.parametrize("when", ["at bind", "after bind"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_weights_of_losses_that_are_trained(fisher: str, when: str) -> None:
    """Parameters that are not the model's are plain (Kendall et al.'s uncertainties)."""
    model = TwoHeads()
    twin = copy.deepcopy(model)
    mine, theirs = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    names = ["trunk.0", "kind"] + (["size"] if fisher == "empirical" else [])
    options = {"fisher": fisher, "exclude": [] if fisher == "empirical" else ["size"]}
    optimizer = bound(model, [*model.parameters(), mine] if when == "at bind" else None, **options)
    if when == "after bind":
        optimizer.add_param_group({"params": [mine]})
    rule = torch.optim.SGD([*twin.parameters(), theirs], lr=LR)
    for step in range(STEPS):
        x, kinds, sizes = batch(step)
        optimizer.zero_grad()
        weighed(model(x), mine, kinds, sizes).backward()
        optimizer.step()
        hand = Hand(twin, names)
        for row, kind, size in zip(x, kinds, sizes, strict=True):
            hand.example(weighed_example, twin, fisher, theirs, row[None], kind[None], size[None])
        take(rule, hand, weighed(twin(x), theirs, kinds, sizes))
    assert_same(model, twin)
    torch.testing.assert_close(mine, theirs)


def weighed_example(
    model: nn.Module, fisher: str, weights: Tensor, x: Tensor, kind: Tensor, size: Tensor
) -> list[Tensor]:
    out = model(x)
    return categorical(out["logits"]) if fisher == "exact" else [weighed(out, weights, kind, size)]


class Experts(nn.Module):
    """A router sends each row to its best experts, of which the last one gets none."""

    def __init__(self, way: str, best: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.way, self.best = nn.Linear(4, 4), way, best
        self.experts = nn.ModuleList(nn.Linear(4, 5) for _ in range(4))
        self.head = nn.Linear(5, 3)
        with torch.no_grad():
            self.router.bias[3] = -100.0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        gates, choices = self.router(x).softmax(-1).topk(self.best)
        mixed = torch.zeros(len(x), 5, dtype=x.dtype)
        for number, expert in enumerate(self.experts):
            gate = (gates * (choices == number)).sum(-1, keepdim=True)
            rows = (choices == number).any(-1).nonzero().squeeze(-1)
            if self.way == "dense":
                mixed = mixed + gate * expert(x)
            elif len(rows) or self.way == "empty":
                mixed = mixed.index_add(0, rows, gate[rows] * expert(x[rows]))
        return self.head(mixed.tanh())  # type: ignore[no-any-return]


@pytest.mark.parametrize("best", [1, 2])
@pytest.mark.parametrize("way", ["skipped", "empty", "dense"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_an_expert_that_sees_no_rows(fisher: str, way: str, best: int) -> None:
    model = Experts(way, best)
    twin = copy.deepcopy(model)
    optimizer, rule = bound(model, fisher=fisher), sgd(twin)
    layers = ["router", "head", *(f"experts.{number}" for number in range(4))]
    for step in range(STEPS):
        x, kinds, _ = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), kinds).backward()
        optimizer.step()
        hand = Hand(twin, layers)
        for row, kind in zip(x, kinds, strict=True):
            hand.example(
                lambda row, kind: (
                    categorical(twin(row[None]))
                    if fisher == "exact"
                    else [F.cross_entropy(twin(row[None]), kind[None])]
                ),
                row,
                kind,
            )
        take(rule, hand, F.cross_entropy(twin(x), kinds))
    assert_same(model, twin)
