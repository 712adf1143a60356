"""All checks that need a GPU, in one command of at most 8 minutes; it writes one JSON file.

    python -m benchmarks.gpu --output FOLDER
    python -m benchmarks.gpu --device cpu --tiny       a rehearsal without a GPU

The parts, the most valuable first: the tests that skip elsewhere; whether ordinary steps wait for
the device; decompositions on a side stream; both races in bfloat16 and float32; decompositions one
by one and in a batch; memory. Each part runs in a process of its own, with a limit of its own. A
part that fails or is late is noted with what it has written so far, and the others run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn
from torch.nn import functional as F

import kfactk
from benchmarks.floor import median_seconds, seconds
from benchmarks.tasks import TASKS, Task

ROOT = Path(__file__).parent.parent
TESTS = (
    "tests/training_loops/test_devices.py",
    "tests/kfactk/optim/test_nonfinite.py",
    "tests/kfactk/optim/test_nonfinite_waiting.py",
    "tests/kfactk/costmodel/test_hardware.py",
    "tests/training_loops/test_amp.py",
)
"""Files with tests that skip without a GPU."""
TOTAL, LEAST = 470.0, 5.0
"""Seconds of all parts: 8 minutes, less 10 s to start; no part begins in the last `LEAST`."""
SIDES: Mapping[int, int] = {256: 32, 1024: 8, 4096: 2}
"""How many matrices of a side are decomposed one by one, and in one batch."""
RACES = (("gpt2", 768, 16), ("imagenet", 224, 128))
"""Task, width or size, and batch: 16,384 tokens, and some 20 GB of activations."""
RACING = 35
"""Seconds of the steps of one race; after them it measures decompositions for its floors."""
CHOSEN = (
    "ekfac, staggered",
    "kfac, staggered",
    "ekfac, running",
    "ekfac of channels and taps, running",
)
"""Settings of kfactk; each task has three of them."""
SOAP = "SOAP, every 10 (pytorch_optimizer)"
SMALL = (("gpt", 8, 2, "bfloat16"), ("resnet8", 2, 2, "float32"))
PRECISIONS = ("bfloat16", "float32")
PATIENCE = 60
"""A rehearsal has so many times the seconds, since other programs may run beside it."""
NEAR = 1e-9
"""The largest difference, relative to the largest entry of a tensor, of float64 runs on two
devices."""
LATER = "not measured yet"


@attrs.frozen
class Part:
    """One part.

    Args:
        name: Its name in the results.
        arguments: Arguments of `python -m`.
        limit: Seconds after which it is ended.
        result: The file that it writes; `None` where its status says it all.
    """

    name: str
    arguments: Sequence[str]
    limit: float
    result: Path | None = None


def races(*, tiny: bool) -> Sequence[tuple[str, int, int, str]]:
    """Return task, width or size, batch and precision of each race; a rehearsal has fewer."""
    return SMALL if tiny else [(*race, precision) for precision in PRECISIONS for race in RACES]


def parts(folder: Path, device: str, *, tiny: bool) -> list[Part]:
    """Return all parts.

    Args:
        folder: Where they write.
        device: Where they run.
        tiny: Whether sizes are as small as can be.
    """
    here = ["--device", device, "--output", str(folder), *(["--tiny"] if tiny else [])]

    def check(name: str, limit: float) -> Part:
        return Part(name, ["benchmarks.gpu", name, *here], limit, folder / f"{name}.json")

    pytest = ["pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    chosen = ["-k", "cpu and lag", TESTS[0]] if device == "cpu" else ["-m", "gpu", *TESTS]
    found = [Part("tests", [*pytest, *chosen], 80), check("waits", 30), check("lag", 35)]
    for task, width, batch, precision in races(tiny=tiny):
        name = f"{task}, {precision}"
        into = folder / name.replace(", ", "-")
        arguments = ["benchmarks.race", "--network", task, "--widths", str(width)]
        arguments += ["--batches", str(batch), "--steps", "2" if tiny else "100"]
        arguments += ["--device", device, "--autocast", precision, "--no-stages"]
        racing = RACING * (PATIENCE if tiny else 1)
        arguments += ["--seconds", str(racing), "--output", str(into)]
        arguments += ["--settings", *CHOSEN]
        found.append(Part(name, arguments, 65, into / "race.json"))
    arguments = ["benchmarks.memory", "--widths", "2" if tiny else "64", "--device", device]
    arguments += ["--batch", "2" if tiny else "64"]
    arguments += ["--only", "iterated" if tiny else "ekfac, staggered"]
    arguments += ["--output", str(folder)]
    return [*found, check("solvers", 30), Part("memory", arguments, 35, folder / "memory.json")]


def run(part: Part) -> dict[str, Any]:
    """Run a part, and return its status, seconds and results.

    A part that is late is ended with all processes that it began.
    """
    start = time.perf_counter()
    if part.result is not None:
        part.result.unlink(missing_ok=True)
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *part.arguments],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = str(process.wait(part.limit))
        except subprocess.TimeoutExpired:
            status = "late"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        told = output.read()
    found: dict[str, Any] = {"status": status, "seconds": round(time.perf_counter() - start, 1)}
    if part.result is not None and part.result.exists():
        found["results"] = json.loads(part.result.read_text())
    if status != "0":
        found["told"] = told[-4000:]
    elif part.result is None:
        found["told"] = told.strip().splitlines()[-1:]
    return found


def place(filename: str, lineno: int) -> str:
    """Return the innermost line of this repository on the stack, outside of this file."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path != Path(__file__):
            return f"{path.relative_to(ROOT)}:{frame.lineno} in {frame.name}: {frame.line}"
    return f"{filename}:{lineno}"


@contextlib.contextmanager
def watching(device: torch.device) -> Iterator[list[str]]:
    """Note the places where the host waits for the device."""
    places: list[str] = []

    def note(
        message: Warning | str, category: object, filename: str, lineno: int, *rest: object
    ) -> None:
        if "synchroniz" in str(message):
            places.append(place(filename, lineno))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def waits(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Count how often steps wait for the device; ordinary steps must not."""
    task, often, seldom = TASKS["gpt"](8 if tiny else 512), 4, 8
    inputs, labels = task.batch(2 if tiny else 16, device)
    model = task.network().to(device)
    periods = {"factor_every": often, "scale_every": often, "basis_every": seldom}
    optimizer = kfactk.build(**{**task.common, **periods}).bind(model)
    counts, faults = [], []
    for step in range(2 * seldom):
        with watching(device) as places:
            optimizer.zero_grad()
            task.loss(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        counts.append(len(places))
        if step % often:
            faults += [f"step {step}, where nothing is due, waits at {each}" for each in places]
    ordinary = max(count for step, count in enumerate(counts) if step % often)
    due = {"ordinary": ordinary, "factors and scale": counts[often], "basis too": counts[seldom]}
    return {**due, "all": counts, "faults": faults}


def lag(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Compare a lagged run on the device with the CPU's, and time what a lag hides."""
    truth, found, without = (
        lagging(where, steps) for where, steps in (("cpu", 2), (device, 2), ("cpu", 0))
    )
    away, effect = deviation(found, truth), deviation(without, truth)
    faults = []
    if not away <= NEAR:
        faults.append(f"a lagged run is {away:.1e} from that of the CPU, more than {NEAR:.0e}")
    if not effect > NEAR:
        faults.append("a run without a lag is the same as with one: the lag has no effect")
    hides = hiding(device, tiny=tiny)
    if device.type == "cuda" and hides["hidden"] <= 0:
        faults.append("decompositions on the side stream take as long as without a lag")
    return {"deviation": away, "effect of the lag": effect, **hides, "faults": faults}


def lagging(device: torch.device | str, steps: int) -> list[torch.Tensor]:
    """Return the parameters of a small float64 run whose decompositions are so many steps late."""
    # "exact" draws signs, and each device others.
    task, options = TASKS["resnet8"](2), {"basis": "ekfac", "fisher": "empirical", "clip": "none"}
    model = task.network().double().to(device)
    recipe = kfactk.build(
        **options,
        update="momentum",
        lr=0.01,
        lag=steps,
        factor_every=1,
        scale_every=2,
        basis_every=4,
    )
    optimizer = recipe.bind(model)
    for step in range(10):
        inputs, labels = task.batch(4, torch.device("cpu"), step)  # others on a device
        optimizer.zero_grad()
        outputs = model(inputs.double().to(device))
        task.loss(outputs, labels.to(device)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return [parameter.detach().cpu() for parameter in model.parameters()]


def deviation(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest entry of the tensor.

    Example:
        >>> deviation([torch.tensor([1.0, 4.5])], [torch.tensor([1.0, 4.0])])
        0.125
    """
    pairs = zip(found, truth, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def hiding(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Return what a refresh costs with and without a lag, in milliseconds.

    A refresh costs what steps of a period take above its median step. *hidden* is the part of the
    decompositions' own time that a lag saves: 1 where they take no time of the loop.
    """
    side, rows = (16, 32) if tiny else (1024, 65536)
    every, late, periods = 20, 10, 2
    plain = nn.Sequential(nn.Linear(side, side), nn.Tanh(), nn.Linear(side, side)).to(device)
    inputs = torch.randn(rows, side, device=device)
    labels = torch.randint(side, (rows,), device=device)
    found: dict[str, Any] = {}
    for name, steps in (("without", 0), ("with", late)):
        model = copy.deepcopy(plain)
        recipe = kfactk.build(
            basis="ekfac",
            lr=1e-4,
            lag=steps,
            factor_every=every,
            scale_every=every,
            basis_every=every,
        )
        optimizer = recipe.bind(model)

        def step(model: nn.Module = model, optimizer: kfactk.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

        taken = [seconds(step, device) for _ in range((1 + periods) * every)][every:]
        median = statistics.median(taken)
        found[f"ordinary step {name}"] = 1000 * median
        found[f"worst step {name}"] = 1000 * max(taken)
        found[f"refresh {name}"] = 1000 * (sum(taken) - len(taken) * median) / periods
    matrices = [m for view in optimizer.layers.values() for m in view.block.matrices().values()]
    own = 1000 * median_seconds(lambda: [torch.linalg.eigh(m) for m in matrices], 1, device)
    hidden = (found["refresh without"] - found["refresh with"]) / own
    return {**found, "decompositions alone": own, "hidden": hidden}


def solvers(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Return the seconds of eigendecompositions, one by one and in one batch, by side."""
    found = {}
    for side, count in ({8: 2, 16: 2} if tiny else SIDES).items():
        rows = torch.randn(count, 2 * side, side, device=device)
        stacked = rows.mT @ rows / side
        matrices = list(stacked.unbind())

        def alone(matrices: Sequence[torch.Tensor] = matrices) -> None:
            for matrix in matrices:
                torch.linalg.eigh(matrix)

        def batched(stacked: torch.Tensor = stacked) -> None:
            torch.linalg.eigh(stacked)

        found[str(side)] = {
            "one by one": median_seconds(alone, 1, device) / count,
            "in a batch": median_seconds(batched, 1, device) / count,
        }
    return found


CHECKS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "waits": waits,
    "lag": lag,
    "solvers": solvers,
}
"""Checks by name. They fail where their results have `faults`."""


def about(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}


def table(found: Mapping[str, Any], *, tiny: bool = False) -> str:
    """Return the results as the tables of the documentation.

    Args:
        found: The results; without `parts`, the tables wait for them.
        tiny: Whether they are those of a rehearsal.
    """
    made, lines = found.get("parts", {}), ["| part | seconds | result |", "|---|---|---|"]
    for part in parts(Path(), "cuda", tiny=tiny):
        if "benchmarks.race" not in part.arguments:
            each = made.get(part.name)
            taken = "" if each is None else each["seconds"]
            lines.append(f"| {part.name} | {taken} | {LATER if each is None else words(each)} |")
    lines += ["", "| race | setting | mean | median | worst / median | steps |"]
    lines.append("|---|---|---|---|---|---|")
    for task, _, _, precision in races(tiny=tiny):
        name = f"{task}, {precision}"
        lines += race_rows(name, TASKS[task](64), made.get(name))
    return "\n".join(lines)


def race_rows(name: str, task: Task, part: Mapping[str, Any] | None) -> list[str]:
    """Return the rows of one race.

    Args:
        name: That of the race.
        task: What it trains.
        part: The race, as far as it came; `None` where it was not run.
    """
    races = (part or {}).get("results", {}).get("races", [])
    title, rows = name, []
    if races and races[0]["batch"] != races[0]["batch_asked"]:
        title += f" ({races[0]['batch']} examples; {races[0]['batch_asked']} need more memory)"
    ours = [setting for setting in CHOSEN if setting in task.recipes]
    for setting in (task.baseline, *ours, SOAP):
        each = races[0]["settings"].get(setting) if races else None
        if each is not None:
            numbers = f"{each['mean']:.2f} | {each['median']:.2f} | {each['worst']:.1f}"
            label = setting
            if setting == task.baseline:
                label += f", {races[0]['baseline_ms']:.1f} ms"
            rows.append(f"| {title} | {label} | {numbers} | {each['steps']} |")
        elif part is None:
            rows.append(f"| {title} | {setting} | {LATER} | | | |")
        elif not races:
            rows.append(f"| {title} | {setting} | {failed(part)} | | | |")
        else:
            begun = {*races[0]["left_out"], *races[0]["first"]}
            why = "no time" if setting in begun else "not installed"
            rows.append(f"| {title} | {setting} | {why} | | | |")
    return rows


def words(part: Mapping[str, Any]) -> str:
    """Return the result of a part that is no race, in words."""
    results = part.get("results")
    if results is None or (part["status"] != "0" and "faults" not in results):
        return failed(part) if part["status"] != "0" else " ".join(part["told"])
    if "runs" in results:
        settings = results["runs"][0]["settings"].items()
        return ", ".join(f"{n} {v['above'] / 2**20:.1f} MiB" for n, v in settings)
    if faults := results.get("faults"):
        return "; ".join(
            ["failed", *faults[:1], *([f"and {len(faults) - 1} more"] * (len(faults) > 1))]
        )
    cells = {name: each for name, each in results.items() if name not in ("all", "faults")}
    return ", ".join(f"{name}: {numbers(each)}" for name, each in cells.items())


def failed(part: Mapping[str, Any]) -> str:
    """Return how a part failed."""
    return {"late": "late", "no time": "no time"}.get(part["status"], f"failed ({part['status']})")


def numbers(value: Any) -> str:
    """Return numbers with three digits.

    Example:
        >>> numbers({"one by one": 0.012345, "in a batch": 3})
        'one by one 0.0123, in a batch 3'
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {numbers(each)}" for name, each in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(given: Sequence[str] | None = None) -> int:
    """Run all parts, or one check, and write the results."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(prog="gpu", description="All checks that need a GPU.")
    parser.add_argument("check", nargs="?", choices=tuple(CHECKS), help="one check alone")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--tiny", action="store_true", help="sizes as small as can be")
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks-output/gpu")
    arguments = parser.parse_args(given)
    folder = Path(os.path.abspath(arguments.output or "benchmarks-output/gpu"))
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device; rehearse with --device cpu --tiny", file=sys.stderr)
        return 2
    if arguments.check:
        found = CHECKS[arguments.check](device, tiny=arguments.tiny)
        (folder / f"{arguments.check}.json").write_text(json.dumps(found, indent=1))
        print(json.dumps(found))
        return int(bool(found.get("faults")))
    results: dict[str, Any] = {"about": about(device), "parts": {}}
    patience = PATIENCE if arguments.tiny else 1
    for part in parts(folder, arguments.device, tiny=arguments.tiny):
        left = TOTAL * patience - (time.perf_counter() - start)
        if left < LEAST:
            done: dict[str, Any] = {"status": "no time", "seconds": 0.0}
        else:
            done = run(attrs.evolve(part, limit=min(part.limit * patience, left)))
        results["parts"][part.name] = done
        print(f"{part.name}: {done['status']}, {done['seconds']} s", flush=True)
        (folder / "gpu.json").write_text(json.dumps(results, indent=1))
    print(f"\n{table(results, tiny=arguments.tiny)}\n\n{folder / 'gpu.json'}")
    return int(any(part["status"] != "0" for part in results["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
