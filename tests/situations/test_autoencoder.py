"""An autoencoder with two losses: binary cross entropy of its pixels, and their squared error.

Both read the same logits of the decoder, or each has a head of its own. Truth is EKFAC written
again, with the columns of both likelihoods.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from tests.situations.by_hand import Hand, assert_same, bernoulli, bound, draw, gaussian, sgd, take

EXAMPLES, STEPS, PIXELS = 6, 3, 5
WEIGHT = 0.3


class Autoencoder(nn.Module):
    def __init__(self, own_head: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(PIXELS, 4), nn.Tanh(), nn.Linear(4, 2))
        self.decoder = nn.Sequential(nn.Linear(2, 4), nn.Tanh())
        self.logits = nn.Linear(4, PIXELS)
        self.pixels = nn.Linear(4, PIXELS) if own_head else None
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.decoder(self.encoder(x))
        logits = self.logits(hidden)
        return {
            "logits": logits,
            "pixels": logits.sigmoid() if self.pixels is None else self.pixels(hidden),
        }


def losses(out: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the loss of each number, `[N, C]`."""
    entropy = F.binary_cross_entropy_with_logits(out["logits"], x, reduction="none")
    return entropy + WEIGHT * (out["pixels"] - x).square()


def loss_of(out: dict[str, Tensor], x: Tensor, divisor: str) -> Tensor:
    return losses(out, x).mean() if divisor == "entries" else losses(out, x).sum(-1).mean()


def one(model: nn.Module, fisher: str, divisor: str, x: Tensor) -> list[Tensor]:
    """Return losses of one example: those of both likelihoods, or its own loss."""
    out = model(x[None])
    if fisher == "empirical":
        return [loss_of(out, x[None], divisor)]
    share = 1 / PIXELS if divisor == "entries" else 1.0
    both = [
        *bernoulli(out["logits"]),
        *((WEIGHT / 0.5) ** 0.5 * each for each in gaussian(out["pixels"])),
    ]
    nothing = 0 * (out["logits"] + out["pixels"]).sum()  # each head has a gradient, maybe of zeros
    return [share**0.5 * each + nothing for each in both]


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("divisor", ["terms", "entries"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.filterwarnings("error::kfactk.KfactkWarning")
def test_two_losses_of_the_pixels(fisher: str, divisor: str, own_head: bool) -> None:
    model = Autoencoder(own_head)
    twin = copy.deepcopy(model)
    squares = {"name": "gaussian", "divisor": divisor}
    if fisher == "exact":
        squares["variance"] = 0.5
    heads = [
        kfactk.head("logits", {"name": "bernoulli", "divisor": divisor}),
        kfactk.head("pixels", squares, weight=WEIGHT),
    ]
    optimizer, rule = bound(model, likelihood=heads, fisher=fisher), sgd(twin)
    layers = ["encoder.0", "encoder.2", "decoder.0", "logits", *(["pixels"] if own_head else [])]
    for step in range(STEPS):
        x = draw(EXAMPLES, PIXELS, seed=step).sigmoid()
        optimizer.zero_grad()
        loss_of(model(x), x, divisor).backward()
        optimizer.step()
        hand = Hand(twin, layers)
        for row in x:
            hand.example(one, twin, fisher, divisor, row)
        take(rule, hand, loss_of(twin(x), x, divisor))
    assert_same(model, twin)
