"""Train an autoencoder by the binary cross entropy of its pixels and by their squared error."""

import torch
from torch import nn
from torch.nn import functional as F

import kfactk


def bars(size):
    """Return images of 8 x 8 with some rows and columns lit."""
    rows, columns = torch.rand(size, 8, 1) < 0.2, torch.rand(size, 1, 8) < 0.2
    return (rows | columns).float().flatten(1)


class Autoencoder(nn.Module):
    def __init__(self, pixels=64, hidden=64, code=12):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, code))
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.Tanh(), nn.Linear(hidden, pixels))

    def forward(self, x):
        logits = self.decoder(self.encoder(x))
        return {"logits": logits, "pixels": logits.sigmoid()}


def main():
    torch.manual_seed(0)
    model = Autoencoder()
    recipe = kfactk.build(
        curvature="kfac",
        likelihood=[
            kfactk.head("logits", "bernoulli"),
            kfactk.head("pixels", {"name": "gaussian", "variance": 0.5}, weight=0.5),
        ],
        update="adam",
        lr=0.01,
        damping=0.01,
    )
    optimizer = recipe.bind(model)

    for step in range(300):
        x = bars(128)
        out = model(x)
        entropy = F.binary_cross_entropy_with_logits(out["logits"], x, reduction="none").sum(1)
        squares = (out["pixels"] - x).square().sum(1)
        optimizer.zero_grad()
        (entropy + 0.5 * squares).mean().backward()
        optimizer.step()
        if step % 100 == 0 or step == 299:
            print(f"step {step}: entropy {entropy.mean():.2f}, squares {squares.mean():.2f}")


if __name__ == "__main__":
    main()
