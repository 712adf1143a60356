"""The plugin of the documentation: the page shows the package, and what tools print is true."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import kfactk
from kfactk.__main__ import main
from kfactk.linalg import vec
from kfactk.registry.registry import registry
from kfactk.testing import BasisLaws, Situation
from tests.kfactk.testing.broken import caught
from tests.test_docs import Block, blocks

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "plugins" / "kfactk-diagonal"
PAGE = ROOT / "docs" / "plugins.md"
NAME = "kfactk_diagonal"


def titled() -> list[tuple[str, Block]]:
    """Blocks of the page with the file they say to be from."""
    found = [(re.search(r'title="(\S+\.\w+)"', block.language), block) for block in blocks(PAGE)]
    return [(match[1], block) for match, block in found if match]


def test_blocks_are_taken_from_their_files() -> None:
    for name, block in titled():
        assert block.text in (FOLDER / name).read_text() + "\n", (
            f"docs/plugins.md:{block.line} is not in {name}"
        )


def test_the_page_shows_the_modules_whole() -> None:
    """All of their code stands on the page."""
    shown = {
        name: "".join(block.text for other, block in titled() if other == name)
        for name in (f"{NAME}.py", f"test_{NAME}.py")
    }
    for name, text in shown.items():
        lines = [
            line
            for line in (FOLDER / name).read_text().partition("annotations\n")[2].splitlines()
            if line
        ]
        missing = [line for line in lines if line not in text]
        assert not missing, f"{name}: {missing}"


def load(text: str) -> ModuleType:
    module = ModuleType(NAME)
    sys.modules[NAME] = module
    exec(text, module.__dict__)
    return module


@pytest.fixture
def source() -> Iterator[str]:
    """Text of the module; its stages have names once it is loaded with `load` and registered."""
    yield (FOLDER / f"{NAME}.py").read_text()
    sys.modules.pop(NAME, None)


@pytest.fixture
def diagonal(source: str) -> Iterator[ModuleType]:
    module = load(source)
    registry().register(module, name="diagonal")
    yield module
    registry().unregister("diagonal")


def damped_diagonal(laws: BasisLaws, situation: Situation) -> torch.Tensor:
    """As the tests of the package have it."""
    return torch.diag_embed(vec(situation.matrices["square"]) + situation.damping)


@pytest.mark.parametrize(
    ("right", "wrong", "law", "lines"),
    [
        (
            '["diagonal"], damping)',
            '["diagonal"].sqrt(), damping)',
            "test_it_is_the_dense_damped_inverse",
            [
                r"without moments, solve is not the inverse .*",
                r"basis .* breaks a law of its family: P is the inverse .*",
            ],
        ),
        (
            "if not matrix.isfinite().all():",
            "if False:",
            "test_a_matrix_that_is_not_finite_is_refused",
            [
                r"decompose\('square', \.\.\.\) took a matrix .*",
                r"basis .* breaks a law of its family: A matrix with NaN or inf .*",
            ],
        ),
    ],
)
def test_laws_say_what_the_page_shows(
    source: str, diagonal: ModuleType, right: str, wrong: str, law: str, lines: list[str]
) -> None:
    assert source.count(right) == 1
    broken = load(source.replace(right, wrong))
    found = caught(
        BasisLaws, broken.DiagonalInverse, law, curvature="diagonal", block=damped_diagonal
    )[law]
    shown = "\n".join(block.text for block in blocks(PAGE) if block.language == "text")
    mistake = next(
        line.replace(right, wrong).strip() for line in source.splitlines() if right in line
    )
    assert mistake in shown or wrong == "if False:"
    for line in lines:
        (said,), (printed,) = re.findall(line, found), re.findall(line, shown)
        said = re.sub(r"^basis <class .*?>", "basis 'diagonal'", said)
        assert re.sub("holds (nan|inf)", "holds nan", said) == printed


def test_new_plugin_says_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command, shown = blocks(PAGE)[:2]
    assert command.text.startswith("$ python -m kfactk ")
    assert main(command.text.split()[4:]) == 0
    assert capsys.readouterr().out == shown.text


def test_it_is_made_as_new_plugin_would(tmp_path: Path) -> None:
    """Its pyproject.toml is what `new-plugin` writes, but for description and entry point."""
    assert (
        main(["new-plugin", "kfactk-diagonal", "--stage", "basis", "--directory", str(tmp_path)])
        == 0
    )
    ours, fresh = (
        tomllib.loads((folder / "pyproject.toml").read_text())
        for folder in (FOLDER, tmp_path / "kfactk-diagonal")
    )
    for each in (ours, fresh):
        del each["project"]["description"], each["project"]["entry-points"]
    assert ours == fresh


@pytest.mark.parametrize("spatial", ["sud", "sua", "reduce"])
def test_there_is_nothing_to_choose(diagonal: ModuleType, spatial: str) -> None:
    with pytest.raises(kfactk.OptionError, match="no option 'spatial'"):
        kfactk.build(curvature={"name": "diagonal", "spatial": spatial}, basis="diagonal")


def test_it_trains_and_is_written_down(diagonal: ModuleType) -> None:
    recipe = kfactk.build(
        curvature={"name": "diagonal", "batch_dim": 1},
        basis="diagonal",
        clip="none",
        update="sgd",
        lr=0.1,
        damping=0.1,
    )
    assert recipe.to_dict()["curvature"] == {"name": "diagonal", "batch_dim": 1}
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    )
    optimizer = recipe.bind(model)
    x, y = torch.randn(32, 1, 4, 4), torch.randint(3, (32,))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
