"""A recipe that is read from data runs no code."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import kfactk
from kfactk import Clip, OptionError, Recipe

RAN: list[str] = []
"""What has run that must not."""


class Spy:
    """A class that has nothing of a stage."""

    def __init__(self, *args: Any, **options: Any) -> None:
        RAN.append("class")


def spy(*args: Any, **options: Any) -> Any:
    RAN.append("function")


@attrs.frozen
class Halve:
    def clip(self, pairs: Any, dot: Any) -> Any:
        return [pair.preconditioned / 2 for pair in pairs], torch.tensor(0.5)


def halve() -> Halve:
    return Halve()


def some_clip() -> Clip:
    return Halve()


def slower(step: int) -> float:
    return 1.0 / (1 + step)


HERE = __name__
PATHS = ["os:system", "subprocess:Popen", "runpy:run_path", "builtins:exec", f"{HERE}:spy"]
NAMED = [{"name": path, "command": "true"} for path in PATHS]
DATA: list[dict[str, Any]] = [
    *({"update": each} for each in [*PATHS, *NAMED]),
    {"curvature": "os:system"},
    {"curvature": ["conv_kfac", {"name": f"{HERE}:spy"}]},
    {"curvature": [{"curvature": f"{HERE}:Spy", "layers": ["0"]}]},
    {"curvature": [{"curvature": "conv_kfac", "basis": f"{HERE}:Spy"}]},
    *({family: f"{HERE}:Spy"} for family in ("basis", "fisher", "likelihood", "clip")),
    *({family: f"{HERE}:spy"} for family in ("placement", "tracker")),
    {"damping": {"callable": f"{HERE}:spy"}},
    {"basis_every": {"callable": "os:getpid"}},
    {"output": {"callable": f"{HERE}:spy"}},
    {"exclude": [{"callable": f"{HERE}:spy"}]},
    {"basis": {"name": "ekfac", "scale_decay": {"callable": f"{HERE}:spy"}}},
    {"update": {"name": "torch.optim:SGD", "momentum": [{"callable": f"{HERE}:spy"}]}},
    {"update": "torch.optim:lr_scheduler"},
    {"update": "torch.optim.adam:Adam"},
    {"update": "torch.hub:load"},
]


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    RAN.clear()
    monkeypatch.setattr(os, "system", spy)
    monkeypatch.setattr(subprocess, "Popen", Spy)
    yield
    assert not RAN


@pytest.mark.parametrize("data", DATA, ids=repr)
def test_data_imports_and_calls_nothing(data: dict[str, Any], monkeypatch: Any) -> None:
    def refuse(name: str, package: str | None = None) -> None:
        raise AssertionError(f"imported {name}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(OptionError, match=r"holds the import path .*trusted=True"):
        Recipe.from_dict(data)


@pytest.mark.parametrize("data", DATA[:10], ids=repr)
def test_trusted_data_calls_nothing_that_makes_no_stage(data: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="is not called, since it"):
        Recipe.from_dict(data, trusted=True)


@pytest.mark.parametrize("path", PATHS)
def test_build_calls_nothing_that_makes_no_stage(path: str) -> None:
    with pytest.raises(OptionError, match="is not called, since it"):
        kfactk.build(clip=path)


def test_a_module_named_in_data_is_not_imported(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "kfactk_intruder.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(OptionError, match="import path"):
        Recipe.from_dict({"clip": "kfactk_intruder:Clip"})
    assert "kfactk_intruder" not in sys.modules


@pytest.mark.parametrize("path", ["Halve", "halve", "some_clip"])
def test_trusted_data_may_name_stages_by_path(path: str) -> None:
    recipe = Recipe.from_dict({"clip": f"{HERE}:{path}"}, trusted=True)
    assert recipe.clip == Halve()


def test_trusted_data_may_name_functions() -> None:
    recipe = Recipe.from_dict({"damping": {"callable": f"{HERE}:slower"}}, trusted=True)
    assert recipe.damping is slower


@pytest.mark.parametrize(
    "recipe",
    [
        {"update": torch.optim.Adagrad},
        {"update": {"name": "torch.optim:SGD", "momentum": 0.9}, "curvature": "all"},
        {"tracker": {"name": "jsonl", "path": "x"}, "factor_decay": 0.5, "exclude": ["head"]},
    ],
)
def test_names_and_torch_optim_need_no_trust(recipe: dict[str, Any]) -> None:
    made = kfactk.build(**recipe)
    assert Recipe.from_dict(made.to_dict()) == made
