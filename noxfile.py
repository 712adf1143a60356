"""The tasks of the project.

    nox -s tests | coverage | lint | docs | plugins | mutants | equivalence
    nox -s experiments | report | bench | gpu

Experiments and reports have a small environment of their own, which the session
`experiments_env` makes. All others share a larger one, made by `env`. Both are refreshed only when
their sources have changed. Arguments after `--` go to the tool of the session:
`nox -s tests -- tests/kfactk -k ekfac`.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.sessions = ["tests"]

ROOT = Path(__file__).parent
MADE_FROM = ("pyproject.toml", "noxfile.py", "kfactk/_version.py")
WORKERS = str(min(os.cpu_count() or 1, 8))
ALL = ("-n", WORKERS, "--dist", "loadgroup", "--durations=25")
THOROUGH = "--thorough"
FAMILIES = (
    *("curvature", "basis", "fisher", "likelihood", "link", "clip", "update", "controller", "pace"),
    *("placement", "tracker"),
)
WRITE_PLUGINS = """
import sys
from kfactk.__main__ import main
folder, *families = sys.argv[1:]
for family in families:
    name = f"kfactk-my-{family}"
    if main(["new-plugin", name, "--stage", family, "--directory", folder]):
        sys.exit(f"new-plugin failed for {family}")
"""
PATIENCE = 30.0  # seconds an interrupted experiment has to save what it did


def fingerprint() -> str:
    """Return a digest of what the environment depends on."""
    digest = hashlib.sha256(str(ROOT).encode())
    for name in MADE_FROM:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def python(session: nox.Session, env: str = "env") -> str:
    """Return the path of the interpreter of a shared environment."""
    folder = (session.cache_dir.parent / env).absolute()
    return str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def make(session: nox.Session, *packages: str) -> None:
    """Install packages into the session's environment, if that is not up to date."""
    stamp = Path(session.virtualenv.location) / "made-from.sha256"
    if stamp.exists() and stamp.read_text() == fingerprint():
        session.log("the environment is up to date")
        return
    # Modules compile when they are first imported: most of what is installed never is.
    session.install("--no-compile", *packages)
    stamp.write_text(fingerprint())


def variables(profile: str) -> dict[str, str]:
    """Return the environment of tests; `profile` says how many examples the laws draw."""
    return {"OMP_NUM_THREADS": "1", "KFACTK_LAWS": profile}


@nox.session(venv_backend="virtualenv", reuse_venv=True, default=False)
def env(session: nox.Session) -> None:
    """Make or refresh the environment that most sessions share."""
    groups = nox.project.dependency_groups(nox.project.load_toml(ROOT / "pyproject.toml"), "dev")
    make(session, "--editable", ".[experiments,testing]", *groups)


@nox.session(venv_backend="virtualenv", reuse_venv=True, default=False)
def experiments_env(session: nox.Session) -> None:
    """Make or refresh the environment of `experiments` and `report`."""
    make(session, "--editable", ".[experiments]")


@nox.session(venv_backend="none", requires=["env"])
def tests(session: nox.Session) -> None:
    """Run all tests and doctests, then `lint`.

    `-- --thorough` draws thirty times as many examples of laws, and runs all cases of wide
    parametrizations in place of a sample. Other arguments go to pytest.
    """
    given = [argument for argument in session.posargs if argument != THOROUGH]
    if not given:
        session.notify("lint")
    profile = "thorough" if THOROUGH in session.posargs else "quick"
    session.run(python(session), "-m", "pytest", *(given or ALL), env=variables(profile))


@nox.session(venv_backend="none", requires=["env"], default=False)
def coverage(session: nox.Session) -> None:
    """Run all tests and doctests, and check that they cover 95 % of lines and branches.

    It is a session of its own, since small tests take half as long again when they are measured.
    """
    measured = {**variables("quick"), "COVERAGE_FILE": str(session.cache_dir / "coverage")}
    measure = python(session), "-m", "coverage"
    session.run(*measure, "erase", env=measured)
    session.run(*measure, "run", "-m", "pytest", *ALL, env=measured)
    session.run(*measure, "combine", "--quiet", env=measured)
    session.run(*measure, "report", env=measured)


@nox.session(venv_backend="none", requires=["experiments_env"], default=False)
def experiments(session: nox.Session) -> None:
    """Compare optimizers on a preset, by default a small one; `-- --help` shows the options."""
    session.run(
        python(session, "experiments_env"),
        "-m",
        "experiments",
        *session.posargs,
        interrupt_timeout=PATIENCE,
        terminate_timeout=PATIENCE,
    )


@nox.session(venv_backend="none", requires=["experiments_env"], default=False)
def report(session: nox.Session) -> None:
    """Rebuild figures, reports and the page of results: `-- results/PRESET`, or all of them."""
    session.run(python(session, "experiments_env"), "-m", "experiments.report", *session.posargs)


@nox.session(venv_backend="none", requires=["env"], default=False)
def lint(session: nox.Session) -> None:
    """Check style (ruff) and types (mypy, strict)."""
    session.run(python(session), "-m", "ruff", "check", "--output-format=concise")
    session.run(python(session), "-m", "ruff", "format", "--check")
    session.run(python(session), "-m", "mypy")


@nox.session(venv_backend="none", requires=["env"], default=False)
def docs(session: nox.Session) -> None:
    """Build the documentation into `site/`; broken links are errors. `-- serve` shows it live."""
    arguments = session.posargs or ["build", "--strict"]
    session.run(python(session), "-m", "mkdocs", *arguments, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(venv_backend="none", requires=["env"], default=False)
def plugins(session: nox.Session) -> None:
    """Install `plugins/kfactk-diagonal`, run its laws, and uninstall it; check `new-plugin`."""
    with tempfile.TemporaryDirectory() as folder:
        stranger(session, Path(folder), "kfactk-diagonal", stages=("curvature", "basis"))
        written = Path(folder) / "written"
        written.mkdir()
        session.run(python(session), "-c", WRITE_PLUGINS, str(written), *FAMILIES, silent=True)
        sources = [
            str(path)
            for place in (written, ROOT / "plugins" / "kfactk-diagonal")
            for path in sorted(place.rglob("*.py"))
        ]
        session.run(
            python(session),
            "-m",
            "ruff",
            "check",
            "--no-cache",
            "--output-format=concise",
            *sources,
        )
        session.run(python(session), "-m", "ruff", "format", "--no-cache", "--check", *sources)
        session.run(python(session), "-m", "mypy", *sources)


def stranger(session: nox.Session, folder: Path, name: str, stages: tuple[str, ...]) -> None:
    """Build and install a plugin from a copy, run its tests elsewhere, and list its stages."""
    source, module, interpreter = ROOT / "plugins" / name, name.replace("-", "_"), python(session)
    pip = interpreter, "-m", "pip"
    version = nox.project.load_toml(source / "pyproject.toml")["project"]["version"]
    shutil.copytree(
        source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    )
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(source / f"test_{module}.py", elsewhere)
    try:
        session.run(*pip, "install", "--quiet", f"{folder / name}[test]")
        with session.chdir(elsewhere):
            tests = (
                "-m",
                "pytest",
                "-p",
                "no:cacheprovider",
                "--doctest-modules",
                "--pyargs",
                f"test_{module}.py",
                module,
            )
            session.run(interpreter, *tests, env={"OMP_NUM_THREADS": "1"})
            for family in stages:
                listed = str(
                    session.run(
                        interpreter, "-m", "kfactk", "stages", "--family", family, silent=True
                    )
                )
                session.log(listed)
                if f"from {name} {version}" not in listed:
                    session.error(
                        f"`kfactk stages --family {family}` lists nothing from {name} {version}, "
                        "which is installed"
                    )
    finally:
        session.run(*pip, "uninstall", "--quiet", "--yes", name)


@nox.session(venv_backend="none", requires=["env"], default=False)
def mutants(session: nox.Session) -> None:
    """Check that the tests notice mistakes in the mathematics; `-- --help` shows the options."""
    session.run(
        python(session),
        "-m",
        "mutation",
        *session.posargs,
        interrupt_timeout=PATIENCE,
        terminate_timeout=PATIENCE,
    )


@nox.session(venv_backend="none", requires=["env"], default=False)
def equivalence(session: nox.Session) -> None:
    """Compare every combination of stages on 1 to 4 ranks with one process.

    `-- --sample N` takes N combinations.
    """
    session.run(
        python(session), "-m", "tests.equivalence", *session.posargs, env={"OMP_NUM_THREADS": "1"}
    )


@nox.session(venv_backend="none", requires=["env"], default=False)
def bench(session: nox.Session) -> None:
    """Run all benchmarks: about 25 minutes on two idle cores.

    `-- race --widths 16` runs one part; `-- --help` shows all parts. Optimizers of other packages
    are installed where possible; the race names those that are missing.
    """
    for requirement in nox.project.dependency_groups(
        nox.project.load_toml(ROOT / "pyproject.toml"), "bench"
    ):
        session.run(
            python(session), "-m", "pip", "install", "--quiet", requirement, success_codes=(0, 1)
        )
    session.run(python(session), "-m", "benchmarks", *session.posargs)


@nox.session(venv_backend="none", requires=["env"], default=False)
def gpu(session: nox.Session) -> None:
    """Run all checks that need a GPU: at most 8 minutes. `-- --device cpu --tiny` rehearses."""
    session.run(python(session), "-m", "benchmarks.gpu", *session.posargs)
