"""What a step measures follows the model as it is: layers change between steps and forwards."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CaptureError, KfactkWarning, Optimizer
from tests.kfactk import surgery
from tests.kfactk.small import F64, assert_equal, batch, bound, train, values
from tests.kfactk.surgery import CHANGES, Change, add, fresh, net

LATEST: dict[str, Any] = {
    "factor_every": 1,
    "scale_every": 1,
    "basis_every": 1,
    "factor_decay": 0.0,
    "lr": 0.1,
}
"""Nothing of earlier steps is left in curvature."""
ONCE: dict[str, Any] = {"factor_every": 100, "scale_every": 100, "basis_every": 100}


def rows(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)


def moment(*inputs: Tensor) -> Tensor:
    """Return A, by its definition, over all examples."""
    a = rows(torch.cat(inputs).detach())
    return a.T @ a / len(a)


# ------------------------------------------------------------------------------- between two steps


RUNNING = {"name": "ekfac", "scale": "running", "scale_decay": 0.0}


@pytest.mark.parametrize("basis", ["kfac", "ekfac", RUNNING], ids=["kfac", "exact", "running"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_treated_like_one_bound_after_the_change(
    change: Change, basis: Any
) -> None:
    model = net()
    optimizer = bound(model, **LATEST, basis=basis)
    for _ in range(2):
        train(optimizer, model, batch())
    change(model, optimizer)
    twin = copy.deepcopy(model)
    other = bound(twin, **LATEST, basis=basis)
    lost = pytest.warns(KfactkWarning, match=r"0\.weight, 0\.bias \(tied.* lost their block")
    for number in range(2):
        data = batch()
        with lost if change is surgery.tie_in_part and not number else contextlib.nullcontext():
            train(optimizer, model, data)
        train(other, twin, data)
    assert tuple(optimizer.layers) == tuple(other.layers) == CHANGES[change]
    assert optimizer.coverage() == other.coverage()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (surgery.insert_in_front, {"0": "2", "2": "4", "4": "6"}),
        (surgery.insert_within, {"0": "1", "2": "3", "4": "5"}),
        (surgery.swap, {"0": "2", "2": "0", "4": "4"}),
        (surgery.wrap, {"0": "0", "2": "2.0", "4": "4"}),
        (surgery.replace_by_the_same_width, {"0": "0", "2": "2"}),
        (surgery.append, {"0": "0", "2": "2", "4": "4"}),
    ],
)
def test_a_layer_keeps_its_curvature_whatever_its_name(
    change: Change, names: dict[str, str]
) -> None:
    model = net()
    optimizer = bound(model, **ONCE)
    train(optimizer, model, batch())
    before = {name: view.factors for name, view in optimizer.layers.items()}
    change(model, optimizer)
    train(optimizer, model, batch())
    after = {name: view.factors for name, view in optimizer.layers.items()}
    for old, new in names.items():
        for factor, value in before[old].items():
            assert torch.equal(after[new][factor], value)


def test_a_renamed_layer_saves_and_loads_its_curvature() -> None:
    model = net()
    optimizer = bound(model, **ONCE)
    train(optimizer, model, batch())
    surgery.swap(model, optimizer)
    saved = optimizer.state_dict()
    other = copy.deepcopy(model)
    resumed = bound(other, [p for _, p in ordered(model, other, optimizer)], **ONCE)
    resumed.load_state_dict(saved)
    for name, view in optimizer.layers.items():
        for factor, value in view.factors.items():
            assert torch.equal(resumed.layers[name].factors[factor], value)


def ordered(model: nn.Module, other: nn.Module, optimizer: Optimizer) -> list[tuple[Any, Any]]:
    """Return parameters of both models in the order of the optimizer's groups."""
    twin = dict(zip(model.parameters(), other.parameters(), strict=True))
    return [(p, twin[p]) for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("after", ["bind", "a step"])
def test_a_state_is_loaded_into_the_layers_as_they_are(after: str) -> None:
    """The bias was frozen after bind, and before the load."""
    model = net()
    model[2].bias.requires_grad_(False)
    optimizer = bound(model)
    train(optimizer, model, batch())
    other = net()
    resumed = bound(other)
    if after == "a step":
        train(resumed, other, batch())
    other[2].bias.requires_grad_(False)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        data = batch()
        train(optimizer, model, data)
        train(resumed, other, data)
    assert_equal(values(model), values(other))


def test_untied_modules_are_layers_of_their_own_again() -> None:
    model = net()
    surgery.tie(model, None)  # type: ignore[arg-type]
    optimizer = bound(model, **LATEST)
    train(optimizer, model, batch())
    assert set(optimizer.layers) == {"0", "4"}
    model[2].weight, model[2].bias = fresh(4, 4).parameters()
    add(optimizer, model[2])
    x, y = batch()
    train(optimizer, model, (x, y))
    assert set(optimizer.layers) == {"0", "2", "4"}
    assert set(optimizer.layers["2"].factors) == {"A", "G"}


@pytest.mark.parametrize("whole", [False, True])
def test_a_layer_compiled_after_bind_keeps_its_block(whole: bool) -> None:
    model = net()
    optimizer = bound(model)
    train(optimizer, model, batch())
    block = optimizer.layers["2"].block
    if whole:
        model[2].compile(backend="eager")
    else:
        model[2] = torch.compile(model[2], backend="eager")  # type: ignore[call-overload]
    for _ in range(2):
        train(optimizer, model, batch())
    name = "2" if whole else "2._orig_mod"
    assert optimizer.layers[name].block is block
    assert f"{name}.weight" in optimizer.coverage().covered


def test_what_is_no_longer_in_the_model_is_let_go() -> None:
    model = net()
    optimizer = bound(model)
    train(optimizer, model, batch())
    gone = weakref.ref(model[2]), weakref.ref(optimizer.layers["2"].block)
    surgery.remove(model, optimizer)
    train(optimizer, model, batch())
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_layer_that_the_optimizer_was_not_given_is_not_covered() -> None:
    model = net()
    optimizer = bound(model)
    model.append(fresh(3, 3))
    train(optimizer, model, batch())
    reasons = {row.parameter: row.reason for row in optimizer.coverage()}
    assert reasons["5.weight"] == "not among the optimizer's parameters"


def test_a_layer_that_is_frozen_for_some_steps_goes_on_where_it_was() -> None:
    model = net()
    optimizer = bound(model, **ONCE)
    train(optimizer, model, batch())
    before = optimizer.layers["2"].factors
    model[2].requires_grad_(False)
    train(optimizer, model, batch())
    assert "2" not in optimizer.layers
    model[2].requires_grad_(True)
    train(optimizer, model, batch())
    for factor, value in optimizer.layers["2"].factors.items():
        assert torch.equal(value, before[factor])


# ----------------------------------------------------------------- between two forwards of one step


def generator_step(model: nn.Module, *, frozen: bool = True) -> None:
    """Run a forward and a backward as the generator's step of a GAN does."""
    model.requires_grad_(not frozen)
    fake = torch.randn(5, 4, dtype=F64, requires_grad=True)
    model(fake).sum().backward()
    model.requires_grad_(True)


def saliency(model: nn.Module) -> None:
    """Differentiate an output by the input, with frozen parameters."""
    model.requires_grad_(False)
    x = torch.randn(4, 4, dtype=F64, requires_grad=True)
    model(x).max().backward()
    model.requires_grad_(True)


def detour(model: nn.Sequential) -> None:
    """Forwards through other modules that are taken back."""
    head, model[4] = model[4], fresh(4, 3)
    model.requires_grad_(False)
    model(torch.randn(3, 4, dtype=F64))
    model[0], model[2] = model[2], model[0]
    model(torch.randn(3, 4, dtype=F64))
    model[0], model[2] = model[2], model[0]
    model[4] = head
    model.requires_grad_(True)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("frozen", [generator_step, saliency, detour])
def test_a_forward_through_frozen_layers_counts_nothing(
    frozen: Callable[[Any], None], first: bool
) -> None:
    """Before the forward of the step or after it; the run without it ends at the same bits."""
    ends = []
    for visits in (True, False):
        model = net()
        optimizer = bound(model, factor_every=2, scale_every=3, basis_every=4, fisher="mc")
        generator = torch.Generator().manual_seed(1)
        for _ in range(6):
            x = torch.randn(6, 4, dtype=F64, generator=generator)
            if visits and first:
                frozen(model)
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.arange(6) % 3).backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            if visits and not first:
                frozen(model)
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        ends.append(values(model))
        weights = {v.block.state.factors["A"].weight for v in optimizer.layers.values()}
        assert weights == {1 + 0.95 + 0.95**2}  # factors were due at steps 0, 2 and 4
    assert_equal(*ends)


def test_a_bias_frozen_in_an_earlier_forward_leaves_the_other_layers_theirs() -> None:
    model = net()
    optimizer = bound(model)
    (x, _), (z, y) = batch(5), batch(6)
    model[2].bias.requires_grad_(False)
    model(x)
    model[2].bias.requires_grad_(True)
    F.cross_entropy(model(z), y).backward()
    hidden = model[:4]
    expected = {
        "0": moment(x, z),
        "2": moment(model[:2](z)),
        "4": moment(hidden(x), hidden(z)),
    }
    optimizer.step()
    for name, a in expected.items():
        torch.testing.assert_close(optimizer.layers[name].factors["A"], a)


def test_a_module_replaced_between_two_forwards_is_measured_in_the_second() -> None:
    model = net()
    optimizer = bound(model, **LATEST)
    train(optimizer, model, batch())
    (x, y), (z, w) = batch(5), batch(6)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    old = model[4]
    plain = [p.detach() - 0.1 * p.grad for p in old.parameters()]
    model[4] = fresh(4, 3)
    add(optimizer, model[4])
    F.cross_entropy(model(z), w).backward()
    hidden = model[:4]
    expected = {"0": moment(x, z), "2": moment(model[:2](torch.cat([x, z])))}
    expected["4"] = moment(hidden(z))
    optimizer.step()
    for name, a in expected.items():
        torch.testing.assert_close(optimizer.layers[name].factors["A"], a)
    for parameter, value in zip(old.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.detach(), value)  # still in the optimizer's groups


def test_modules_tied_between_two_forwards_are_measured_as_one_layer_in_the_second() -> None:
    model = net()
    optimizer = bound(model, **LATEST)
    (x, y), (z, w) = batch(5), batch(6)
    F.cross_entropy(model(x), y).backward()
    surgery.tie(model, optimizer)
    F.cross_entropy(model(z), w).backward()
    expected = moment(z) + moment(model[:2](z))
    optimizer.step()
    assert optimizer.layers["0"].layer.sites == (model[0], model[2])
    torch.testing.assert_close(optimizer.layers["0"].factors["A"], expected)


def test_a_change_after_the_last_forward_is_an_error_and_moves_nothing() -> None:
    """The gradient of the new layer comes from no forward that was followed."""
    model = net()
    optimizer = bound(model, **LATEST)
    train(optimizer, model, batch())
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    model[2].bias.requires_grad_(False)
    before = values(model)
    with pytest.raises(CaptureError, match="layer '2' has a gradient but gave no sample"):
        optimizer.step()
    assert_equal(before, values(model))
    train(optimizer, model, (x, y))
    assert set(optimizer.layers["2"].factors["A"].shape) == {4}


def test_weights_that_stand_in_for_the_parameters_are_an_error() -> None:
    """`torch.func.functional_call`: the forward ran with other weights than the layer's."""
    model = net()
    optimizer = bound(model)
    x, y = batch()
    other = {name: 1.0 * parameter for name, parameter in model.named_parameters()}
    before = values(model)
    F.cross_entropy(torch.func.functional_call(model, other, (x,)), y).backward()
    with pytest.raises(CaptureError, match=r"torch\.func\.functional_call"):
        optimizer.step()
    assert_equal(before, values(model))


# ------------------------------------------------------------------------------------- tied modules


class Called(nn.Module):
    """One module called three times."""

    def __init__(self, make: Callable[[], nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.part, self.head = make(), head

    def parts(self) -> list[nn.Module]:
        return [self.part] * 3

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts():
            x = torch.tanh(part(x))
        return self.head(x)


class Tied(Called):
    """Three modules with the same parameters, each called once."""

    def __init__(self, make: Callable[[], nn.Module], head: nn.Module) -> None:
        super().__init__(make, head)
        self.more = nn.ModuleList([make(), make()])
        for other in self.more:
            for name, parameter in self.part.named_parameters():
                setattr(other, name, parameter)

    def parts(self) -> list[nn.Module]:
        return [self.part, *self.more]


KINDS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(4, 4), lambda: nn.Linear(4, 3), (6, 4)),
    "no bias": (lambda: nn.Linear(4, 4, bias=False), lambda: nn.Linear(4, 3), (6, 4)),
    "conv": (
        lambda: nn.Conv1d(2, 2, 3, padding=1),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 3)),
        (6, 2, 4),
    ),
    "norm": (lambda: nn.LayerNorm(4), lambda: nn.Linear(4, 3), (6, 4)),
}


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("kind", KINDS)
def test_tied_modules_equal_one_module_called_as_often(kind: str, fisher: str) -> None:
    make, head, shape = KINDS[kind]
    ends = []
    for model_of in (Called, Tied):
        torch.manual_seed(0)
        model = model_of(make, head()).double()
        model.head.load_state_dict(seeded(head()).state_dict())
        for parameter in model.part.parameters():
            with torch.no_grad():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        optimizer = bound(model, curvature=["conv_kfac", "norm"], basis_every=2, fisher=fisher)
        assert "part" in optimizer.layers
        assert not any(name.startswith("more") for name in optimizer.layers)
        for step in range(3):
            x = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(step))
            train(optimizer, model, (x, torch.arange(6) % 3))
        ends.append((values(model), factors(optimizer)))
    (one, curvature), (other, same) = ends
    for each, its in ((one, other), (curvature, same)):
        assert len(each) == len(its)
        for a, b in zip(each, its, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def seeded(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter).sin())
    return module.double()


def factors(optimizer: Optimizer) -> list[Tensor]:
    return [f for view in optimizer.layers.values() for _, f in sorted(view.factors.items())]


def test_tied_modules_of_which_one_ran_are_measured_by_that_one() -> None:
    torch.manual_seed(0)
    model = Tied(lambda: nn.Linear(4, 4), nn.Linear(4, 3)).double()
    optimizer = bound(model)
    model.parts = lambda: [model.more[0]]  # type: ignore[method-assign]
    x, y = batch()
    train(optimizer, model, (x, y))
    torch.testing.assert_close(optimizer.layers["part"].factors["A"], moment(x))


@pytest.mark.parametrize("tied", ["weight", "bias"])
def test_modules_tied_in_part_are_left_to_the_update_rule(tied: str) -> None:
    model = net()
    setattr(model[2], tied, getattr(model[0], tied))
    optimizer = bound(model)
    assert set(optimizer.layers) == {"4"}
    before = values(model)
    train(optimizer, model, batch())
    for old, parameter in list(zip(before, model.parameters(), strict=True))[:3]:
        torch.testing.assert_close(parameter.detach(), old - 0.1 * parameter.grad)
    assert kfactk.build().coverage(model).plain == optimizer.coverage().plain
