"""torchrun without its imports: its processes are forked from one that has imported torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import attrs
from torch.distributed import run

from kfactk.testing._support.ranks import process_context

PATIENCE = 300.0
"""Seconds that a call may take."""


@attrs.frozen
class Done:
    """What a call left behind."""

    returncode: int
    stdout: str
    stderr: str


def torchrun(
    script: Path,
    *arguments: object,
    folder: Path,
    processes: int = 2,
    restarts: int = 0,
    variables: Mapping[str, str] | None = None,
) -> Done:
    """Run a script as `torchrun --standalone` does.

    Args:
        script: Its path.
        *arguments: Of the script.
        folder: The working directory.
        processes: How many run the script.
        restarts: How often torchrun starts them again after a failure.
        variables: Environment variables besides those of this process.
    """
    options = [
        *("--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)),
        *("--start-method", "fork", "--run-path", str(script), *map(str, arguments)),
    ]
    with tempfile.TemporaryDirectory() as written:
        outputs = Path(written) / "stdout", Path(written) / "stderr"
        environment = {**os.environ, **(variables or {})}
        process = process_context().Process(
            target=_agent, args=(options, str(folder), *map(str, outputs), environment)
        )
        process.start()
        process.join(PATIENCE)
        ended = process.exitcode is not None
        process.kill()
        process.join()
        stdout, stderr = (output.read_text() for output in outputs)
    assert ended, f"torchrun does not end; it said\n{stderr}"
    return Done(int(process.exitcode or 0), stdout, stderr)


def _agent(
    options: list[str], folder: str, stdout: str, stderr: str, environment: dict[str, str]
) -> None:
    """Run torchrun in a process of its own, the parent of those that run the script."""
    for output, number in ((stdout, 1), (stderr, 2)):
        descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    run.main(options)
