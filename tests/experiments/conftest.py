from pathlib import Path

import pytest
from PIL import Image

from experiments import data, settings
from experiments.data import Dataset
from experiments.settings import Study
from tests.experiments.studies import OWN, SIGNALS, TINY


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """Settings for runs of three steps an epoch."""
    return TINY


@pytest.fixture
def tiny(tmp_path: Path, tiny_text: str) -> Path:
    """A file with these settings."""
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_text)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images, 3 + 2 of each of 2 classes; red is 10 * class + number, all else 100."""
    root = tmp_path / "images"
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (10 * label + i, 100, 100)).save(
                    root / part / name / f"{i}.jpg", quality=100, subsampling=0
                )
    return root


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Study:
    """The study of these settings."""
    path = tmp_path_factory.mktemp("settings") / "tiny.toml"
    path.write_text(tiny_text)
    return settings.read(path)


@pytest.fixture(scope="session")
def dataset(study: Study) -> Dataset:
    """Its examples."""
    return data.load(study.data, None, Path("unused"), print)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings of a study whose examples and network, with dropout, are of a module of its own."""
    module = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "own.toml"
    path.write_text(SIGNALS % (f"{module}:signals", f"{module}:network"))
    return path


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new database of MLflow, which takes it seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow = pytest.importorskip("mlflow")
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path
