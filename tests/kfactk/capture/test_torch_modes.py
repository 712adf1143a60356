"""Compilation, checkpointing and autocast leave the curvature as it is, or raise a clear error."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from kfactk import CaptureError, Optimizer
from kfactk.capture.torch_modes import EAGERNESS, ForcedEagerness, full_precision
from tests.kfactk.small import F64, assert_equal, batch, bound, factors, hooks, net, train, values


def stance() -> str:
    return str(torch._dynamo.eval_frame._stance.stance)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing compiled, and no optimizer of another test holding the compiler back."""
    gc.collect()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A compiler that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.compiled, self.ran = 0, 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.ran += 1
            return module(*args)

        return run


def compiled_inside(model: nn.Sequential, graphs: Graphs) -> nn.Sequential:
    return nn.Sequential(model[0], torch.compile(nn.Sequential(model[1], model[2]), backend=graphs))


WAYS: dict[str, Callable[[nn.Sequential, Graphs], tuple[Optimizer, nn.Module]]] = {}


def way(function: Callable[..., tuple[Optimizer, nn.Module]]) -> None:
    WAYS[function.__name__.replace("_", " ")] = function


RECIPE: dict[str, Any] = {
    "factor_every": 3,
    "scale_every": 3,
    "basis_every": 6,
    "update": "adam",
    "lr": 0.01,
}


@way
def bound_then_compiled(model: nn.Sequential, graphs: Graphs) -> tuple[Optimizer, nn.Module]:
    optimizer = bound(model, **RECIPE)
    return optimizer, torch.compile(model, backend=graphs)


@way
def compiled_then_bound(model: nn.Sequential, graphs: Graphs) -> tuple[Optimizer, nn.Module]:
    compiled = torch.compile(model, backend=graphs)
    return bound(compiled, **RECIPE), compiled


@way
def compiled_whole_then_bound(model: nn.Sequential, graphs: Graphs) -> tuple[Optimizer, nn.Module]:
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    return bound(compiled, **RECIPE), compiled


@way
def compiled_then_inner_bound(model: nn.Sequential, graphs: Graphs) -> tuple[Optimizer, nn.Module]:
    compiled = torch.compile(model, backend=graphs)
    return bound(model, **RECIPE), compiled


@way
def compiled_and_run_then_inner_bound(
    model: nn.Sequential, graphs: Graphs
) -> tuple[Optimizer, nn.Module]:
    compiled = torch.compile(model, backend=graphs)
    F.cross_entropy(compiled(batch()[0]), batch()[1]).backward()
    return bound(model, **RECIPE), compiled


@way
def compiled_in_place_then_bound(
    model: nn.Sequential, graphs: Graphs
) -> tuple[Optimizer, nn.Module]:
    model.compile(backend=graphs)
    return bound(model, **RECIPE), model


@way
def bound_then_compiled_in_place(
    model: nn.Sequential, graphs: Graphs
) -> tuple[Optimizer, nn.Module]:
    optimizer = bound(model, **RECIPE)
    model.compile(backend=graphs)
    return optimizer, model


@way
def a_part_compiled_then_bound(model: nn.Sequential, graphs: Graphs) -> tuple[Optimizer, nn.Module]:
    whole = compiled_inside(model, graphs)
    return bound(whole, **RECIPE), whole


@way
def bound_then_a_part_compiled_in_place(
    model: nn.Sequential, graphs: Graphs
) -> tuple[Optimizer, nn.Module]:
    optimizer = bound(model, **RECIPE)
    model[2].compile(backend=graphs)
    return optimizer, model


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", WAYS)
def test_a_compiled_model_trains_as_the_bare_one(name: str) -> None:
    model = net()
    twin, graphs = copy.deepcopy(model), Graphs()
    optimizer, called = WAYS[name](model, graphs)
    other = bound(twin, **RECIPE)
    for step in range(8):
        torch.manual_seed(step)
        data = batch()
        ran = graphs.ran
        train(optimizer, called, data)
        assert (graphs.ran > ran) == (step % 3 > 0), (
            "compiled code runs on the steps that are not due, and on these only"
        )
        train(other, twin, data)
    assert_equal(values(model), values(twin))
    assert_equal(factors(optimizer), factors(other))


@pytest.mark.usefixtures("fresh")
def test_a_compiled_training_step_trains_as_the_bare_one() -> None:
    model = net()
    twin, graphs = copy.deepcopy(model), Graphs()
    optimizer, other = bound(model, **RECIPE), bound(twin, **RECIPE)
    step = torch.compile(train, backend=graphs)
    for seed in range(8):
        torch.manual_seed(seed)
        data = batch()
        assert step(optimizer, model, data) == train(other, twin, data)
    assert graphs.ran > 0
    assert_equal(values(model), values(twin))


@pytest.mark.usefixtures("fresh")
def test_a_graph_that_may_not_break_is_refused_with_the_remedy() -> None:
    model = net()
    optimizer = bound(model, factor_every=2, scale_every=2, basis_every=2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    train(optimizer, compiled, batch())
    with pytest.raises(
        torch._dynamo.exc.Unsupported,
        match="Bind the compiled model, or compile without fullgraph=True",
    ):
        train(optimizer, compiled, batch())


@pytest.mark.usefixtures("fresh")
def test_the_compiler_is_let_go_when_nothing_is_due_and_at_the_end() -> None:
    model, data = net(), batch()
    assert stance() == "default"
    optimizer = bound(model, factor_every=2, scale_every=2, basis_every=2)
    assert stance() == "force_eager"
    train(optimizer, model, data)
    assert stance() == "default"
    train(optimizer, model, data)
    assert stance() == "force_eager"
    first, second = bound(net()), bound(net())
    optimizer.close()
    first.close()
    assert stance() == "force_eager"
    del second
    assert stance() == "default"


@pytest.mark.usefixtures("fresh")
def test_one_of_two_on_the_same_model_does_not_keep_the_compiler_back() -> None:
    model, data = net(), batch()
    optimizers = [bound(model, factor_every=9), bound(model, factor_every=9)]
    F.cross_entropy(model(data[0]), data[1]).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert stance() == "default"


@pytest.mark.usefixtures("fresh")
def test_holders_of_the_compiler_are_counted() -> None:
    eagerness, one, other = ForcedEagerness(), object(), object()
    with torch.compiler.set_stance("eager_on_recompile"):
        eagerness.release(one)
        eagerness.force(one)
        eagerness.force(one)
        eagerness.force(other)
        eagerness.release(one)
        eagerness.release(one)
        assert stance() == "force_eager"
        eagerness.release(other)
        assert stance() == "eager_on_recompile"
    assert not EAGERNESS._tokens


@pytest.mark.usefixtures("fresh")
def test_a_layer_unfrozen_under_a_compiled_model_is_an_error_once_not_a_silence() -> None:
    """Nothing foresaw that it is due, so compiled code ran already; the next step foresees it."""
    model, data = net(), batch()
    model[0].requires_grad_(False)
    optimizer = bound(model, factor_every=9, scale_every=9, basis_every=9)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        train(optimizer, compiled, data)
    model[0].requires_grad_(True)
    try:
        train(optimizer, compiled, data)
    except CaptureError:
        train(optimizer, compiled, data)
    assert optimizer.layers["0"].factors
    assert hooks(model) == 2


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.b, self.drop, self.out, self.reentrant = (
            nn.Linear(4, 5),
            nn.Linear(5, 5),
            nn.Dropout(0.5),
            nn.Linear(5, 3),
            reentrant,
        )

    def middle(self, x: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.b(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x = (
            self.middle(x)
            if self.reentrant is None
            else checkpoint(self.middle, x, use_reentrant=self.reentrant)
        )
        return self.out(x)


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("where", ["inside", "root"])
def test_checkpointing_that_is_not_reentrant(fisher: str, where: str) -> None:
    plain, data = Checkpointed(None).double(), batch()
    model = Checkpointed(False if where == "inside" else None).double()
    model.load_state_dict(plain.state_dict())
    optimizer, other = bound(model, fisher=fisher), bound(plain, fisher=fisher)
    for step in range(2):
        for one, followed in ((model, optimizer), (plain, other)):
            torch.manual_seed(step)
            followed.zero_grad()
            root = where == "root" and one is model
            output = checkpoint(one, data[0], use_reentrant=False) if root else one(data[0])
            F.cross_entropy(output, data[1]).backward()
            followed.step()
    assert_equal(factors(optimizer), factors(other))
    assert_equal(values(model), values(plain))


def test_reentrant_checkpointing_is_an_error_that_says_so() -> None:
    model, data = Checkpointed(True).double(), batch()
    bound(model)
    optimizer = bound(model)
    with pytest.raises(CaptureError, match="use_reentrant=False"):
        model(data[0])
    optimizer.close()


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_selective_checkpointing_is_an_error_unless_no_pass_is_ours(fisher: str) -> None:
    contexts = functools.partial(
        create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default]
    )

    class Selective(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            part = nn.Sequential(self[0], self[1])
            inner = checkpoint(part, x, use_reentrant=False, context_fn=contexts)
            output: Tensor = self[2](inner)
            return output

    truth, data = net(), batch()
    model = Selective(*copy.deepcopy(truth))
    optimizer, other = (bound(each, fisher=fisher) for each in (model, truth))
    train(other, truth, data)
    if fisher != "empirical":
        with pytest.raises(CaptureError, match="selective activation checkpointing"):
            model(data[0])
        return
    train(optimizer, model, data)
    assert_equal(factors(optimizer), factors(other))


def test_a_root_under_reentrant_checkpointing_is_an_error_that_says_so() -> None:
    model, (inputs, labels) = net(), batch()
    optimizer = bound(model)
    F.cross_entropy(
        checkpoint(model, inputs.requires_grad_(), use_reentrant=True), labels
    ).backward()
    with pytest.raises(CaptureError, match="reentrant activation checkpointing"):
        optimizer.step()
    assert optimizer.steps == 0


class Seen(nn.Module):
    """Notes the dtype of the output of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out, self.dtype = nn.Linear(4, 8), nn.Linear(8, 3), None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        self.dtype = hidden.dtype
        return self.out(torch.tanh(hidden))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_an_autocast_model_are_float32_sums(fisher: str, dtype: torch.dtype) -> None:
    """Gradients are in half precision, sums over them are not, even with autocast around step()."""
    torch.manual_seed(1)
    model = Seen()
    optimizer = bound(model, fisher=fisher)
    inputs, labels = torch.randn(64, 4), torch.arange(64) % 3
    with torch.autocast("cpu", dtype):
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        assert torch.is_autocast_enabled("cpu")
    assert model.dtype == dtype
    ones = torch.cat([inputs, torch.ones(64, 1)], -1).double()
    found = optimizer.layers["hidden"].factors["A"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), ones.T @ ones / 64, rtol=1e-6, atol=1e-7)
    decomposition = optimizer.layers["hidden"].decomposition["A"]
    rebuilt = (
        decomposition["eigenvectors"]
        @ torch.diag(decomposition["eigenvalues"])
        @ decomposition["eigenvectors"].T
    )
    torch.testing.assert_close(rebuilt, found, rtol=1e-5, atol=1e-5)
    view = optimizer.layers["hidden"]
    gradient = {"weight": model.hidden.weight.grad, "bias": model.hidden.bias.grad}
    twin = copy.deepcopy(view.precondition(gradient))
    with torch.no_grad():
        shift = {name: getattr(model.hidden, name) + 0.1 * twin[name] for name in gradient}
    torch.manual_seed(1)
    start = Seen()
    for name, value in shift.items():
        torch.testing.assert_close(value, getattr(start.hidden, name), rtol=1e-5, atol=1e-6)


def test_half_precision_gradients_of_a_confident_model_do_not_underflow() -> None:
    """The gradient, 1.5e-8, underflows in float16, but not times the factor of the pass."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[1].weight.copy_(torch.eye(2))
        model[0].bias.copy_(torch.tensor([18.0, 0.0]))
    optimizer = bound(model, fisher={"name": "mc", "draw": lambda view: view.argmax(-1)})
    model(torch.ones(8, 2, dtype=torch.float16)).float().sum().backward()
    optimizer.step()
    p = float(torch.tensor([18.0, 0.0], dtype=F64).softmax(0)[1])
    assert p < torch.finfo(torch.float16).smallest_normal / 1000
    assert float(optimizer.layers["0"].factors["G"][1, 1]) == pytest.approx(
        p * p, rel=0.05, abs=0.0
    )


def test_full_precision_switches_off_what_is_on_only() -> None:
    with full_precision(["cpu", "meta", "cpu"]):
        assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision(["cpu"]):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
