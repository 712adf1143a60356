import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import lock
from experiments.errors import ExperimentError

HOLD = """
import sys, time
from pathlib import Path
from experiments import lock
with lock.hold(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


def quiet(text: str) -> None:
    raise AssertionError(text)


def test_second_holder_is_told_who_holds_it(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    )
    try:
        assert other.stdout.readline() == b"held\n"
        began = time.monotonic()
        with pytest.raises(ExperimentError, match=f"in use by .*process {other.pid} on"):
            lock.hold(tmp_path, quiet).__enter__()
        assert time.monotonic() - began < 1.0
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    (tmp_path / ".report.html.77").write_text("half")
    with lock.hold(tmp_path, quiet):  # the lock has ended with its process
        assert f"process {os.getpid()} on" in (tmp_path / lock.OWNER).read_text()
    assert not (tmp_path / lock.OWNER).exists()
    assert not (tmp_path / ".report.html.77").exists()


def test_it_may_be_held_again_and_after_errors(tmp_path: Path):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), lock.hold(tmp_path, quiet):
            raise KeyboardInterrupt


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path):
    run = tmp_path / "runs" / "sgd-seed0"
    for folder in (run, tmp_path / "cache", tmp_path / "figures", tmp_path / "other"):
        folder.mkdir(parents=True)
    gone = [
        *(run / ".run.json.12", run / ".checkpoint.pt.3", tmp_path / "cache" / ".train.pt.9"),
        *(tmp_path / "figures" / ".test_loss.svg.1", tmp_path / ".report.html.99"),
    ]
    kept = [
        *(run / "run.json", run / ".note.12", tmp_path / ".git.1", tmp_path / "report.html.1"),
        *(tmp_path / "other" / ".x.json.1", tmp_path / "figures" / ".mine.svg"),
    ]
    for path in (*gone, *kept):
        path.write_text("")
    (run / ".a.pt.1").mkdir()
    with lock.hold(tmp_path, quiet):
        assert not any(path.exists() for path in gone)
        assert all(path.exists() for path in kept)


def test_file_systems_without_locks_are_told(tmp_path: Path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(lock.filelock.FileLock, "acquire", refuse)
    said = []
    with lock.hold(tmp_path, said.append):
        pass
    assert "without locks" in said[0]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_folders_without_permission_are_refused(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(ExperimentError, match="cannot be locked"):
        lock.hold(tmp_path, quiet).__enter__()
