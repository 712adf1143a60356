"""Train one trunk with two heads: a class and a number for each example."""

import torch
from torch import nn
from torch.nn import functional as F

import kfactk


def batch(size, mix):
    x = torch.randn(size, 10)
    hidden = (x @ mix).tanh()
    return x, hidden[:, :3].argmax(1), hidden[:, 3:].sum(1)


class TwoTasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.kind, self.size = nn.Linear(64, 3), nn.Linear(64, 1)

    def forward(self, x):
        hidden = self.trunk(x)
        return {"kind": self.kind(hidden), "size": self.size(hidden).squeeze(1)}


def main():
    torch.manual_seed(0)
    model, mix = TwoTasks(), torch.randn(10, 6) / 3
    recipe = kfactk.build(
        curvature="kfac",
        likelihood={"kind": "categorical", "size": {"name": "gaussian", "variance": 0.5}},
        update="adam",
        lr=0.003,
        damping=0.001,
    )
    optimizer = recipe.bind(model)

    for step in range(200):
        x, kinds, sizes = batch(128, mix)
        out = model(x)
        kind_loss = F.cross_entropy(out["kind"], kinds)
        size_loss = F.mse_loss(out["size"], sizes)
        optimizer.zero_grad()
        (kind_loss + size_loss).backward()  # each loss is a mean over examples
        optimizer.step()
        if step % 50 == 0 or step == 199:
            print(f"step {step}: kind {kind_loss:.3f}, size {size_loss:.3f}")


if __name__ == "__main__":
    main()
