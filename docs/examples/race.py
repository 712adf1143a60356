"""Race AdamW and kfactk on your model, at equal wall-clock time: python race.py [seconds per run].

Replace `make_model`, `training` and `HELD_OUT` by your own. Ten runs of 60 seconds take ten
minutes.
"""

import copy
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

import kfactk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_model():
    return nn.Sequential(
        nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 5)
    )


def data(size, seed):
    """Return inputs of several scales, and the class that a fixed function gives them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 20, generator=generator) * torch.logspace(-1.5, 0.5, 20)
    mix = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    return x, ((3 * x).sin() @ mix).argmax(1)


def training():
    """Yield mini-batches without end."""
    x, y = data(16384, seed=1)
    generator = torch.Generator().manual_seed(2)
    while True:
        rows = torch.randint(len(x), (128,), generator=generator)
        yield x[rows].to(DEVICE), y[rows].to(DEVICE)


HELD_OUT = data(1024, seed=3)


def loss_of(model, batch):
    x, y = batch
    return F.cross_entropy(model(x.to(DEVICE)), y.to(DEVICE))


def adamw(lr):
    return lambda model: torch.optim.AdamW(model.parameters(), lr=lr)


def preset(name, lr):
    update = {"name": "adamw", "fused": True}
    return lambda model: kfactk.preset(name, lr=lr, update=update, weight_decay=0.01).bind(model)


ENTRIES = {f"AdamW, lr {lr}": adamw(lr) for lr in (0.0003, 0.001, 0.003, 0.01)}
ENTRIES |= {f"kfactk thesis, lr {lr}": preset("thesis", lr) for lr in (0.001, 0.003, 0.01)}
ENTRIES |= {f"kfactk short, lr {lr}": preset("short", lr) for lr in (0.001, 0.003, 0.01)}


def held_out(model):
    model.eval()
    with torch.no_grad():
        loss = loss_of(model, HELD_OUT).item()
    model.train()
    return loss


def run(make_optimizer, start, seconds, looks=10):
    """Train a copy of the model for some time; return the steps and the lowest held-out loss."""
    model = copy.deepcopy(start)
    optimizer, batches = make_optimizer(model), training()
    steps, losses = 0, []
    for _ in range(looks):
        end = time.perf_counter() + seconds / looks
        while time.perf_counter() < end:
            optimizer.zero_grad()
            loss = loss_of(model, next(batches))
            loss.backward()
            optimizer.step()
            loss.item()  # waits for a GPU, so that the clock is right
            steps += 1
        losses.append(held_out(model))  # its time does not count
    return steps, min((each for each in losses if each == each), default=float("inf"))


def main(seconds):
    torch.manual_seed(0)
    start = make_model().to(DEVICE)
    print(kfactk.build().coverage(start))
    results = {}
    for name, make_optimizer in ENTRIES.items():
        steps, results[name] = run(make_optimizer, start, seconds)
        print(f"{name}: {steps} steps, held-out loss {results[name]:.4f}")
    print(f"best: {min(results, key=results.get)}")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
