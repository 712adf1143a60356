"""Variational autoencoders: sampling inside the forward, two losses, two optimizers.

Truth is EKFAC written again, with the same noise.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.situations.by_hand import LR, Hand, assert_same, bernoulli, bound, gaussian, sgd, take

EXAMPLES, STEPS, PIXELS, CODE = 6, 3, 5, 2
ENCODER, DECODER = ["encoder.0", "mean", "log_variance"], ["decoder.0", "decoder.2"]


class VAE(nn.Module):
    """Draws its noise from torch's global random state."""

    def __init__(self, samples: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(PIXELS, 4), nn.Tanh())
        self.mean, self.log_variance = nn.Linear(4, CODE), nn.Linear(4, CODE)
        self.decoder = nn.Sequential(nn.Linear(CODE, 4), nn.Tanh(), nn.Linear(4, PIXELS))
        self.double()
        self.shape = (samples, CODE) if samples else (CODE,)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(x)
        return self.mean(hidden), self.log_variance(hidden)

    def decode(self, mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
        if noise.ndim == 3:
            mean, log_variance = mean[:, None], log_variance[:, None]
        out: Tensor = self.decoder(mean + (log_variance / 2).exp() * noise)
        return out

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x)
        noise = torch.randn(len(x), *self.shape, dtype=x.dtype)
        return self.decode(mean, log_variance, noise), mean, log_variance

    def given(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the forward with this noise."""
        mean, log_variance = self.encode(x)
        return self.decode(mean, log_variance, noise), mean, log_variance


def pixels(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.rand(EXAMPLES, PIXELS, generator=generator, dtype=torch.float64)


def reconstruction(logits: Tensor, x: Tensor) -> Tensor:
    """Return the loss of each example, mean over the samples of its code."""
    target = x if logits.ndim == 2 else x[:, None].expand_as(logits)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
    return each if logits.ndim == 2 else each.mean(-1)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1)


def one(model: VAE, fisher: str, x: Tensor, noise: Tensor) -> list[Tensor]:
    logits, mean, log_variance = model.given(x[None], noise[None])
    if fisher == "exact":
        return bernoulli(logits)
    return [(reconstruction(logits, x[None]) + divergence(mean, log_variance)).sum()]


def by_hand(model: VAE, fisher: str, terms: int = 1, *, mean: bool = True) -> None:
    """Train with noise from the global random state, as the model itself draws it."""
    rule = sgd(model, LR if mean else LR / EXAMPLES)
    for step in range(STEPS):
        x = pixels(step)
        noise = torch.randn(EXAMPLES, *model.shape, dtype=x.dtype)
        hand = Hand(model, ENCODER + DECODER)
        for row, its in zip(x, noise, strict=True):
            hand.example(one, model, fisher, row, its, terms=terms)
        logits, *code = model.given(x, noise)
        loss = reconstruction(logits, x) + divergence(*code)
        take(rule, hand, loss.mean() if mean else loss.sum())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("fisher", "way"),
    [
        ("exact", "one backward"),
        ("exact", "two backwards"),
        ("empirical", "one backward"),
        ("empirical", "two that keep the graph"),
    ],
)
def test_the_usual_loss(fisher: str, reduction: str, way: str) -> None:
    """Reconstruction and divergence together or apart; the noise is the loop's own."""
    model = VAE()
    twin = copy.deepcopy(model)
    optimizer = bound(model, fisher=fisher, likelihood="bernoulli", reduction=reduction)
    optimizer.param_groups[0]["lr"] = LR if reduction == "mean" else LR / EXAMPLES
    torch.manual_seed(1)
    for step in range(STEPS):
        x = pixels(step)
        optimizer.zero_grad()
        logits, mean, log_variance = model(x)
        losses = [reconstruction(logits, x), divergence(mean, log_variance)]
        parts = [each.mean() if reduction == "mean" else each.sum() for each in losses]
        if way == "one backward":
            sum(parts).backward()  # type: ignore[union-attr]
        else:
            parts[0].backward(retain_graph=True)
            parts[1].backward(retain_graph=way != "two backwards")
        optimizer.step()
    torch.manual_seed(1)
    by_hand(twin, fisher, mean=reduction == "mean")
    assert_same(model, twin)


def test_several_codes_of_each_example() -> None:
    """Each of three samples is a term; the decoder sees them as rows, the encoder does not."""
    model = VAE(samples=3)
    twin = copy.deepcopy(model)
    optimizer = bound(model, likelihood={"name": "bernoulli", "class_axis": -1})
    torch.manual_seed(1)
    for step in range(STEPS):
        x = pixels(step)
        optimizer.zero_grad()
        logits, *code = model(x)
        (reconstruction(logits, x) + divergence(*code)).mean().backward()
        optimizer.step()
    torch.manual_seed(1)
    by_hand(twin, "exact", terms=3)
    assert_same(model, twin)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        vae = VAE()
        self.encoder, self.mean, self.log_variance = vae.encoder, vae.mean, vae.log_variance

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(x)
        return self.mean(hidden), self.log_variance(hidden)


def test_one_optimizer_for_each_half() -> None:
    """The encoder's output is its code, read as a Gaussian's mean; the decoder's are pixels."""
    encoder, decoder = Encoder(), VAE().decoder
    twins = copy.deepcopy(encoder), copy.deepcopy(decoder)
    optimizers = [
        bound(encoder, likelihood="gaussian", output=lambda out: torch.cat(out, -1)),
        bound(decoder, likelihood="bernoulli"),
    ]
    rules = [sgd(twin) for twin in twins]
    for step in range(STEPS):
        x = pixels(step)
        noise = torch.randn(EXAMPLES, CODE, generator=torch.Generator().manual_seed(step)).double()
        for optimizer in optimizers:
            optimizer.zero_grad()
        mean, log_variance = encoder(x)
        logits = decoder(mean + (log_variance / 2).exp() * noise)
        (reconstruction(logits, x) + divergence(mean, log_variance)).mean().backward()
        for optimizer in optimizers:
            optimizer.step()

        mean, log_variance = twins[0](x)
        codes = mean + (log_variance / 2).exp() * noise
        loss = (reconstruction(twins[1](codes), x) + divergence(mean, log_variance)).mean()
        hands = Hand(twins[0], ENCODER), Hand(twins[1], ["0", "2"])
        for row, code in zip(x, codes.detach(), strict=True):
            hands[0].example(lambda row: gaussian(torch.cat(twins[0](row[None]), -1)), row)
            hands[1].example(lambda code: bernoulli(twins[1](code[None])), code)
        for rule, hand in zip(rules, hands, strict=True):
            rule.zero_grad()
            hand.fill(loss)
        for rule in rules:
            rule.step()
    assert_same(encoder, twins[0])
    assert_same(decoder, twins[1])
