"""`python -m benchmarks`: all benchmarks one after the other, or one with its own arguments.

Each part is a module and runs in its own process, so that parts share neither memory nor threads.
What it prints is also written to the output folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path("benchmarks-output")
PARTS: dict[str, tuple[str, bool]] = {
    "race": ("step times of all optimizers, with the arithmetic floor and the stages", True),
    "kernels": ("kernels of convolutions against their plain forms", False),
    "memory": ("peak memory against the least possible", True),
    "scaling": ("stages over width, depth, batch and resolution", True),
    "plot": ("plots of the results of the others", True),
}
"""What each measures, and whether it takes a folder for its results; in the order of the runs."""


def command(part: str, arguments: Sequence[str], output: Path) -> list[str]:
    """Return the command that runs a part.

    Example:
        >>> command("race", ["--widths", "16"], Path("out"))[1:]
        ['-m', 'benchmarks.race', '--widths', '16', '--output', 'out']
    """
    given = ["--output", str(output)] if PARTS[part][1] else []
    return [sys.executable, "-m", f"benchmarks.{part}", *arguments, *given]


def run(part: str, arguments: Sequence[str], output: Path) -> int:
    """Run a part, write what it prints to `PART.txt`, and return its exit status."""
    output.mkdir(parents=True, exist_ok=True)
    print(f"== {part}: {PARTS[part][0]}", flush=True)
    with (
        (output / f"{part}.txt").open("w", buffering=1) as log,
        subprocess.Popen(
            command(part, arguments, output), stdout=subprocess.PIPE, text=True, bufsize=1
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
    return process.returncode


def main(given: Sequence[str] | None = None) -> int:
    """Run the parts asked for, and return the first exit status that is not 0."""
    lines = "\n".join(f"  {part:10}{what}" for part, (what, _) in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="benchmarks",
        description="Benchmarks of kfactk.",
        epilog=f"parts, of which all run by default:\n{lines}\n"
        "PART --help shows the arguments of one",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=FOLDER,
        help=f"folder for tables, results and plots; default: {FOLDER}",
    )
    parser.add_argument("part", nargs="?", choices=tuple(PARTS), help="the part to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of that part")
    asked = parser.parse_args(given)
    # The folder may also follow the part.
    rest = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    rest.add_argument("--output", type=Path, default=asked.output)
    folder, arguments = rest.parse_known_args(asked.arguments)
    parts = [asked.part] if asked.part else PARTS
    statuses = [run(part, arguments, folder.output) for part in parts]
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
