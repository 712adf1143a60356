"""The law of ranks catches stages that make ranks differ from each other or from one process."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfactk import OptionError, Statistic
from kfactk.registry.registry import registry
from kfactk.testing import BasisLaws, ClipLaws, CurvatureLaws, Laws, PipelineLaws, UpdateLaws
from kfactk.testing._support.division import Sent, basis_for, equal_on_ranks
from kfactk.testing._support.laws import Law
from kfactk.testing._support.ranks import shared_workers
from kfactk.testing._support.training import Training
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.clip.none import NoClip
from kfactk_stages.curvature.conv_kfac import ConvKfac
from kfactk_stages.curvature.kfac import Kfac
from tests.kfactk.testing.broken import caught
from tests.kfactk.testing.broken_bases import Changed

pytestmark = pytest.mark.xdist_group("ranks")
LAW = "test_two_ranks_are_one_process"
OTHERWISE = (
    "2 ranks, each with its part of every batch, do not do what one process does with the whole"
)
BITS = "after the same steps ranks have different bits in the"


def together() -> float:
    return 2.0 if dist.is_initialized() else 1.0


def mine() -> float:
    return 1.0 + (dist.get_rank() if dist.is_initialized() else 0)


class Apart(KfacInverse):
    """Each rank has its own step."""

    def operator(self, *given: Any) -> Changed:
        right = super().operator(*given)
        return Changed(right, {"solve": lambda right, v: right.solve(v) * mine()})


class Longer(KfacInverse):
    """Steps are longer with several ranks."""

    def operator(self, *given: Any) -> Changed:
        right = super().operator(*given)
        return Changed(right, {"solve": lambda right, v: right.solve(v) * together()})


class Batched(Kfac):
    """Divides by its own number of examples: the mean of means, but weighed wrongly."""

    def gradient_factors(self, layer: Any, samples: Any) -> dict[str, Statistic]:
        found = super().gradient_factors(layer, samples)["G"]
        return {"G": Statistic(found.total, found.count / together())}


class Counting(ConvKfac):
    """G is a sum over a rank's part of the batch, not a mean."""

    def gradient_factors(self, layer: Any, samples: Any) -> dict[str, Statistic]:
        found = super().gradient_factors(layer, samples)["G"]
        return {"G": found.scaled(float(samples.examples))}


class Bounded(NoClip):
    """Clips more with several ranks."""

    def clip(self, pairs: Any, dot: Any) -> Any:
        return [pair.preconditioned / together() for pair in pairs], torch.ones(())


class Hurrying(torch.optim.SGD):
    """Ranks run at different paces."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad, alpha=0.1 * mine())


@pytest.mark.parametrize(
    ("laws", "stage", "says"),
    [
        (BasisLaws, Apart, BITS),
        (BasisLaws, Longer, OTHERWISE),
        (CurvatureLaws, Batched, OTHERWISE),
        (CurvatureLaws, Counting, OTHERWISE),
        (ClipLaws, Bounded, OTHERWISE),
        (UpdateLaws, Hurrying, BITS),
    ],
)
def test_each_family_is_held_to_it(laws: type[Laws], stage: type, says: str) -> None:
    found = caught(laws, stage, LAW)
    assert says in found[LAW]
    assert "Two ranks with half of each batch do what one process does with the whole" in found[LAW]


class Summing(Training):
    """A loss that is no mean, and a Fisher stage that listens to it."""

    recipe = {"reduction": "sum", "update": "sgd", "fisher": "empirical"}  # noqa: RUF012

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, targets, reduction="sum")


def test_recipes_are_held_to_it() -> None:
    assert (
        OTHERWISE
        in caught(PipelineLaws, None, LAW, recipe={"clip": Bounded(), "update": "sgd"})[LAW]
    )
    equal_on_ranks(Summing(), Summing.recipe)


def test_where_what_travels_is_rounded_ranks_have_to_agree_all_the_same() -> None:
    equal_on_ranks(Training(), {"basis": Longer(), "update": "sgd"}, rounded=True)
    with pytest.raises(AssertionError, match=BITS):
        equal_on_ranks(Training(), {"basis": Apart(), "update": "sgd"}, rounded=True)


def test_workers_are_shared_by_all_tests_of_ranks() -> None:
    for laws in (BasisLaws, PipelineLaws):
        made = type("TestOne", (laws,), {})
        assert [(mark.name, mark.args) for mark in getattr(made, LAW).pytestmark] == [
            ("xdist_group", ("ranks",))
        ]
        assert isinstance(getattr(made, LAW).kfactk_law, Law)


# ------------------------------------------------------------------------- what cannot be sent


def test_what_other_processes_cannot_find_is_told_with_the_remedy() -> None:
    class Hidden(NoClip):
        pass

    class Own(PipelineLaws):
        def model(self) -> nn.Module:
            return nn.Linear(2, 3)

    said = caught(ClipLaws, Hidden, LAW)[LAW]
    assert "the recipe cannot be sent to ranks, which are other processes (" in said
    assert "define its stages and functions at the top level of a module" in said
    with pytest.raises(
        OptionError, match=r"Own has model of its own, .* define it at the top level of its module"
    ):
        equal_on_ranks(Own(), {})


class AtTheTop(PipelineLaws):
    """A function that has no name travels with the class that has one."""

    recipe = {"update": "sgd", "damping": lambda step: 0.1 / (1 + step)}  # noqa: RUF012


def test_a_recipe_is_found_in_its_class() -> None:
    equal_on_ranks(AtTheTop(), AtTheTop.recipe)
    with pytest.raises(OptionError, match="cannot be sent"):
        equal_on_ranks(AtTheTop(), dict(AtTheTop.recipe))


@pytest.fixture
def nowhere(tmp_path: Path) -> Iterator[ModuleType]:
    """Make a module as pytest's import mode "importlib" does, with a name that has no import."""
    file = tmp_path / "test_mine.py"
    file.write_text("class Named:\n    def __call__(self):\n        return 'found'\n")
    spec = importlib.util.spec_from_file_location("nowhere.test_mine", file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["nowhere"] = ModuleType("nowhere")
    module = sys.modules["nowhere.test_mine"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["nowhere.test_mine"], sys.modules["nowhere"]


def asked(rank: int, sent: Sent) -> str:
    return str(sent.unpacked()())


def test_modules_that_cannot_be_imported_are_loaded_from_their_files(nowhere: ModuleType) -> None:
    assert shared_workers().run(2, asked, Sent.of(nowhere.Named())) == ["found", "found"]


def test_modules_are_looked_for_where_the_tests_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In folders too that were added after the workers had started."""
    shared_workers().run(1, asked, Sent.of(dict))
    (tmp_path / "late_stage.py").write_text(
        "import late_helper\nclass Named:\n"
        "    def __call__(self):\n        return late_helper.WORD\n"
    )
    (tmp_path / "late_helper.py").write_text("WORD = 'helped'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert shared_workers().run(
        1, asked, Sent.of(importlib.import_module("late_stage").Named())
    ) == ["helped"]


# ----------------------------------------------------------------------------- what is skipped


@attrs.frozen(kw_only=True)
class Elsewhere(Kfac):
    """For no layer of the model."""

    def unsupported(self, module: nn.Module) -> str | None:
        return "it is not mine"


class Unheard(Kfac):
    provides = frozenset({"unheard"})


@pytest.mark.parametrize(
    ("stage", "why"),
    [
        (Elsewhere, "supports no layer of the model that is trained here"),
        (Unheard, "no registered basis takes unheard, which curvature"),
    ],
)
def test_a_curvature_that_cannot_be_tried_is_skipped_with_the_reason(stage: type, why: str) -> None:
    with pytest.raises(pytest.skip.Exception, match=why):
        getattr(type("TestOne", (CurvatureLaws,), {"stage": stage})(), LAW)()


def test_a_basis_without_moments_is_preferred() -> None:
    assert basis_for(Kfac()) == registry().resolve("basis", "kfac")
    assert basis_for(Unheard()) is None
