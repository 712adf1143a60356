"""The base of laws of recipes: train a small model by a recipe, and compare the results."""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk.errors import KfactkWarning
from kfactk.optim.optimizer import Optimizer
from kfactk.recipe import Recipe
from kfactk.testing._support.laws import Laws, close
from kfactk.testing._support.models import Net, Still

PERIODS = {"factor_every": 2, "scale_every": 3, "basis_every": 5}
"""Periods that are no multiples of each other; those of the recipe take precedence."""
EXAMPLES, STEPS = 6, 4

Recipes = st.SearchStrategy[Mapping[str, Any]]
Data = tuple[Tensor, Tensor]


def built(recipe: Mapping[str, Any]) -> Recipe:
    """Return a recipe; what a law gives for nothing, as periods of no use, is not told."""
    with _unused_untold():
        return kfactk.build(**recipe)


@contextlib.contextmanager
def _unused_untold() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* ha(s|ve) no effect: ", KfactkWarning)
        yield


class Training(Laws):
    """Train a small model by a recipe; subclasses may replace model, batch and loss."""

    family = "recipe"
    recipe: ClassVar[Mapping[str, Any]] = {}
    """Arguments of `kfactk.build`."""
    tolerance: ClassVar[float] = 1e-6
    """Relative deviation allowed where the order of sums differs, for a model in float64."""

    def recipes(self) -> Recipes:
        """Return a strategy for the recipes under test: by default, the recipe of the class."""
        return st.just(self.recipe)

    def steady(self) -> Recipes:
        """Return a strategy for the recipes that do not amplify rounding errors.

        Laws that change the order of sums use them. A basis of eigenvectors is not among them where
        eigenvalues other than zero are repeated: any rounding rotates the vectors.
        """
        return self.recipes()

    def model(self) -> nn.Module:
        """Return the model, without dropout or BatchNorm.

        It may draw its parameters from torch's global generator.
        """
        return Net()

    def batch(self, generator: torch.Generator, examples: int) -> Data:
        """Return inputs and targets, with examples in dimension 0."""
        inputs = torch.randn(examples, 2, 4, generator=generator, dtype=torch.float64)
        return inputs, torch.randint(3, (examples,), generator=generator)

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        """Return the training loss, reduced over the examples as the recipe's `reduction` says."""
        return F.cross_entropy(output, targets)

    def still(self, recipe: Recipe) -> Recipe:
        """Return the recipe with draws that depend on each example's output alone.

        Laws that compare batches of different sizes need it. This covers the draws of the
        likelihood. Override it for a Fisher stage that draws by other means.
        """
        with _unused_untold():
            return recipe.evolve(likelihood=Still(recipe.likelihood))

    def subject(self) -> Recipe:
        """Return the recipe."""
        return kfactk.build(**self.recipe)

    def label(self) -> str:
        """Return the recipe in words, for messages."""
        return f"recipe {dict(self.recipe)!r}"

    def build(self, recipe: Mapping[str, Any]) -> Recipe:
        """Build the recipe, with short periods unless it sets its own, or a pace does."""
        paced = recipe.get("pace") is not None
        periods = {"factor_every": PERIODS["factor_every"]} if paced else PERIODS
        return built({**periods, **recipe})

    def fresh(self) -> nn.Module:
        """Return a new model, with the same parameters every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.model().train()

    def data(self, number: int) -> Data:
        """Return batch `number`."""
        return self.batch(torch.Generator().manual_seed(number), EXAMPLES)

    def backward(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        data: Data,
        factor: float = 1.0,
        *,
        num_terms: bool = False,
    ) -> Tensor:
        """Run forward and backward of one batch, and return the loss.

        The loss is multiplied by `factor` and, with `num_terms`, by the number of its terms.
        """
        output = model(data[0])
        optimizer.observe()
        loss = self.loss(output, data[1]) * factor
        if num_terms:
            [head] = optimizer.recipe.heads
            located = head.locate(output)
            assert located is not None
            view = head.likelihood.view(located)
            loss = loss * (view.shape[0] * view.shape[1])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self, optimizer: Optimizer, model: nn.Module, number: int) -> float:
        """Take one step of the ordinary loop, and return the loss."""
        return self.take(optimizer, lambda: self.backward(optimizer, model, self.data(number)))

    def take(self, optimizer: Optimizer, evaluate: Callable[[], Tensor]) -> float:
        """Take one step, and return the loss; with a closure where a controller needs one.

        Args:
            optimizer: Takes it.
            evaluate: Fills the gradients, and returns the loss.
        """

        def closure() -> float:
            optimizer.zero_grad()
            return float(evaluate())

        if optimizer.recipe.controller is not None:
            return float(optimizer.step(closure))
        loss = closure()
        optimizer.step()
        return loss

    def run(self, recipe: Recipe, steps: int = STEPS) -> tuple[nn.Module, Optimizer]:
        """Train a new model, and return it with its optimizer."""
        model = self.fresh()
        optimizer = recipe.bind(model)
        for number in range(steps):
            self.step(optimizer, model, number)
        return model, optimizer

    def compare(
        self,
        recipe: Recipe,
        one: Callable[[Optimizer, nn.Module, int], Tensor],
        other: Callable[..., Tensor],
        says: str,
    ) -> None:
        """Assert that two ways to train give the same parameters and factors, but for rounding."""
        found = []
        for train in (one, other):
            model = self.fresh()
            optimizer = recipe.bind(model)
            for number in range(STEPS):
                self.take(optimizer, functools.partial(train, optimizer, model, number))
            found.append(dict(outcome(model, optimizer)))
        self.alike(found[0], found[1], says)

    def alike(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor], says: str) -> None:
        """Assert that tensors of the same names are equal, within the tolerance for their size."""
        assert one.keys() == other.keys(), (
            f"{says}: one has {sorted(one)}, the other {sorted(other)}"
        )
        for name, tensor in one.items():
            size = float(tensor.abs().max()) if tensor.numel() else 0.0
            close(
                other[name],
                tensor,
                f"{says}: {name} differs",
                rtol=self.tolerance,
                atol=self.tolerance * size + 1e-12,
            )

    def inapplicable(self, why: str) -> NoReturn:
        """Skip the law for the recipe of the class; reject a drawn recipe."""
        if type(self).recipes is Training.recipes:
            pytest.skip(why)
        hypothesis.reject()


def outcome(model: nn.Module, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """Return copies of parameters and factors, by name."""
    found: dict[str, Tensor] = {
        f"parameter {name}": parameter for name, parameter in model.named_parameters()
    }
    for name, view in optimizer.layers.items():
        found |= {f"factor {key} of layer {name}": tensor for key, tensor in view.factors.items()}
    return [(name, tensor.detach().clone()) for name, tensor in sorted(found.items())]


def identical(one: Sequence[tuple[str, Any]], other: Sequence[tuple[str, Any]], says: str) -> None:
    """Assert that two lists of named values are bit-for-bit the same."""
    assert [name for name, _ in one] == [name for name, _ in other], (
        f"{says}: {one} and {other} have different names"
    )
    for (name, a), (_, b) in zip(one, other, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            assert a.dtype == b.dtype, f"{says}: {name} is {b.dtype}, not {a.dtype}"
            close(b, a, f"{says}: {name} differs", rtol=0, atol=0)
        else:
            assert a == b, f"{says}: {name} is {b!r}, not {a!r}"


def flattened(nested: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return nested mappings and sequences as a list of paths with values."""
    if isinstance(nested, Mapping):
        return [
            pair
            for key in sorted(nested, key=str)
            for pair in flattened(nested[key], f"{path}/{key}")
        ]
    if isinstance(nested, list | tuple):
        return [
            pair
            for number, item in enumerate(nested)
            for pair in flattened(item, f"{path}/{number}")
        ]
    return [(path, nested)]


def through_file(state: Any) -> Any:
    """Return a state as `torch.save` writes it and `torch.load(weights_only=True)` reads it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        return torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise AssertionError(
            "the state holds more than tensors, numbers and text, which "
            f"torch.load(weights_only=True) refuses: {error}"
        ) from error


def rearrange(entries: dict[str, Any], how: str) -> None:
    """Reorder the entries of a dict in place: "reversed", or "rotated" (the last entry first)."""
    items = list(entries.items())
    entries.clear()
    entries.update(items[::-1] if how == "reversed" else items[-1:] + items[:-1])


def hooks(model: nn.Module) -> dict[str, int]:
    """Return how many hooks of each kind the modules of a model have in total."""

    def kinds(module: nn.Module) -> Iterator[tuple[str, int]]:
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                yield name.strip("_"), len(value)

    found: dict[str, int] = {}
    for module in model.modules():
        for name, count in kinds(module):
            found[name] = found.get(name, 0) + count
    return {name: count for name, count in found.items() if count}
