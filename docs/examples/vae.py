"""Train a variational autoencoder on binary images of bars."""

import torch
from torch import nn
from torch.nn import functional as F

import kfactk


def bars(size):
    """Return images of 8 x 8 with some rows and columns lit."""
    rows, columns = torch.rand(size, 8, 1) < 0.2, torch.rand(size, 1, 8) < 0.2
    return (rows | columns).float().flatten(1)


class VAE(nn.Module):
    def __init__(self, pixels=64, hidden=64, code=8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(hidden, code), nn.Linear(hidden, code)
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def forward(self, x):
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return self.decoder(code), mean, log_variance  # the likelihood reads the first


def main():
    torch.manual_seed(0)
    model = VAE()
    recipe = kfactk.build(
        curvature="kfac", likelihood="bernoulli", update="adam", lr=0.01, damping=0.01
    )
    optimizer = recipe.bind(model)

    for step in range(300):
        x = bars(128)
        logits, mean, log_variance = model(x)
        reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        loss = (reconstruction + divergence).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == 299:
            print(f"step {step}: loss {loss:.2f}, divergence {divergence.mean():.2f}")


if __name__ == "__main__":
    main()
