"""Step times of kfactk's settings and of other optimizers, relative to a plain one.

All optimizers alternate in one process, one step each, so that other load on the machine affects
them alike. So does a large matrix product, whose rate gives the floor. The ratios carry over to
other machines; the seconds do not. The first step, where everything is due, does not count. The
counted steps contain every period a whole number of times. `settings.py` lists the settings,
`tasks.py` the networks: a ResNet-8 beside SGD with momentum, a transformer beside AdamW.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from benchmarks import heap
from benchmarks.floor import Floor, Product, floors
from benchmarks.settings import BASELINE, NOT_ON_THE_INDEX, Setting, missing
from benchmarks.tasks import TASKS, Task
from kfactk.optim.optimizer import Optimizer

BATCHES = 16
"""Mini-batches that steps take in turn. On one alone gradients soon span few directions, and
decompositions take other ways than in training."""


@attrs.define
class Run:
    """The times of one setting.

    Args:
        seconds: Seconds of each step after the first.
        stages: Seconds of each stage in a mean step, for a setting of kfactk.
    """

    seconds: list[float]
    stages: dict[str, float]


def timed_step(
    task: Task, model: nn.Module, optimizer: Any, batch: tuple[Tensor, Tensor], precision: str
) -> float:
    """Take one step, and return its seconds, with forward and backward."""
    (inputs, labels), dtype = batch, getattr(torch, precision)
    start = time.perf_counter()
    optimizer.zero_grad()
    with torch.autocast(inputs.device.type, dtype=dtype, enabled=precision != "float32"):
        loss = task.loss(model(inputs), labels)
    loss.backward()
    optimizer.step()
    if inputs.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    chosen: Mapping[str, Setting],
    task: Task,
    steps: int,
    batch: int,
    device: torch.device,
    *,
    profiled: bool,
    precision: str = "float32",
) -> tuple[dict[str, Run], dict[str, float]]:
    """Race settings.

    Args:
        chosen: The settings by name.
        task: What is trained.
        steps: Number of counted steps.
        batch: Examples in a mini-batch.
        device: Where to train.
        profiled: Whether to time stages; on an accelerator this slows down steps.
        precision: Of autocast in the forward; "float32" for none.

    Returns:
        Runs by name, and the FLOP/s of a large matrix product, by precision.
    """
    examples = [task.batch(batch, device, number) for number in range(BATCHES)]
    entries = []
    for name, setting in chosen.items():
        model = task.network().to(device)
        entries.append((name, model, setting.make(model)))
    products = [
        Product(name, device)
        for name in sorted({setting.precision for setting in chosen.values()} | {"float32"})
    ]
    runs, profiles = {name: Run([], {}) for name in chosen}, {}
    multiplied: dict[str, list[float]] = {product.precision: [] for product in products}
    with contextlib.ExitStack() as stack:
        for name, _, optimizer in entries:
            if profiled and isinstance(optimizer, Optimizer):
                profiles[name] = stack.enter_context(optimizer.profile())
        for step in range(steps + 1):
            for name, model, optimizer in entries:
                taken = timed_step(task, model, optimizer, examples[step % BATCHES], precision)
                if step:
                    runs[name].seconds.append(taken)
            for product in products:
                multiplied[product.precision].append(product.seconds())
    for name, profile in profiles.items():
        counted = profile.steps[1:]
        # "model" includes the steps of the other optimizers.
        every = {stage for each in counted for stage in each} - {"model"}
        runs[name].stages = {
            stage: sum(each.get(stage, 0.0) for each in counted) / len(counted) for stage in every
        }
    return runs, {
        product.precision: product.rate(multiplied[product.precision]) for product in products
    }


def metrics(
    runs: Mapping[str, Run], least: Mapping[str, Floor], baseline: str = BASELINE
) -> dict[str, dict[str, Any]]:
    """Return the metrics of each setting.

    Mean, median, floor and stages are relative to the baseline; the worst step is relative to the
    median of the setting.
    """
    base, middle = (
        statistics.mean(runs[baseline].seconds),
        statistics.median(runs[baseline].seconds),
    )
    found: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        median = statistics.median(run.seconds)
        found[name] = {
            "mean": statistics.mean(run.seconds) / base,
            "median": median / middle,
            "worst": max(run.seconds) / median,
            "floor": least[name].ratio(middle) if name in least else None,
            "stages": {stage: taken / base for stage, taken in run.stages.items()},
            "floors": {stage: taken / middle for stage, taken in least[name].mean.items()}
            if name in least
            else {},
            "seconds": run.seconds,
        }
    return found


def table(found: Mapping[str, Mapping[str, Any]], baseline: str = BASELINE) -> str:
    """Return a line for each setting."""
    head = f"x {baseline.partition(' (')[0]}"
    lines = [f"{head:44}{'mean':>8}{'floor':>8}{'median':>8}{'worst / median':>16}"]
    for name, each in found.items():
        least = "" if each["floor"] is None else f"{each['floor']:.2f}"
        lines.append(
            f"{name:44}{each['mean']:8.2f}{least:>8}{each['median']:8.2f}{each['worst']:16.1f}"
        )
    return "\n".join(lines)


def stages(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a line for each setting of kfactk: stages of a mean step, and their floors."""
    names = ("fisher", "factors", "scale", "basis", "precondition", "clip", "update", "rest")
    lines = [f"{'mean step, relative (floor)':44}" + "".join(f"{name:>15}" for name in names)]
    for name, each in found.items():
        if each["stages"]:
            cells = [f"{each['stages'].get(stage, 0.0):.3f}" for stage in names]
            least = [
                f" ({each['floors'][stage]:.3f})" if stage in each["floors"] else ""
                for stage in names
            ]
            lines.append(
                f"{name:44}"
                + "".join(f"{cell + floor:>15}" for cell, floor in zip(cells, least, strict=True))
            )
    return "\n".join(lines)


def race(
    chosen: Mapping[str, Setting],
    task: Task,
    steps: int,
    batch: int,
    device: torch.device,
    *,
    precision: str = "float32",
    with_stages: bool = True,
) -> dict[str, Any]:
    """Race on one task, print the tables, and return the results."""
    run_once = partial(measure, task=task, steps=steps, batch=batch, device=device)
    on_cpu = device.type == "cpu"
    runs, speed = run_once(chosen, profiled=on_cpu and with_stages, precision=precision)
    if with_stages and not on_cpu:
        mine = {name: setting for name, setting in chosen.items() if setting.options is not None}
        for name, run in run_once(mine, profiled=True, precision=precision)[0].items():
            runs[name].stages = run.stages
    least = floors(chosen, task.network(), task.shape, batch, speed, device)
    found = metrics(runs, least, task.baseline)
    middle = 1000 * statistics.median(runs[task.baseline].seconds)
    rates = ", ".join(f"{rate / 1e9:.0f} in {name}" for name, rate in speed.items())
    print(
        f"{task.name}, {batch} examples, {device.type}, {precision}; "
        f"a step of {task.baseline} took {middle:.1f} ms (median),"
    )
    print(f"and a large matrix product ran at {rates} GFLOP/s")
    print(f"{table(found, task.baseline)}\n\n{stages(found)}\n", flush=True)
    return {
        "task": task.name,
        "batch": batch,
        "device": device.type,
        "precision": precision,
        "baseline": task.baseline,
        "baseline_ms": middle,
        "flops": speed,
        "settings": found,
    }


def main() -> None:
    """Measure, print tables, and write the results."""
    parser = argparse.ArgumentParser(
        prog="race", description="Step times relative to SGD with momentum, or AdamW."
    )
    parser.add_argument(
        "--network", choices=tuple(TASKS), default="resnet8", help="what is trained"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=100,
        help="steps of each setting; a multiple of 100 contains every period a whole number of "
        "times",
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[64], help="examples in a mini-batch"
    )
    parser.add_argument(
        "--widths",
        type=int,
        nargs="+",
        help="channels of the first stage, size of images or width of a transformer; default: 16 "
        "and 64, 32 or 256",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="these settings of kfactk")
    parser.add_argument(
        "--autocast", default="float32", help="precision of the forward, such as bfloat16"
    )
    parser.add_argument("--no-stages", action="store_true", help="do not time stages")
    parser.add_argument("--output", type=Path, help="folder to write race.json into")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    heap.keep_freed()
    absent = [*missing(), *(f"{name} (not on the package index)" for name in NOT_ON_THE_INDEX)]
    print(f"not installed, and therefore left out: {', '.join(absent)}")
    usual = {"resnet8": [16, 64], "resnet50": [32], "gpt": [256], "gpt2": [768]}
    results = []
    for width in arguments.widths or usual[arguments.network]:
        task = TASKS[arguments.network](width)
        for batch in arguments.batches:
            chosen = task.settings(arguments.only)
            if arguments.settings:
                named = (*arguments.settings, task.baseline, "SOAP, every 10 (pytorch_optimizer)")
                chosen = {name: each for name, each in chosen.items() if name in named}
            results.append(
                race(
                    chosen,
                    task,
                    arguments.steps,
                    batch,
                    torch.device(arguments.device),
                    precision=arguments.autocast,
                    with_stages=not arguments.no_stages,
                )
            )
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "race.json").write_text(
            json.dumps({"torch": torch.__version__, "races": results}, indent=1)
        )


if __name__ == "__main__":
    main()
