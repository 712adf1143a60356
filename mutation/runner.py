"""Run tests on mutants, each in a copy of the checkout, several at the same time."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import attrs

from mutation.mutants import ROOT, Mutant
from mutation.witness import ELSEWHERE, FOLDER, INVALID, MODULE, REPORT

COPIED = (
    "kfactk",
    "plugins",
    "tests",
    "mutation",
    "benchmarks",
    "experiments",
    "docs",
    "pyproject.toml",
    "noxfile.py",
    "README.md",
    "CHANGELOG.md",
)
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.egg-info", ".hypothesis", "build", "dist")
TIMEOUT = 900.0
"""Seconds after which a run of the tests is stopped."""


@attrs.frozen
class Verdict:
    """The result of the tests on a mutant.

    Args:
        mutant: The mutant.
        outcome: "killed" (a test failed), "survived", "invalid" (it cannot be imported),
            "timed out", or "broken" (the run itself failed).
        by: The test that failed first; for other outcomes, the output.
        seconds: The duration.
    """

    mutant: Mutant
    outcome: str
    by: str
    seconds: float

    @property
    def noticed(self) -> bool:
        """Whether the tests noticed it; a timeout counts only where the mutant is known to hang."""
        return self.outcome == "killed" or (self.outcome == "timed out" and self.mutant.hangs)


class Bench:
    """A copy of what the tests need, in a temporary folder, for one mutant at a time.

    Args:
        root: The checkout.
        timeout: Seconds after which a run of the tests is stopped.
    """

    def __init__(self, root: Path = ROOT, timeout: float = TIMEOUT) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name).resolve() / "checkout"
        self.folder.mkdir()
        self._timeout, self._closed = timeout, False
        self._process: subprocess.Popen[str] | None = None
        for part in COPIED:
            if (root / part).is_dir():
                shutil.copytree(root / part, self.folder / part, ignore=NOT_COPIED)
            elif (root / part).exists():
                shutil.copy(root / part, self.folder / part)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *raised: object) -> None:
        self._temporary.cleanup()

    def stop(self) -> None:
        """End the current run, and start no other."""
        self._closed = True
        self._end(self._process)

    def judge(self, mutant: Mutant) -> Verdict:
        """Run the tests on a mutant, path by path until one fails; then restore the copy."""
        file, start = self.folder / mutant.path, time.monotonic()
        original = file.read_text()
        file.write_text(mutant.source)
        try:
            for i, path in enumerate(mutant.tests):
                outcome, by = self.run(
                    [path], mutant.module, [f"--ignore={seen}" for seen in mutant.tests[:i]]
                )
                if outcome != "survived":
                    break
        finally:
            file.write_text(original)
        return Verdict(mutant, outcome, by, time.monotonic() - start)

    def run(
        self, tests: Sequence[str], module: str, options: Sequence[str] = ()
    ) -> tuple[str, str]:
        """Run tests until the first one fails.

        Args:
            tests: Their paths.
            module: The module with the mistake.
            options: Further arguments for pytest.

        Returns:
            The outcome, and the test that failed or the output.
        """
        report = self.folder.parent / "report.json"
        report.unlink(missing_ok=True)
        inherited = {  # without the coverage of this process
            name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")
        }
        environment = {
            **inherited,
            FOLDER: str(self.folder),
            MODULE: module,
            REPORT: str(report),
            "PYTHONPATH": os.pathsep.join([str(self.folder), str(self.folder / "plugins")]),
            # Python identifies compiled files by size and second, which is too coarse for mutants.
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "KFACTK_LAWS": "quick",
        }
        pytest = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "mutation.witness",
        ]
        code, output = self._execute([*pytest, *options, *tests], environment)
        if code is None:
            return "timed out", f"after {self._timeout:g} s"
        if code == 0:
            return "survived", ""
        if code == INVALID:
            return "invalid", output.strip().splitlines()[-1]
        if report.exists() and code != ELSEWHERE:
            return "killed", str(json.loads(report.read_text()))
        return "broken", output[-2000:]

    def _execute(
        self, command: Sequence[str], environment: dict[str, str]
    ) -> tuple[int | None, str]:
        """Run a command; return its exit code, or `None` after a timeout, and its output.

        Processes that it started end with it.
        """
        if self._closed:
            return -signal.SIGINT, "interrupted"
        pipe, both = subprocess.PIPE, subprocess.STDOUT
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=pipe,
            stderr=both,
            text=True,
            start_new_session=True,
        )
        self._process = process
        try:
            output, _ = process.communicate(timeout=self._timeout)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            self._end(process)
            process.wait()

    def _end(self, process: subprocess.Popen[str] | None) -> None:
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def run(mutants: Sequence[Mutant], jobs: int, root: Path = ROOT) -> Iterator[Verdict]:
    """Yield verdicts as they come."""
    free: queue.Queue[Bench] = queue.Queue()

    def judge(mutant: Mutant) -> Verdict:
        bench = free.get()
        try:
            return bench.judge(mutant)
        finally:
            free.put(bench)

    with contextlib.ExitStack() as stack:
        benches = [stack.enter_context(Bench(root)) for _ in range(min(jobs, len(mutants)))]
        for bench in benches:
            free.put(bench)
        pool = stack.enter_context(ThreadPoolExecutor(jobs))
        for bench in benches:
            stack.callback(bench.stop)  # before the pool waits for its threads
        waiting = [pool.submit(judge, mutant) for mutant in mutants]
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for done in as_completed(waiting):
            yield done.result()
