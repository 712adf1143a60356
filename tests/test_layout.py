"""The shape of the project: which room imports which, what is an entry point, where tests are."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import attrs
import pytest

pytestmark = pytest.mark.xdist_group("layout")  # one worker, so that sources are read once

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
ENTRY_POINTS: dict[str, str] = PYPROJECT["project"]["entry-points"]["kfactk"]

VOCABULARY = {
    *("_version", "assignment", "derivatives", "errors", "jets", "linalg", "masking"),
    *("operators", "options"),
    *("samples", "sides"),
    *("stages", "statistics", "timing", "validation"),
}
FLOORS: tuple[set[str], ...] = (
    VOCABULARY,
    {"distributed"},
    {"registry", "capture", "preconditioner"},
    {"optim"},
    {"recipe"},
    {"costmodel", "testing"},
    {"cli"},
    {"__main__"},
)
"""Rooms from the ground up. A room imports itself and the floors below, no neighbour.

The modules of the vocabulary may import each other.
"""
FOR_STAGES = {
    *("errors", "linalg", "masking", "operators", "options", "samples", "sides", "stages"),
    *("costmodel.cost", "costmodel.hardware", "registry.torch_optimizer"),
}
"""Modules whose public names a stage may import, besides what `kfactk` itself exports."""
PURE = ("errors", "linalg", "statistics")
ACROSS = {"situations", "training_loops", "equivalence", "integrations", "peers"}
"""Folders of tests that mirror no source: they drive the whole package."""
COMMON_WORDS = {"auto", "none", "value", "norm", "exact", "momentum", "gradient", "rows"}
"""Stage names that also mean something else as a string."""
LONGEST_FUNCTION = 70
"""Lines, without those of the docstring."""
OLD_NAMES = re.compile(
    r"Observer|Capture|LayerState|LayerView|Verdicts|Recorder|Originals|Survey|Ranks|Places|Early"
    r"|Calendar|Agenda|Blocks|Coupling|Need|Due|Use|MakesOperator|PartsFactors|Redecomposes"
    r"|blaming|standing_in|redecomposes?|makes_operator|parts_factors|back_to|calendar|agenda"
    r"|(decompos|hold|keep)ers?|audience|late_layers|taking_turns"
)
"""Names that the glossary of the design has replaced."""


@attrs.frozen
class Import:
    """One name of an import statement, `name` empty for `import module`.

    Args:
        module: What is imported from.
        name: What is imported.
        line: Where.
        top: Whether the statement runs when the module is imported.
    """

    module: str
    name: str
    line: int
    top: bool


def sources(package: str) -> dict[str, Path]:
    """Return the modules of one of our packages, by dotted name."""
    root = ROOT / SETUPTOOLS["package-dir"][package]
    return {_dotted(package, path.relative_to(root)): path for path in sorted(root.rglob("*.py"))}


def _dotted(package: str, path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))


@cache
def imports(path: Path) -> list[Import]:
    """Return all imports of a file, also those for types only and those inside functions."""
    return list(_imports(ast.parse(path.read_text()), top=True))


def _imports(node: ast.AST, top: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, "", node.lineno, top) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: import absolutely, for this test to follow"
        for alias in node.names:
            yield Import(node.module or "", alias.name, node.lineno, top)
    lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    top = top and not lazy and not _for_types(node)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, top)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


@cache
def edges(package: str) -> dict[str, dict[str, int]]:
    """Return, for each module of a package, the modules of the package it imports, with lines."""
    files, found = sources(package), {}
    for name, path in files.items():
        found[name] = {}
        for item in imports(path):
            whole = f"{item.module}.{item.name}"
            target = whole if whole in files else item.module
            if target in files and target != name:
                found[name][target] = item.line
    return found


def room(module: str) -> str:
    """Return the room of a module of kfactk, "" for `kfactk/__init__.py`."""
    return [*module.split("."), ""][1]


def test_every_module_is_in_a_room() -> None:
    rooms = {room(name) for name in sources("kfactk")} - {""}
    assert rooms == set().union(*FLOORS)


@pytest.mark.parametrize("name", sorted(set().union(*FLOORS)))
def test_rooms_import_what_is_below(name: str) -> None:
    floor = next(number for number, rooms in enumerate(FLOORS) if name in rooms)
    allowed = {name}.union(*FLOORS[:floor]) | (VOCABULARY if name in VOCABULARY else set())
    allowed |= {""} if name == "testing" else set()
    wrong = [
        f"{module}:{line} imports {target}"
        for module, targets in edges("kfactk").items()
        for target, line in targets.items()
        if room(module) == name and room(target) not in allowed
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["kfactk", "kfactk_stages"])
def test_no_import_circle(package: str) -> None:
    graph = {name: set(targets) - {package} for name, targets in edges(package).items()}
    while free := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in free}
    assert not graph, f"modules in import circles, or above some: {sorted(graph)}"


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("kfactk", {"kfactk_stages", "experiments", "benchmarks", "tests"}),
        ("kfactk_stages", {"experiments", "benchmarks", "tests"}),
    ],
)
def test_packages_do_not_look_up(package: str, forbidden: set[str]) -> None:
    wrong = [
        f"{name}:{item.line} imports {item.module}"
        for name, path in sources(package).items()
        for item in imports(path)
        if item.module.split(".")[0] in forbidden
    ]
    assert not wrong, wrong


def test_stages_import_only_what_kfactk_makes_public() -> None:
    public = {item.name for item in imports(ROOT / "kfactk" / "__init__.py")} | FOR_STAGES
    wrong = []
    for name, path in sources("kfactk_stages").items():
        for item in imports(path):
            package, _, module = item.module.partition(".")
            exported = item.name in public if not module else module in FOR_STAGES
            if package == "kfactk" and (not exported or item.name.startswith("_")):
                wrong.append(f"{name}:{item.line} imports {item.name} from {item.module}")
    assert not wrong, "\n".join(wrong)


def _declared(*extras: str) -> set[str]:
    project = PYPROJECT["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][e] for e in extras)]
    return {re.split(r"[^\w-]", text)[0] for each in lists for text in each}


@pytest.mark.parametrize("package", ["kfactk", "kfactk_stages"])
def test_only_declared_dependencies_are_imported(package: str) -> None:
    known = _declared() | set(SETUPTOOLS["package-dir"]) | sys.stdlib_module_names
    wrong = []
    for name, path in sources(package).items():
        for item in imports(path):
            root = item.module.split(".")[0]
            lazy = name.startswith(f"kfactk_stages.tracker.{root}") and not item.top
            kit = name.startswith("kfactk.testing") and root in _declared("testing")
            if root not in known and not lazy and not kit:
                wrong.append(f"{name}:{item.line} imports {root}")
    assert not wrong, wrong


def test_the_experiments_import_only_what_their_extra_declares() -> None:
    modules = {"scikit-learn": "sklearn", "pillow": "PIL"}
    modules["pytorch-optimizer"] = "pytorch_optimizer"
    known = {modules.get(name, name) for name in _declared("experiments")}
    known |= {"kfactk", "kfactk_stages", "experiments"} | sys.stdlib_module_names
    wrong = [
        f"{path.name}:{item.line} imports {item.module}"
        for path in sorted((ROOT / "experiments").rglob("*.py"))
        for item in imports(path)
        if item.module.split(".")[0] not in known
    ]
    assert not wrong


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_know_no_layers_and_no_processes(name: str) -> None:
    path = ROOT / "kfactk" / f"{name}.py"
    nodes = ast.walk(ast.parse(path.read_text()))
    used = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    used |= {f"{item.module}.{item.name}" for item in imports(path)}
    wrong = sorted(text for text in used if re.match(r"torch\.(nn|distributed|autograd)\b", text))
    assert not wrong, f"kfactk.{name} uses {wrong}"


def implements_hooks(path: Path) -> bool:
    return any(
        ast.unparse(decorator).split("(")[0].split(".")[-1] == "hookimpl"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
    )


def test_entry_points_are_the_modules_that_implement_hooks() -> None:
    modules = {name for name, path in sources("kfactk_stages").items() if implements_hooks(path)}
    assert modules
    assert modules == set(ENTRY_POINTS.values())


def test_entry_points_are_named_after_their_modules() -> None:
    assert all(module == f"kfactk_stages.{name}" for name, module in ENTRY_POINTS.items())


@pytest.mark.parametrize("package", ["kfactk", "kfactk_stages"])
def test_every_package_directory_is_in_the_wheel(package: str) -> None:
    files = sources(package)
    packages = {name for name, path in files.items() if path.name == "__init__.py"}
    assert {name.rpartition(".")[0] for name in files} - packages == {""}, "no __init__.py"
    listed = {name for name in SETUPTOOLS["packages"] if name.split(".")[0] == package}
    assert packages == listed
    assert "py.typed" in SETUPTOOLS["package-data"][package]


def test_the_core_names_no_stage() -> None:
    stages = {name.split(".")[1] for name in ENTRY_POINTS} - COMMON_WORDS
    wrong = [
        f"{name}:{node.lineno} {node.value!r}"
        for name, path in sources("kfactk").items()
        if name != "kfactk.recipe"  # its defaults
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in stages
    ]
    assert not wrong, wrong


def python_files() -> list[Path]:
    folders = ["kfactk", "plugins", "experiments", "mutation", "tests", "benchmarks", "docs"]
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [ROOT / "noxfile.py", *(path for path in found if "build" not in path.parts)]


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def test_no_function_is_long() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in python_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and _lines(node) - (_lines(node.body[0]) if ast.get_docstring(node) else 0)
        > LONGEST_FUNCTION
    ]
    assert not long, "\n".join(long)


def _identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the names that code gives and uses, with lines."""
    for node in ast.walk(tree):
        for field in ("name", "id", "attr", "arg"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield name, getattr(node, "lineno", 0)


def test_names_that_were_replaced_stay_away() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in python_files()
        for name, line in _identifiers(ast.parse(path.read_text()))
        if OLD_NAMES.fullmatch(name)
    ]
    assert not wrong, "the glossary has other names for these:\n" + "\n".join(wrong)


def test_every_module_has_tests_at_its_own_path() -> None:
    """What begins with an underscore may also be tested through the modules that use it."""
    missing = []
    for package in SETUPTOOLS["package-dir"]:
        for module, path in sources(package).items():
            *folders, name = module.split(".")
            if path.name != "__init__.py" and "._" not in module:
                folder = (ROOT / "tests").joinpath(*folders)
                missing += [] if any(folder.glob(f"test_{name}*.py")) else [module]
    assert not missing, f"modules without tests/PATH/test_NAME*.py: {missing}"


def test_folders_of_tests_mirror_those_of_the_source() -> None:
    roots = dict(SETUPTOOLS["package-dir"])
    roots |= {name: name for name in ("benchmarks", "docs", "experiments", "mutation")}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        top, *folders = path.relative_to(ROOT / "tests").parent.parts or ("",)
        if top and top not in ACROSS:
            assert top in roots, f"tests/{top} mirrors no folder of the source"
            assert (ROOT / roots[top]).joinpath(*folders).is_dir(), f"{path} mirrors no folder"
