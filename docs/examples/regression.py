"""Train on targets in their own unit (prices of hundreds of thousands), without scaling them."""

import torch
from torch import nn
from torch.nn import functional as F

import kfactk


def houses(size):
    """Return features of unit scale, and prices."""
    x = torch.randn(size, 6)
    price = 250_000 + 80_000 * (x[:, 0] + (x[:, 1] * x[:, 2]).tanh() + 0.5 * x[:, 3].abs())
    return x, (price + 8_000 * torch.randn(size))[:, None]


class Prices(nn.Module):
    """The network works in units of `spread`, and answers in the unit of the targets."""

    def __init__(self, center, spread):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 1))
        self.register_buffer("center", center)
        self.register_buffer("spread", spread)

    def forward(self, x):
        return self.center + self.spread * self.net(x)


def main():
    torch.manual_seed(0)
    x, y = houses(2000)
    model = Prices(y.mean(), y.std())
    variance = y.var().item()
    recipe = kfactk.build(
        curvature="kfac",
        fisher="exact",
        likelihood={"name": "gaussian", "variance": variance, "divisor": "entries"},
        update="momentum",
        lr=0.003,
    )
    optimizer = recipe.bind(model)

    for step in range(300):
        rows = torch.randint(len(x), (128,))
        loss = F.mse_loss(model(x[rows]), y[rows]) / (2 * variance)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == 299:
            print(f"step {step}: root mean square error {(2 * variance * loss).sqrt():.0f}")


if __name__ == "__main__":
    main()
