"""Which of the user's backwards count, against hand-written sums of outer products."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CaptureError, Optimizer
from tests.kfactk.small import F64

X = torch.linspace(-1, 1, 24, dtype=F64).reshape(6, 4)
Y = torch.arange(6) % 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def bound(model: nn.Module, **recipe: Any) -> Optimizer:
    options = {"curvature": "kfac", "lr": 0.0, "damping": 0.1, **recipe}
    return kfactk.build(**options).bind(model)


def last_factor(model: nn.Sequential, x: Tensor, *losses: Any) -> Tensor:
    """Return G of the last layer: the mean outer product of the summed loss' gradient."""
    out = model(x)
    total = sum(loss(out) for loss in losses)
    [gradient] = torch.autograd.grad(total, out)
    gradient = gradient * len(x)
    return gradient.mT @ gradient / len(x)


def entropy(out: Tensor) -> Tensor:
    return F.cross_entropy(out, Y)


def reversed_entropy(out: Tensor) -> Tensor:
    return F.cross_entropy(out, Y.flip(0))


def measured(optimizer: Optimizer) -> Tensor:
    optimizer.step()
    return optimizer.layers["2"].factors["G"]


@pytest.mark.parametrize("retained", [True, False])
def test_backwards_through_one_forward_add_up(retained: bool) -> None:
    model = net()
    optimizer = bound(model, fisher="empirical", basis="kfac")
    out = model(X)
    entropy(out).backward(retain_graph=True)
    reversed_entropy(out).backward(retain_graph=retained)
    expected = last_factor(net(), X, entropy, reversed_entropy)
    torch.testing.assert_close(measured(optimizer), expected)


def test_gradients_taken_by_hand_count() -> None:
    model = net()
    optimizer = bound(model, fisher="empirical", basis="kfac")
    parameters = list(model.parameters())
    for parameter, found in zip(
        parameters, torch.autograd.grad(entropy(model(X)), parameters), strict=True
    ):
        parameter.grad = found
    torch.testing.assert_close(measured(optimizer), last_factor(net(), X, entropy))


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_inputs_alone_do_not_count(create_graph: bool) -> None:
    """As for saliency maps and adversarial examples."""
    model, x = net(), X.clone().requires_grad_()
    optimizer = bound(model, fisher="empirical", basis="kfac")
    out = model(x)
    torch.autograd.grad(out.sum(), x, retain_graph=True, create_graph=create_graph)
    entropy(out).backward()
    torch.testing.assert_close(measured(optimizer), last_factor(net(), X, entropy))


def test_a_backward_that_keeps_its_graph_for_later_counts() -> None:
    model = net()
    optimizer = bound(model, fisher="empirical", basis="kfac")
    entropy(model(X)).backward(create_graph=True)
    torch.testing.assert_close(measured(optimizer), last_factor(net(), X, entropy))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_loss_of_a_derivative_is_refused_and_changes_nothing() -> None:
    model, x = net(), X.clone().requires_grad_()
    optimizer = bound(model, fisher="empirical", lr=0.1)
    before = [parameter.clone() for parameter in model.parameters()]
    out = model(x)
    [slope] = torch.autograd.grad(out.sum(), x, create_graph=True)
    (entropy(out) + slope.square().mean()).backward()
    with pytest.raises(CaptureError, match=r"layers '0', '2'.*exclude=\['0', '2'\]"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.zero_grad()
    entropy(model(X)).backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_penalty_on_the_gradients_themselves_is_refused() -> None:
    model = net()
    optimizer = bound(model, fisher="empirical")
    entropy(model(X)).backward(create_graph=True)
    gradients = [parameter.grad for parameter in model.parameters()]
    sum(gradient.square().sum() for gradient in gradients if gradient is not None).backward()
    with pytest.raises(CaptureError, match="layers '0'"):
        optimizer.step()
    optimizer.zero_grad()


def test_a_backward_into_some_parameters_counts_for_their_layers_only() -> None:
    model = net()
    optimizer = bound(model, fisher="empirical", basis="kfac")
    out = model(X)
    entropy(out).backward(inputs=list(model[2].parameters()), retain_graph=True)
    reversed_entropy(out).backward(inputs=list(model[0].parameters()))
    torch.testing.assert_close(measured(optimizer), last_factor(net(), X, entropy))


CLEARED = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, to zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
}


@pytest.mark.parametrize("how", CLEARED)
def test_a_backward_whose_gradients_are_thrown_away_does_not_count(how: str) -> None:
    """As of a discriminator in the generator's step, or of a batch that a scaler skipped."""
    model = net()
    optimizer = bound(model, fisher="empirical", basis="kfac")
    reversed_entropy(model(3 * X)).backward()
    CLEARED[how](model, optimizer)
    entropy(model(X)).backward()
    torch.testing.assert_close(measured(optimizer), last_factor(net(), X, entropy))


def test_gradients_may_be_cleared_between_a_forward_and_its_backward() -> None:
    model = net()
    optimizer = bound(model, fisher="empirical", basis="kfac")
    loss = entropy(model(X))
    optimizer.zero_grad()
    loss.backward()
    torch.testing.assert_close(measured(optimizer), last_factor(net(), X, entropy))


def test_micro_batches_add_their_samples() -> None:
    model = net()
    optimizer = bound(model, fisher="empirical", basis="kfac", reduction="sum")
    for part in (slice(0, 2), slice(2, 6)):
        F.cross_entropy(model(X[part]), Y[part], reduction="sum").backward()
    torch.testing.assert_close(measured(optimizer), last_factor(net(), X, entropy))


def skipped(model: nn.Module, optimizer: Optimizer) -> None:
    entropy(model(5 * X)).backward()
    optimizer.zero_grad()


def ignored(model: nn.Module, optimizer: Optimizer) -> None:
    model(5 * X)


def differentiated(model: nn.Module, optimizer: Optimizer) -> None:
    x = X.clone().requires_grad_()
    torch.autograd.grad(model(x).sum(), x)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("what", [skipped, ignored, differentiated])
def test_the_running_scale_counts_terms_whose_gradient_is_there(what: Any, times: int) -> None:
    scales = []
    for extra in (0, times):
        model = net()
        optimizer = bound(
            model, fisher="exact", basis={"name": "ekfac", "scale": "running"}, factor_decay=0.0
        )
        for _ in range(extra):
            what(model, optimizer)
        entropy(model(X)).backward()
        optimizer.step()
        scales.append(sum(view.scale["scale"].sum() for view in optimizer.layers.values()))
    # The trace of the squared gradient is the same in every basis.
    torch.testing.assert_close(scales[1], scales[0])


@pytest.mark.parametrize("retained", [False, True])
def test_layers_leave_while_the_backward_runs_unless_the_graph_is_kept(
    retained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 3)).double()
    optimizer = bound(model, fisher="empirical")
    taken: list[str] = []
    at_the_input: list[str] = []
    accumulate = optimizer._preconditioner.accumulate

    def noted(layer: Any, *args: Any, **options: Any) -> None:
        taken.append(layer.name)
        accumulate(layer, *args, **options)

    monkeypatch.setattr(optimizer._preconditioner, "accumulate", noted)
    x = X.clone().requires_grad_()
    x.register_hook(lambda gradient: at_the_input.extend(taken))
    entropy(model(x)).backward(retain_graph=retained)
    assert at_the_input == ([] if retained else ["3", "2", "0"])
    assert taken == ([] if retained else ["3", "2", "0"])
    optimizer.step()
    assert taken == ["3", "2", "0"]


def test_nothing_keeps_a_watched_forward_alive() -> None:
    model = net()
    optimizer = bound(model, fisher="empirical")
    out = model(X)
    node = weakref.ref(out)
    entropy(out).backward()
    del out
    assert node() is None
    optimizer.step()


@pytest.mark.parametrize("depth", [3, 5])
@pytest.mark.parametrize("last_retained", [True, False])
def test_every_layer_has_the_sum_of_backwards(depth: int, last_retained: bool) -> None:
    def factors(*losses: Any) -> list[Tensor]:
        torch.manual_seed(0)
        hidden = [each for _ in range(depth - 1) for each in (nn.Linear(4, 4), nn.Tanh())]
        model = nn.Sequential(*hidden, nn.Linear(4, 3)).double()
        optimizer = bound(model, fisher="empirical", basis="kfac", clip="none", lr=0.0)
        optimizer.param_groups[0]["lr"] = 1e-30
        out = model(X)
        for number, loss in enumerate(losses, 1):
            loss(out, Y).backward(retain_graph=number < len(losses) or last_retained)
        optimizer.step()
        return [view.factors["G"] for view in optimizer.layers.values()]

    def pulled(out: Tensor, target: Tensor) -> Tensor:
        return 0.3 * out.square().mean()

    def both(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out, target) + pulled(out, target)

    torch.testing.assert_close(factors(F.cross_entropy, pulled), factors(both))


def test_a_freed_graph_leaves_another_one_of_the_forward_open() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
            self.b = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    def factors(several: bool) -> list[Tensor]:
        model = Two().double()
        optimizer = bound(model, fisher="empirical", basis="kfac", output=torch.cat)
        a, b = model(X)
        losses = [F.cross_entropy(a, Y), F.cross_entropy(b, Y), 0.5 * b.square().mean()]
        if several:
            losses[1].backward(retain_graph=True)
            losses[0].backward()
            losses[2].backward()
        else:
            sum(losses).backward()
        optimizer.step()
        return [view.factors["G"] for view in optimizer.layers.values()]

    torch.testing.assert_close(factors(True), factors(False))


class Heads(nn.Module):
    """A trunk and two heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.trunk(x))
        return torch.stack([self.one(hidden), self.two(hidden)], 1)


def emptied(parameters: Any) -> None:
    for parameter in parameters:
        parameter.grad = None


def zeroed(parameters: Any) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()


CLEARING: dict[str, Any] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "model": lambda model, optimizer: model.zero_grad(),
    "model, kept": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "None": lambda model, optimizer: emptied(model.parameters()),
    "zeros": lambda model, optimizer: zeroed(model.parameters()),
    "trunk": lambda model, optimizer: emptied(model.trunk.parameters()),
}


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("way", CLEARING)
def test_what_gradients_no_longer_hold_does_not_count(way: str, forwards: int) -> None:
    """The first backward is of head one, the second of head two, which it did not reach."""

    def factors(clear: Any, first: bool) -> dict[str, Tensor]:
        model = Heads()
        likelihood = {"name": "categorical", "class_axis": -1}
        optimizer = bound(model, fisher="empirical", basis="kfac", likelihood=likelihood)
        out = model(X)
        if first:
            F.cross_entropy(out[:, 0], Y).backward(retain_graph=forwards == 1)
            clear(model, optimizer)
            out = out if forwards == 1 else model(X)
        F.cross_entropy(out[:, 1], Y).backward()
        optimizer.step()
        return {name: view.factors["G"] for name, view in optimizer.layers.items()}

    found, truth = factors(CLEARING[way], True), factors(None, False)
    torch.testing.assert_close(found["trunk"], truth["trunk"])
    # The first backward gives head two zeros: they count where nobody clears them.
    share = forwards if way == "trunk" else 1
    torch.testing.assert_close(found["two"], truth["two"] / share)
    assert bool(found["one"].any()) == (way == "trunk")


@pytest.mark.parametrize("last", [True, False])
def test_gradients_that_are_zero_by_themselves_count(last: bool) -> None:
    """As of a batch whose loss has no weight, or behind a ReLU that is dead."""
    model = net()
    optimizer = bound(model, fisher="empirical", basis="kfac")
    for weight in (1.0, 0.0) if last else (0.0, 1.0):
        (weight * entropy(model(X))).backward()
    torch.testing.assert_close(measured(optimizer), last_factor(net(), X, entropy) / 2)
