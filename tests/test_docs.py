"""README and the documentation: every example runs, every public name and hook is described, every link leads somewhere."""

import contextlib
import doctest
import inspect
import io
import re
import sys
import tomllib
import types
from pathlib import Path

import attrs
import pytest

import kfactk
from kfactk import hookspecs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCS = "\n".join(page.read_text() for page in PAGES[1:])
COMMANDS = ["pip install nox && nox -s experiments", "pip install nox && nox -s tests"]

NOT_RUN = "{ .python .not-run }"
LANGUAGES = {"python", NOT_RUN, "console", "toml", "text", 'text title="Output"'}
MOST_NOT_RUN = 2

page_names = [str(page.relative_to(ROOT)) for page in PAGES]
each_page = pytest.mark.parametrize("page", PAGES, ids=page_names)


@attrs.frozen
class Block:
    """A fenced block: what stands behind the opening fence, its text, and the line its text begins on."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    found, fence, start = [], None, 0
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip().startswith("```"):
            continue
        if fence is None:
            fence, start = line.strip().removeprefix("```").strip(), number
        else:
            text = inspect.cleandoc("\n".join(["", *lines[start : number - 1]]))
            found.append(Block(fence, text + "\n", start + 1))
            fence = None
    assert fence is None, f"{page.name}:{start}: a fence is not closed"
    return found


@each_page
def test_fences_are_of_known_kinds(page: Path) -> None:
    odd = [f"line {block.line}: {block.language!r}" for block in blocks(page) if block.language not in LANGUAGES]
    assert not odd, f"use one of {sorted(LANGUAGES)}, so that examples are run: {odd}"


def test_few_examples_are_not_run() -> None:
    assert sum(block.language == NOT_RUN for page in PAGES for block in blocks(page)) <= MOST_NOT_RUN


@each_page
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page share a namespace; a block of output must be what the one before it printed."""
    module = types.ModuleType(f"example_{page.stem.replace('-', '_').lower()}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    printed = ""
    for block in blocks(page):
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, module.__dict__)
            printed = out.getvalue()
        elif block.language.startswith("text title"):
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert doctest.OutputChecker().check_output(block.text, printed, flags), f"line {block.line}: printed\n{printed}"
        elif block.language == "toml":
            tomllib.loads(block.text)


def test_readme_names_exactly_two_commands() -> None:
    readme = PAGES[0]
    shell = [line.removeprefix("$ ") for block in blocks(readme) if block.language == "console" for line in block.text.splitlines()]
    assert shell == COMMANDS
    prose = readme.read_text()
    for command in COMMANDS:
        prose = prose.replace(command, "")
    assert not re.search(r"\b(pip|uv|conda|nox -s|git clone|apt)\b", prose), "a set-up command besides the two"


def test_the_commands_are_nox_sessions() -> None:
    source = (ROOT / "noxfile.py").read_text()
    for command in COMMANDS:
        assert f"def {command.split()[-1]}(session: nox.Session)" in source


def hooks() -> list[str]:
    return [name for name, _ in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("kfactk_")]


def public_names() -> list[str]:
    return [name for name, value in vars(kfactk).items() if not name.startswith("_") and not inspect.ismodule(value)]


def test_hooks_and_public_names_are_found() -> None:
    assert {*hookspecs.STAGE_HOOKS.values(), "kfactk_bound", "kfactk_stepped"} == set(hooks())
    assert {"build", "Recipe", "Optimizer", "KfactkError", "hookimpl"} <= set(public_names())


@pytest.mark.parametrize("name", hooks())
def test_hooks_are_documented(name: str) -> None:
    assert re.search(rf"\b{name}\b", DOCS), f"no page of docs/ mentions the hook {name}"


def test_public_names_are_documented() -> None:
    missing = [name for name in public_names() if not re.search(rf"`(kfactk\.)?{name}\b|^::: kfactk\.(\w+\.)*{name}$", DOCS, re.MULTILINE)]
    assert not missing, f"no page of docs/ mentions {missing}"


def test_every_error_has_its_remedy() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    errors = [name for name in public_names() if name.endswith(("Error", "Warning"))]
    missing = [name for name in errors if not re.search(rf"^#+ .*`{name}`", page, re.MULTILINE)]
    assert not missing, f"docs/troubleshooting.md has no section on {missing}"


def test_every_stage_is_described() -> None:
    page = (ROOT / "docs" / "stages.md").read_text()
    names = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["kfactk"]
    missing = [name for name in names if f"`{name.split('.')[1]}`" not in page]
    assert not missing, f"docs/stages.md does not mention {missing}"


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith(("https://", "#"))]
    broken = [target for target in targets if not (page.parent / target.split("#")[0]).exists()]
    assert not broken, f"{page.name}: {broken}"


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    missing = [name for page in PAGES[1:] if (name := page.relative_to(ROOT / "docs").as_posix()) not in config]
    assert not missing, f"mkdocs.yml does not list {missing}"
