"""Train an encoder with InfoNCE (SimCLR): two views of each example, no labels."""

import torch
from torch import nn
from torch.nn import functional as F

import kfactk


def views(size):
    """Return two noisy views of the same points; half of the inputs hold noise alone."""
    signal = torch.randn(size, 8)
    return [
        torch.cat([signal + 0.3 * torch.randn(size, 8), torch.randn(size, 8)], 1) for _ in range(2)
    ]


def info_nce(z, temperature=0.2):
    """Rows n and n + N of `z` are views of the same example."""
    z = F.normalize(z, dim=1)
    similarity = z @ z.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z) // 2))


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    recipe = kfactk.build(
        curvature="kfac",
        fisher={"name": "empirical", "terms": "input"},  # the loss is a mean over the inputs
        update="adam",
        lr=0.003,
        damping=0.001,
    )
    optimizer = recipe.bind(model)

    for step in range(200):
        loss = info_nce(model(torch.cat(views(64))))  # both views in one forward
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == 199:
            print(f"step {step}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
