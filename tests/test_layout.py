"""The shape of the project: which way imports point, what is an entry point, how long a file may be."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
ENTRY_POINTS: dict[str, str] = PYPROJECT["project"]["entry-points"]["kfactk"]

FOUNDATION = {"errors", "linalg", "averages", "samples"}
ABOVE = {  # module -> the modules right above it, which import it
    "stages": {"hookspecs", "capture"},
    "hookspecs": {"registry"},
    "registry": {"recipe"},
    "capture": {"preconditioner"},
    "shards": {"originals"},
    "originals": {"preconditioner"},
    "preconditioner": {"optimizer"},
    "optimizer": {"recipe"},
    "recipe": set(),
}
DOCUMENTED = FOUNDATION | {"stages", "torch_optimizer", "costs", "machines"}
"""Modules of kfactk whose public names stages may import, besides what `kfactk` itself exports."""
LOOPS = {Path("distributed")}
"""Folders of tests that mirror no source: whole training loops on several ranks."""
COMMON_WORDS = {"none", "value", "norm", "exact", "momentum"}
"""Stage names that also mean something else as a string."""
LONGEST_FILE, LONGEST_FUNCTION = 400, 70


@attrs.frozen
class Import:
    """One import statement's one name, `name` empty for `import module`; `top` unless it stands inside a function."""

    module: str
    name: str
    line: int
    top: bool


def sources(package: str) -> dict[str, Path]:
    """Module name to file, for one of our packages."""
    root = ROOT / SETUPTOOLS["package-dir"][package]
    return {
        module_name(package, path.relative_to(root)): path for path in sorted(root.rglob("*.py"))
    }


def module_name(package: str, path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imports(path: Path) -> list[Import]:
    """Imports that happen at run time: all but those under `if TYPE_CHECKING:`."""
    return list(_imports(ast.parse(path.read_text()), top=True))


def _imports(node: ast.AST, top: bool) -> Iterator[Import]:
    match node:
        case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
            children = list[ast.AST](node.orelse)
        case ast.Import():
            yield from (Import(alias.name, "", node.lineno, top) for alias in node.names)
            return
        case ast.ImportFrom():
            assert node.level == 0, (
                f"line {node.lineno}: import absolutely, so that this test can follow"
            )
            yield from (
                Import(node.module or "", alias.name, node.lineno, top) for alias in node.names
            )
            return
        case _:
            children = list(ast.iter_child_nodes(node))
    top = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in children:
        yield from _imports(child, top)


def graph() -> dict[str, set[str]]:
    """For each module of kfactk the modules of kfactk that it imports, "" standing for `kfactk/__init__.py`."""
    files = sources("kfactk")
    edges = {}
    for name, path in files.items():
        found = set()
        for item in imports(path):
            target = (
                f"{item.module}.{item.name}"
                if f"{item.module}.{item.name}" in files
                else item.module
            )
            if target in files and target != name:
                found.add(target.removeprefix("kfactk").removeprefix("."))
        edges[name.removeprefix("kfactk").removeprefix(".")] = found
    return edges


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = list(edges.get(start, ()))
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += edges.get(name, ())
    return seen


def allowed_below(name: str) -> set[str]:
    """The named modules that `name` may reach: those it stands above."""
    if name in FOUNDATION:
        return FOUNDATION - {name}
    return FOUNDATION | {low for low in ABOVE if name in reachable(low, ABOVE)}


def test_the_whole_core_is_read() -> None:
    missing = (FOUNDATION | set(ABOVE)) - set(graph())
    assert not missing, f"modules that this test names and kfactk lacks: {sorted(missing)}"


@pytest.mark.parametrize("name", sorted(FOUNDATION | set(ABOVE)))
def test_imports_point_down(name: str) -> None:
    wrong = reachable(name, graph()) & (FOUNDATION | set(ABOVE)) - allowed_below(name)
    assert not wrong, f"kfactk.{name} reaches, directly or through helpers, {sorted(wrong)}"


def test_no_import_cycle_in_the_core() -> None:
    edges = {name: targets - {""} for name, targets in graph().items() if name}
    cyclic = sorted(name for name in edges if name in reachable(name, edges))
    assert not cyclic, f"modules in import cycles: {cyclic}"


def test_the_core_imports_from_modules_not_from_its_own_front() -> None:
    fronts = sorted(
        name
        for name, targets in graph().items()
        if "" in targets and name.split(".")[0] not in {"__main__", "testing"}
    )
    assert not fronts, f"modules that import names from kfactk/__init__.py: {fronts}"


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("kfactk", {"kfactk_stages", "experiments", "tests"}),
        ("kfactk_stages", {"experiments", "tests"}),
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
    public = {item.name for item in imports(ROOT / "kfactk" / "__init__.py")}
    wrong = []
    for name, path in sources("kfactk_stages").items():
        for item in imports(path):
            if item.module.split(".")[0] != "kfactk":
                continue
            module = item.module.removeprefix("kfactk").removeprefix(".")
            is_public = (
                item.name in public | DOCUMENTED
                if not module
                else module in DOCUMENTED and not item.name.startswith("_")
            )
            if not is_public:
                wrong.append(
                    f"{name}:{item.line} imports {item.name or 'module'} from {item.module}"
                )
    assert not wrong, wrong


@pytest.mark.parametrize("package", ["kfactk", "kfactk_stages"])
def test_only_declared_dependencies_are_imported(package: str) -> None:
    project = PYPROJECT["project"]
    declared, kit = (
        {re.split(r"[^\w-]", text)[0] for text in each}
        for each in (project["dependencies"], project["optional-dependencies"]["testing"])
    )
    ours = set(SETUPTOOLS["package-dir"])
    wrong = []
    for name, path in sources(package).items():
        for item in imports(path):
            root = item.module.split(".")[0]
            optional = (name == f"kfactk_stages.tracker.{root}" and not item.top) or (
                name.startswith("kfactk.testing") and root in kit
            )
            if root not in declared | ours | sys.stdlib_module_names and not optional:
                wrong.append(f"{name}:{item.line} imports {root}")
    assert not wrong, f"not among the dependencies {sorted(declared)}: {wrong}"


def test_the_experiments_import_only_what_their_extra_declares() -> None:
    project = PYPROJECT["project"]
    declared = {
        re.split(r"[^\w-]", text)[0]
        for text in [*project["dependencies"], *project["optional-dependencies"]["experiments"]]
    }
    modules = {"scikit-learn": "sklearn", "pillow": "PIL"}
    known = (
        {modules.get(name, name) for name in declared}
        | {"kfactk", "kfactk_stages", "experiments"}
        | sys.stdlib_module_names
    )
    wrong = [
        f"{path.name}:{item.line} imports {item.module}"
        for path in sorted((ROOT / "experiments").rglob("*.py"))
        for item in imports(path)
        if item.module.split(".")[0] not in known
    ]
    assert not wrong


@pytest.mark.parametrize("name", ["errors", "linalg", "averages"])
def test_pure_modules_know_no_layers_and_no_processes(name: str) -> None:
    path = ROOT / "kfactk" / f"{name}.py"
    used = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    used |= {f"{item.module}.{item.name}" for item in imports(path)}
    wrong = sorted(text for text in used if re.match(r"torch\.(nn|distributed|autograd)\b", text))
    assert not wrong, f"kfactk.{name} uses {wrong}"


def implements_hooks(path: Path) -> bool:
    decorators = [
        d
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        for d in node.decorator_list
    ]
    return any(ast.unparse(d).split("(")[0].split(".")[-1] == "hookimpl" for d in decorators)


def test_entry_points_are_the_modules_that_implement_hooks() -> None:
    modules = {name for name, path in sources("kfactk_stages").items() if implements_hooks(path)}
    registered = set(ENTRY_POINTS.values())
    assert modules, "no module with a hookimpl was found"
    assert not modules - registered, (
        f"stage modules missing from [project.entry-points.kfactk]: {sorted(modules - registered)}"
    )
    assert not registered - modules, (
        f"entry points without a module that implements a hook: {sorted(registered - modules)}"
    )


def test_entry_points_are_named_after_their_modules() -> None:
    assert {f"kfactk_stages.{name}": module for name, module in ENTRY_POINTS.items()} == {
        m: m for m in ENTRY_POINTS.values()
    }


@pytest.mark.parametrize("package", ["kfactk", "kfactk_stages"])
def test_every_package_directory_is_in_the_wheel(package: str) -> None:
    found = {
        name.rpartition(".")[0] if path.name != "__init__.py" else name
        for name, path in sources(package).items()
    }
    listed = {name for name in SETUPTOOLS["packages"] if name.split(".")[0] == package}
    assert found == listed
    assert "py.typed" in SETUPTOOLS["package-data"][package]
    for name in listed:
        assert f"{name}" in sources(package), f"{name} has no __init__.py"


def test_the_core_names_no_stage() -> None:
    stages = {name.split(".")[1] for name in ENTRY_POINTS} - COMMON_WORDS
    wrong = []
    for name, path in sources("kfactk").items():
        if name == "kfactk.recipe":  # its defaults
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in stages:
                wrong.append(f"{name}:{node.lineno} {node.value!r}")
    assert not wrong, wrong


def python_files() -> list[Path]:
    folders = ["kfactk", "plugins", "experiments", "mutation", "tests", "benchmarks"]
    return [
        ROOT / "noxfile.py",
        *sorted(
            path
            for folder in folders
            for path in (ROOT / folder).rglob("*.py")
            if "build" not in path.parts
        ),
    ]


def test_no_file_is_long() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in python_files()
        if (count := len(path.read_text().splitlines())) > LONGEST_FILE
    }
    assert not long, long


def test_no_function_is_long() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in python_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > LONGEST_FUNCTION
    ]
    assert not long, long


@pytest.mark.parametrize("module", sorted(ENTRY_POINTS.values()))
def test_every_stage_has_tests_at_its_own_path(module: str) -> None:
    *folders, name = module.split(".")
    assert list((ROOT / "tests").joinpath(*folders).glob(f"test_{name}*.py"))


def test_folders_of_tests_mirror_those_of_the_source() -> None:
    for package, folder in SETUPTOOLS["package-dir"].items():
        tests = {
            path.relative_to(ROOT / "tests" / package).parent
            for path in (ROOT / "tests" / package).rglob("test_*.py")
        }
        assert tests - LOOPS <= {
            path.relative_to(ROOT / folder).parent for path in sources(package).values()
        }
