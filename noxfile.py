"""Every task of the project: `nox -s tests`, `nox -s experiments`, `nox -s lint`, `nox -s docs`, `nox -s bench`.

All of them share one environment, made by the session `env` and refreshed only when what it was made from has changed. Arguments behind
`--` go to the tool that the session runs: `nox -s tests -- tests/kfactk -k ekfac`.
"""

import hashlib
import os
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.sessions = ["tests"]

ROOT = Path(__file__).parent
MADE_FROM = ("pyproject.toml", "noxfile.py", "kfactk/_version.py")
WORKERS = str(min(os.cpu_count() or 1, 8))
THOROUGH = "--thorough"
PATIENCE = 30.0  # seconds an interrupted experiment has to save what it did


def fingerprint() -> str:
    """What the environment depends on, as one line."""
    digest = hashlib.sha256(str(ROOT).encode())
    for name in MADE_FROM:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def python(session: nox.Session) -> str:
    """Path of the shared environment's interpreter."""
    env = session.cache_dir.parent / "env"
    return str(env / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


@nox.session(venv_backend="virtualenv", reuse_venv=True, default=False)
def env(session: nox.Session) -> None:
    """Make or refresh the environment that the other sessions share."""
    stamp = Path(session.virtualenv.location) / "made-from.sha256"
    if stamp.exists() and stamp.read_text() == fingerprint():
        session.log("the environment is up to date")
        return
    groups = nox.project.dependency_groups(nox.project.load_toml(ROOT / "pyproject.toml"), "dev")
    session.install("--editable", ".[experiments,testing]", *groups)
    stamp.write_text(fingerprint())


@nox.session(venv_backend="none", requires=["env"])
def tests(session: nox.Session) -> None:
    """All tests and doctests, then `lint`. `-- --thorough` draws twenty times the examples; other arguments go to pytest, alone."""
    given = [argument for argument in session.posargs if argument != THOROUGH]
    if not given:
        session.notify("lint")
    profile = "thorough" if THOROUGH in session.posargs else "quick"
    arguments = given or ["-n", WORKERS, "--dist", "loadgroup"]
    session.run(python(session), "-m", "pytest", *arguments, env={"OMP_NUM_THREADS": "1", "KFACTK_LAWS": profile})


@nox.session(venv_backend="none", requires=["env"], default=False)
def experiments(session: nox.Session) -> None:
    """The study, in small by default; `nox -s experiments -- --help` shows what else there is."""
    session.run(python(session), "-m", "experiments", *session.posargs, interrupt_timeout=PATIENCE, terminate_timeout=PATIENCE)


@nox.session(venv_backend="none", requires=["env"], default=False)
def lint(session: nox.Session) -> None:
    """Style (ruff) and types (mypy, strict)."""
    session.run(python(session), "-m", "ruff", "check", "--output-format=concise")
    session.run(python(session), "-m", "ruff", "format", "--check")
    session.run(python(session), "-m", "mypy")


@nox.session(venv_backend="none", requires=["env"], default=False)
def docs(session: nox.Session) -> None:
    """Build the documentation into `site/`; a broken link is an error. `-- serve` shows it while you write."""
    arguments = session.posargs or ["build", "--strict", "--quiet"]
    session.run(python(session), "-m", "mkdocs", *arguments, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(venv_backend="none", requires=["env"], default=False)
def bench(session: nox.Session) -> None:
    """Step times relative to SGD."""
    session.run(python(session), "benchmarks/step_time.py", *session.posargs)
