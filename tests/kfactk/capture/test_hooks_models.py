"""Captured factors of many models equal plain autograd on a twin, one example at a time."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kfactk
from kfactk import CaptureError, Optimizer
from kfactk.capture.forward import Forward
from tests.kfactk import dense

F64 = torch.float64
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def bound(model: nn.Module, **recipe: Any) -> Optimizer:
    options: dict[str, Any] = {
        "fisher": "exact",
        "clip": "none",
        "update": "sgd",
        "lr": 0.1,
        "damping": 0.05,
    }
    return kfactk.build(**(options | recipe)).bind(model)


def logits_of(output: Any) -> Tensor:
    return (
        output
        if isinstance(output, Tensor)
        else output["logits"]
        if isinstance(output, dict)
        else output[0]
    )


def assert_measures(
    optimizer: Optimizer, twin: nn.Module, inputs: Tensor, only: set[str] | None = None
) -> None:
    """The optimizer's factors are those of the twin, which has the same parameters and no hooks."""
    names = [name for name in optimizer.layers if only is None or name in only]
    scores = dense.exact_scores(dense.categorical_labels)
    seen = dense.watch(twin, inputs, lambda output, n: scores(logits_of(output), n), names)
    assert names
    for name in names:
        for factor, truth in dense.factors(seen[name], "sud", float(len(inputs))).items():
            torch.testing.assert_close(
                optimizer.layers[name].factors[factor], truth, rtol=1e-9, atol=1e-12
            )


def step_once(model: nn.Module, inputs: Tensor, **recipe: Any) -> tuple[Optimizer, nn.Module]:
    twin = copy.deepcopy(model)
    optimizer = bound(model, **recipe)
    F.cross_entropy(logits_of(model(inputs)), LABELS).backward()
    optimizer.step()
    return optimizer, twin


class Inplace(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)
        self.mid = nn.Linear(8, 4)
        self.out = nn.Linear(4, 3)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.relu(self.mid(self.relu(self.conv(x)).flatten(1))))


def test_an_inplace_relu_behind_a_layer() -> None:
    model = Inplace(inplace=True).double()
    twin = Inplace(inplace=False).double()
    twin.load_state_dict(model.state_dict())
    inputs = torch.randn(6, 1, 3, 3, dtype=F64)
    optimizer, _ = step_once(model, inputs)
    assert_measures(optimizer, twin, inputs)


@pytest.mark.parametrize("first", [True, False])
def test_a_users_hook_that_changes_the_output_of_a_layer(first: bool) -> None:
    class Doubled(nn.Module):
        def __init__(self, inside: bool) -> None:
            super().__init__()
            self.a, self.b, self.inside = nn.Linear(4, 5), nn.Linear(5, 3), inside

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            return self.b(torch.tanh(2 * hidden if self.inside else hidden))

    model, twin, inputs = (
        Doubled(False).double(),
        Doubled(True).double(),
        torch.randn(6, 4, dtype=F64),
    )
    twin.load_state_dict(model.state_dict())
    if first:
        model.a.register_forward_hook(lambda module, args, output: 2 * output)
    optimizer = bound(model)
    if not first:
        model.a.register_forward_hook(lambda module, args, output: 2 * output)
    F.cross_entropy(model(inputs), LABELS).backward()
    optimizer.step()
    assert_measures(optimizer, twin, inputs)


class Branches(nn.Module):
    """Two towers, one residual, joined; `stray` leads nowhere, and `unused` never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.deep = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 5)
        self.out, self.stray, self.unused = nn.Linear(10, 3), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.aside = self.stray(x)
        left, right = torch.tanh(self.left(x)), torch.tanh(self.right(x))
        return self.out(torch.cat([left + self.deep(left), right], -1))


def test_branches_residuals_and_layers_that_lead_nowhere() -> None:
    model, inputs = Branches().double(), torch.randn(6, 4, dtype=F64)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, twin = step_once(model, inputs)
    assert_measures(optimizer, twin, inputs, {"left", "right", "deep", "out"})
    assert optimizer.layers["stray"].factors == {}
    assert optimizer.layers["unused"].factors == {}
    after = dict(model.named_parameters())
    assert all(
        torch.equal(after[name], before[name]) == name.startswith(("stray", "unused"))
        for name in before
    )


def test_a_layer_trained_beside_the_observed_output_is_an_error() -> None:
    model, inputs = Branches().double(), torch.randn(6, 4, dtype=F64)
    optimizer = bound(model)
    (F.cross_entropy(model(inputs), LABELS) + model.aside.square().sum()).backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(CaptureError, match=r"'stray'.*another output.*exclude=\['stray'\]"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Twice(nn.Module):
    """A shared module; with `wasted` a further use of it that does not reach the output."""

    def __init__(self, wasted: bool = False) -> None:
        super().__init__()
        self.shared, self.out, self.wasted = nn.Linear(4, 4), nn.Linear(4, 3), wasted

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.shared(x))
        if self.wasted:
            self.aside = self.shared(hidden.detach() + 1)
        return self.out(torch.tanh(self.shared(hidden)))


def test_a_module_used_twice_in_one_forward() -> None:
    model, inputs = Twice().double(), torch.randn(6, 4, dtype=F64)
    optimizer, twin = step_once(model, inputs)
    assert_measures(optimizer, twin, inputs)


def test_a_use_that_does_not_reach_the_output_adds_nothing() -> None:
    inputs = torch.randn(6, 4, dtype=F64)
    model = Twice(wasted=True).double()
    optimizer, twin = step_once(model, inputs)
    twin.wasted = False
    assert_measures(optimizer, twin, inputs)


def test_a_use_that_does_not_reach_the_users_loss_adds_nothing() -> None:
    inputs, found = torch.randn(6, 4, dtype=F64), []
    for wasted in (True, False):
        torch.manual_seed(0)
        optimizer, _ = step_once(Twice(wasted).double(), inputs, fisher="empirical")
        found.append(optimizer.layers["shared"].factors)
    for name, truth in found[1].items():
        torch.testing.assert_close(found[0][name], truth)


class Returns(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any], width: int = 3) -> None:
        super().__init__()
        self.hidden, self.out, self.wrap = nn.Linear(4, 5), nn.Linear(5, width), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.out(torch.tanh(self.hidden(x))))


class Attributes:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class ModelOutput(collections.OrderedDict[str, Any]):
    """Like a transformers output: a mapping with its items as attributes, the loss first."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


Named = collections.namedtuple("Named", ["features", "logits"])

OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], Any]] = {
    "tensor": (lambda t: t, lambda o: o, None),
    "tuple": (lambda t: (t, "extra"), lambda o: o[0], None),
    "list": (lambda t: [t], lambda o: o[0], None),
    "dict": (lambda t: {"features": t * 0, "logits": t}, lambda o: o["logits"], None),
    "object": (Attributes, lambda o: o.logits, None),
    "model output": (lambda t: ModelOutput(loss=t.sum(), logits=t), lambda o: o.logits, None),
    "named tuple": (lambda t: Named(t * 0, t), lambda o: o.logits, None),
    "function": (lambda t: {"prediction": t}, lambda o: o["prediction"], lambda o: o["prediction"]),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_forms_of_the_models_output(kind: str) -> None:
    wrap, unwrap, output = OUTPUTS[kind]
    torch.manual_seed(3)
    model, inputs = Returns(wrap).double(), torch.randn(6, 4, dtype=F64)
    twin = Returns(lambda t: t).double()
    twin.load_state_dict(model.state_dict())
    optimizer = bound(model, output=output)
    F.cross_entropy(unwrap(model(inputs)), LABELS).backward()
    optimizer.step()
    assert_measures(optimizer, twin, inputs)


REFUSED: dict[str, tuple[Callable[[Tensor], Any], int, str]] = {
    "a loss": (lambda t: t.square().sum(), 3, "single number, which looks like a loss"),
    "a single column": (lambda t: t, 1, r"single class.*gaussian.*bernoulli"),
    "a column squeezed": (
        lambda t: t.squeeze(-1),
        1,
        r"one number in each example.*gaussian.*bernoulli",
    ),
    "an unknown mapping": (
        lambda t: {"prediction": t},
        3,
        r"dict with tensors at 'prediction'.*likelihood=\{'prediction': 'categorical'\}",
    ),
    "a number": (lambda t: 3.0, 3, r"returned float.*output="),
    "an empty tuple": (lambda t: (), 3, r"returned tuple.*output="),
    "three dimensions": (lambda t: t.unsqueeze(1), 3, "class_axis"),
    "detached": (lambda t: t.detach(), 3, "does not require gradients"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_outputs_that_cannot_be_logits_are_refused_with_the_remedy(kind: str) -> None:
    wrap, width, message = REFUSED[kind]
    model = Returns(wrap, width)
    optimizer = bound(model)
    with pytest.raises(CaptureError, match=message):
        model(torch.randn(6, 4))
    assert optimizer.steps == 0
    assert not model.hidden._forward_hooks


def test_regression_with_one_column_works_when_told() -> None:
    model, inputs = Returns(lambda t: t, 1).double(), torch.randn(6, 4, dtype=F64)
    optimizer = bound(model, likelihood="gaussian")
    F.mse_loss(model(inputs), torch.zeros(6, 1, dtype=F64)).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.layers["out"].factors["G"], torch.ones(1, 1, dtype=F64))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.out = (
            nn.Linear(4, 6),
            nn.MultiheadAttention(6, 2, batch_first=True),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        return self.out(self.attention(hidden, hidden, hidden)[0])


def test_multihead_attention_is_stepped_plainly_and_its_neighbours_are_preconditioned() -> None:
    model = Attention().double()
    twin = copy.deepcopy(model)
    optimizer = bound(model, likelihood={"name": "categorical", "class_axis": -1})
    inputs, labels = torch.randn(6, 2, 4, dtype=F64), torch.randint(3, (6, 2))
    assert set(optimizer.layers) == {"embed", "out"}
    F.cross_entropy(model(inputs).movedim(-1, 1), labels).backward()
    optimizer.step()
    F.cross_entropy(twin(inputs).movedim(-1, 1), labels).backward()
    for name, parameter in model.attention.named_parameters():
        plain = twin.attention.get_parameter(name)
        assert plain.grad is not None
        torch.testing.assert_close(parameter, plain - 0.1 * plain.grad)
    assert not torch.allclose(model.out.weight, twin.out.weight - 0.1 * twin.out.weight.grad)


def test_a_transformer_encoder_with_tokens() -> None:
    """Tokens are rows of one example: G is the mean of the moment over tokens."""
    torch.manual_seed(5)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
        1,
        enable_nested_tensor=False,
    )
    model = nn.Sequential(encoder, nn.Linear(6, 3)).double()
    twin = copy.deepcopy(model)
    optimizer = bound(model, likelihood={"name": "categorical", "class_axis": -1})
    inputs, labels = torch.randn(3, 2, 6, dtype=F64), torch.randint(3, (3, 2))
    F.cross_entropy(model(inputs).movedim(-1, 1), labels).backward()
    optimizer.step()
    assert set(optimizer.layers) == {"0.layers.0.linear1", "0.layers.0.linear2", "1"}

    def scores(output: Tensor, n: int) -> list[Tensor]:
        log_p = output[0].log_softmax(-1)
        return [
            log_p[s, c].detach().exp().sqrt() * -log_p[s, c]
            for s in range(len(log_p))
            for c in range(log_p.shape[-1])
        ]

    seen = dense.watch(twin, inputs, scores, list(optimizer.layers))
    for name, one in seen.items():
        truth = dense.factors(one, "sud", 6.0)  # 3 examples of 2 terms
        torch.testing.assert_close(optimizer.layers[name].factors["A"], truth["A"])
        torch.testing.assert_close(optimizer.layers[name].factors["G"], truth["G"])


class Masks(TorchDispatchMode):
    """Which gradients the backwards of a model's convolutions compute: of input, weight, bias."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: list[list[bool]] = []
        self._weights = {parameter.data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func is torch.ops.aten.convolution_backward.default
            and args[2].data_ptr() in self._weights
        ):
            self.seen.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


def test_the_pass_computes_no_weight_gradient_and_stops_at_the_first_layer() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2),
        nn.Tanh(),
        nn.Conv2d(2, 2, 2),
        nn.Tanh(),
        nn.Conv2d(2, 3, 1),
        nn.Flatten(),
    )
    optimizer = bound(model, fisher="mc")
    with Masks(model) as masks:
        loss = F.cross_entropy(model(torch.randn(6, 1, 3, 3)), LABELS)
        of_pass = list(masks.seen)
        loss.backward()
    assert of_pass == [[True, False, False]] * 10, "the first pass follows four on the layout"
    assert len(masks.seen) == 13
    assert masks.seen[-1] == [False, True, True]
    optimizer.step()


def test_the_pass_gives_autograds_gradients_at_every_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gradient equals that of `torch.autograd.grad`, asked for all edges at once."""
    compared: list[str] = []
    original = Forward.run

    def checked(self: Forward, loss: Tensor, start: Tensor, sink: Any) -> None:
        truth = torch.autograd.grad(
            loss, [call.edges[0] for call in self.calls], retain_graph=True, allow_unused=True
        )
        by_layer: dict[str, list[Tensor]] = {}
        for call, gradient in zip(self.calls, truth, strict=True):
            if gradient is not None:
                by_layer.setdefault(call.record.layer.name, []).append(gradient)

        def compare(layer: Any, calls: Any) -> None:
            expected = by_layer.pop(layer.name)
            found = [call.gradient * call.scale for call in calls]
            assert len(found) == len(expected)
            assert all(any(torch.equal(one, other) for other in found) for one in expected)
            compared.append(layer.name)
            sink(layer, calls)

        original(self, loss, start, compare)
        assert not by_layer

    monkeypatch.setattr(Forward, "run", checked)
    for model in (Branches().double(), Twice(wasted=True).double(), Inplace(inplace=True).double()):
        compared.clear()
        shape = (6, 1, 3, 3) if isinstance(model, Inplace) else (6, 4)
        optimizer = bound(model)
        F.cross_entropy(model(torch.randn(*shape, dtype=F64)), LABELS).backward()
        optimizer.step()
        assert set(compared) == {
            name for name in optimizer.layers if name not in ("stray", "unused")
        }
