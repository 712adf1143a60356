"""What a user installs: one wheel with both packages, found outside the checkout."""

import email
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NEEDED_TO_BUILD = ("pyproject.toml", "README.md", "LICENSE", "kfactk", "plugins/kfactk_stages")

pytestmark = pytest.mark.xdist_group("packaging")  # one worker, so that the wheel is built once


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of what it is made of, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("build")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in NEEDED_TO_BUILD:
        source, target = ROOT / name, folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copy(source, target)
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        folder,
        folder / "source",
        cwd=folder,
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def contents(wheel: Path) -> dict[str, str]:
    """Text of every file in the wheel by its name, that of metadata files without their folder."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            re.sub(r"^[^/]*\.dist-info/", "dist-info/", name): archive.read(name).decode()
            for name in archive.namelist()
        }


def test_the_wheel_carries_both_packages_whole_and_nothing_else(contents: dict[str, str]) -> None:
    expected = {"kfactk/py.typed", "kfactk_stages/py.typed"}
    for package, folder in (
        ("kfactk", ROOT / "kfactk"),
        ("kfactk_stages", ROOT / "plugins" / "kfactk_stages"),
    ):
        expected |= {
            f"{package}/{path.relative_to(folder).as_posix()}"
            for kind in ("*.py", "*.template")
            for path in folder.rglob(kind)
        }
    assert {name for name in contents if not name.startswith("dist-info/")} == expected


def test_the_metadata(contents: dict[str, str]) -> None:
    metadata = email.message_from_string(contents["dist-info/METADATA"])
    requirements = metadata.get_all("Requires-Dist") or []
    required = {re.split(r"[^\w-]", text)[0] for text in requirements if "extra ==" not in text}
    assert required == {"torch", "pluggy", "attrs"}
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    licence = contents["dist-info/licenses/LICENSE"]
    assert licence.startswith("MIT License")
    assert "The kfactk authors" in licence


def test_the_version_is_written_in_one_place(contents: dict[str, str]) -> None:
    (version,) = re.findall(
        r'^__version__ = "(.+)"$', (ROOT / "kfactk" / "_version.py").read_text(), re.MULTILINE
    )
    assert email.message_from_string(contents["dist-info/METADATA"])["Version"] == version
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    modules = [
        path
        for folder in ("kfactk", "plugins/kfactk_stages")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert [path.name for path in modules if f'"{version}"' in path.read_text()] == ["_version.py"]


def test_building_needs_no_torch() -> None:
    assert [re.split(r"[^\w-]", text)[0] for text in PYPROJECT["build-system"]["requires"]] == [
        "setuptools"
    ]


def test_an_installed_wheel_lists_the_first_party_stages(wheel: Path, tmp_path: Path) -> None:
    """The wheel runs outside the checkout, in a fresh environment with our dependencies."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        wheel,
        cwd=tmp_path,
    )
    site = Path(
        run(
            python,
            "-I",
            "-c",
            "import sysconfig; print(sysconfig.get_path('purelib'))",
            cwd=tmp_path,
        ).strip()
    )
    # A path line adds packages but not their .pth files: the editable install stays hidden.
    (site / "borrowed.pth").write_text(
        sysconfig.get_path("purelib") + "\n" + sysconfig.get_path("platlib") + "\n"
    )

    where = run(
        python,
        "-I",
        "-c",
        "import kfactk, kfactk_stages; print(kfactk.__file__, kfactk_stages.__file__)",
        cwd=tmp_path,
    )
    assert [Path(text).is_relative_to(site) for text in where.split()] == [True, True]
    listed = json.loads(run(python, "-I", "-m", "kfactk", "stages", "--json", cwd=tmp_path))
    text = json.dumps(listed)
    missing = [
        name
        for name in PYPROJECT["project"]["entry-points"]["kfactk"]
        if f'"{name.split(".")[1]}"' not in text
    ]
    assert not missing, f"stages that the installed wheel does not list: {missing}\n{text}"
