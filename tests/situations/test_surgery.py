"""Models that change after bind: layers replaced, added, removed, tied, parametrized, pruned.

Truth is EKFAC written again for the layers that are left, and the plain gradient for the rest.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from kfactk import KfactkWarning, Optimizer
from tests.situations.by_hand import Hand, assert_same, bound, categorical, draw, sgd, take

EXAMPLES = 8
FISHERS = pytest.mark.parametrize("fisher", ["exact", "empirical"])


class Net(nn.Sequential):
    """Layers 0, 2, 4 are linear, with 2 and 4 of the same shape."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)
        super().__init__(*layers)
        self.double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    return draw(EXAMPLES, 4, seed=step), (torch.arange(EXAMPLES) + step) % 3


def one(
    model: nn.Module, buffers: dict[str, Tensor], fisher: str, x: Tensor, y: Tensor
) -> list[Tensor]:
    """Begin with these buffers, which a forward may change."""
    model.load_state_dict(buffers, strict=False)
    logits = model(x[None])
    return categorical(logits) if fisher == "exact" else [F.cross_entropy(logits, y[None])]


def step_of(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    x, y = batch(number)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def step_by_hand(model: nn.Module, layers: list[str], number: int, fisher: str = "exact") -> None:
    x, y = batch(number)
    hand, buffers = Hand(model, layers), copy.deepcopy(dict(model.named_buffers()))
    for row, label in zip(x, y, strict=True):
        hand.example(one, model, buffers, fisher, row, label)
    model.load_state_dict(buffers, strict=False)
    take(sgd(model), hand, F.cross_entropy(model(x), y))


class Both:
    """A bound model and its twin, which get the same changes."""

    def __init__(self, fisher: str = "exact") -> None:
        self.model, self.fisher, self.number = Net(), fisher, 0
        self.twin = copy.deepcopy(self.model)
        self.optimizer = bound(self.model, fisher=fisher)

    def change(self, how: Callable[[Any], object]) -> None:
        """Change both, with the same random numbers."""
        for model in (self.model, self.twin):
            torch.manual_seed(1)
            how(model)

    def train(self, layers: list[str], steps: int = 2, *, warns: str = "") -> None:
        """Take steps; the first of them warns, or none does."""
        for first in (True, *[False] * (steps - 1)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", KfactkWarning)
                step_of(self.model, self.optimizer, self.number)
            found = [str(each.message) for each in caught]
            assert len(found) == bool(warns and first), found
            assert all(re.search(warns, each) for each in found), found
            step_by_hand(self.twin, layers, self.number, self.fisher)
            self.number += 1
        assert set(self.optimizer.layers) == set(layers)
        assert_same(self.model, self.twin)

    def trains_all(self) -> None:
        """Put all parameters of the model into the only group."""
        self.optimizer.param_groups[0]["params"] = list(self.model.parameters())


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.mT) / 2


def symmetric(model: Any) -> None:
    parametrize.register_parametrization(model[2], "weight", Symmetric())


def pruned(model: Any) -> None:
    prune.l1_unstructured(model[2], "weight", 0.5)


@FISHERS
@pytest.mark.parametrize(
    ("how", "undo"),
    [
        (symmetric, lambda model: parametrize.remove_parametrizations(model[2], "weight")),
        (
            lambda model: parametrizations.spectral_norm(model[2]),
            lambda model: parametrize.remove_parametrizations(model[2], "weight"),
        ),
        (
            lambda model: parametrizations.orthogonal(model[2]),
            lambda model: parametrize.remove_parametrizations(model[2], "weight"),
        ),
        (pruned, None),
    ],
    ids=["symmetric", "spectral_norm", "orthogonal", "pruned"],
)
def test_a_weight_that_is_computed_and_no_longer(how: Any, undo: Any, fisher: str) -> None:
    """Its layer is plain meanwhile, and the warning names its parameters and no others."""
    both = Both(fisher)
    both.train(["0", "2", "4"])
    both.change(how)
    both.train(["0", "4"], warns=r"after bind: 2\..*2\.bias \((?!.*[04]\.(weight|bias)).*plain")
    if undo is not None:
        both.change(undo)
        both.trains_all()
        both.train(["0", "2", "4"])


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_whose_parameters_are_put_in_the_groups(old: bool) -> None:
    both = Both()
    both.train(["0", "2", "4"])
    norm = nn.utils.weight_norm if old else parametrizations.weight_norm
    both.change(lambda model: norm(model[2]))
    both.trains_all()
    both.train(["0", "4"], warns=r"2\.bias .*lost their block.*plain")


@FISHERS
def test_a_layer_in_place_of_another(fisher: str) -> None:
    both = Both(fisher)
    both.train(["0", "2", "4"])

    def replace(model: Any) -> None:
        model[2] = nn.Linear(3, 3).double()

    both.change(replace)
    both.trains_all()
    both.train(["0", "2", "4"])


def test_a_layer_in_place_of_another_that_is_not_trained() -> None:
    """The warning names it; the other layers are right."""
    both = Both()
    both.train(["0", "2", "4"])

    def replace(model: Any) -> None:
        model[2] = nn.Linear(3, 3).double()

    both.change(replace)
    both.twin[2].requires_grad_(False)
    told = r"after bind: 2\.weight, 2\.bias of the model are new.*Bind after such a change"
    both.train(["0", "4"], warns=told)


def test_a_layer_of_another_size() -> None:
    """As for a new number of classes."""
    both = Both()
    both.train(["0", "2", "4"])

    def replace(model: Any) -> None:
        model[4] = nn.Linear(3, 5).double()

    both.change(replace)
    both.trains_all()
    both.train(["0", "2", "4"])


def test_layers_that_are_added_and_removed() -> None:
    both = Both()
    both.train(["0", "2", "4"])
    both.change(lambda model: model.extend([nn.Tanh(), nn.Linear(3, 3).double()]))
    both.optimizer.add_param_group({"params": list(both.model[6].parameters())})
    both.train(["0", "2", "4", "6"])

    def remove(model: Any) -> None:
        model[2] = nn.Identity()

    both.change(remove)
    both.train(["0", "4", "6"])
    both.change(lambda model: model.pop(6))
    both.train(["0", "4"])


@FISHERS
def test_layers_that_are_tied_and_untied(fisher: str) -> None:
    """Two modules with the same parameters are one layer, as one module that is called twice."""
    both = Both(fisher)
    both.train(["0", "2", "4"])
    model: Any = both.model
    model[4].weight, model[4].bias = model[2].weight, model[2].bias
    both.twin[4] = both.twin[2]
    both.train(["0", "2"])
    model[4] = copy.deepcopy(model[2])
    both.twin[4] = copy.deepcopy(both.twin[2])
    both.trains_all()
    both.train(["0", "2", "4"])


def test_weights_that_are_tied_without_their_biases() -> None:
    """What two layers share in part is plain."""
    both = Both()
    both.train(["0", "2", "4"])

    def tie(model: Any) -> None:
        model[4].weight = model[2].weight

    both.change(tie)
    both.trains_all()
    both.train(["0"], warns=r"after bind: 2\.weight.*plain")


def test_parameters_that_are_assigned_by_loading() -> None:
    """`load_state_dict(assign=True)` makes new parameters, which the groups must get."""
    both = Both()
    both.train(["0", "2", "4"])
    other = copy.deepcopy(both.twin)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    both.change(lambda model: model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True))
    both.trains_all()
    both.train(["0", "2", "4"])


def test_parameters_that_are_assigned_and_not_in_the_groups() -> None:
    """As with torch's own optimizers the model stays as it is; the warning names all of it."""
    model = Net()
    optimizer = bound(model)
    step_of(model, optimizer, 0)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    kept = copy.deepcopy(model)
    with pytest.warns(KfactkWarning, match=r"0\.weight.*4\.bias of the model are new parameters"):
        step_of(model, optimizer, 1)
    assert_same(model, kept)


def test_values_that_are_loaded_in_place() -> None:
    both = Both()
    both.train(["0", "2", "4"])
    kept = copy.deepcopy(both.twin.state_dict())
    both.train(["0", "2", "4"])
    both.change(lambda model: model.load_state_dict(kept))
    both.train(["0", "2", "4"])


def test_a_copy_of_a_bound_model_is_free() -> None:
    """It may be trained beside it, by a rule of torch or bound itself."""
    both = Both()
    both.train(["0", "2", "4"], steps=1)
    free, own = copy.deepcopy(both.model), copy.deepcopy(both.model)
    twin, other = copy.deepcopy(free), bound(own)
    for number in range(5, 8):
        both.train(["0", "2", "4"], steps=1)
        rule = sgd(free)
        rule.zero_grad()
        F.cross_entropy(free(batch(number)[0]), batch(number)[1]).backward()
        rule.step()
        take(sgd(twin), Hand(twin, []), F.cross_entropy(twin(batch(number)[0]), batch(number)[1]))
        step_of(own, other, number)
    assert_same(free, twin)
    single = copy.deepcopy(both.model)
    for parameter, start in zip(single.parameters(), Both().model.parameters(), strict=True):
        parameter.data = start.data
    for number in (0, 5, 6, 7):
        step_by_hand(single, ["0", "2", "4"], number)
    assert_same(own, single)


def test_another_precision() -> None:
    """Parameters keep their identity, and curvature the float32 in which it was made."""
    model = Net().float()
    optimizer = bound(model)
    x, y = batch(0)
    F.cross_entropy(model(x.float()), y).backward()
    optimizer.step()
    model.double()
    twin = copy.deepcopy(model)
    for number in range(1, 4):
        step_of(model, optimizer, number)
        step_by_hand(twin, ["0", "2", "4"], number)
    assert_same(model, twin, rtol=1e-5, atol=1e-5)
