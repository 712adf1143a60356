"""Peak memory of each setting above that of SGD with momentum, beside the least it can be and one layer's workspace.

On a CPU every allocation and release of torch's allocator is listened to (`torch.profiler`), temporaries inside of operations included, so
that the figure is exact and the same on every run; the resident set would hold whatever the C library keeps. On CUDA torch counts itself.

    least        factors, decompositions and moments, as kept between steps, and the update rule's state above SGD's
    workspace    what preconditioning one layer alone takes at its peak above all that it keeps, the largest of all layers

Periods are shortened, so that a few steps hold everything that happens: a first step, ordinary ones, and refreshes of what is there.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.floor import job
from benchmarks.settings import BASELINE, Setting, network, settings
from kfactk.costmodel.cost import LayerCost
from kfactk.optim.optimizer import Optimizer

SHORT = {"factor_every": 4, "scale_every": 4, "basis_every": 8}
STEPS, OTHERS, IMAGE, MIB = 9, 11, (3, 32, 32), 2**20
"""Of others, whose periods are 10, more steps are taken."""


def peak(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that were allocated at once while this ran, above those that were when it began.

    Example:
        >>> def squares():
        ...     first = torch.zeros(1000)
        ...     del first
        ...     return torch.zeros(500), torch.zeros(250)
        >>> peak(squares, torch.device("cpu"))
        4000
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    events = watched.profiler.kineto_results.events()  # type: ignore[union-attr]
    highest = current = 0
    for event in sorted(
        (event for event in events if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    ):
        current += event.nbytes()
        highest = max(highest, current)
    return highest


def bytes_of(tensors: Mapping[str, Any]) -> int:
    """Of those that are tensors."""
    return sum(
        value.numel() * value.itemsize for value in tensors.values() if isinstance(value, Tensor)
    )


@attrs.define
class Kept:
    """Bytes that an optimiser keeps between steps.

    Args:
        curvature: Factors, decompositions and moments.
        update: The rest of its state.
    """

    curvature: int = 0
    update: int = 0

    @classmethod
    def by(cls, optimizer: Any) -> Kept:
        """What this one keeps."""
        found = cls()
        for state in optimizer.state.values():
            curvature = {
                key: value for key, value in state.items() if str(key).startswith("kfactk.")
            }
            found.curvature += bytes_of(curvature)
            found.update += bytes_of(
                {str(key): value for key, value in state.items() if key not in curvature}
            )
        return found


def trained(
    make: Callable[[nn.Module], Any], width: int, batch: int, steps: int, device: torch.device
) -> tuple[int, Kept]:
    """Peak of so many steps, from the making of the model on, and what is kept after them."""
    kept = Kept()

    def run() -> None:
        nonlocal kept
        model = network(width).to(device)
        optimizer = make(model)
        images, labels = (
            torch.randn(batch, *IMAGE, device=device),
            torch.randint(10, (batch,), device=device),
        )
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        if hasattr(optimizer, "state"):
            kept = Kept.by(optimizer)

    return peak(run, device), kept


def bound(setting: Setting, **options: Any) -> Callable[[nn.Module], Optimizer]:
    """Makes a setting's optimiser with short periods."""
    recipe = setting.recipe(**SHORT, **options)
    return recipe.bind


def plain(setting: Setting) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Makes the update rule of a setting of kfactk, without curvature."""
    recipe = setting.recipe()
    return lambda model: recipe.update.make(
        [{"params": list(model.parameters())}], lr=recipe.lr, weight_decay=0.0
    )


def largest(setting: Setting, width: int, batch: int) -> list[str]:
    """Layers that may need the largest workspace: those that keep most, see most, or read and write most, as the cost model counts it."""
    layers = job(setting, network(width), IMAGE, batch).layers
    counts: tuple[Callable[[LayerCost], float], ...] = (
        lambda layer: sum(layer.sizes.kept.values()) + layer.sizes.moments,
        lambda layer: layer.retained,
        lambda layer: layer.factors.bytes + layer.scale.bytes,
    )
    return sorted({max(layers, key=lambda name: count(layers[name])) for count in counts})


def workspace(
    setting: Setting, width: int, batch: int, base: int, device: torch.device
) -> tuple[int, str]:
    """The most that one layer alone takes above what it keeps, and which layer that is.

    Args:
        setting: One of kfactk's.
        width: Of the network.
        batch: Images in a mini-batch.
        base: Peak of plain steps with the same update rule.
        device: Where.
    """
    layers = list(setting.recipe().bind(network(width)).layers)
    found = []
    for name in largest(setting, width, batch):
        others = [other for other in layers if other != name]
        highest, kept = trained(bound(setting, exclude=others), width, batch, STEPS, device)
        found.append((max(0, highest - base - kept.curvature), name))
    return max(found)


def measured(
    chosen: Mapping[str, Setting], width: int, batch: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Bytes, by setting; each is printed as soon as it is known."""
    base, momentum = trained(chosen[BASELINE].make, width, batch, STEPS, device)
    rules: dict[str, int] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, setting in chosen.items():
        if setting.options is None:
            found[name] = {"above": trained(setting.make, width, batch, OTHERS, device)[0] - base}
        else:
            rule = str(setting.options["update"])
            if rule not in rules:
                rules[rule] = trained(plain(setting), width, batch, STEPS, device)[0]
            highest, kept = trained(bound(setting), width, batch, STEPS, device)
            most, layer = workspace(setting, width, batch, rules[rule], device)
            least = kept.curvature + kept.update - momentum.update
            found[name] = {
                "above": highest - base,
                "least": least,
                "workspace": most,
                "layer": layer,
            }
        print(row(name, found[name]), flush=True)
    return found


def row(name: str, found: Mapping[str, Any]) -> str:
    """One line of the table."""
    line = f"{name:44}{found['above'] / MIB:10.1f}"
    if "least" in found:
        allowed = 1.5 * found["least"] + found["workspace"]
        cells = f"{found['least'] / MIB:10.1f}{found['workspace'] / MIB:12.1f}"
        line += f"{cells}{found['above'] / found['least']:10.2f}{found['above'] / allowed:12.2f}  {found['layer']}"
    return line


def main() -> None:
    """Measure, print tables, and write the figures."""
    parser = argparse.ArgumentParser(
        prog="memory", description="Peak memory above that of SGD with momentum."
    )
    parser.add_argument("--batch", type=int, default=64, help="images in a mini-batch")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[16, 64], help="channels of the first stage"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--only", default="", help="settings whose name contains this, besides SGD")
    parser.add_argument("--output", type=Path, help="folder to write memory.json into")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen, results = settings(arguments.only), []
    for width in arguments.widths:
        print(
            f"ResNet-8, {width} channels, {arguments.batch} images of 32 x 32, {arguments.device}; MiB above SGD's peak"
        )
        print(
            f"{'':44}{'peak':>10}{'least':>10}{'workspace':>12}{'/ least':>10}{'/ allowed':>12}  of layer"
        )
        found = measured(chosen, width, arguments.batch, torch.device(arguments.device))
        results.append(
            {
                "width": width,
                "batch": arguments.batch,
                "device": arguments.device,
                "settings": found,
            }
        )
        print("allowed: 1.5 x least + workspace\n")
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "memory.json").write_text(
            json.dumps({"torch": torch.__version__, "runs": results}, indent=1)
        )


if __name__ == "__main__":
    main()
