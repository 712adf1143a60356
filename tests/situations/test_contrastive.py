"""Two views and one encoder: siamese pairs, InfoNCE, bootstrapping, queues of negatives.

Truth is EKFAC written again. Where examples meet in the loss, what counts of an example is the
gradient through its own rows: those of the others are detached.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfactk import Optimizer
from tests.situations.by_hand import (
    Hand,
    assert_same,
    bernoulli,
    bound,
    categorical,
    draw,
    gaussian,
    sgd,
    take,
)

PAIRS, STEPS = 6, 3
LAYERS = ["0", "2"]


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def views(step: int) -> tuple[Tensor, Tensor]:
    """Return two noisy views of the same points."""
    points = draw(PAIRS, 4, seed=step)
    return tuple(points + 0.1 * draw(PAIRS, 4, seed=step + k) for k in (100, 200))  # type: ignore[return-value]


class Siamese(nn.Module):
    """Says whether two inputs belong together."""

    def __init__(self, at_once: bool) -> None:
        super().__init__()
        self.encoder, self.at_once = encoder(), at_once
        self.head = nn.Linear(3, 1).double()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.at_once:
            one, other = self.encoder(torch.stack([a, b], 1)).unbind(1)
        else:
            one, other = self.encoder(a), self.encoder(b)
        return self.head((one - other).square())


def pair(model: nn.Module, fisher: str, a: Tensor, b: Tensor, label: Tensor) -> list[Tensor]:
    logit = model(a, b)
    return (
        bernoulli(logit)
        if fisher == "exact"
        else [F.binary_cross_entropy_with_logits(logit, label)]
    )


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_siamese_pairs(fisher: str, at_once: bool) -> None:
    """One encoder sees both views of an example: in two calls, or stacked as rows."""
    model = Siamese(at_once)
    twin = copy.deepcopy(model)
    optimizer, rule = bound(model, fisher=fisher, likelihood="bernoulli"), sgd(twin)
    for step in range(STEPS):
        (a, b), labels = views(step), (torch.arange(PAIRS) % 2).double()[:, None]
        b = torch.where(labels.bool(), b, b.roll(1, 0))
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(a, b), labels).backward()
        optimizer.step()
        hand = Hand(twin, ["encoder.0", "encoder.2", "head"])
        for a_n, b_n, label in zip(a, b, labels, strict=True):
            hand.example(pair, twin, fisher, a_n[None], b_n[None], label[None])
        take(rule, hand, F.binary_cross_entropy_with_logits(twin(a, b), labels))
    assert_same(model, twin)


def info_nce(z: Tensor) -> Tensor:
    """SimCLR's loss: rows n and n + N are views of the same point."""
    z = F.normalize(z, dim=-1)
    same = torch.eye(2 * PAIRS, dtype=torch.bool)
    logits = (z @ z.mT / 0.5).masked_fill(same, -torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * PAIRS).roll(PAIRS))


def both_at_once(model: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    return model(torch.cat([a, b]))


def one_by_one(model: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([model(a), model(b)])


@pytest.mark.parametrize("fisher", ["empirical", {"name": "empirical", "terms": "input"}])
@pytest.mark.parametrize(("call", "rows"), [(both_at_once, 2 * PAIRS), (one_by_one, PAIRS)])
def test_info_nce(call: Callable[..., Tensor], rows: int, fisher: Any) -> None:
    """The empirical Fisher of each row; the mean loss counts for the rows of one forward."""
    model = encoder()
    twin = copy.deepcopy(model)
    optimizer, rule = bound(model, fisher=fisher), sgd(twin)
    for step in range(STEPS):
        a, b = views(step)
        optimizer.zero_grad()
        info_nce(call(model, a, b)).backward()
        optimizer.step()
        hand, x = Hand(twin, LAYERS), torch.cat([a, b])
        with torch.no_grad():
            others = twin(x)
        for n in range(2 * PAIRS):
            hand.example(partial(row_among, times=rows), twin, x, others, n)
        take(rule, hand, info_nce(twin(x)))
    assert_same(model, twin)


def with_row(rows: Tensor, n: int, row: Tensor) -> Tensor:
    return torch.cat([rows[:n], row, rows[n + 1 :]])


def cached(model: nn.Module, a: Tensor, b: Tensor) -> None:
    """As GradCache: embeddings first, without gradients; then chunk by chunk, with theirs."""
    x = torch.cat([a, b])
    with torch.no_grad():
        z = model(x)
    [gradient] = torch.autograd.grad(info_nce(z.requires_grad_()), [z])
    for chunk, its in zip(x.split(5), gradient.split(5), strict=True):
        (model(chunk) * its).sum().backward()


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_chunks_with_cached_gradients(fisher: str) -> None:
    """Curvature is that of all rows, though no forward with gradients sees all of them."""
    model = encoder()
    twin = copy.deepcopy(model)
    optimizer = bound(model, fisher=fisher, likelihood="gaussian", reduction="sum")
    rule = sgd(twin)
    for step in range(STEPS):
        a, b = views(step)
        optimizer.zero_grad()
        cached(model, a, b)
        optimizer.step()
        hand, x = Hand(twin, LAYERS), torch.cat([a, b])
        others = twin(x).detach()
        for n in range(2 * PAIRS):
            if fisher == "exact":
                hand.example(lambda row: gaussian(twin(row)), x[[n]])
            else:
                hand.example(row_among, twin, x, others, n)
        take(rule, hand, info_nce(twin(x)))
    assert_same(model, twin)


def row_among(
    model: nn.Module, x: Tensor, others: Tensor, n: int, times: float = 1.0
) -> list[Tensor]:
    """Return the loss, in which one row lets gradients through."""
    return [times * info_nce(with_row(others, n, model(x[[n]])))]


class TwoTowers(nn.Module):
    """Logits of all pairs of two kinds of inputs, as CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = encoder(), encoder()
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        one, other = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        return self.scale.exp() * one @ other.mT


def clip_loss(logits: Tensor) -> Tensor:
    right = torch.arange(len(logits))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.mT, right)) / 2


def row_of_tower(
    tower: nn.Module, x: Tensor, n: int, mine: Tensor, theirs: Tensor, scale: Tensor
) -> list[Tensor]:
    """Return the summed loss, in which one row of one tower lets gradients through."""
    z = F.normalize(with_row(mine, n, tower(x[[n]])), dim=-1)
    return [PAIRS * clip_loss(scale.exp() * z @ F.normalize(theirs, dim=-1).mT)]


@pytest.mark.parametrize("fisher", ["empirical", {"name": "empirical", "terms": "texts"}])
def test_two_towers(fisher: Any) -> None:
    """A trained temperature is plain; each tower's rows count for the symmetric loss."""
    model = TwoTowers()
    twin = copy.deepcopy(model)
    optimizer, rule = bound(model, fisher=fisher), sgd(twin)
    for step in range(STEPS):
        images, texts = views(step)
        optimizer.zero_grad()
        clip_loss(model(images, texts)).backward()
        optimizer.step()
        hands = []
        for own, other, x, y, name in (
            (twin.image, twin.text, images, texts, "image"),
            (twin.text, twin.image, texts, images, "text"),
        ):
            with torch.no_grad():
                mine, theirs = own(x), other(y)
            hand = Hand(twin, [f"{name}.0", f"{name}.2"])
            for n in range(PAIRS):
                hand.example(row_of_tower, own, x, n, mine, theirs, twin.scale)
            hands.append(hand)
        loss = clip_loss(twin(images, texts))
        rule.zero_grad()
        hands[0].fill(loss, [twin.scale])
        hands[1].fill(loss)
        rule.step()
    assert_same(model, twin)


def follow(slow: nn.Module, fast: nn.Module) -> None:
    with torch.no_grad():
        for mine, theirs in zip(slow.parameters(), fast.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)


def bootstrap(online: nn.Module, target: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """BYOL's loss, symmetric."""
    with torch.no_grad():
        wanted = F.normalize(target(b), dim=-1), F.normalize(target(a), dim=-1)
    found = F.normalize(online(a), dim=-1), F.normalize(online(b), dim=-1)
    return sum((f - w).square().sum(-1).mean() for f, w in zip(found, wanted, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("made", ["before bind", "after bind", "after a step"])
def test_a_momentum_encoder(made: str) -> None:
    """As BYOL: a copy that follows, whenever it was made, is nobody's business."""
    online = encoder()
    twin = copy.deepcopy(online)
    target = copy.deepcopy(online)
    optimizer, rule = bound(online, likelihood="gaussian"), sgd(twin)
    slow = copy.deepcopy(twin)
    if made == "after bind":
        target = copy.deepcopy(online)
    for step in range(STEPS):
        a, b = views(step)
        optimizer.zero_grad()
        bootstrap(online, target, a, b).backward()
        optimizer.step()
        hand = Hand(twin, LAYERS)
        for row in torch.cat([a, b]):
            hand.example(lambda row: gaussian(twin(row[None])), row)
        take(rule, hand, bootstrap(twin, slow, a, b))
        if made == "after a step" and not step:
            target, slow = copy.deepcopy(online), copy.deepcopy(twin)
        follow(target, online)
        follow(slow, twin)
    assert_same(online, twin)


class Queue(nn.Module):
    """As MoCo: keys of a slow encoder, and a queue of old keys, all inside the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.query = encoder()
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.queue: Tensor
        self.register_buffer("queue", F.normalize(draw(12, 3, seed=9), dim=-1))

    def logits(self, a: Tensor, keys: Tensor) -> Tensor:
        q = F.normalize(self.query(a), dim=-1)
        right = (q * keys).sum(-1, keepdim=True)
        return torch.cat([right, q @ self.queue.clone().mT], 1) / 0.5

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            follow(self.key, self.query)
            keys = F.normalize(self.key(b), dim=-1)
        found = self.logits(a, keys)
        self.queue.copy_(torch.cat([keys, self.queue[: -len(keys)]]))
        return found


def among_keys(model: Queue, fisher: str, row: Tensor, key: Tensor) -> list[Tensor]:
    logits = model.logits(row, key)
    return categorical(logits) if fisher == "exact" else [-logits.log_softmax(-1)[0, 0]]


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_queue_inside_the_model(fisher: str) -> None:
    model = Queue()
    twin = copy.deepcopy(model)
    optimizer, rule = bound(model, fisher=fisher), sgd(twin.query)
    right = torch.zeros(PAIRS, dtype=torch.long)
    for step in range(STEPS):
        a, b = views(step)
        optimizer.zero_grad()
        F.cross_entropy(model(a, b), right).backward()
        optimizer.step()
        before = copy.deepcopy(twin)
        loss = F.cross_entropy(twin(a, b), right)
        keys, hand = F.normalize(twin.key(b), dim=-1), Hand(twin.query, LAYERS)
        after, twin.queue = twin.queue, before.queue

        for row, key in zip(a, keys, strict=True):
            hand.example(among_keys, twin, fisher, row[None], key[None])
        twin.queue = after
        take(rule, hand, loss)
    assert_same(model, twin)


def test_triplets() -> None:
    """Three calls of one encoder in a step, each a forward of its own, and one backward."""

    def loss(model: nn.Module, rows: list[Tensor]) -> Tensor:
        return F.triplet_margin_loss(*map(model, rows), margin=5.0)

    model = encoder()
    twin = copy.deepcopy(model)
    optimizer: Optimizer = bound(model, likelihood="gaussian")
    rule: Any = sgd(twin)
    for step in range(STEPS):
        rows = [*views(step), draw(PAIRS, 4, seed=step + 300)]
        optimizer.zero_grad()
        loss(model, rows).backward()
        optimizer.step()
        hand = Hand(twin, LAYERS)
        for row in torch.cat(rows):
            hand.example(lambda row: gaussian(twin(row[None])), row)
        take(rule, hand, loss(twin, rows))
    assert_same(model, twin)
