"""Layers whose influence the recorded calls do not hold whole are found, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfactk
from kfactk import CaptureError, KfactkWarning, Optimizer
from kfactk.capture.fisher_pass import FisherPass
from kfactk.capture.guard import unseen_layers

CASES: dict[str, Callable[[], tuple[nn.Module, list[Any], set[str]]]] = {}
ROWS = torch.linspace(-1, 1, 15).reshape(5, 3)


def case(function: Callable[[], tuple[nn.Module, list[Any], set[str]]]) -> None:
    """Note a model, the arguments of its forwards, and the layers that are seen in part."""
    CASES[function.__name__.replace("_", " ")] = function


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


class Calls(nn.Module):
    """A model whose forward is a function of itself."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in (parts or {"net": net()}).items():
            setattr(self, name, part)

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


@case
def a_plain_network() -> Any:
    return net(), [(ROWS,)], set()


@case
def rows_of_rank_three() -> Any:
    return net(), [(ROWS.reshape(5, 1, 3),)], set()


@case
def the_same_layers_twice() -> Any:
    return Calls(lambda model, x: model.net(model.net(x))), [(ROWS,)], set()


@case
def two_forwards_one_after_the_other() -> Any:
    return net(), [(ROWS,), (2 * ROWS,)], set()


@case
def a_weight_that_a_function_reads() -> Any:
    def decoded(model: Any, x: Tensor) -> Tensor:
        return F.linear(model.net(x), model.net[2].weight.mT)

    return Calls(decoded), [(ROWS,)], {"net.2"}


@case
def a_bias_that_a_function_reads() -> Any:
    return Calls(lambda model, x: model.net(x) + model.net[2].bias), [(ROWS,)], {"net.2"}


@case
def a_layer_that_a_function_alone_reads() -> Any:
    def both(model: Any, x: Tensor) -> Tensor:
        return F.linear(model.net(x), model.other.weight)

    return Calls(both, net=net(), other=nn.Linear(3, 2)), [(ROWS,)], {"other"}


@case
def a_weight_that_is_read_without_gradient() -> Any:
    def detached(model: Any, x: Tensor) -> Tensor:
        return F.linear(model.net(x), model.net[2].weight.mT.detach())

    return Calls(detached), [(ROWS,)], set()


@case
def a_derivative_in_the_inputs() -> Any:
    def residual(model: Any, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        u = model.net(x)
        return torch.autograd.grad(u.sum(), x, create_graph=True)[0] - u

    return Calls(residual), [(ROWS,)], {"net.0", "net.2"}


@case
def a_derivative_of_convolutions() -> Any:
    def residual(model: Any, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        u = model.out(torch.tanh(model.conv(x)))
        return torch.autograd.grad(u.sum(), x, create_graph=True)[0].flatten(1)[:, :3] + u.mean()

    parts = {"conv": nn.Conv2d(1, 2, 3), "out": nn.Conv2d(2, 1, 1)}
    return Calls(residual, **parts), [(torch.randn(4, 1, 4, 4),)], {"conv", "out"}


@case
def a_loop_outside_the_model() -> Any:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(7, 4), nn.Linear(4, 3)
            self.state = torch.zeros(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.state = torch.tanh(self.hidden(torch.cat([x, self.state], -1)))
            return self.out(self.state)

    return Cell(), [(ROWS,)] * 2, {"hidden"}


@case
def a_loop_inside_the_model() -> Any:
    def loop(model: Any, x: Tensor) -> Tensor:
        state = torch.zeros(5, 4)
        for _ in range(3):
            state = torch.tanh(model.hidden(torch.cat([x, state], -1)))
        return model.out(state)

    return Calls(loop, hidden=nn.Linear(7, 4), out=nn.Linear(4, 3)), [(ROWS,)], set()


@case
def a_checkpointed_part() -> Any:
    def run(model: Any, x: Tensor) -> Tensor:
        return model.out(checkpoint(model.net, x, use_reentrant=False))

    return Calls(run, net=net(), out=nn.Linear(3, 3)), [(ROWS,)], set()


def adapted(model: Any, x: Tensor, *, second: bool) -> Tensor:
    parameters = dict(model.net.named_parameters())
    inner = torch.func.functional_call(model.net, parameters, (x,)).square().sum()
    steps = torch.autograd.grad(inner, list(parameters.values()), create_graph=second)
    fast = {name: p - 0.1 * s for (name, p), s in zip(parameters.items(), steps, strict=True)}
    found: Tensor = torch.func.functional_call(model.net, fast, (x,))
    return found


@case
def a_first_order_inner_step() -> Any:
    return Calls(lambda model, x: adapted(model, x, second=False)), [(ROWS,)], set()


@case
def an_inner_step_of_second_order() -> Any:
    return Calls(lambda model, x: adapted(model, x, second=True)), [(ROWS,)], {"net.0", "net.2"}


@case
def weights_that_are_scaled_for_one_call() -> Any:
    def scaled(model: Any, x: Tensor) -> Tensor:
        half = {name: p * 0.5 for name, p in model.net.named_parameters()}
        found: Tensor = torch.func.functional_call(model.net, half, (x,))
        return found

    return Calls(scaled), [(ROWS,)], {"net.0", "net.2"}


@case
def a_part_under_vmap() -> Any:
    def run(model: Any, x: Tensor) -> Tensor:
        return model.out(torch.func.vmap(model.net)(x))

    return Calls(run, net=net(), out=nn.Linear(3, 3)), [(ROWS,)], {"net.0", "net.2"}


@case
def a_custom_function_of_a_weight() -> Any:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight.mT

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return gradient @ weight.to(gradient.dtype), gradient.mT @ x.to(gradient.dtype)

    def run(model: Any, x: Tensor) -> Tensor:
        h: Tensor = Scaled.apply(model.net(x), model.net[2].weight.mT)
        return h

    return Calls(run), [(ROWS,)], {"net.2"}


@case
def all_kinds_of_layers() -> Any:
    def run(model: Any, x: Tensor, t: Tensor) -> Tensor:
        h = model.instance(model.group(model.batch(model.conv(x)))).mean((2, 3))
        out: Tensor = model.out(model.rms(model.layer(h + model.table(t).sum(1))))
        return out

    parts = {
        "conv": nn.Conv2d(3, 4, 3),
        "batch": nn.BatchNorm2d(4),
        "group": nn.GroupNorm(2, 4),
        "instance": nn.InstanceNorm2d(4, affine=True),
        "layer": nn.LayerNorm(4),
        "rms": nn.RMSNorm(4),
        "table": nn.Embedding(7, 4),
        "out": nn.Linear(4, 3),
    }
    return Calls(run, **parts), [(torch.randn(5, 3, 6, 6), torch.randint(7, (5, 2)))], set()


@case
def an_encoder() -> Any:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2)), [(torch.randn(3, 5, 8),)], set()


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The names of the layers that the guard finds in each followed forward."""
    found: list[set[str]] = []

    def noted(self: FisherPass, forward: Any, views: list[Tensor]) -> Any:
        found.append({layer.name for layer in unseen_layers(views, forward.calls, forward.layers)})
        return forward

    monkeypatch.setattr(FisherPass, "_guarded", noted)
    return found


def bound(model: nn.Module, **recipe: Any) -> Optimizer:
    likelihood = {"name": "categorical", "class_axis": -1}
    return kfactk.build(**{"curvature": "all", "likelihood": likelihood, **recipe}).bind(model)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_layers_seen_in_part_are_found(
    name: str, precision: torch.dtype, found: list[set[str]]
) -> None:
    """In full precision and under autocast, whose copies of a weight all its calls share."""
    torch.manual_seed(0)
    model, forwards, expected = CASES[name]()
    optimizer = bound(model)
    assert set(optimizer.layers) >= expected
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        for args in forwards:
            model(*args)
    assert len(found) == len(forwards)
    assert found[-1] == expected
    optimizer.close()


def test_the_refusal_names_all_layers_and_the_line_to_paste() -> None:
    model, [args], _ = CASES["a derivative in the inputs"]()
    optimizer = bound(model)
    with pytest.raises(CaptureError, match=r"'net.0', 'net.2'.*exclude=\['net.0', 'net.2'\]"):
        model(*args)
    optimizer.close()


def test_unseen_layers_train_plainly_on_request() -> None:
    """As they do where they are excluded from the start."""
    ends = []
    for recipe in ({"unseen": "plain"}, {"exclude": ["net.2"]}):
        torch.manual_seed(0)
        model, [args], _ = CASES["a weight that a function reads"]()
        optimizer = bound(model, fisher="exact", lr=0.1, update="sgd", clip="none", **recipe)
        if "unseen" in recipe:
            with pytest.warns(KfactkWarning, match="layers 'net.2'.*plain gradient from now on"):
                model(*args)
            optimizer.zero_grad()
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(*args), torch.arange(5) % 4).backward()
            optimizer.step()
        assert set(optimizer.layers) == {"net.0"}
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
        if "unseen" in recipe:
            [row] = [row for row in optimizer.coverage() if row.parameter == "net.2.weight"]
            assert "unseen" in row.reason
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)
