"""Step times of kfactk's settings relative to torch's SGD, on a small convolutional network and random images.

All settings take turns, one step each, in one process, so that whatever else the machine does meets them alike. The ratios, not the
seconds, are what carries over to other machines. A step's median is that of an ordinary step, on which no curvature is due; the mean
includes the steps on which it is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk

BASELINE = "SGD (torch)"
Make = Callable[[nn.Module], torch.optim.Optimizer]

SETTINGS: dict[str, Make] = {
    BASELINE: lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "Adam (torch)": lambda model: torch.optim.Adam(model.parameters(), lr=0.001),
    "K-FAC": lambda model: kfactk.build(basis="kfac", update="momentum").bind(model),
    "EKFAC": lambda model: kfactk.build(basis="ekfac", update="momentum").bind(model),
    "EKFAC, reduce": lambda model: kfactk.build(curvature={"name": "conv_kfac", "spatial": "reduce"}, update="momentum").bind(model),
    "EKFAC, running scale": lambda model: kfactk.build(basis={"name": "ekfac", "scale": "running"}, update="momentum").bind(model),
    "EKFAC, empirical": lambda model: kfactk.build(fisher="empirical", update="momentum").bind(model),
    "EKFACadam": lambda model: kfactk.build(update="adam").bind(model),
    "EKFAC, all due at every step": lambda model: kfactk.build(update="momentum", factor_every=1, scale_every=1, basis_every=1).bind(model),
}


def network() -> nn.Module:
    """Three convolutions with BatchNorm, and a linear layer."""
    layers: list[nn.Module] = []
    for channels, wider in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def timed_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """Seconds of one step, forward and backward included."""
    start = time.perf_counter()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(steps: int, batch: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each setting's steps. Everything is due at step 0, which is not counted, and again once in `basis_every` steps."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    runs = []
    for name, make in SETTINGS.items():
        torch.manual_seed(0)
        model = network().to(device)
        runs.append((name, model, make(model)))
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for step in range(steps + 1):
        for name, model, optimizer in runs:
            taken = timed_step(model, optimizer, images, labels)
            if step:
                seconds[name].append(taken)
    return seconds


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="Step times relative to torch's SGD.")
    parser.add_argument("--steps", type=int, default=100, help="steps of each setting; at 100 every default period comes round once")
    parser.add_argument("--batch", type=int, default=64, help="images in a mini-batch")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seconds = measure(arguments.steps, arguments.batch, torch.device(arguments.device))
    median, mean = statistics.median(seconds[BASELINE]), statistics.mean(seconds[BASELINE])
    print(f"{arguments.steps} steps of {arguments.batch} images; a step of {BASELINE} took {1000 * median:.1f} ms (median)")
    print(f"{'':30}{'median':>8}{'mean':>8}   times a step of {BASELINE}")
    for name, taken in seconds.items():
        print(f"{name:30}{statistics.median(taken) / median:8.2f}{statistics.mean(taken) / mean:8.2f}")


if __name__ == "__main__":
    main()
