import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.errors import ExperimentError
from experiments.files import write_atomically, write_text

FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from experiments.errors import ExperimentError
from experiments.files import write_atomically, write_text
path, kind = Path(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may grow further
try:
    if kind == "text":
        write_text(path, "x" * 30_000)
    else:
        write_atomically(path, lambda file: torch.save({"x": torch.zeros(30_000)}, file))
except ExperimentError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the limit is Unix's")
@pytest.mark.parametrize("kind", ["text", "tensors"])
def test_full_disk_is_one_line_and_keeps_the_old_file(kind: str, tmp_path: Path):
    path = tmp_path / "file.pt"
    path.write_text("whole")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), kind],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout
    assert done.stdout.count("\n") == 1
    assert path.read_text() == "whole"
    assert [each.name for each in tmp_path.iterdir()] == ["file.pt"]


def test_folders_in_the_way_are_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "full").mkdir(parents=True)
    for path in (tmp_path / "file" / "new", tmp_path / "folder"):
        with pytest.raises(ExperimentError, match="cannot be written"):
            write_text(path, "text")


def test_text_that_utf8_cannot_hold_is_escaped(tmp_path: Path):
    write_text(tmp_path / "file", "a\udcffb")
    assert (tmp_path / "file").read_bytes() == b"a\\udcffb"


def test_errors_of_the_writer_itself_are_not_hidden(tmp_path: Path):
    with pytest.raises(KeyError):
        write_atomically(tmp_path / "file", lambda path: {}["x"])
    assert list(tmp_path.iterdir()) == []
