"""The one command for a GPU: what it runs, what it notes, and that it can be rehearsed."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Part

CPU = torch.device("cpu")


def test_parts_end_within_eight_minutes(tmp_path: Path):
    found = gpu.parts(tmp_path, "cuda", tiny=False)
    names = ["tests", "waits", "solvers", "gpt2, float32", "gpt2, bfloat16"]
    assert [part.name for part in found] == [
        *(*names, "resnet50, float32", "resnet50, bfloat16", "memory")
    ]
    assert sum(part.limit for part in found) <= 8 * 60
    assert all(Path(gpu.ROOT / name).is_file() for name in gpu.TESTS)


def test_failed_and_late_parts_are_noted(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"x": 1}')
    good = gpu.run(Part("good", ["platform"], 30, tmp_path / "a.json"))
    assert (good["status"], good["results"]) == ("0", {"x": 1})
    bad = gpu.run(Part("bad", ["no_such_module"], 30))
    assert bad["status"] == "1"
    assert "No module named" in bad["told"]
    late = gpu.run(Part("late", ["timeit", "-n1", "-r1", "__import__('time').sleep(30)"], 0.5))
    assert late["status"] == "late"
    shown = gpu.table({"parts": {"good": good, "bad": bad, "late": late}})
    assert "| good | 0 |" in shown
    assert "| failed |" in shown.splitlines()[-1]


@pytest.mark.parametrize("check", sorted(gpu.CHECKS))
def test_checks_can_be_rehearsed(check: str, tmp_path: Path, capsys):
    assert gpu.main([check, "--device", "cpu", "--tiny", "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / f"{check}.json").read_text())
    assert json.loads(capsys.readouterr().out) == written
    assert set(written) >= ({"ordinary", "all"} if check == "waits" else {"8", "16"})


def test_a_missing_gpu_is_one_line(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert "rehearse with --device cpu --tiny" in capsys.readouterr().err
