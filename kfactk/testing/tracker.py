"""Laws of trackers: they record metrics, and neither a tracker nor its failure changes training."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import kfactk
from kfactk.errors import KfactkWarning
from kfactk.registry.registry import registry
from kfactk.stages import Tracker
from kfactk.testing._support.laws import Laws, law

NAMES = ("loss", "clip_factor", "seconds/basis", "layer.0/condition", "condition_max")
METHODS = ("start", "record", "close")
"""Methods that the framework calls and that may fail."""
CHILD = """
import json, os, sys
from kfactk.registry.registry import registry
tracker = registry().resolve("tracker", json.loads(sys.argv[1]))
tracker.start({})
for step in range(3):
    tracker.record(step, {"loss": step / 4})
tracker.flush()
tracker.record(3, {"loss": 1.0})
os._exit(9)
"""
"""The program of a process that dies with unwritten records."""


@attrs.frozen
class Recorded:
    """What a tracker has recorded, as its test reads it.

    Args:
        rows: For each recorded step, in order, its number and the metrics by name.
        recipe: The recipe: nested mappings, or one mapping with dotted names; `None` where it
            cannot be read.
    """

    rows: Sequence[tuple[int, Mapping[str, float]]]
    recipe: Mapping[str, Any] | None = None


@attrs.frozen
class Metric:
    """A drawn metric: a number of Python, or a 0-dimensional tensor.

    Args:
        value: The number.
        dtype: Of the tensor; `None` for a number of Python.
    """

    value: float
    dtype: torch.dtype | None

    def given(self) -> Tensor | float:
        """Return what the tracker gets."""
        return self.value if self.dtype is None else torch.tensor(self.value, dtype=self.dtype)

    def number(self) -> float:
        """Return what the tracker must record."""
        return float(self.given())


def metrics(*, finite: bool) -> st.SearchStrategy[dict[str, Metric]]:
    """Return a strategy for the metrics of one step, by name."""
    values = st.floats(-(2.0**100), 2.0**100, width=32) | st.integers(-1000, 1000)
    kinds = st.sampled_from([None, torch.float32, torch.float64, torch.bfloat16])
    counts = st.builds(Metric, st.integers(0, 2**40), st.just(torch.int64))
    drawn = st.builds(Metric, values, kinds) | counts
    nonfinite = st.builds(Metric, st.sampled_from([math.nan, math.inf, -math.inf]), kinds)
    each = drawn if finite else drawn | nonfinite
    return st.dictionaries(st.sampled_from(NAMES), each, min_size=1)


def recipes() -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for recipes as trackers get them: text-safe nested mappings."""
    names = st.sampled_from(["lr", "basis", "name", "damping", "betas"])
    leaves = (
        st.none()
        | st.booleans()
        | st.integers(-5, 5)
        | st.floats(0, 1)
        | st.text("abc_ -", min_size=1, max_size=5).map(str.strip)
    )
    values = st.recursive(
        leaves.filter(lambda value: value != ""),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    )
    return st.dictionaries(names, values, max_size=4)


class TrackerLaws(Laws):
    """Laws of every tracker. A class says where its stage writes, and how to read that.

    Example:
        >>> class Lines:
        ...     every = 1
        ...     def __init__(self, path): self.path, self.lines = path, []
        ...     def start(self, recipe): self.path.write_text("")
        ...     def record(self, step, metrics):
        ...         self.lines.append(f"{step} {float(metrics['loss'])!r}\\n")
        ...     def flush(self):
        ...         with self.path.open("a") as file: file.writelines(self.lines)
        ...         self.lines = []
        ...     def close(self): self.flush()
        >>> class TestLines(TrackerLaws):
        ...     stage = Lines
        ...     def stage_in(self, folder):
        ...         return Lines(folder / "lines")
        ...     def read(self, folder):
        ...         rows = [line.split() for line in (folder / "lines").read_text().splitlines()]
        ...         return Recorded([(int(step), {"loss": float(loss)}) for step, loss in rows])
        >>> TestLines().test_is_told_of_a_run()
    """

    family = "tracker"
    precision: ClassVar[float] = 0.0
    """Relative error of recorded metrics; 0 for none."""
    keeps_nonfinite: ClassVar[bool] = False
    """Claim: NaN and infinities are recorded."""
    survives_exit: ClassVar[bool] = False
    """Claim: flushed metrics stay when the process dies. The law starts a process, so the stage
    needs an import path."""

    def stage_in(self, folder: Path) -> Any:
        """Return the stage, as for kfactk.build, which writes to this new and empty folder."""
        return self.stage

    def read(self, folder: Path) -> Recorded | None:
        """Return what the stage of `stage_in(folder)` has recorded.

        `None` means that it cannot be read: laws that need it are skipped.
        """
        return None

    def finite_rows(self) -> st.SearchStrategy[list[tuple[int, dict[str, Metric]]]]:
        """Return a strategy for steps in rising order, with their metrics."""
        steps = st.lists(st.integers(0, 1000), min_size=1, max_size=5, unique=True).map(sorted)
        finite = not self.keeps_nonfinite
        return steps.flatmap(
            lambda found: st.tuples(
                *(st.tuples(st.just(step), metrics(finite=finite)) for step in found)
            ).map(list)
        )

    @law(examples=8, rows="finite_rows")
    def test_records_what_happened(self, rows: list[tuple[int, dict[str, Metric]]]) -> None:
        """Steps, names and values are recorded once, in order; closing twice changes nothing."""
        with _folder() as folder:
            tracker = self._started(folder)
            for step, expected in rows:
                given = {name: metric.given() for name, metric in expected.items()}
                tracker.record(step, given)
                for value in given.values():
                    if isinstance(value, Tensor):
                        value.zero_()  # the framework uses its tensors again
            tracker.close()
            tracker.close()
            self._is_recorded(folder, rows, "after close()")

    @law(examples=4, rows="finite_rows", more="finite_rows")
    def test_flush_shows_what_is_held(
        self, rows: list[tuple[int, dict[str, Metric]]], more: list[tuple[int, dict[str, Metric]]]
    ) -> None:
        """After `flush` all records can be read; flushing again adds nothing."""
        later = [(rows[-1][0] + 1 + step, expected) for step, expected in more]
        with _folder() as folder:
            tracker = self._started(folder)
            for known, new in ((rows, rows), (rows + later, later)):
                for step, expected in new:
                    tracker.record(
                        step, {name: metric.given() for name, metric in expected.items()}
                    )
                tracker.flush()
                tracker.flush()
                self._is_recorded(folder, known, "after flush(), before close()")
            tracker.close()

    @law(examples=6, recipe=recipes())
    def test_recipe_is_recorded_at_the_start(self, recipe: dict[str, Any]) -> None:
        """After the start and a flush, each entry of the recipe can be read under its name."""
        with _folder() as folder:
            tracker = self._started(folder, recipe)
            tracker.flush()
            found = self._read(folder).recipe
            tracker.close()
        if found is None:
            pytest.skip(f"{type(self).__name__}.read gives no recipe")
        assert _flat(found) == _flat(recipe), f"the recipe {recipe} reads back as {dict(found)}"

    @law(examples=1)
    def test_every_is_a_whole_number(self) -> None:
        """`every` is a whole number of at least 1."""
        with _folder() as folder:
            every = self._made(folder).every
        whole = isinstance(every, int) and not isinstance(every, bool)
        assert whole, f"every={every!r} is not a whole number of at least 1"
        assert every >= 1, f"every={every!r} is not a whole number of at least 1"

    @law(examples=2, seed=st.integers(0, 2**16))
    def test_is_told_of_a_run(self, seed: int) -> None:
        """In a run of `kfactk.build(tracker=...)` it records one step in `every`, with its loss."""
        with _folder() as folder:
            every = self._made(folder).every
        with _folder() as folder:
            losses, _ = _train(self.stage_in(folder), seed, 2 * every + 1)
            rows = self._read(folder).rows
        steps = [step for step, _ in rows]
        assert steps == [0, every, 2 * every], (
            f"with every={every}, steps {steps} of {2 * every + 1} are recorded"
        )
        for step, found in rows:
            assert self._near(found.get("loss", math.nan), losses[step]), (
                f"the loss of step {step} was {losses[step]}; the record is {found}"
            )

    @law(examples=1, seed=st.integers(0, 2**16))
    def test_does_not_change_training(self, seed: int) -> None:
        """With the tracker, parameters and global random state are, bit for bit, those without."""
        with _folder() as folder:
            tracked = _train(self.stage_in(folder), seed, 4)
        plain = _train(None, seed, 4)
        assert tracked[1] == plain[1], (
            "training with the tracker gives other parameters, or draws random numbers: "
            f"{tracked[1]}, {plain[1]}"
        )

    @law(
        examples=3,
        seed=st.integers(0, 2**16),
        fails=st.lists(st.sampled_from(METHODS), min_size=1, unique=True),
    )
    def test_a_failing_sink_costs_no_training(self, seed: int, fails: list[str]) -> None:
        """Where start, record or close raise, training does not change; one KfactkWarning tells."""
        with _folder() as folder, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            failing = Failing(self._made(folder), tuple(fails))
            found = _train(failing, seed, failing.every + 1)
        said = [
            str(warning.message)
            for warning in caught
            if issubclass(warning.category, KfactkWarning)
        ]
        ours = [text for text in said if Failing.WHY in text]
        assert len(ours) == 1, (
            f"{len(ours)} warnings in place of one tell of a tracker whose {', '.join(fails)} "
            f"fail: {said}"
        )
        plain = _train(None, seed, failing.every + 1)
        assert found == plain, (
            f"a tracker whose {', '.join(fails)} fail changes the training: {found}, {plain}"
        )

    @law(examples=1)
    def test_flushed_records_survive_the_process(self) -> None:
        """If claimed: flushed records can be read after the process has died."""
        if not self.survives_exit:
            pytest.skip(f"{type(self).__name__} does not claim `survives_exit`")
        with _folder() as folder:
            spec = registry().describe("tracker", self._made(folder))
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            child = subprocess.run(
                [sys.executable, "-c", CHILD, json.dumps(spec)],
                env=environment,
                capture_output=True,
                text=True,
            )
            assert child.returncode == 9, (
                f"the process had to die with 9, but ended with {child.returncode}: {child.stderr}"
            )
            rows = [(step, dict(found)) for step, found in self._read(folder).rows]
        wanted = [(step, {"loss": step / 4}) for step in range(3)]
        assert rows[:3] == wanted, f"the process flushed {wanted} and died; the records are {rows}"

    def _made(self, folder: Path) -> Tracker:
        tracker: Tracker = registry().resolve("tracker", self.stage_in(folder))
        return tracker

    def _started(self, folder: Path, recipe: Mapping[str, Any] | None = None) -> Tracker:
        tracker = self._made(folder)
        tracker.start(recipe or {})
        return tracker

    def _read(self, folder: Path) -> Recorded:
        found = self.read(folder)
        if found is None:
            pytest.skip(f"{type(self).__name__} has no `read`, which returns what was recorded")
        return found

    def _near(self, found: float, expected: float) -> bool:
        same = found == expected or (math.isnan(found) and math.isnan(expected))
        return same or abs(found - expected) <= self.precision * abs(expected)

    def _is_recorded(
        self, folder: Path, rows: Sequence[tuple[int, Mapping[str, Metric]]], when: str
    ) -> None:
        found = self._read(folder).rows
        steps, wanted = [step for step, _ in found], [step for step, _ in rows]
        assert steps == wanted, f"{when}, steps {steps} are recorded, not {wanted}"
        for (step, expected), (_, row) in zip(rows, found, strict=True):
            assert set(row) == set(expected), (
                f"{when}, step {step} has the metrics {sorted(row)}, not {sorted(expected)}"
            )
            for name, metric in expected.items():
                says = f"{when}, {name!r} of step {step} is {row[name]!r}, not {metric.number()!r}"
                assert self._near(float(row[name]), metric.number()), says


@attrs.frozen
class Failing:
    """A tracker that fails in some methods.

    Args:
        original: The tracker.
        fails: Names of the methods that raise.
    """

    original: Any
    fails: tuple[str, ...]

    WHY: ClassVar[str] = "the sink is broken"

    @property
    def every(self) -> int:
        """That of the original."""
        return int(self.original.every)

    def start(self, recipe: Mapping[str, Any]) -> None:
        """Start, or fail."""
        self._may_fail("start")
        self.original.start(recipe)

    def record(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Record, or fail; do nothing where the start failed."""
        self._may_fail("record")
        if "start" not in self.fails:
            self.original.record(step, metrics)

    def flush(self) -> None:
        """Flush."""
        self.original.flush()

    def close(self) -> None:
        """Close, and then fail if `close` is among the methods that fail."""
        if "start" not in self.fails:
            self.original.close()
        self._may_fail("close")

    def _may_fail(self, what: str) -> None:
        if what in self.fails:
            raise OSError(self.WHY)


def _train(
    tracker: Any, seed: int, steps: int
) -> tuple[list[float], tuple[list[list[float]], int]]:
    """Run a small training; return losses, and parameters with the next global random number."""
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        optimizer = kfactk.build(
            tracker=tracker, factor_every=2, scale_every=2, basis_every=2
        ).bind(model)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            x = torch.randn(4, 2, dtype=torch.float64)
            loss = nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.record(loss=loss)
            optimizer.step()
            losses.append(loss.item())
        optimizer.close()
        drawn = int(torch.randint(2**31, ()))
    finally:
        torch.set_rng_state(before)
    return losses, ([parameter.flatten().tolist() for parameter in model.parameters()], drawn)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        yield Path(name)


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Return the leaves of nested mappings and sequences as text, under dotted names."""
    if isinstance(value, Mapping) and value:
        items: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list | tuple) and value:
        items = list(enumerate(value))
    else:
        return {prefix: str(value)} if prefix else {}
    found: dict[str, str] = {}
    for name, inner in items:
        found.update(_flat(inner, f"{prefix}.{name}" if prefix else str(name)))
    return found
