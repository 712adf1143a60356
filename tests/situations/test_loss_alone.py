"""A loss without a likelihood: transcription, a bound on evidence, two networks that play a game.

`empirical` with `terms` measures them. Its D_n is the gradient of the summed loss through the rows
of example n: one matrix for the sum of all losses of an example, cross products of them included.
Truth is EKFAC written again, of the loss of each example alone. Losses in which examples meet are
in `test_contrastive`.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.situations.by_hand import LR, Hand, assert_same, bound, draw, perceptron, sgd, take

EXAMPLES, STEPS = 6, 3
ALONE = {"fisher": {"name": "empirical", "terms": "input"}}
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum"])

FRAMES, SYMBOLS = 7, 5


class Listener(nn.Module):
    """Says of each frame which symbol it is, or none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, SYMBOLS)).double()

    def forward(self, frames: Tensor) -> Tensor:
        found: Tensor = self.body(frames)
        return found


def recordings(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return frames, texts, and how much of both is there, of each recording."""
    generator = torch.Generator().manual_seed(step)
    texts = torch.randint(1, SYMBOLS, (EXAMPLES, 3), generator=generator)
    heard = torch.randint(6, FRAMES + 1, (EXAMPLES,), generator=generator)
    written = torch.arange(EXAMPLES) % 3 + 1
    return draw(EXAMPLES, FRAMES, 4, seed=step), texts, heard, written


def transcription(
    model: nn.Module, data: tuple[Tensor, ...], reduction: str, which: slice = slice(None)
) -> Tensor:
    """Return CTC's loss; its mean divides by the length of each text, its sum does not."""
    frames, texts, heard, written = (each[which] for each in data)
    symbols = model(frames).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(symbols, texts, heard, written, reduction=reduction)


@REDUCTIONS
def test_a_transcription(reduction: str) -> None:
    model = Listener()
    twin = copy.deepcopy(model)
    lr = LR if reduction == "mean" else LR / EXAMPLES
    fisher = {"name": "empirical", "terms": "frames"}
    optimizer, rule = bound(model, fisher=fisher, reduction=reduction, lr=lr), sgd(twin, lr)
    for step in range(STEPS):
        data = recordings(step)
        optimizer.zero_grad()
        transcription(model, data, reduction).backward()
        optimizer.step()
        hand = Hand(twin, ["body.0", "body.2"])
        for n in range(EXAMPLES):
            one = slice(n, n + 1)
            hand.example(lambda one=one: [transcription(twin, data, reduction, one)])  # noqa: B023
        take(rule, hand, transcription(twin, data, reduction))
    assert_same(model, twin)


class Evidence(nn.Module):
    """A variational autoencoder that returns its losses and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
        self.mean, self.log_variance = nn.Linear(4, 2), nn.Linear(4, 2)
        self.decoder = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 5))
        self.double()

    def forward(self, images: Tensor, noise: Tensor, reduction: str) -> dict[str, Tensor]:
        hidden = self.encoder(images)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        logits = self.decoder(mean + (log_variance / 2).exp() * noise)
        rebuilt = F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum(-1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
        found = {"rebuilt": rebuilt, "divergence": divergence}
        return {name: getattr(each, reduction)() for name, each in found.items()}


def evidence(losses: dict[str, Tensor]) -> Tensor:
    return losses["rebuilt"] + 0.7 * losses["divergence"]


@REDUCTIONS
@pytest.mark.parametrize("way", ["one backward", "two backwards"])
def test_a_bound_on_evidence(reduction: str, way: str) -> None:
    """Two losses of one example make one D_n, however many backwards bring them."""
    model = Evidence()
    twin = copy.deepcopy(model)
    lr = LR if reduction == "mean" else LR / EXAMPLES
    fisher = {"name": "empirical", "terms": "images"}
    optimizer, rule = bound(model, fisher=fisher, reduction=reduction, lr=lr), sgd(twin, lr)
    for step in range(STEPS):
        images, noise = draw(EXAMPLES, 5, seed=step).sigmoid(), draw(EXAMPLES, 2, seed=step + 10)
        optimizer.zero_grad()
        losses = model(images, noise, reduction)
        if way == "one backward":
            evidence(losses).backward()
        else:
            losses["rebuilt"].backward(retain_graph=True)
            (0.7 * losses["divergence"]).backward(retain_graph=True)
        optimizer.step()
        hand = Hand(twin, ["encoder.0", "mean", "log_variance", "decoder.0", "decoder.2"])
        for image, its in zip(images, noise, strict=True):
            hand.example(lambda *one: [evidence(twin(*one, "sum"))], image[None], its[None])
        take(rule, hand, evidence(twin(images, noise, reduction)))
    assert_same(model, twin)


class Game:
    """A generator of points and a critic, with the hinge losses of both."""

    def __init__(self) -> None:
        self.generator = perceptron()
        torch.manual_seed(1)
        self.critic = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def of_real(self, points: Tensor) -> Tensor:
        return F.relu(1 - self.critic(points)).mean()

    def of_fake(self, points: Tensor) -> Tensor:
        return F.relu(1 + self.critic(points)).mean()

    def of_generator(self, noise: Tensor) -> Tensor:
        return -self.critic(self.generator(noise)).mean()


def critic_loss(game: Game, real: Tensor, fake: Tensor, *, at_once: bool) -> Tensor:
    if not at_once:
        return game.of_real(real) + game.of_fake(fake)
    scores = game.critic(torch.cat([real, fake]))
    return F.relu(1 - scores[: len(real)]).mean() + F.relu(1 + scores[len(real) :]).mean()


@pytest.mark.parametrize("at_once", [False, True])
def test_two_that_play_against_each_other(at_once: bool) -> None:
    """Each forward has as many terms as rows.

    So real and fake points in one forward are a mean over twice as many terms, and their losses,
    which are means over half of them, are twice those of the terms.
    """
    game, twin = Game(), Game()
    optimizers = bound(game.generator, **ALONE), bound(game.critic, **ALONE)
    rules = sgd(twin.generator), sgd(twin.critic)
    times = 2 if at_once else 1
    for step in range(STEPS):
        real, noise = draw(EXAMPLES, 3, seed=step) + 1, draw(EXAMPLES, 4, seed=step + 10)
        for each in optimizers:
            each.zero_grad()
        fake = game.generator(noise)
        critic_loss(game, real, fake.detach(), at_once=at_once).backward()
        optimizers[1].step()
        game.critic.requires_grad_(False)
        optimizers[0].zero_grad()
        game.of_generator(noise).backward()
        optimizers[0].step()
        game.critic.requires_grad_(True)

        hand = Hand(twin.critic, ["0", "2"])
        found = twin.generator(noise).detach()
        for row in real:
            hand.example(lambda row: [times * twin.of_real(row[None])], row)
        for row in found:
            hand.example(lambda row: [times * twin.of_fake(row[None])], row)
        take(rules[1], hand, critic_loss(twin, real, found, at_once=False))
        hand = Hand(twin.generator, ["0", "2"])
        for row in noise:
            hand.example(lambda row: [twin.of_generator(row[None])], row)
        take(rules[0], hand, twin.of_generator(noise))
    assert_same(game.critic, twin.critic)
    assert_same(game.generator, twin.generator)


def test_a_number_of_terms_is_that_of_the_mean() -> None:
    """The hinge losses of one forward as a mean over N, as the number says, and not over rows."""
    game, twin = Game(), Game()
    terms: Any = {"fisher": {"name": "empirical", "terms": EXAMPLES}}
    optimizer, rule = bound(game.critic, **terms), sgd(twin.critic)
    real, fake = draw(EXAMPLES, 3, seed=1) + 1, draw(EXAMPLES, 3, seed=2)
    critic_loss(game, real, fake, at_once=True).backward()
    optimizer.step()
    hand = Hand(twin.critic, ["0", "2"])
    for row, other in zip(real, fake, strict=True):
        hand.example(lambda row: [twin.of_real(row[None])], row)
        hand.example(lambda row: [twin.of_fake(row[None])], other, terms=0)
    take(rule, hand, critic_loss(twin, real, fake, at_once=False))
    assert_same(game.critic, twin.critic)
