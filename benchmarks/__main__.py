"""`python -m benchmarks`: all benchmarks in turn, or one of them with its own arguments.

Each part is a module and runs in a process of its own, so that none meets another's memory or threads. What it prints is kept in the
output folder, too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path("benchmarks-output")
PARTS: dict[str, tuple[str, bool]] = {
    "race": ("step times beside other optimisers', with the arithmetic floor and the stages", True),
    "kernels": ("kernels of convolutions against their plain forms", False),
    "memory": ("peak memory beside the least it can be", True),
    "scaling": ("stages over width, depth, batch and resolution", True),
    "plot": ("plots of the others' figures", True),
}
"""What each is, and whether it takes a folder for its figures; in the order in which they run."""


def command(part: str, arguments: Sequence[str], output: Path) -> list[str]:
    """How a part is run.

    Example:
        >>> command("race", ["--widths", "16"], Path("out"))[1:]
        ['-m', 'benchmarks.race', '--widths', '16', '--output', 'out']
    """
    given = ["--output", str(output)] if PARTS[part][1] else []
    return [sys.executable, "-m", f"benchmarks.{part}", *arguments, *given]


def run(part: str, arguments: Sequence[str], output: Path) -> int:
    """Run a part, and keep what it prints in `PART.txt`; returns its exit status."""
    output.mkdir(parents=True, exist_ok=True)
    print(f"== {part}: {PARTS[part][0]}", flush=True)
    with (
        (output / f"{part}.txt").open("w", buffering=1) as kept,
        subprocess.Popen(
            command(part, arguments, output), stdout=subprocess.PIPE, text=True, bufsize=1
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            kept.write(line)
    return process.returncode


def main(given: Sequence[str] | None = None) -> int:
    """Run what is asked for; returns the first exit status that is not 0."""
    lines = "\n".join(f"  {part:10}{what}" for part, (what, _) in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="benchmarks",
        description="Benchmarks of kfactk.",
        epilog=f"parts, all of them unless one is named:\n{lines}\nPART --help tells the arguments of one",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=FOLDER,
        help=f"folder for tables, figures and plots ({FOLDER})",
    )
    parser.add_argument("part", nargs="?", choices=tuple(PARTS), help="the one part to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what that part is given")
    asked = parser.parse_args(given)
    behind = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False
    )  # the folder may be named behind the part as well
    behind.add_argument("--output", type=Path, default=asked.output)
    folder, arguments = behind.parse_known_args(asked.arguments)
    statuses = [
        run(part, arguments, folder.output) for part in ([asked.part] if asked.part else PARTS)
    ]
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
