"""The mean of the gradient in coordinates of the basis, against turning it in each step."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import kfactk
from kfactk.preconditioner.gradient_mean import TURNED
from kfactk_stages.basis.soap import Soap

F64 = torch.float64
OPTIONS = {
    "curvature": {"name": "gradient", "counts": "next"},
    "update": "sgd",
    "factor_every": 1,
    "scale_every": 1,
    "basis_every": 3,
    "lr": 0.01,
}
MOMENTS = [
    0.9,
    {"decay": 0.9, "corrected": False, "nesterov": True},
    {"decay": 0.5, "nesterov": True},
]


class Turning(Soap):
    """Has no coordinates, so that each mean is turned in its step."""

    def coordinates(self, decomposition: Any, v: Tensor) -> Tensor | None:
        return None

    def gradient_moments(self, decomposition: Any, gradient: Tensor, num_terms: Any) -> Any:
        turned = Soap.coordinates(self, decomposition, gradient)
        turned = gradient if turned is None else turned
        return self.coordinate_moments(decomposition, turned, num_terms)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
    return nn.Sequential(*layers).to(F64)


def step(
    model: nn.Module, optimizer: kfactk.Optimizer, number: int, *, broken: bool = False
) -> None:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(16, 5, dtype=F64, generator=generator)
    optimizer.zero_grad()
    loss = model(x).square().mean()
    (loss * float("nan") if broken else loss).backward()
    optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("changes", [{}, {"scale_every": 2}, {"basis": "eigh"}])
def test_training_is_that_which_turns_each_mean(moment: Any, changes: dict[str, Any]) -> None:
    found = []
    refresh = "eigh" if changes.get("basis") else "iterate"
    options = {**OPTIONS, **changes, "first_moment": moment}
    for basis in (Soap(refresh=refresh), Turning(refresh=refresh)):
        model = network()
        optimizer = kfactk.build(**{**options, "basis": basis}).bind(model)
        for number in range(11):
            step(model, optimizer, number)
        found.append(weights(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_it_is_turned_once_a_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step turns each matrix's gradient; the mean, only where the basis is new."""
    model, counts = network(), [0]
    optimizer = kfactk.build(**OPTIONS, basis="soap", first_moment=0.9).bind(model)
    turn = Soap.coordinates

    def counted(self: Soap, decomposition: Any, v: Tensor) -> Tensor | None:
        counts[0] += 1
        return turn(self, decomposition, v)

    monkeypatch.setattr(Soap, "coordinates", counted)
    made = []
    for number in range(9):
        counts[0] = 0
        step(model, optimizer, number)
        made.append(counts[0])
    # Four parameters; the first step makes a basis only, and the second turns their first mean.
    assert made[1:] == [8, 4, 8, 4, 4, 8, 4, 4]


def test_a_bad_batch_leaves_the_means_as_they_are() -> None:
    model = network()
    optimizer = kfactk.build(**OPTIONS, basis="soap", first_moment=0.9).bind(model)
    for number in range(5):
        step(model, optimizer, number)
    before = {name: tensor.clone() for name, tensor in means(optimizer).items()}
    assert len(before) == 4 * 4
    with pytest.warns(kfactk.KfactkWarning, match="NaN or inf"):
        step(model, optimizer, 99, broken=True)
    after = means(optimizer)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        counted = name.endswith(".weight")
        assert counted or torch.equal(after[name], tensor), name


def means(optimizer: kfactk.Optimizer) -> dict[str, Tensor]:
    """Return the saved means of gradients, and their weights."""
    return {
        f"{number} {key}": tensor
        for number, entry in optimizer.state_dict()["state"].items()
        for key, tensor in entry.items()
        if "gradient." in str(key)
    }


@pytest.mark.parametrize("method", ["coordinate_moments", "operator", "decompose"])
@pytest.mark.parametrize("failing", [0, 1, 3, 5])
def test_a_step_that_failed_is_tried_again(method: str, failing: int) -> None:
    """Nothing counts twice: neither the gradient in its statistics, nor in its mean."""
    found = []
    for broken in (False, True):
        model, basis = network(), Failing(decay=0.9)
        optimizer = kfactk.build(**OPTIONS, basis=basis, first_moment=0.9).bind(model)
        for number in range(7):
            if broken and number == failing:
                FAULTS[method] = 3
                with contextlib.suppress(kfactk.PluginError):
                    step(model, optimizer, number)
                FAULTS.clear()
                if optimizer.steps > number:  # the method was not asked in this step
                    continue
            step(model, optimizer, number)
        found.append(weights(model))
    assert torch.equal(found[0], found[1])


FAULTS: dict[str, int] = {}
"""Methods that fail, each with the number of the call."""


class Failing(Soap):
    """Fails when it is told to."""

    def coordinate_moments(self, *arguments: Any) -> Any:
        fail("coordinate_moments")
        return Soap.coordinate_moments(self, *arguments)

    def operator(self, *arguments: Any) -> Any:
        fail("operator")
        return Soap.operator(self, *arguments)

    def decompose(self, *arguments: Any) -> Any:
        fail("decompose")
        return Soap.decompose(self, *arguments)


def fail(method: str) -> None:
    if method in FAULTS:
        FAULTS[method] -= 1
        if not FAULTS[method]:
            raise RuntimeError("sabotage")


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_resumed_run_goes_on_bit_for_bit(steps: int) -> None:
    model = network()
    recipe = kfactk.build(**OPTIONS, basis="soap", first_moment=0.9)
    optimizer = recipe.bind(model)
    for number in range(steps):
        step(model, optimizer, number)
    again = copy.deepcopy(model)
    resumed = recipe.bind(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(steps, steps + 4):
        step(model, optimizer, number)
        step(again, resumed, number)
        assert torch.equal(weights(model), weights(again))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("changes", [{}, {"scale_every": 4}, {"basis": "shampoo"}])
def test_a_fresh_optimizer_has_room_for_what_any_step_saves(
    changes: dict[str, Any], steps: int
) -> None:
    """`torch.distributed.checkpoint` loads into room, and refuses what was not saved."""
    recipe = kfactk.build(
        **{**OPTIONS, "curvature": "gradient", "basis": "soap", "first_moment": 0.9, **changes}
    )
    model, other = network(), network()
    optimizer, fresh = recipe.bind(model), recipe.bind(other)
    for number in range(steps):
        step(model, optimizer, number)
    keys = [
        {(name, key) for name, entry in found["state"].items() for key in entry}
        for found in (
            get_optimizer_state_dict(model, optimizer),
            get_optimizer_state_dict(other, fresh),
        )
    ]
    assert keys[0] == keys[1]


def test_a_state_without_it_is_taken() -> None:
    """One that was saved before there was such a mean goes on, equal up to rounding."""
    model = network()
    recipe = kfactk.build(**OPTIONS, basis="soap", first_moment=0.9)
    optimizer = recipe.bind(model)
    for number in range(5):
        step(model, optimizer, number)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        for key in [key for key in entry if TURNED in str(key)]:
            del entry[key]
    again = copy.deepcopy(model)
    resumed = recipe.bind(again)
    resumed.load_state_dict(saved)
    for number in range(5, 9):
        step(model, optimizer, number)
        step(again, resumed, number)
    torch.testing.assert_close(weights(model), weights(again), rtol=1e-11, atol=1e-13)
