"""Step times of kfactk's settings and of other optimizers, relative to a plain one.

All optimizers alternate in one process, one step each, so that other load on the machine affects
them alike. So does a large matrix product, whose rate gives the floor. The ratios carry over to
other machines; the seconds do not. The first step, where everything is due, does not count. The
counted steps contain every period a whole number of times, unless `--seconds` ends them earlier.
A setting with a lag takes its steps after the others, in a row: its decompositions run beside the
loop. `settings.py` lists the settings, `tasks.py` the networks: a ResNet-8 beside SGD with
momentum, a transformer beside AdamW.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from benchmarks import heap
from benchmarks.floor import Floor, Product, floors, seconds
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
        first: Seconds of the first step.
    """

    seconds: list[float] = attrs.field(factory=list)
    stages: dict[str, float] = attrs.field(factory=dict)
    first: float = 0.0


@attrs.frozen
class Entry:
    """A setting that takes part."""

    name: str
    model: nn.Module
    optimizer: Any
    lags: bool


def timed_step(
    task: Task, model: nn.Module, optimizer: Any, batch: tuple[Tensor, Tensor], precision: str
) -> float:
    """Take one step, and return its seconds, with forward and backward."""
    (inputs, labels), dtype = batch, getattr(torch, precision)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(inputs.device.type, dtype=dtype, enabled=precision != "float32"):
            loss = task.loss(model(inputs), labels)
        loss.backward()
        optimizer.step()

    return seconds(step, inputs.device)


def rounds(
    chosen: Mapping[str, Setting],
    task: Task,
    steps: int,
    batch: int,
    device: torch.device,
    *,
    profiled: bool,
    precision: str = "float32",
    until: float = math.inf,
) -> Iterator[tuple[dict[str, Run], dict[str, float]]]:
    """Race settings, and yield what is known so far: after each first step, and after each round.

    A setting whose first step would begin in the second half of the time takes no part.

    Args:
        chosen: The settings by name, the baseline first.
        task: What is trained.
        steps: Number of counted steps.
        batch: Examples in a mini-batch.
        device: Where to train.
        profiled: Whether to time stages; on an accelerator this slows down steps.
        precision: Of autocast in the forward; "float32" for none.
        until: No round begins that would end after this time of `time.perf_counter`.

    Yields:
        Runs by name, and the FLOP/s of a large matrix product, by precision.
    """
    examples = [task.batch(batch, device, number) for number in range(BATCHES)]
    names = sorted({setting.precision for setting in chosen.values()} | {"float32"})
    products = [Product(name, device) for name in names]
    multiplied: dict[str, list[float]] = {name: [] for name in names}
    runs: dict[str, Run] = {}
    profiles, entries, half = {}, [], (time.perf_counter() + until) / 2
    with contextlib.ExitStack() as stack:
        for name, setting in chosen.items():
            if runs and time.perf_counter() > half:
                break
            model, lags = task.network().to(device), bool((setting.options or {}).get("lag"))
            entry = Entry(name, model, setting.make(model), lags)
            if profiled and isinstance(entry.optimizer, Optimizer):
                profiles[name] = stack.enter_context(entry.optimizer.profile())
            first = timed_step(task, model, entry.optimizer, examples[0], precision)
            entries.append(entry)
            runs[name] = Run(first=first)
            yield runs, {}
        for group, end in groups(entries, until):
            for step in range(1, steps + 1):
                start = time.perf_counter()
                for entry in group:
                    data = examples[step % BATCHES]
                    taken = timed_step(task, entry.model, entry.optimizer, data, precision)
                    runs[entry.name].seconds.append(taken)
                for product in products:
                    multiplied[product.precision].append(product.seconds())
                yield runs, {p.precision: p.rate(multiplied[p.precision]) for p in products}
                now = time.perf_counter()
                if now + (now - start) > end:
                    break
    for name, profile in profiles.items():
        counted = profile.steps[1:]
        # "model" includes the steps of the other optimizers.
        every = {stage for each in counted for stage in each} - {"model"}
        runs[name].stages = {
            stage: sum(each.get(stage, 0.0) for each in counted) / len(counted) for stage in every
        }
    yield runs, {p.precision: p.rate(multiplied[p.precision]) for p in products}


def groups(entries: Sequence[Entry], until: float) -> Iterator[tuple[list[Entry], float]]:
    """Yield the entries that alternate, then each that has a lag, and when they have to end.

    Decompositions with a lag run beside the loop: in other optimizers' steps if these alternated
    with it. Each entry has the same share of the time.
    """
    found = [[entry for entry in entries if not entry.lags]]
    found += [[entry] for entry in entries if entry.lags]
    for number, group in enumerate(found):
        now, left = time.perf_counter(), sum(len(each) for each in found[number:])
        yield group, now + (until - now) * len(group) / left


def measure(*given: Any, **options: Any) -> tuple[dict[str, Run], dict[str, float]]:
    """Return what is known at the end of `rounds`, which has the same arguments."""
    for found in rounds(*given, **options):
        last = found
    return last


def metrics(
    runs: Mapping[str, Run], least: Mapping[str, Floor], baseline: str = BASELINE
) -> dict[str, dict[str, Any]]:
    """Return the metrics of each setting that took a step after the first.

    Mean, median, floor and stages are relative to the baseline; the worst step and its floor are
    relative to the median of the setting.
    """
    runs = {name: run for name, run in runs.items() if run.seconds}
    if not runs:
        return {}
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
            "worst_floor": least[name].worst_ratio(middle, median) if name in least else None,
            "stages": {stage: taken / base for stage, taken in run.stages.items()},
            "floors": {stage: taken / middle for stage, taken in least[name].mean.items()}
            if name in least
            else {},
            "steps": len(run.seconds),
            "first": run.first,
            "seconds": run.seconds,
        }
    return found


def table(found: Mapping[str, Mapping[str, Any]], baseline: str = BASELINE) -> str:
    """Return a line for each setting."""
    head = f"x {baseline.partition(' (')[0]}"
    lines = [f"{head:44}{'mean':>8}{'floor':>8}{'median':>8}{'worst / median':>16}{'floor':>8}"]
    for name, each in found.items():
        least = "" if each["floor"] is None else f"{each['floor']:.2f}"
        most = "" if each["worst_floor"] is None else f"{each['worst_floor']:.1f}"
        cells = f"{each['mean']:8.2f}{least:>8}{each['median']:8.2f}{each['worst']:16.1f}{most:>8}"
        lines.append(f"{name:44}{cells}".rstrip())
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


@attrs.frozen
class Conditions:
    """What a race depends on.

    Args:
        task: What is trained.
        batch: Examples in a mini-batch.
        asked: How many were asked for.
        device: Where to train.
        precision: Of autocast in the forward; "float32" for none.
        names: Names of the settings that were to take part.
    """

    task: Task
    batch: int
    asked: int
    device: torch.device
    precision: str
    names: tuple[str, ...]

    def results(
        self, runs: Mapping[str, Run], speed: Mapping[str, float], least: Mapping[str, Floor]
    ) -> dict[str, Any]:
        """Return results, those of a part of a race too."""
        base = runs[self.task.baseline]
        return {
            "task": self.task.name,
            "batch": self.batch,
            "batch_asked": self.asked,
            "device": self.device.type,
            "precision": self.precision,
            "baseline": self.task.baseline,
            "baseline_ms": 1000 * statistics.median(base.seconds or [base.first]),
            "flops": dict(speed),
            "first": {name: run.first for name, run in runs.items()},
            "left_out": [name for name in self.names if name not in runs],
            "settings": metrics(runs, least, self.task.baseline),
        }


@attrs.define
class Output:
    """The file of results, which is whole at any time.

    Args:
        folder: Where `race.json` is written; `None` for nowhere.
        earlier: Results of the races before.
    """

    folder: Path | None
    earlier: list[dict[str, Any]] = attrs.field(factory=list)

    def write(self, found: Mapping[str, Any]) -> None:
        """Write the results of the races before, and those of this one so far."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"torch": torch.__version__, "races": [*self.earlier, found]}, indent=1)
        part = self.folder / "race.json.part"
        part.write_text(text)
        part.replace(self.folder / "race.json")


def race(
    chosen: Mapping[str, Setting],
    task: Task,
    steps: int,
    batch: int,
    device: torch.device,
    *,
    precision: str = "float32",
    with_stages: bool = True,
    until: float = math.inf,
    output: Output | None = None,
) -> dict[str, Any]:
    """Race on one task, print the tables, and return the results.

    Where the device's memory does not suffice, the mini-batch is halved, and the results say so.

    Args:
        chosen: The settings by name.
        task: What is trained.
        steps: Number of counted steps.
        batch: Examples in a mini-batch.
        device: Where to train.
        precision: Of autocast in the forward; "float32" for none.
        with_stages: Whether to time stages.
        until: When the steps end, as in `rounds`.
        output: Takes the results after each round.

    Raises:
        torch.OutOfMemoryError: A mini-batch of one example is too large.
    """
    output = output or Output(None)
    asked = batch
    while True:
        how = Conditions(task, batch, asked, device, precision, tuple(chosen))
        try:
            return _race(chosen, how, steps, until, output, with_stages=with_stages)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{task.name}: {2 * batch} examples need more memory than there is; now {batch}")


def _race(
    chosen: Mapping[str, Setting],
    how: Conditions,
    steps: int,
    until: float,
    output: Output,
    *,
    with_stages: bool,
) -> dict[str, Any]:
    task, batch, device = how.task, how.batch, how.device
    on_cpu = device.type == "cpu"
    options: dict[str, Any] = {"precision": how.precision, "until": until}
    options["profiled"] = on_cpu and with_stages
    for runs, speed in rounds(chosen, task, steps, batch, device, **options):
        output.write(how.results(runs, speed, {}))
    if with_stages and not on_cpu:
        mine = {name: chosen[name] for name in runs if chosen[name].options is not None}
        again, _ = measure(mine, task, steps, batch, device, **{**options, "profiled": True})
        for name, run in again.items():
            runs[name].stages = run.stages
    raced = {name: chosen[name] for name in runs}
    least = floors(raced, task.network(), task.shape, batch, speed, device)
    found = how.results(runs, speed, least)
    output.write(found)
    rates = ", ".join(f"{rate / 1e9:.0f} in {name}" for name, rate in speed.items())
    print(
        f"{task.name}, {batch} examples, {device.type}, {how.precision}; "
        f"a step of {task.baseline} took {found['baseline_ms']:.1f} ms (median),"
    )
    print(f"and a large matrix product ran at {rates} GFLOP/s")
    if found["left_out"]:
        print(f"not begun in time: {', '.join(found['left_out'])}")
    each = found["settings"]
    print(f"{table(each, task.baseline)}\n\n{stages(each)}\n", flush=True)
    return found


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
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="the steps of all races end after these"
    )
    parser.add_argument(
        "--output", type=Path, help="folder to write race.json into, after each round"
    )
    arguments = parser.parse_args()
    until = time.perf_counter() + arguments.seconds
    torch.set_num_threads(arguments.threads)
    heap.keep_freed()
    absent = [*missing(), *(f"{name} (not on the package index)" for name in NOT_ON_THE_INDEX)]
    print(f"not installed, and therefore left out: {', '.join(absent)}")
    usual = {"resnet8": [16, 64], "resnet50": [32], "imagenet": [224], "gpt": [256], "gpt2": [768]}
    device, output = torch.device(arguments.device), Output(arguments.output)
    named = None
    if arguments.settings:
        named = (*arguments.settings, "SOAP, every 10 (pytorch_optimizer)")
    for width in arguments.widths or usual[arguments.network]:
        task = TASKS[arguments.network](width)
        for batch in arguments.batches:
            found = race(
                task.settings(arguments.only, named),
                task,
                arguments.steps,
                batch,
                device,
                precision=arguments.autocast,
                with_stages=not arguments.no_stages,
                until=until,
                output=output,
            )
            output.earlier.append(found)


if __name__ == "__main__":
    main()
