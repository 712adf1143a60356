"""Step times of kfactk's settings and of other optimisers relative to SGD with momentum, side by side.

All of them take turns, one step each, in one process, so that whatever else the machine does meets them alike. The ratios, not the
seconds, are what carries over to other machines. Everything is due in a first step, which is not counted; the steps that are counted
hold every period a whole number of times.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from experiments.models import ResNet

BASELINE = "SGD, momentum (torch)"
PERIODS = {"factor_every": 10, "scale_every": 10, "basis_every": 100}
Make = Callable[[nn.Module], Any]


def _kfactk(**recipe: Any) -> Make:
    return lambda model: kfactk.build(**{"update": "adam", **PERIODS, **recipe}).bind(model)


SETTINGS: dict[str, Make] = {
    BASELINE: lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "Adam (torch)": lambda model: torch.optim.Adam(model.parameters(), lr=0.001),
    "conv_kfac, ekfac, adam": _kfactk(),
    "conv_kfac, ekfac, adam, staggered": _kfactk(stagger=True),
    "conv_kfac, kfac, adam": _kfactk(basis="kfac"),
    "conv_kfac (reduce), ekfac, adam, staggered": _kfactk(curvature={"name": "conv_kfac", "spatial": "reduce"}, stagger=True),
}
"""By name; each makes the optimiser of a model."""


def _others() -> dict[str, Make]:
    """Second-order optimisers of other packages, those that are installed."""
    found: dict[str, Make] = {}
    if importlib.util.find_spec("pytorch_optimizer"):
        from pytorch_optimizer import SOAP

        found["SOAP, every 10 (pytorch_optimizer)"] = lambda model: SOAP(model.parameters(), lr=0.003, precondition_frequency=10)
    if importlib.util.find_spec("heavyball"):
        import heavyball

        heavyball.utils.compile_mode = None  # its autotuning takes minutes a shape on a CPU
        found["SOAP (heavyball)"] = lambda model: heavyball.SOAP(model.parameters(), lr=0.003, precondition_frequency=10)
    if importlib.util.find_spec("singd"):
        from singd.optim.optimizer import SINGD

        found["SINGD, every 10"] = lambda model: SINGD(model, T=10, lr=0.01, momentum=0.9)
    return found


def network(width: int) -> nn.Module:
    """ResNet-8 for images of 32 x 32."""
    torch.manual_seed(0)
    return ResNet(3, (width, 2 * width, 4 * width), 10)


def timed_step(model: nn.Module, optimizer: Any, images: Tensor, labels: Tensor) -> float:
    """Seconds of one step, forward and backward included."""
    start = time.perf_counter()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(settings: Mapping[str, Make], width: int, steps: int, batch: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each setting's steps after the first."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    runs = []
    for name, make in settings.items():
        model = network(width).to(device)
        runs.append((name, model, make(model)))
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for step in range(steps + 1):
        for name, model, optimizer in runs:
            taken = timed_step(model, optimizer, images, labels)
            if step:
                seconds[name].append(taken)
    return seconds


def table(seconds: Mapping[str, list[float]]) -> str:
    """Mean and median relative to the baseline's, and the worst step relative to the median of its own."""
    base = seconds[BASELINE]
    lines = [f"{'':44}{'mean':>8}{'median':>8}{'worst / median':>16}"]
    for name, taken in seconds.items():
        mean, median = statistics.mean(taken) / statistics.mean(base), statistics.median(taken) / statistics.median(base)
        lines.append(f"{name:44}{mean:8.2f}{median:8.2f}{max(taken) / statistics.median(taken):16.1f}")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="Step times relative to SGD with momentum.")
    parser.add_argument(
        "--steps", type=int, default=100, help="steps of each setting; a multiple of 100 holds every period as often as it comes"
    )
    parser.add_argument("--batch", type=int, default=64, help="images in a mini-batch")
    parser.add_argument("--widths", type=int, nargs="+", default=[16], help="channels of the first stage")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--only", default="", help="settings whose name contains this, besides SGD")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    every = SETTINGS | _others()
    settings = {name: make for name, make in every.items() if name == BASELINE or arguments.only in name}
    for width in arguments.widths:
        seconds = measure(settings, width, arguments.steps, arguments.batch, torch.device(arguments.device))
        middle = 1000 * statistics.median(seconds[BASELINE])
        print(f"ResNet-8, {width} channels, {arguments.batch} images of 32 x 32; a step of {BASELINE} took {middle:.1f} ms (median)")
        print(table(seconds), flush=True)


if __name__ == "__main__":
    main()
