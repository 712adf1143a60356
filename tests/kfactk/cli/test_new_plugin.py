"""`new-plugin` writes packages that work, whose laws find mistakes, and overwrites nothing."""

import importlib.metadata
import os
import re
import string
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest

from kfactk import OptionError, UnknownStageError, testing
from kfactk.cli import new_plugin as scaffold
from kfactk.cli.new_plugin import FILES, LAWS, SUFFIX, Package, new_plugin
from kfactk.registry.hookspecs import STAGE_HOOKS
from kfactk.registry.registry import Registry, registry
from tests.distributions import Site, site as site
from tests.kfactk.testing.broken import caught

ROOT = Path(__file__).parents[3]
TEMPLATES = ROOT / "kfactk" / "cli" / "templates"
STARTING = "two_ranks or ranks_are_one or every_process or survive_the_process"
"""Laws that start processes, as pytest selects them."""
each_family = pytest.mark.parametrize("family", STAGE_HOOKS)


def make(name: str, family: str, directory: Path, known: Registry | None = None) -> Path:
    return new_plugin(name, family, directory, known or registry())[1]


@pytest.mark.parametrize(
    ("given", "family", "names"),
    [
        (
            "kfactk-diagonal",
            "basis",
            ("kfactk-diagonal", "kfactk_diagonal", "diagonal", "DiagonalBasis"),
        ),
        (
            "Trust.Region__2",
            "clip",
            ("trust-region-2", "trust_region_2", "trust_region_2", "TrustRegion2Clip"),
        ),
        (
            "kfactk-soft-clip",
            "clip",
            ("kfactk-soft-clip", "kfactk_soft_clip", "soft_clip", "SoftClip"),
        ),
        ("kfactk-none", "tracker", ("kfactk-none", "kfactk_none", "none", "NoneTracker")),
        ("x-y", "fisher", ("x-y", "x_y", "x_y", "XYFisher")),
    ],
)
def test_package_derives_all_names_from_one(
    given: str, family: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    package, folder = new_plugin(given, family, tmp_path, Registry())
    assert (package.distribution, package.module, package.stage, package.class_name) == names
    assert folder == tmp_path / names[0]
    assert f"\nclass {names[3]}" in (folder / f"{names[1]}.py").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "must begin with a letter"),
        ("2nd", "must begin with a letter"),
        (
            "my basis!",
            "ASCII letters, digits and dashes in between, at most 60 characters. Try kfactk-",
        ),
        ("kfactk-größe", "Try kfactk-gr-e."),
        ("../escape", "Try kfactk-escape."),
        ("a/b", "Try kfactk-a-b."),
        ("kfactk-" + 60 * "a", "at most 60 characters"),
        ("taming", "its folder would have the name of its module.* such as kfactk-taming"),
        ("test-this", "pytest would collect the module 'test_this'"),
        ("conftest-two", "pytest would collect"),
        ("-", "begin with a letter"),
        ("basis-", "end with a letter or digit"),
        ("kfactk", "leaves no name for the stage"),
        ("kfactk-2nd", "leaves no name for the stage, which begins with a letter"),
        (
            "lambda",
            "'lambda' is a keyword of Python and cannot be the name of a module. Give another "
            "name, such as kfactk-lambda.",
        ),
        ("match", "'match' is a keyword of Python"),
        (
            "random",
            "a module 'random' can be imported already, and one would hide the other. Give another "
            "name, such as kfactk-random.",
        ),
        (
            "kfactk-stages",
            "a module 'kfactk_stages' can be imported already.* such as kfactk-stages-basis",
        ),
        ("pytest-xdist", "a distribution 'pytest-xdist' is installed already"),
        (
            "kfactk-ekfac",
            "kfactk provides a basis 'ekfac' already, and of two .* such as kfactk-ekfac-2",
        ),
    ],
)
def test_new_plugin_refuses_names_that_cannot_be_used(
    name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        make(name, "basis", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_new_plugin_takes_the_name_of_a_stage_of_another_family(tmp_path: Path) -> None:
    assert make("kfactk-ekfac", "clip", tmp_path).is_dir()


def test_new_plugin_refuses_an_unknown_family(tmp_path: Path) -> None:
    with pytest.raises(UnknownStageError, match=r"no stage family 'bases'. Did you mean 'basis'"):
        make("kfactk-x", "bases", tmp_path)


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "broken link"])
def test_new_plugin_overwrites_nothing(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "kfactk-mine"
    if kind == "file":
        target.write_text("precious")
    elif kind == "broken link":
        target.symlink_to(tmp_path / "gone")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "README.md").write_text("precious")
    with pytest.raises(
        OptionError,
        match=r"kfactk-mine exists already, and nothing is overwritten. Give another name",
    ):
        make("kfactk-mine", "basis", tmp_path)
    assert list(tmp_path.iterdir()) == [target]
    if kind == "folder":
        assert [path.read_text() for path in target.iterdir()] == ["precious"]


def test_new_plugin_does_not_overwrite_a_folder_made_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "kfactk-mine"

    def meanwhile(package: Package, stages: Any) -> None:
        target.mkdir()
        (target / "README.md").write_text("precious")

    monkeypatch.setattr(scaffold, "_check_free", meanwhile)
    with pytest.raises(OptionError, match="cannot be made"):
        make("kfactk-mine", "basis", tmp_path)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["precious"]


def test_new_plugin_leaves_nothing_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = Path.write_text, []

    def full(path: Path, *arguments: Any, **more: Any) -> int:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(path)
        return write(path, *arguments, **more)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        OptionError,
        match=r"cannot be made: No space left on device. Give a --directory that exists, can be wr",
    ):
        make("kfactk-mine", "basis", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_new_plugin_refuses_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError,
        match=r"cannot be made: No such file or directory. Give a --directory that exists",
    ):
        make("kfactk-mine", "basis", tmp_path / "gone")


def test_templates_are_complete_and_all_used() -> None:
    expected = {
        template.format(family=family) + SUFFIX
        for template in FILES.values()
        for family in STAGE_HOOKS
    }
    assert {path.name for path in TEMPLATES.iterdir()} == expected
    assert all(hasattr(testing, name) for name in LAWS.values())


@each_family
def test_package_fills_in_every_name(family: str) -> None:
    files = Package("kfactk-mine", family).files()
    assert set(files) == {
        "pyproject.toml",
        "README.md",
        ".gitignore",
        "kfactk_mine.py",
        "test_kfactk_mine.py",
    }
    for name, text in files.items():
        assert "$" not in text, f"{name} has a placeholder left"
        used = set(string.Template(text).get_identifiers())
        assert not used, f"{name}: {used}"
    project = tomllib.loads(files["pyproject.toml"])["project"]
    assert project["dependencies"] == [f"kfactk>={importlib.metadata.version('kfactk')}"]
    assert project["optional-dependencies"] == {"test": ["kfactk[testing]"]}
    assert LAWS[family] in files["test_kfactk_mine.py"]


def folders(tmp_path: Path, name: str) -> list[Path]:
    """Make a package of each family."""
    return [make(f"{name}-{family}", family, tmp_path) for family in STAGE_HOOKS]


@pytest.mark.parametrize("name", ["kfactk-a", "kfactk-mine", "kfactk-rather-long"])
def test_package_passes_ruff(name: str, tmp_path: Path) -> None:
    made = folders(tmp_path, name)
    for command in (["check"], ["format", "--diff"]):
        call = [sys.executable, "-m", "ruff", *command, "--no-cache", *map(str, made)]
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def install(site: Site, folder: Path) -> None:
    """Install a package as `pip install` would, from its pyproject.toml."""
    made = tomllib.loads((folder / "pyproject.toml").read_text())
    for module in made["tool"]["setuptools"]["py-modules"]:
        (site.folder / f"{module}.py").write_text((folder / f"{module}.py").read_text())
    project = made["project"]
    site.install(project["name"], project["entry-points"]["kfactk"], project["version"])


def test_package_passes_its_own_tests(site: Site, tmp_path: Path) -> None:
    """One pytest runs over an installed package of each family, without laws that start processes.

    Of the recipes, one law runs. The thorough profile runs them all.
    """
    tests = tmp_path / "tests"
    tests.mkdir()
    for folder in folders(tmp_path, "kfactk-mine"):
        install(site, folder)
        for test in folder.glob("test_*.py"):
            (tests / test.name).write_text(test.read_text())
    (tests / "pytest.ini").write_text(
        "[pytest]\naddopts = -q --doctest-modules -p no:cacheprovider\n"
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("COV")},
        "PYTHONPATH": os.pathsep.join([str(site.folder), *sys.path]),
        "KFACTK_LAWS": "quick",
        "OMP_NUM_THREADS": "1",
    }
    some = (
        []
        if os.environ.get("KFACTK_LAWS") == "thorough"
        else ["-k", f"not ({STARTING}) and (not TestRecipe or equal_seeds)"]
    )
    call = [sys.executable, "-m", "pytest", str(tests), str(site.folder), *some]
    done = subprocess.run(
        call, cwd=tests, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    listed = {
        (info.family, info.name, info.distribution)
        for info in Registry.load(site.entry_points()).stages()
    }
    assert listed == {(family, f"mine_{family}", f"kfactk-mine-{family}") for family in STAGE_HOOKS}


BROKEN = [  # family, text, the text that replaces it, the law that fails, its message
    (
        "basis",
        "coefficients, self.left.mT, self.right.mT",
        "coefficients, self.left, self.right",
        "test_it_is_self_adjoint",
        "solve is not self-adjoint",
    ),
    (
        "basis",
        "(spectrum, damping,",
        "(spectrum, 0.0,",
        "test_with_much_damping_it_divides_by_it",
        r"damping \* P is not the identity",
    ),
    (
        "basis",
        "linalg.eigh(matrix)",
        "linalg.eigh(matrix.mT @ matrix)",
        "test_one_row_gives_the_fisher",
        "F is not the Fisher matrix",
    ),
    ("curvature", ".scaled(1 / rows)", "", "test_g_is_a_mean_over_rows", "G is not the mean"),
    (
        "curvature",
        " * call.scale",
        "",
        "test_the_scale_of_a_call_is_honoured",
        "per-example gradients: .* do not count",
    ),
    (
        "curvature",
        '"forward" in vars(module)',
        "False",
        "test_what_cannot_be_treated_is_refused",
        "accepts Linear with another forward",
    ),
    (
        "fisher",
        "math.sqrt(self.draws)",
        "self.draws",
        "test_outer_products_converge_to_the_dense_fisher",
        "does not converge",
    ),
    (
        "likelihood",
        "(0.5 * view.detach())",
        "view.detach()",
        "test_root_columns_make_the_fisher_information",
        "do not sum to the Fisher",
    ),
    (
        "likelihood",
        "view + torch.lgamma",
        "view - torch.lgamma",
        "test_nll_is_minus_the_log_probability",
        "nll is not minus the log-prob",
    ),
    (
        "link",
        "/ self.limit, self.limit)",
        "/ self.limit, self.limit) - 9.0",
        "test_correction_is_positive_definite",
        "not positive definite",
    ),
    (
        "clip",
        "norms > bounds, bounds",
        "norms > 0, bounds",
        "test_never_enlarges",
        "the clip enlarges: the norm .* became",
    ),
    (
        "update",
        "weight_decay=weight_decay",
        "weight_decay=0.0",
        "test_equals_its_counterpart",
        "not those of the counterpart",
    ),
    (
        "update",
        "groups, lr",
        "[dict(group) for group in groups], lr",
        "test_is_an_optimizer_over_the_given_groups",
        "groups are copied",
    ),
    (
        "tracker",
        "(step, name, float(metric))",
        "(step, name, 0.0)",
        "test_records_what_happened",
        "after close.*, .* of step .* is 0.0, not",
    ),
    (
        "tracker",
        "float(metric))",
        "f'{float(metric):g}')",
        "test_records_what_happened",
        "after close.*, .* of step .* is .*, not",
    ),
    (
        "controller",
        "return 0, -model.slopes[0] / curvature if",
        "return 0, -3 * model.slopes[0] / curvature if",
        "test_a_step_lowers_the_model",
        r"M\(d\) - M\(0\) is",
    ),
    (
        "pace",
        "return min(2 * intervals[0], self.longest)",
        "return intervals[0] / 2",
        "test_interval_counts_units",
        "the interval is .*: make it a whole number of at least 1",
    ),
    (
        "placement",
        "number % ranks,",
        "number,",
        "test_every_piece_has_ranks_that_exist",
        r"its gradient workers are \(\d,\), not a tuple of ascending ranks",
    ),
    (
        "placement",
        "gradient_workers=owner",
        "gradient_workers=(1,)",
        "test_one_rank_alone_does_all",
        "alone, rank 0 has to do all of",
    ),
]


@pytest.mark.parametrize(("family", "right", "wrong", "law", "message"), BROKEN)
def test_laws_of_a_package_find_mistakes(
    family: str, right: str, wrong: str, law: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Package("kfactk-mine", family)
    files = package.files()
    text = files[f"{package.module}.py"]
    assert text.count(right) == 1
    stages, tests = types.ModuleType("broken_stage"), types.ModuleType("its_tests")
    monkeypatch.setitem(sys.modules, stages.__name__, stages)
    exec(text.replace(right, wrong), stages.__dict__)
    exec(files[f"test_{package.module}.py"], tests.__dict__)
    laws, stage = vars(tests)[f"Test{package.class_name}"], vars(stages)[package.class_name]
    spec = {**laws.stage, "name": stage} if isinstance(laws.stage, dict) else stage
    if family == "tracker":
        monkeypatch.setattr(laws, "stage_in", lambda self, folder: stage(folder / "run.csv", 2))
    found = caught(laws, spec, law, shrunk=False)
    assert law in found, f"{law} does not fail where {right!r} is {wrong!r}"
    assert re.search(message, found[law]), found[law]
