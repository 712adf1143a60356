"""Laws of trackers, put to trackers that break them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import kfactk.optim.metrics
from kfactk.testing import Recorded, TrackerLaws
from kfactk.testing._support.laws import VARIABLE
from tests.kfactk.testing.broken import caught


class Lines:
    """A good tracker, one JSON line a step; the broken ones change a part of it."""

    every: Any = 2

    def __init__(self, path: str) -> None:
        self.path, self.held = path, []

    def start(self, recipe: Mapping[str, Any]) -> None:
        Path(self.path).write_text(json.dumps(self.written(recipe)) + "\n")

    def written(self, recipe: Mapping[str, Any]) -> Any:
        return recipe

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.held.append(
            json.dumps([step, {name: self.number(value) for name, value in metrics.items()}])
        )

    def number(self, value: Any) -> float:
        return float(value)

    def flush(self) -> None:
        with Path(self.path).open("a") as file:
            file.writelines(f"{line}\n" for line in self.held)
        self.held = []

    def close(self) -> None:
        self.flush()


class LinesLaws(TrackerLaws):
    """The laws with the way to read them."""

    keeps_nonfinite = True

    def stage_in(self, folder: Path) -> Any:
        return self.stage(str(folder / "lines"))

    def read(self, folder: Path) -> Recorded:
        recipe, *rows = (folder / "lines").read_text().splitlines()
        return Recorded(
            [(step, found) for step, found in map(json.loads, rows)], json.loads(recipe)
        )


class HoldsTensors(Lines):
    """Turns tensors into numbers only when it writes."""

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.held.append((step, dict(metrics)))

    def flush(self) -> None:
        rows, self.held = self.held, []
        self.held = [
            json.dumps([step, {name: float(value) for name, value in metrics.items()}])
            for step, metrics in rows
        ]
        super().flush()


class Rounds(Lines):
    def number(self, value: Any) -> float:
        return round(float(value), 4)


class LosesNan(Lines):
    def number(self, value: Any) -> float:
        return float(value) if torch.isfinite(torch.tensor(float(value))) else 0.0


class CountsSteps(Lines):
    count = -1

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.count += 1
        super().record(self.count, metrics)


class LosesNames(Lines):
    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        super().record(step, {name: value for name, value in metrics.items() if "/" not in name})


class Backwards(Lines):
    def flush(self) -> None:
        self.held.reverse()
        super().flush()


class Repeats(Lines):
    def flush(self) -> None:
        held = list(self.held)
        super().flush()
        self.held = held


class ClosesOnce(Lines):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise ValueError("closed already")
        self.closed = True
        super().close()


class FlushesAtTheEnd(Lines):
    def flush(self) -> None:
        pass

    def close(self) -> None:
        super().flush()


class LosesTheEnd(Lines):
    def close(self) -> None:
        pass


class ForgetsOptions(Lines):
    def written(self, recipe: Mapping[str, Any]) -> Any:
        return {name: "..." if isinstance(value, dict) else value for name, value in recipe.items()}


class Never(Lines):
    every = 0


class Halfway(Lines):
    every = 2.5


class LosesLosses(Lines):
    """Overwrites the loss with the last one it saw."""

    loss = 0.0

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        super().record(step, {**metrics, "loss": self.loss} if "loss" in metrics else metrics)
        self.loss = metrics.get("loss", 0.0)


class Draws(Lines):
    """Names its run by torch's global generator."""

    def start(self, recipe: Mapping[str, Any]) -> None:
        self.name = int(torch.randint(1000, ()))
        super().start(recipe)


class Buffers(Lines):
    """Hands what it flushes to Python's buffer, not to the system."""

    def start(self, recipe: Mapping[str, Any]) -> None:
        super().start(recipe)
        self.file = Path(self.path).open("a")  # noqa: SIM115

    def flush(self) -> None:
        self.file.writelines(f"{line}\n" for line in self.held)
        self.held = []

    def close(self) -> None:
        self.flush()
        self.file.close() if hasattr(self, "file") else None


BROKEN: list[tuple[type[Lines], str, str]] = [
    (HoldsTensors, "records_what_happened", "is 0.0, not"),
    (Rounds, "records_what_happened", ", not "),
    (LosesNan, "records_what_happened", "is 0.0, not"),
    (CountsSteps, "records_what_happened", "are recorded, not"),
    (LosesNames, "records_what_happened", "has the metrics"),
    (Backwards, "records_what_happened", "are recorded, not"),
    (Repeats, "records_what_happened", "are recorded, not"),
    (ClosesOnce, "records_what_happened", "closed already"),
    (LosesTheEnd, "records_what_happened", "after close(), steps [] are recorded"),
    (
        FlushesAtTheEnd,
        "flush_shows_what_is_held",
        "after flush(), before close(), steps [] are recorded",
    ),
    (Repeats, "flush_shows_what_is_held", "after flush(), before close()"),
    (ForgetsOptions, "recipe_is_recorded_at_the_start", "reads back as"),
    (Never, "every_is_a_whole_number", "every=0 is not a whole number of at least 1"),
    (Halfway, "every_is_a_whole_number", "every=2.5 is not a whole number of at least 1"),
    (LosesTheEnd, "is_told_of_a_run", "with every=2, steps [] of 5 are recorded"),
    (LosesLosses, "is_told_of_a_run", "the loss of step 0 was"),
    (Draws, "does_not_change_training", "gives other parameters, or draws random numbers"),
]


@pytest.mark.parametrize(("stage", "title", "says"), BROKEN)
def test_a_broken_tracker_is_caught(
    stage: type[Lines], title: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "thorough")  # as many examples as it takes to find one that fails
    law = f"test_{title}"
    found = caught(LinesLaws, stage, law)
    assert says in found.get(law, "obeyed")
    assert "breaks a law of its family" in found[law]


def test_a_good_tracker_obeys() -> None:
    assert caught(LinesLaws, Lines) == {}


def test_rounding_to_a_stated_precision_is_allowed() -> None:
    class Short(Lines):
        def number(self, value: Any) -> float:
            return float(f"{float(value):.6g}")

    law = "test_records_what_happened"
    assert caught(LinesLaws, Short, law, precision=1e-5) == {}
    assert ", not " in caught(LinesLaws, Short, law, precision=1e-9)[law]


def test_a_framework_that_a_sink_can_stop_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    law = "test_a_failing_sink_costs_no_training"
    monkeypatch.setattr(
        kfactk.optim.metrics, "_surviving", lambda warned, call, refusals=(): call()
    )
    assert "the sink is broken" in caught(LinesLaws, Lines, law)[law]

    def silent(warned: list[str], call: Any, refusals: Any = ()) -> None:
        try:
            call()
        except OSError:
            torch.rand(())

    monkeypatch.setattr(kfactk.optim.metrics, "_surviving", silent)
    assert "0 warnings in place of one tell" in caught(LinesLaws, Lines, law)[law]


def test_a_framework_that_records_other_steps_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    law = "test_is_told_of_a_run"
    monkeypatch.setattr(
        kfactk.optim.metrics.MetricsRecorder,
        "due",
        lambda self, step: self._tracker is not None and (step + 1) % self._tracker.every == 0,
    )
    assert "with every=2, steps [1, 3] of 5 are recorded" in caught(LinesLaws, Lines, law)[law]


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("stage", "says"), [(Lines, None), (Buffers, "the process flushed [(0, {'loss': 0.0})")]
)
def test_what_a_dying_process_takes_along_is_missed(stage: type[Lines], says: str | None) -> None:
    law = "test_flushed_records_survive_the_process"
    found = caught(LinesLaws, stage, law, survives_exit=True)
    assert found == {} if says is None else says in found[law]


def test_what_cannot_be_read_back_is_skipped_with_a_reason() -> None:
    made = type("TestBlind", (TrackerLaws,), {"stage": Lines, "stage_in": LinesLaws.stage_in})()
    with pytest.raises(pytest.skip.Exception, match="TestBlind has no `read`, which returns"):
        made.test_records_what_happened()
    with pytest.raises(pytest.skip.Exception, match="does not claim `survives_exit`"):
        made.test_flushed_records_survive_the_process()
