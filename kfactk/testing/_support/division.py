"""A batch divided among ranks: several processes with parts of it against one with the whole."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import pickle
import pickletools
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfactk.errors import KfactkError, OptionError
from kfactk.optim.optimizer import Optimizer
from kfactk.preconditioner.state import PREFIX
from kfactk.recipe import Recipe
from kfactk.registry.registry import registry
from kfactk.testing._support.laws import Laws, law
from kfactk.testing._support.ranks import shared_workers
from kfactk.testing._support.training import PERIODS, Training

TRAINING = ("model", "batch", "loss", "still", "fresh", "data", "backward", "tolerance")
"""Members of a class of laws that say what is trained, on which data, and how."""
FACTOR = f"{PREFIX}factor."
Test = TypeVar("Test", bound=Callable[..., None])


def on_ranks(test: Test) -> Test:
    """Mark a test that runs on several processes.

    With `--dist loadgroup`, pytest-xdist then starts one set of processes for all these tests.
    """
    if importlib.util.find_spec("xdist") is None:
        return test
    marked: Test = pytest.mark.xdist_group("ranks")(test)
    return marked


@attrs.frozen
class Sent:
    """A job for the ranks, as plain data.

    Args:
        job: The job, pickled.
        files: The files of the modules that it names.
        path: Where modules are searched for.
    """

    job: bytes
    files: Mapping[str, str]
    path: Sequence[str]

    @classmethod
    def of(cls, job: Any) -> Sent:
        """Return a job, ready to be sent.

        Raises:
            Exception: An error of pickle's, if something in it cannot be found by name.
        """
        data = pickle.dumps(job)
        named = {text for _, text, _ in pickletools.genops(data) if isinstance(text, str)}
        files = {
            name: getattr(sys.modules[name], "__file__", None)
            for name in sorted(named & set(sys.modules))
        }
        return cls(data, {name: file for name, file in files.items() if file}, list(sys.path))

    def unpacked(self) -> Any:
        """Return the job, in another process.

        Modules that cannot be imported by name are loaded from their files.
        """
        sys.path += [folder for folder in self.path if folder not in sys.path]
        for name, file in self.files.items():
            try:
                importlib.import_module(name)
            except ImportError:
                spec = importlib.util.spec_from_file_location(name, file)
                if spec is None or spec.loader is None:
                    raise
                for parent in itertools.accumulate(name.split(".")[:-1], "{}.{}".format):
                    sys.modules.setdefault(parent, ModuleType(parent))
                sys.modules[name] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules[name])
        return pickle.loads(self.job)


@attrs.frozen(eq=False)
class Left:
    """What a run leaves behind on one rank.

    Args:
        metrics: Parameters and the averaged factors that the rank keeps.
        bits: A digest of each tensor that it has.
    """

    metrics: Mapping[str, Tensor]
    bits: Mapping[str, str]

    @classmethod
    def by(cls, model: nn.Module, optimizer: Optimizer) -> Left:
        """Return what a model and its optimizer leave behind."""
        tensors = {
            f"parameter {name}": parameter.detach() for name, parameter in model.named_parameters()
        }
        for name, parameter in model.named_parameters():
            entries = optimizer.state.get(parameter, {})
            tensors |= {
                f"{key} of {name}": value
                for key, value in entries.items()
                if isinstance(value, Tensor)
            }
        stages = (rule.curvature for rule in optimizer.recipe.rules)
        rows = tuple(FACTOR + name for stage in stages for name in stage.row_factors)
        metrics = {  # of rows, the order is no law
            name: tensor.sort(0).values if name.startswith(rows) else tensor.clone()
            for name, tensor in tensors.items()
            if name.startswith(("parameter ", FACTOR))
        }
        return cls(metrics, {name: _digest(tensor) for name, tensor in tensors.items()})


def equal_on_ranks(
    laws: Training, recipe: Mapping[str, Any], ranks: int = 2, *, rounded: bool = False
) -> None:
    """Assert that ranks with equal parts of each batch do what one process does with the whole.

    The ranks must agree bit for bit.

    Args:
        laws: What is trained, on which data, and how.
        recipe: Arguments of `kfactk.build`.
        ranks: How many.
        rounded: Whether they may differ from one process, because what travels is rounded.

    Raises:
        AssertionError: They do not.
        OptionError: Other processes cannot find the recipe or the class of laws.
    """
    __tracebackhide__ = True
    found = shared_workers().run(ranks, _trained, ranks, _sent(laws, recipe))
    for name in sorted({name for left in found for name in left.bits}):
        different = {left.bits[name] for left in found if name in left.bits}
        assert len(different) == 1, (
            f"after the same steps ranks have different bits in the {name}, which must be equal"
        )
    if rounded:
        return
    model = laws.fresh()
    one = Left.by(model, _run(laws, _quiet(laws, recipe), model, model, 0, 1)).metrics
    together = {name: tensor for left in found for name, tensor in left.metrics.items()}
    laws.alike(
        one,
        together,
        f"{ranks} ranks, each with its part of every batch, do not do what one process does with "
        "the whole",
    )


def _quiet(laws: Training, recipe: Mapping[str, Any]) -> Recipe:
    return laws.still(laws.build(recipe)).evolve(tracker=None)


def _run(
    laws: Training, recipe: Recipe, model: nn.Module, wrapped: nn.Module, rank: int, ranks: int
) -> Optimizer:
    optimizer = recipe.bind(wrapped)
    for number in range(PERIODS["basis_every"] + 1):

        def evaluate(number: int = number) -> Tensor:
            inputs, targets = laws.data(number)
            data = inputs[rank::ranks], targets[rank::ranks]
            loss = laws.backward(optimizer, wrapped, data)
            if recipe.reduction == "sum":  # what the wrapper averages
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad *= ranks
            return loss

        laws.take(optimizer, evaluate)
    return optimizer


def _trained(rank: int, ranks: int, sent: Sent) -> Left:
    """Run the job of one rank."""
    laws, recipe = sent.unpacked()
    laws = laws()
    made = _quiet(laws, laws.recipe) if recipe is None else recipe
    model = laws.fresh()
    return Left.by(model, _run(laws, made, model, DistributedDataParallel(model), rank, ranks))


def _sent(laws: Training, recipe: Mapping[str, Any]) -> Sent:
    cls = type(laws)
    found = next(each for each in cls.__mro__ if _by_name(each))
    own = [name for name in TRAINING if getattr(found, name, None) is not getattr(cls, name)]
    if own:
        raise OptionError(
            f"{cls.__name__} has {', '.join(own)} of its own, and ranks are other processes, which "
            "find a class by its name only: define it at the top level of its module."
        )
    made = _quiet(laws, recipe)
    try:
        return Sent.of((found, made))
    except Exception as error:  # pickle raises errors of many kinds
        if found is cls and recipe is laws.recipe:
            return Sent.of((found, None))
        raise OptionError(
            f"the recipe cannot be sent to ranks, which are other processes ({error}): define its "
            "stages and functions at the top level of a module, where they are found by name."
        ) from error


def _by_name(cls: type) -> bool:
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cls


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return hashlib.sha256(bytes(data.tolist())).hexdigest()


class InRecipe(Laws):
    """The law of ranks: for a stage in a recipe."""

    def in_recipe(self) -> dict[str, Any]:
        """Return a recipe with the stage in it: arguments of `kfactk.build`."""
        return {self.family: self.subject()}

    @law()
    @on_ranks
    def test_two_ranks_are_one_process(self) -> None:
        """Two ranks with half of each batch do what one process does with the whole.

        They agree bit for bit. The update is SGD, which shows factors that Adam would not.
        """
        training, recipe = Training(), {"update": torch.optim.SGD, **self.in_recipe()}
        if not training.build(recipe).coverage(training.fresh()).covered:
            pytest.skip(
                f"{self.label()} supports no layer of the model that is trained here; PipelineLaws "
                "can be given another one"
            )
        equal_on_ranks(training, recipe)


class CurvatureInRecipe(InRecipe):
    """The law of ranks, for a curvature."""

    family = "curvature"

    def in_recipe(self) -> dict[str, Any]:
        """Return a recipe with the curvature and a registered basis that takes what it provides.

        The law is skipped where there is none.
        """
        curvature = self.subject()
        basis = basis_for(curvature)
        if basis is None:
            provides = ", ".join(sorted(curvature.provides))
            pytest.skip(f"no registered basis takes {provides}, which {self.label()} provides")
        return {"curvature": curvature, "basis": basis}


def basis_for(curvature: Any) -> Any:
    """Return a registered basis that takes what a curvature provides; `None` without any.

    The curvature's default is preferred, then a basis without moments.
    """
    if curvature.default_basis is not None:
        return registry().resolve("basis", curvature.default_basis)
    fitting = []
    for name in sorted({info.name for info in registry().stages("basis") if not info.blocked}):
        try:
            basis = registry().resolve("basis", name)
        except KfactkError:  # claimed twice, or in need of options
            continue
        if basis.requires and curvature.must_be_read <= basis.reads <= curvature.provides:
            fitting.append((basis.moments_from is not None, name, basis))
    return min(fitting, key=lambda each: each[:2])[2] if fitting else None
