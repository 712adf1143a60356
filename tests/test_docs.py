"""README and documentation: examples run, public names are described, links are valid."""

import contextlib
import doctest
import inspect
import io
import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import attrs
import pytest

import kfactk
from kfactk import testing
from kfactk.registry import hookspecs
from kfactk.registry.registry import registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCS = "\n".join(page.read_text() for page in PAGES[1:])
COMMANDS = ["pip install nox && nox -s experiments", "pip install nox && nox -s tests"]

NOT_RUN = "{ .python .not-run }"
LANGUAGES = {
    "python",
    NOT_RUN,
    "console",
    "toml",
    "text",
    'text title="Output"',
    "math",
    "laws",
    "message",
}
LANGUAGES |= {
    f'py title="{path.name}"' for path in (ROOT / "docs" / "examples").glob("*.py")
}  # included, and run by tests/docs
LANGUAGES |= {
    'python title="kfactk_diagonal.py"',
    'python title="test_kfactk_diagonal.py"',
    'toml title="pyproject.toml"',
}
MOST_NOT_RUN = 2

page_names = [str(page.relative_to(ROOT)) for page in PAGES]
OURS = "kfactk"
"""The distribution of the first-party stages."""
GREEK = {
    "alpha": "α",
    "delta": "δ",
    "epsilon": "ε",
    "lambda": "λ",
    "mu": "μ",
    "nu": "ν",
    "phi": "φ",
    "pi": "π",
    "rho": "ρ",
    "tau": "τ",
}
GREEK |= {"theta": "θ", "Omega": "Ω", "eta": "η", "gamma": "γ", "sigma": "σ"}

each_page = pytest.mark.parametrize("page", PAGES, ids=page_names)


@attrs.frozen
class Block:
    """A fenced block: its language, its text, and the line on which its text begins."""

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
    assert fence is None, f"{page.name}:{start}: this fence has no end"
    return found


@each_page
def test_fences_have_a_known_language(page: Path) -> None:
    odd = [
        f"line {block.line}: {block.language!r}"
        for block in blocks(page)
        if block.language not in LANGUAGES
    ]
    assert not odd, f"use one of {sorted(LANGUAGES)}, so that examples are run: {odd}"


def test_fences_that_do_not_run_are_few() -> None:
    assert (
        sum(block.language == NOT_RUN for page in PAGES for block in blocks(page)) <= MOST_NOT_RUN
    )


@each_page
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page share a namespace; a block of output follows its code."""
    module = types.ModuleType(f"example_{page.stem.replace('-', '_').lower()}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    printed = ""
    for block in blocks(page):
        if block.language.split(" title")[0] == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, module.__dict__)
            printed = out.getvalue()
        elif block.language.startswith("text title"):
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert doctest.OutputChecker().check_output(block.text, printed, flags), (
                f"line {block.line}: printed\n{printed}"
            )
        elif block.language.split(" title")[0] == "toml":
            tomllib.loads(block.text)


def test_lines_of_methods_build_what_they_name() -> None:
    """A basis or a clip says little of a method without its update rule: the default is Adam."""
    rows = [row for row in (ROOT / "docs/methods.md").read_text().splitlines() if row[:2] == "| "]
    lines = re.findall(r"`([a-z_]+=[^`]*)`", "\n".join(row.split(" | ")[1] for row in rows))
    assert len(lines) > len(rows) / 2
    for line in lines:
        eval(f"kfactk.build({line})", {"kfactk": kfactk})
        assert "update=" in line or not re.search("basis=|clip=", line), line


def test_readme_has_exactly_two_commands() -> None:
    readme = PAGES[0]
    shell = [
        line.removeprefix("$ ")
        for block in blocks(readme)
        if block.language == "console"
        for line in block.text.splitlines()
    ]
    assert shell == COMMANDS
    prose = readme.read_text()
    for command in (*COMMANDS, "`pip install .`", "`git clone`"):
        prose = prose.replace(command, "")
    assert not re.search(r"\b(pip|uv|conda|nox -s|git clone|apt)\b", prose), (
        "the README has a set-up command besides the two, the clone and the installation"
    )


def test_citations_name_the_version() -> None:
    for page, entry in (("CITATION.cff", "version: (.+)"), ("docs/citing.md", "version = {(.+)}")):
        found = re.findall(rf"^ *{entry}$", (ROOT / page).read_text(), re.MULTILINE)
        assert found == [kfactk.__version__], page


def test_site_build_fails_on_warnings() -> None:
    source = (ROOT / "noxfile.py").read_text()
    assert '"--strict"' in source
    assert "--quiet" not in source.split("def docs(")[1].split("@nox")[0], (
        "with --quiet, mkdocs counts no warnings, so --strict has no effect"
    )


def test_readme_commands_are_nox_sessions() -> None:
    source = (ROOT / "noxfile.py").read_text()
    for command in COMMANDS:
        assert f"def {command.split()[-1]}(session: nox.Session)" in source


def hooks() -> list[str]:
    return [
        name
        for name, _ in inspect.getmembers(hookspecs, inspect.isfunction)
        if name.startswith("kfactk_")
    ]


def public_names(module: types.ModuleType = kfactk) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]


def test_public_names_include_hooks_and_classes() -> None:
    assert {*hookspecs.STAGE_HOOKS.values(), "kfactk_bound", "kfactk_stepped"} == set(hooks())
    assert {"build", "Recipe", "Optimizer", "KfactkError", "hookimpl"} <= set(public_names())


@pytest.mark.parametrize("name", hooks())
def test_hooks_are_documented(name: str) -> None:
    assert re.search(rf"\b{name}\b", DOCS), f"no page of docs/ mentions the hook {name}"


def test_public_names_are_documented() -> None:
    missing = [
        name
        for name in public_names()
        if not re.search(rf"`(kfactk\.)?{name}\b|^::: kfactk\.(\w+\.)*{name}$", DOCS, re.MULTILINE)
    ]
    assert not missing, f"no page of docs/ mentions {missing}"


def test_errors_have_a_section_with_the_remedy() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    errors = [name for name in public_names() if name.endswith(("Error", "Warning"))]
    missing = [name for name in errors if not re.search(rf"^#+ .*`{name}`", page, re.MULTILINE)]
    assert not missing, f"docs/troubleshooting.md has no section on {missing}"


def rows(page: str, heading: str) -> list[list[str]]:
    """Return rows of the tables of a page with this first row, each after its section."""
    section, inside, found = "", False, []
    for line in (ROOT / "docs" / page).read_text().splitlines():
        section = line.removeprefix("## ") if line.startswith("## ") else section
        inside = line == heading or (inside and line.startswith("|"))
        if inside and line != heading and not line.startswith("|---"):
            found.append([section, *(cell.strip() for cell in line.strip("|").split("|"))])
    return found


def test_stages_are_in_the_section_of_their_family() -> None:
    page = (ROOT / "docs" / "stages.md").read_text()
    sections = {part.split("\n")[0]: part for part in page.split("\n## ")[1:]}
    missing = [
        info
        for info in registry().stages()
        if info.distribution == OURS and f"`{info.name}`" not in sections[info.family]
    ]
    assert not missing, f"docs/stages.md does not mention {missing}"


def test_option_tables_equal_the_registry() -> None:
    listed = {
        (family, stage, option.strip("`"), default.strip("`"))
        for family, option, stages, default, _ in rows(
            "stages.md", "| option | of | default | sets |"
        )
        for stage in re.findall("`(.+?)`", stages)
    }
    there = {
        (info.family, info.name, option.name, repr(option.default))
        for info in registry().stages()
        if info.distribution == OURS
        for option in info.options
    }
    assert listed == there, (
        f"docs/stages.md: lacks {sorted(there - listed)}, has {sorted(listed - there)}"
    )


def test_arguments_of_build_are_explained_in_a_page() -> None:
    prose = "\n".join(page.read_text() for page in PAGES[1:] if "reference" not in str(page))
    missing = [
        name
        for name in inspect.signature(kfactk.build).parameters
        if name != "unknown" and not re.search(rf"\b{name}\b", prose)
    ]
    assert not missing, f"no page outside the reference explains {missing} of kfactk.build"


def test_greek_letters_are_in_the_mathematics() -> None:
    page = (ROOT / "docs" / "mathematics.md").read_text()
    sources = "\n".join(
        path.read_text() for path in (ROOT / "plugins" / "kfactk_stages").rglob("*.py")
    )
    missing = [
        name
        for name, letter in GREEK.items()
        if re.search(rf"\b{name}\d?\b", sources) and letter not in page
    ]
    assert not missing, f"docs/mathematics.md does not explain {missing}"
    equations = set(re.findall(r"equation \(?(\d+)\)?", sources))
    assert equations, "no docstring names an equation"
    assert all(rf"\tag{{{number}}}" in page for number in equations), (
        f"docs/mathematics.md lacks one of the equations {equations}"
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the documentation as `nox -s docs` does; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("COV")},
            "NO_MKDOCS_2_WARNING": "1",
        },
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def described() -> dict[str, set[str]]:
    """Return what the reference must describe, with the anchors of which one must exist."""
    found = {}
    for module in (kfactk, testing):
        for name in public_names(module):
            value = getattr(module, name)
            found[f"{module.__name__}.{name}"] = {
                f"{module.__name__}.{name}",
                f"{getattr(value, '__module__', '')}.{name}",
            }
    found |= {hook: {f"kfactk.registry.hookspecs.{hook}"} for hook in hooks()}
    for info in registry().stages():
        if info.distribution == OURS:
            stage = type(registry().resolve(info.family, info.name))
            found[f"{info.family} {info.name}"] = {f"{stage.__module__}.{stage.__qualname__}"}
    return found


@pytest.mark.xdist_group("site")
def test_reference_describes_public_names(site: Path) -> None:
    anchors = {
        anchor
        for page in site.rglob("*.html")
        for anchor in re.findall(r'\bid="([^"]+)"', page.read_text())
    }
    missing = [what for what, ids in described().items() if not ids & anchors]
    assert not missing, f"add `::: name` to docs/reference.md or docs/reference/: {missing}"


@pytest.mark.xdist_group("site")
def test_laws_are_listed(site: Path) -> None:
    page = (site / "testing" / "index.html").read_text()
    for name in public_names(testing):
        laws = [
            law
            for law in dir(getattr(testing, name))
            if hasattr(getattr(getattr(testing, name), law), "kfactk_law")
        ]
        missing = [
            law
            for law in laws
            if f"<td>{law.removeprefix('test_').replace('_', ' ')}</td>" not in page
        ]
        assert not missing, (
            f"docs/testing.md does not list {missing} of {name}; add a fence ```laws with {name}"
        )


@pytest.mark.xdist_group("site")
def test_site_fetches_nothing_from_other_servers(site: Path) -> None:
    fetched = {
        f"{page.relative_to(site)}: {tag}"
        for page in site.rglob("*.html")
        for tag in re.findall(
            r"<(?:script|link|img)\b[^>]*?\b(?:src|href)=\"?(?:https?:)?//[^>]*>", page.read_text()
        )
        if 'rel="canonical"' not in tag
    }
    assert not fetched, fetched


@pytest.mark.xdist_group("site")
def test_formulas_are_typeset(site: Path) -> None:
    """Each fence becomes MathML."""
    for page in PAGES[1:]:
        written = sum(block.language == "math" for block in blocks(page))
        if written:
            built = site / page.relative_to(ROOT / "docs").with_suffix("") / "index.html"
            assert built.read_text().count("<math ") == written, (
                f"{page.name}: some formulas are shown as source"
            )


def drawing(name: str) -> str:
    return (ROOT / "docs" / "assets" / f"{name}.svg").read_text()


def description(name: str) -> str:
    """Return the text that describes a drawing in words."""
    found = re.search("<desc.*?>(.+?)</desc>", drawing(name), re.DOTALL)
    assert "<title" in drawing(name)
    assert found is not None, f"{name}.svg has no <desc>"
    return " ".join(found[1].split())


def test_data_flow_shows_every_family() -> None:
    for family in hookspecs.STAGE_HOOKS:
        assert re.search(rf"\b{family}\b", description("data-flow"), re.IGNORECASE), (
            f"the <desc> of the drawing does not name the {family}"
        )
        assert f">{family.capitalize()}" in drawing("data-flow"), f"the drawing has no {family}"


def reading_path() -> list[tuple[str, tuple[str, ...]]]:
    """Return the files of the reading path with their functions, as the drawing names them."""
    names = re.findall(
        r'<text class="name"[^>]*>([\w/]+/[\w/]+|operators)(?:: ([^<]+))?<', drawing("reading-path")
    )
    return [(file, tuple(functions.split(", ")) if functions else ()) for file, functions in names]


@pytest.mark.parametrize(("file", "functions"), reading_path())
def test_reading_path_names_functions_that_exist(file: str, functions: tuple[str, ...]) -> None:
    source = (ROOT / "kfactk" / f"{file}.py").read_text()
    missing = [name for name in functions if not re.search(rf"\bdef {name}\b", source)]
    assert not missing, f"kfactk/{file}.py has no function {missing}; correct the drawing"


def test_concepts_list_the_reading_path_in_order() -> None:
    page = (ROOT / "docs" / "concepts.md").read_text()
    section = page.split("\n## The code of one step\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\d\. `([\w/]+)`", section, re.MULTILINE)
    assert listed == [file for file, _ in reading_path()]


def test_rooms_show_every_module_and_folder() -> None:
    package = ROOT / "kfactk"
    there = {path.stem for path in package.glob("*.py") if not path.stem.startswith("_")}
    there |= {path.parent.name for path in package.glob("*/__init__.py")}
    shown = set(re.findall(r"\w+", description("rooms")))
    assert not there - shown, f"the <desc> of rooms.svg does not name {there - shown}"
    vocabulary = re.search(r'"what"[^>]*>(errors, [^<]+)<', drawing("rooms"))
    assert vocabulary is not None
    stale = set(vocabulary[1].split(", ")) - there
    assert not stale, f"rooms.svg shows {stale}, which kfactk does not have"


@each_page
def test_links_name_files_that_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = [
        target
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
        if not target.startswith(("https://", "#"))
    ]
    broken = [target for target in targets if not (page.parent / target.split("#")[0]).exists()]
    assert not broken, f"{page.name}: {broken}"


def test_pages_are_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    missing = [
        name
        for page in PAGES[1:]
        if (name := page.relative_to(ROOT / "docs").as_posix()) not in config
    ]
    assert not missing, f"mkdocs.yml does not list {missing}"
