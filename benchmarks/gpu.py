"""All checks that need a GPU, in one command of a few minutes; it writes one JSON file.

    python -m benchmarks.gpu --output FOLDER
    python -m benchmarks.gpu --device cpu --tiny       a rehearsal without a GPU

The parts: the tests that skip elsewhere; whether ordinary steps wait for the device; decompositions
one by one and in a batch; both races in float32 and bfloat16; memory. Each part runs in a process
of its own, with a limit of its own. A part that fails or is late is noted, and the others run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

import kfactk
from benchmarks.floor import median_seconds
from benchmarks.tasks import TASKS

ROOT = Path(__file__).parent.parent
TESTS = (
    "tests/training_loops/test_amp.py",
    "tests/kfactk/optim/test_nonfinite.py",
    "tests/kfactk/optim/test_nonfinite_waiting.py",
    "tests/kfactk/costmodel/test_hardware.py",
    "tests/kfactk/test_timing.py",
)
"""Files with tests that skip without a GPU."""
SIDES = (256, 1024, 4096)
ALONE, TOGETHER = 8, 8
"""How many matrices are decomposed one by one, and in one batch."""
RACES = (("gpt2", 768, 16), ("resnet50", 32, 128))
"""Task, width or size, and batch."""
CHOSEN = ("ekfac, staggered", "kfac, staggered", "ekfac, running")
SMALL = (("gpt", 8, 2), ("resnet8", 2, 2))


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


def parts(folder: Path, device: str, *, tiny: bool) -> list[Part]:
    """Return all parts.

    Args:
        folder: Where they write.
        device: Where they run.
        tiny: Whether sizes are as small as can be.
    """
    here = ["--device", device, "--output", str(folder), *(["--tiny"] if tiny else [])]
    files = TESTS[-1:] if tiny else TESTS
    found = [
        Part("tests", ["pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *files], 90),
        *(
            Part(name, ["benchmarks.gpu", name, *here], 40, folder / f"{name}.json")
            for name in CHECKS
        ),
    ]
    for task, width, batch in SMALL if tiny else RACES:
        for precision in ("float32", "bfloat16"):
            name = f"{task}, {precision}"
            into = folder / name.replace(", ", "-")
            arguments = ["benchmarks.race", "--network", task, "--widths", str(width)]
            arguments += ["--batches", str(batch), "--steps", "2" if tiny else "100"]
            arguments += ["--device", device, "--autocast", precision, "--no-stages"]
            arguments += ["--settings", *CHOSEN, "--output", str(into)]
            found.append(Part(name, arguments, 60, into / "race.json"))
    arguments = ["benchmarks.memory", "--widths", "2" if tiny else "64", "--device", device]
    arguments += ["--batch", "2" if tiny else "64", "--only", "ekfac, staggered"]
    arguments += ["--output", str(folder)]
    return [*found, Part("memory", arguments, 60, folder / "memory.json")]


def run(part: Part) -> dict[str, Any]:
    """Run a part, and return its status, seconds and results."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", *part.arguments],
            cwd=ROOT,
            timeout=part.limit,
            capture_output=True,
            text=True,
            check=False,
        )
        status, told = str(done.returncode), done.stdout[-2000:] + done.stderr[-2000:]
    except subprocess.TimeoutExpired as error:
        status, told = "late", str(error.output or "")[-2000:]
    found: dict[str, Any] = {"status": status, "seconds": round(time.perf_counter() - start, 1)}
    if status != "0":
        found["told"] = told
    elif part.result is not None:
        found["results"] = json.loads(part.result.read_text())
    else:
        found["told"] = told.strip().splitlines()[-1:]
    return found


def waits(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Count how often steps wait for the device, by what is due in them."""
    task = TASKS["gpt"](8 if tiny else 512)
    inputs, labels = task.batch(2 if tiny else 16, device)
    model = task.network().to(device)
    recipe = kfactk.build(**{**task.common, "factor_every": 4, "scale_every": 4, "basis_every": 8})
    optimizer, counts = recipe.bind(model), []
    for _ in range(16):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            optimizer.zero_grad()
            task.loss(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(each.message) for each in caught))
    due = {"ordinary": 1, "factors and scale": 4, "basis too": 8}
    return {name: counts[step] for name, step in due.items()} | {"all": counts}


def solvers(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Return the seconds of eigendecompositions, one by one and in one batch, by side."""
    found = {}
    for side in (8, 16) if tiny else SIDES:
        rows = torch.randn(TOGETHER, 2 * side, side, device=device)
        stacked = rows.mT @ rows / side
        matrices = list(stacked.unbind())

        def alone(matrices: Sequence[torch.Tensor] = matrices) -> None:
            for matrix in matrices[:ALONE]:
                torch.linalg.eigh(matrix)

        def batched(stacked: torch.Tensor = stacked) -> None:
            torch.linalg.eigh(stacked)

        found[str(side)] = {
            "one by one": median_seconds(alone, 1, device) / ALONE,
            "in a batch": median_seconds(batched, 1, device) / TOGETHER,
        }
    return found


CHECKS: Mapping[str, Callable[..., dict[str, Any]]] = {"waits": waits, "solvers": solvers}


def about(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}


def table(found: Mapping[str, Any]) -> str:
    """Return the results as the table of the documentation."""
    lines = ["| part | status | seconds | result |", "|---|---|---|---|"]
    for name, part in found["parts"].items():
        lines.append(f"| {name} | {part['status']} | {part['seconds']} | {_words(part)} |")
    return "\n".join(lines)


def _words(part: Mapping[str, Any]) -> str:
    results = part.get("results")
    if results is None:
        return " ".join(part.get("told") or [])[:80] if part["status"] == "0" else "failed"
    if "races" in results:
        [race] = results["races"]
        each = race["settings"].items()
        cells = [f"{n} {v['mean']:.2f} (worst {v['worst']:.1f})" for n, v in each]
        return f"{race['baseline_ms']:.1f} ms; " + ", ".join(cells)
    if "runs" in results:
        settings = results["runs"][0]["settings"].items()
        return ", ".join(f"{n} {v['above'] / 2**20:.0f} MiB" for n, v in settings)
    return ", ".join(f"{n} {v}" for n, v in results.items() if n != "all")


def main(given: Sequence[str] | None = None) -> int:
    """Run all parts, or one check, and write the results."""
    parser = argparse.ArgumentParser(prog="gpu", description="All checks that need a GPU.")
    parser.add_argument("check", nargs="?", choices=tuple(CHECKS), help="one check alone")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--tiny", action="store_true", help="sizes as small as can be")
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks-output/gpu")
    arguments = parser.parse_args(given)
    folder = Path(os.path.abspath(arguments.output or "benchmarks-output/gpu"))
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    if arguments.check:
        found = CHECKS[arguments.check](device, tiny=arguments.tiny)
        (folder / f"{arguments.check}.json").write_text(json.dumps(found, indent=1))
        print(json.dumps(found))
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device; rehearse with --device cpu --tiny", file=sys.stderr)
        return 2
    results: dict[str, Any] = {"about": about(device), "parts": {}}
    for part in parts(folder, arguments.device, tiny=arguments.tiny):
        results["parts"][part.name] = run(part)
        print(f"{part.name}: {results['parts'][part.name]['status']}", flush=True)
        (folder / "gpu.json").write_text(json.dumps(results, indent=1))
    print(f"\n{table(results)}\n\n{folder / 'gpu.json'}")
    return int(any(part["status"] != "0" for part in results["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
