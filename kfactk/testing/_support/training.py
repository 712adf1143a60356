"""Train a small model by a recipe and compare the results: the base of laws of recipes."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk.capture.support import model_output
from kfactk.optim.optimizer import Optimizer
from kfactk.recipe import Recipe
from kfactk.testing._support.laws import Laws, close
from kfactk.testing._support.models import Net, Still

PERIODS = {"factor_every": 2, "scale_every": 3, "basis_every": 5}
"""No multiples of each other; a recipe's own come before them."""
EXAMPLES, STEPS = 6, 4

Recipes = st.SearchStrategy[Mapping[str, Any]]
Data = tuple[Tensor, Tensor]


class Training(Laws):
    """A recipe at work on a small model; model, batch and loss can be others."""

    family = "recipe"
    recipe: ClassVar[Mapping[str, Any]] = {}
    """Arguments of `kfactk.build`."""
    tolerance: ClassVar[float] = 1e-6
    """Relative deviation allowed where sums are taken in another order; for a model in float64."""

    def recipes(self) -> Recipes:
        """The recipes that are to obey: the class' own."""
        return st.just(self.recipe)

    def steady(self) -> Recipes:
        """Those recipes whose results rounding changes by no more than its own size.

        Laws that take sums in another order use them. Repeated nonzero eigenvalues rule a basis of
        eigenvectors out: rounding rotates the vectors.
        """
        return self.recipes()

    def model(self) -> nn.Module:
        """The model, without dropout or BatchNorm; its parameters may be drawn globally."""
        return Net()

    def batch(self, generator: torch.Generator, examples: int) -> Data:
        """Inputs and targets, their examples in dimension 0."""
        inputs = torch.randn(examples, 2, 4, generator=generator, dtype=torch.float64)
        return inputs, torch.randint(3, (examples,), generator=generator)

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        """The training loss, reduced over the examples as the recipe's `reduction` says."""
        return F.cross_entropy(output, targets)

    def still(self, recipe: Recipe) -> Recipe:
        """The recipe with draws that depend on each example's output alone.

        Laws that compare batches of other sizes use it. It changes the draws of the likelihood; a
        Fisher stage that draws by itself needs its own override.
        """
        return recipe.evolve(likelihood=Still(recipe.likelihood))

    def subject(self) -> Recipe:
        """The recipe."""
        return kfactk.build(**self.recipe)

    def label(self) -> str:
        """The recipe as it is written."""
        return f"recipe {dict(self.recipe)!r}"

    def build(self, recipe: Mapping[str, Any]) -> Recipe:
        """The recipe, with short periods unless it has its own."""
        return kfactk.build(**{**PERIODS, **recipe})

    def fresh(self) -> nn.Module:
        """The model, with the same parameters every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.model().train()

    def data(self, number: int) -> Data:
        """Batch `number`."""
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
        """Run forward and backward of one batch; return the loss.

        Args:
            factor: What the loss is multiplied by.
            num_terms: Whether to multiply it by the number of its terms as well.
        """
        output = model(data[0])
        optimizer.observe()
        loss = self.loss(output, data[1]) * factor
        if num_terms:
            view = optimizer.recipe.likelihood.view(
                (optimizer.recipe.output or model_output)(output)
            )
            loss = loss * (view.shape[0] * view.shape[1])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self, optimizer: Optimizer, model: nn.Module, number: int) -> float:
        """One step of the ordinary loop; the loss."""
        optimizer.zero_grad()
        loss = self.backward(optimizer, model, self.data(number))
        optimizer.step()
        return float(loss)

    def run(self, recipe: Recipe, steps: int = STEPS) -> tuple[nn.Module, Optimizer]:
        """The model after some steps."""
        model = self.fresh()
        optimizer = recipe.bind(model)
        for number in range(steps):
            self.step(optimizer, model, number)
        return model, optimizer

    def compare(
        self,
        recipe: Recipe,
        one: Callable[[Optimizer, nn.Module, int], None],
        other: Callable[..., None],
        says: str,
    ) -> None:
        """Two runs that must come to the same parameters and factors, but for the order of sums."""
        found = []
        for train in (one, other):
            model = self.fresh()
            optimizer = recipe.bind(model)
            for number in range(STEPS):
                optimizer.zero_grad()
                train(optimizer, model, number)
                optimizer.step()
            found.append(dict(outcome(model, optimizer)))
        self.alike(found[0], found[1], says)

    def alike(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor], says: str) -> None:
        """Assert that tensors of equal names are equal within the tolerance of their size."""
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
        """Skip the law for the class' own recipe; pass over one that was drawn."""
        if type(self).recipes is Training.recipes:
            pytest.skip(why)
        hypothesis.reject()


def outcome(model: nn.Module, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """Parameters and factors by name, as copies."""
    found: dict[str, Tensor] = {
        f"parameter {name}": parameter for name, parameter in model.named_parameters()
    }
    for name, view in optimizer.layers.items():
        found |= {f"factor {key} of layer {name}": tensor for key, tensor in view.factors.items()}
    return [(name, tensor.detach().clone()) for name, tensor in sorted(found.items())]


def identical(one: Sequence[tuple[str, Any]], other: Sequence[tuple[str, Any]], says: str) -> None:
    """Assert that two lists of named values are the same bit for bit."""
    assert [name for name, _ in one] == [name for name, _ in other], (
        f"{says}: {one} and {other} have other names"
    )
    for (name, a), (_, b) in zip(one, other, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            assert a.dtype == b.dtype, f"{says}: {name} is {b.dtype}, not {a.dtype}"
            close(b, a, f"{says}: {name} differs", rtol=0, atol=0)
        else:
            assert a == b, f"{says}: {name} is {b!r}, not {a!r}"


def flattened(nested: Any, path: str = "") -> list[tuple[str, Any]]:
    """Nested mappings and sequences as a list of paths with values."""
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
    """A state as `torch.save` writes it and `torch.load(weights_only=True)` reads it back."""
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
    """Reorder the entries of a dict in place: "reversed", or "rotated" with the last one first."""
    items = list(entries.items())
    entries.clear()
    entries.update(items[::-1] if how == "reversed" else items[-1:] + items[:-1])


def hooks(model: nn.Module) -> dict[str, int]:
    """How many hooks of each kind the modules of a model have together."""

    def kinds(module: nn.Module) -> Iterator[tuple[str, int]]:
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                yield name.strip("_"), len(value)

    found: dict[str, int] = {}
    for module in model.modules():
        for name, count in kinds(module):
            found[name] = found.get(name, 0) + count
    return {name: count for name, count in found.items() if count}
