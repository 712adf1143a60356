import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import kfactk
from benchmarks import contestants, reference
from experiments import models

CLASSES = 10
EACH = 7


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for part, (label, i) in itertools.product(
        ("train", "test"), itertools.product(range(CLASSES), range(EACH))
    ):
        folder = tmp_path / "images" / part / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (25 * label, 36 * i, 100)).save(folder / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TRAIN": CLASSES * EACH,
        "TEST": CLASSES * EACH,
        "BATCH": 16,
        "STEPS": 4,
        "SMOOTHED": 2,
        "EPOCH": 3,
    }.items():
        monkeypatch.setattr(reference, name, value)
    everyone = {
        name: each
        for name, each in contestants.everyone().items()
        if "torch" in name or name == "kfactk, short"
    }
    monkeypatch.setattr(reference, "everyone", lambda: everyone)


def test_batches_are_full_and_epochs_repeat_no_image(images: Path, tmp_path: Path) -> None:
    task = reference.Task.load(images, tmp_path / "cache", torch.device("cpu"))
    pixels = torch.cat([batch for batch, _ in itertools.islice(task.batches(seed=3), 4)])
    assert pixels.shape == (64, 3, 32, 32)  # of 70 images, 6 are left out
    assert len(pixels.flatten(1).unique(dim=0)) == 64
    again = torch.cat([batch for batch, _ in itertools.islice(task.batches(seed=3), 4)])
    assert torch.equal(pixels, again)
    assert [len(batch) for batch, _ in itertools.islice(task.batches(seed=3), 9)] == [
        16
    ] * 9  # of three epochs


def test_contestants_train_as_they_would_alone(images: Path, tmp_path: Path) -> None:
    task = reference.Task.load(images, tmp_path / "cache", torch.device("cpu"))
    runs = reference.race(task, reference.everyone(), seed=5, steps=5)
    model = models.make("resnet8", channels=3, classes=10, seed=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for pixels, labels in itertools.islice(task.batches(seed=5), 5):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pixels), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert next(run.losses for run in runs if run.name == contestants.BASELINE) == losses
    for run in runs:
        assert len(run.losses) == len(run.seconds) == 5
        assert run.losses[0] == losses[0]  # the same weights and images
        assert 0 <= run.accuracy <= 100


def test_disturbed_steps_do_not_count() -> None:
    runs = [
        reference.Run("a", seed, "", seconds=seconds)
        for seed, seconds in enumerate(([1.0, 2.0], [9.0, 2.5], [1.5, 80.0]))
    ]
    assert reference.cumulative_seconds(runs) == [1.5, 4.0]


def test_duels_compare_at_equal_wall_clock() -> None:
    short = contestants.ours(contestants.RECIPES["kfactk, short"])
    field = {
        contestants.BASELINE: contestants.everyone()[contestants.BASELINE],
        "dear": contestants.everyone()["AdamW (torch)"],
        "our": short,
    }
    runs = {
        contestants.BASELINE: [
            reference.Run(contestants.BASELINE, 0, "", [9.0, 8.0, 6.0, 5.0, 4.0], [1.0] * 5, 50.0)
        ],
        "dear": [reference.Run("dear", 0, "", [9.0, 5.0, 3.0, 2.0, 1.0], [1.6] * 5, 60.0)],
        "our": [reference.Run("our", 0, "", [9.0, 4.0, 2.0, 1.0, 0.5], [1.25] * 5, 70.0)],
    }
    final = {
        row[0]: row[1:] for row in map(str.split, reference.table(runs, field).splitlines()[1:])
    }
    assert final["our"] == [
        "1.500",
        "2.333",
        "nan",
        "70.0",
        "1.25",
        "1/4/1",
    ]  # (2 + 1) / 2, (4 + 2 + 1) / 3
    assert final["dear"] == ["2.500", "3.333", "nan", "60.0", "1.60"]
    rows = [line.split() for line in reference.duels(runs, field).splitlines()]
    assert rows[-2][-5:] == [
        "3",
        "5.500",
        "3.000",
        "6.333",
        "5.000",
    ]  # 4 seconds are 3 steps of 1.25
    assert rows[-1][-5:] == [
        "5+",
        "2.500",
        "0.750",
        "3.333",
        "1.167",
    ]  # 6.4 seconds are more than there were


def test_command_races_each_seed_once(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [
        "reference",
        "--data",
        str(images),
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "5",
        "--seeds",
        "1",
        "--threads",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", command)
    reference.main()
    kept = tmp_path / "out" / "seed-1.json"
    first, written = capsys.readouterr().out, kept.stat().st_mtime_ns
    assert {run["name"] for run in json.loads(kept.read_text())} == set(reference.everyone())
    reference.main()
    assert kept.stat().st_mtime_ns == written
    assert first.endswith(capsys.readouterr().out)  # but for the decoding
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "2"])
    with pytest.raises(SystemExit):
        reference.main()


@pytest.mark.parametrize(
    ("arguments", "due"),
    [
        ({}, {"factors": 32, "scale": 32, "basis": 4}),
        (
            {"stagger": True},
            {"factors": 32, "scale": 32, "basis": 5},
        ),  # turn 0 at steps 7, 107, 207, 307
        (
            {"factor_every": 5, "scale_every": 1, "basis_every": kfactk.early},
            {"factors": 63, "scale": 312, "basis": 10},
        ),
    ],
)
def test_due_steps(arguments: dict[str, object], due: dict[str, int]) -> None:
    assert contestants.due_steps(kfactk.build(**arguments), 312) == due  # type: ignore[arg-type]


def test_recipe_draws_by_the_seed_of_the_run() -> None:
    thesis = contestants.ours(contestants.RECIPES["kfactk, thesis"])
    optimizer = thesis.make(models.make("resnet8", channels=3, classes=10, seed=0), 7)
    assert optimizer.recipe.fisher.seed == 7
    assert math.isclose(optimizer.recipe.damping, 0.001)
    optimizer.close()
