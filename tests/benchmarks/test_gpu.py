"""The one command for a GPU: what it runs, what it notes, and that it can be rehearsed."""

import fcntl
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import kfactk
from benchmarks import gpu, tasks
from benchmarks.gpu import Part

CPU = torch.device("cpu")


def test_parts_end_within_eight_minutes(tmp_path: Path):
    found = gpu.parts(tmp_path, "cuda", tiny=False)
    names = ["tests", "waits", "lag", "gpt2, bfloat16", "imagenet, bfloat16", "gpt2, float32"]
    assert [part.name for part in found] == [*names, "imagenet, float32", "solvers", "memory"]
    assert sum(part.limit for part in found) <= gpu.TOTAL <= 8 * 60
    races = [part for part in found if "benchmarks.race" in part.arguments]
    assert all(part.limit >= gpu.RACING + 30 for part in races)  # to start, and for the floors


def test_every_test_of_a_gpu_is_listed():
    marked = {
        str(path.relative_to(gpu.ROOT))
        for path in (gpu.ROOT / "tests").rglob("test_*.py")
        if "mark." + "gpu" in path.read_text()
    }
    assert marked == set(gpu.TESTS)


def test_each_race_has_three_settings_of_kfactk():
    for task, width, _ in gpu.RACES:
        assert sum(name in gpu.CHOSEN for name in tasks.TASKS[task](width).recipes) == 3


def test_failed_and_late_parts_are_noted_with_what_they_wrote(tmp_path: Path):
    written = tmp_path / "a.json"
    script = f"open({str(written)!r}, 'w').write('[1]'); __import__('time').sleep(SECONDS)"
    given = ["timeit", "-n1", "-r1"]
    good = gpu.run(Part("good", [*given, script.replace("SECONDS", "0")], 30, written))
    assert (good["status"], good["results"]) == ("0", [1])
    bad = gpu.run(Part("bad", ["no_such_module"], 30, written))
    assert bad["status"] == "1"
    assert "No module named" in bad["told"]
    assert "results" not in bad  # those of the run before are gone
    late = gpu.run(Part("late", [*given, script.replace("SECONDS", "60")], 5, written))
    assert (late["status"], late["results"]) == ("late", [1])
    assert gpu.words(bad) == "failed (1)"
    assert gpu.failed(late) == "late"


def test_processes_of_a_late_part_end_with_it(tmp_path: Path):
    """They would hold its output, and whoever reads to its end would wait for them."""
    mark = tmp_path / "held by the child"
    command = (
        f"import fcntl, time; mark = open({str(mark)!r}, 'w'); fcntl.flock(mark, fcntl.LOCK_EX); "
        "print('held', file=mark, flush=True); time.sleep(60)"
    )
    child = f"__import__('subprocess').run([{sys.executable!r}, '-c', {command!r}])"
    start = time.perf_counter()
    assert gpu.run(Part("late", ["timeit", "-n1", "-r1", child], 3))["status"] == "late"
    with mark.open() as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)  # waits for the end of the child
        assert ours.read() == "held\n"
    assert time.perf_counter() - start < 30


def test_no_part_begins_when_the_time_is_up(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "TOTAL", 0.0)
    assert gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {part["status"] for part in found["parts"].values()} == {"no time"}
    assert "| waits | 0.0 | no time |" in capsys.readouterr().out


def check(name: str, folder: Path) -> tuple[int, dict]:
    status = gpu.main([name, "--device", "cpu", "--tiny", "--output", str(folder)])
    return status, json.loads((folder / f"{name}.json").read_text())


def test_an_ordinary_step_that_waits_fails_and_is_told(tmp_path: Path, monkeypatch):
    """A CPU does not tell of waits: here a clip does, as torch tells of those on a GPU."""
    clip = kfactk.Optimizer.step

    def step(self: kfactk.Optimizer, *given: object) -> object:
        if self.steps in (3, 4):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return clip(self, *given)

    monkeypatch.setattr(kfactk.Optimizer, "step", step)
    status, found = check("waits", tmp_path)
    assert status == 1
    assert found["all"] == [0, 0, 0, 1, 1, *[0] * 11]
    assert (found["ordinary"], found["factors and scale"]) == (1, 1)
    [fault] = found["faults"]  # step 4 may wait: factors are due
    assert fault.startswith("step 3, where nothing is due, waits at tests/benchmarks/test_gpu.py:")
    assert "in step: warnings.warn" in fault
    assert gpu.words({"status": "1", "results": found}) == f"failed; {fault}"


def test_a_lagged_run_that_differs_fails(tmp_path: Path, monkeypatch):
    lagging = gpu.lagging

    def broken(device: torch.device | str, steps: int) -> list[torch.Tensor]:
        found = lagging(device, steps)
        return [each + 1e-8 for each in found] if isinstance(device, torch.device) else found

    monkeypatch.setattr(gpu, "lagging", broken)
    status, found = check("lag", tmp_path)
    assert status == 1
    assert "from that of the CPU, more than 1e-09" in found["faults"][0]
    monkeypatch.setattr(gpu, "lagging", lambda device, steps: [torch.ones(2)])
    assert check("lag", tmp_path)[1]["faults"] == [
        "a run without a lag is the same as with one: the lag has no effect"
    ]


def test_a_missing_gpu_is_one_line(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert "rehearse with --device cpu --tiny" in capsys.readouterr().err


def test_the_documentation_has_the_table_as_it_is_printed():
    """It waits for results, or has them: then each line has the same first cells."""
    page = (gpu.ROOT / "docs" / "performance.md").read_text()
    waiting = gpu.table({})
    assert gpu.LATER not in page or waiting in page
    for line in waiting.splitlines():
        assert line.partition(gpu.LATER)[0].rpartition("|")[0] in page


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict]:
    """Run the whole command on the CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [*command, "--output", str(folder)],
        cwd=gpu.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, json.loads((folder / "gpu.json").read_text())


def test_the_whole_command_can_be_rehearsed(rehearsal):
    done, found = rehearsal
    parts = found["parts"]
    assert done.returncode == 0, {n: p for n, p in parts.items() if p["status"] != "0"}
    assert list(parts) == [part.name for part in gpu.parts(Path(), "cpu", tiny=True)]
    assert "2 passed" in parts["tests"]["told"][0]
    assert parts["waits"]["results"]["all"] == [0] * 16
    lag = parts["lag"]["results"]
    assert lag["deviation"] <= gpu.NEAR < lag["effect of the lag"]
    assert set(parts["solvers"]["results"]) == {"8", "16"}
    iterated = "ekfac, staggered, bfloat16, iterated"
    for task, _, _, precision in gpu.SMALL:
        [race] = parts[f"{task}, {precision}"]["results"]["races"]
        assert race["precision"] == precision
        assert race["settings"]["ekfac, staggered"]["floor"] > 1
        assert {each["steps"] for each in race["settings"].values()} == {2}
    assert parts["memory"]["results"]["runs"][0]["settings"][iterated]["above"] > 0


def test_the_rehearsal_prints_its_table(rehearsal):
    done, found = rehearsal
    printed = gpu.table(found, tiny=True)
    assert printed in done.stdout
    assert gpu.LATER not in printed
    rows = [line.split(" | ") for line in printed.splitlines()]
    assert all(len(row) in (3, 6) for row in rows if len(row) > 1)
    [row] = [row for row in rows if row[0] == "| gpt, bfloat16" and row[1] == "ekfac, staggered"]
    ran = found["parts"]["gpt, bfloat16"]["results"]["races"][0]["settings"]["ekfac, staggered"]
    assert row[2:] == [
        *(f"{ran['mean']:.2f}", f"{ran['median']:.2f}", f"{ran['worst']:.1f}"),
        "2 |",
    ]


def test_a_race_tells_what_it_left_out():
    task = tasks.transformer(64)
    settings = {task.baseline: {"mean": 1, "median": 1, "worst": 1, "steps": 7}}
    race = {
        "batch": 8,
        "batch_asked": 16,
        "baseline_ms": 5,
        "first": {task.baseline: 1, "ekfac, staggered": 1},
        "left_out": ["kfac, staggered"],
        "settings": settings,
    }
    rows = gpu.race_rows("gpt2", task, {"status": "late", "results": {"races": [race]}})
    title = "| gpt2 (8 examples; 16 need more memory) |"
    assert rows[0] == f"{title} {task.baseline}, 5.0 ms | 1.00 | 1.00 | 1.0 | 7 |"
    assert rows[1] == f"{title} ekfac, staggered | no time | | | |"
    assert rows[2] == f"{title} kfac, staggered | no time | | | |"
    assert rows[-1] == f"{title} {gpu.SOAP} | not installed | | | |"
    assert "| late |" in gpu.race_rows("gpt2", task, {"status": "late"})[0]
