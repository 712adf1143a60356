"""Peak memory of each setting above that of SGD with momentum, against the least possible.

On a CPU, `torch.profiler` records every allocation and release of torch's allocator, also of
temporaries inside operations. The number is therefore exact and the same in every run; the resident
set would include what the C library keeps. On CUDA, torch counts itself.

    least        factors, decompositions and moments, as kept between steps, and the state of the
                 update rule above that of SGD
    workspace    the peak of preconditioning one layer above its state; the largest of all layers

Periods are short, so that a few steps include everything: a first step, ordinary steps, and
refreshes of existing state.
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
"""Optimizers of other packages, with periods of 10, take `OTHERS` steps."""


def peak(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak of allocated bytes during a call, above those allocated before it.

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
    """Return the bytes of the values that are tensors."""
    return sum(
        value.numel() * value.itemsize for value in tensors.values() if isinstance(value, Tensor)
    )


@attrs.define
class StateBytes:
    """Bytes that an optimizer keeps between steps.

    Args:
        curvature: Factors, decompositions and moments.
        update: The rest of its state.
    """

    curvature: int = 0
    update: int = 0

    @classmethod
    def of(cls, optimizer: Any) -> StateBytes:
        """Count the state of an optimizer."""
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


def peak_of_training(
    make: Callable[[nn.Module], Any], width: int, batch: int, steps: int, device: torch.device
) -> tuple[int, StateBytes]:
    """Return the peak from the construction of the model to the last step, and the final state."""
    state = StateBytes()

    def run() -> None:
        nonlocal state
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
            state = StateBytes.of(optimizer)

    return peak(run, device), state


def with_short_periods(setting: Setting, **options: Any) -> Callable[[nn.Module], Optimizer]:
    """Return a maker of the optimizer of a setting, with short periods."""
    recipe = setting.recipe(**SHORT, **options)
    return recipe.bind


def without_curvature(setting: Setting) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return a maker of the update rule of a setting of kfactk, without curvature."""
    recipe = setting.recipe()
    return lambda model: recipe.update.make(
        [{"params": list(model.parameters())}], lr=recipe.lr, weight_decay=0.0
    )


def largest_layers(setting: Setting, width: int, batch: int) -> list[str]:
    """Return the layers that may need the largest workspace.

    They have the most state, the largest samples or the most memory traffic in the cost model.
    """
    layers = job(setting, network(width), "x".join(map(str, IMAGE)), batch).layers
    counts: tuple[Callable[[LayerCost], float], ...] = (
        lambda layer: sum(layer.sizes.kept.values()) + layer.sizes.moments,
        lambda layer: layer.retained,
        lambda layer: layer.factors.bytes + layer.scale.bytes,
    )
    return sorted({max(layers, key=lambda name: count(layers[name])) for count in counts})


def workspace(
    setting: Setting, width: int, batch: int, base: int, device: torch.device
) -> tuple[int, str]:
    """Return the largest workspace of one layer above its state, and the name of that layer.

    Args:
        setting: A setting of kfactk.
        width: Width of the network.
        batch: Images in a mini-batch.
        base: Peak of steps without curvature, with the same update rule.
        device: Where to train.
    """
    layers = list(setting.recipe().bind(network(width)).layers)
    found = []
    for name in largest_layers(setting, width, batch):
        others = [other for other in layers if other != name]
        make = with_short_periods(setting, exclude=others)
        highest, state = peak_of_training(make, width, batch, STEPS, device)
        found.append((max(0, highest - base - state.curvature), name))
    return max(found)


def measure(
    chosen: Mapping[str, Setting], width: int, batch: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Measure bytes by setting, and print each result at once."""
    base, momentum = peak_of_training(chosen[BASELINE].make, width, batch, STEPS, device)
    rules: dict[str, int] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, setting in chosen.items():
        if setting.options is None:
            highest, _ = peak_of_training(setting.make, width, batch, OTHERS, device)
            found[name] = {"above": highest - base}
        else:
            rule = str(setting.options["update"])
            if rule not in rules:
                make = without_curvature(setting)
                rules[rule], _ = peak_of_training(make, width, batch, STEPS, device)
            highest, state = peak_of_training(
                with_short_periods(setting), width, batch, STEPS, device
            )
            most, layer = workspace(setting, width, batch, rules[rule], device)
            least = state.curvature + state.update - momentum.update
            found[name] = {
                "above": highest - base,
                "least": least,
                "workspace": most,
                "layer": layer,
            }
        print(row(name, found[name]), flush=True)
    return found


def row(name: str, found: Mapping[str, Any]) -> str:
    """Return one line of the table."""
    above = found["above"]
    line = f"{name:44}{above / MIB:10.1f}"
    if "least" in found:
        least, most = found["least"], found["workspace"]
        allowed = 1.5 * least + most
        line += f"{least / MIB:10.1f}{most / MIB:12.1f}{above / least:10.2f}{above / allowed:12.2f}"
        line += f"  {found['layer']}"
    return line


def main() -> None:
    """Measure, print tables, and write the results."""
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
            f"ResNet-8, {width} channels, {arguments.batch} images of 32 x 32, "
            f"{arguments.device}; MiB above SGD's peak"
        )
        cells = f"{'peak':>10}{'least':>10}{'workspace':>12}{'/ least':>10}{'/ allowed':>12}"
        print(f"{'':44}{cells}  of layer")
        found = measure(chosen, width, arguments.batch, torch.device(arguments.device))
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
