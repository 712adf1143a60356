"""The loop for many processes under torchrun: it learns, and resumes on another number of them."""

import re
from pathlib import Path

import pytest

from tests.torchrun import torchrun

pytestmark = pytest.mark.xdist_group("ranks")

ROOT = Path(__file__).parents[2]


def launched(folder: Path, processes: int) -> dict[int, float]:
    """Loss by epoch."""
    script = ROOT / "docs" / "examples" / "ddp_training.py"
    done = torchrun(script, folder=folder, processes=processes)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"epoch (\d+): loss ([\d.]+)", done.stdout)
    assert len(found) == len({epoch for epoch, _ in found}), "one process prints"
    return {int(epoch): float(loss) for epoch, loss in found}


def test_it_learns_and_goes_on_with_one_process(tmp_path: Path) -> None:
    whole = launched(tmp_path, 2)
    assert list(whole) == [0, 1, 2, 3]
    assert whole[3] < 0.5 * whole[0]
    (tmp_path / "checkpoints" / "latest").write_text("2")
    resumed = launched(tmp_path, 1)
    assert list(resumed) == [2, 3]
    for epoch, loss in resumed.items():  # the same batches, and the Fisher pass draws nothing
        assert loss == pytest.approx(whole[epoch], abs=2e-3)
    assert launched(tmp_path, 1) == {}
