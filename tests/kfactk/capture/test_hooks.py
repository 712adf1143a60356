"""Which forwards hooks follow, and what they leave alone."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from kfactk import CaptureError
from kfactk.capture.forward import Forward
from kfactk.capture.hooks import call_tensors
from tests.kfactk.small import assert_equal, batch, bound, factors, hooks, net, train


class Counted:
    """How many forwards were followed, by anybody."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards = 0
        original = Forward.__init__

        def init(forward: Forward, *args: Any) -> None:
            self.forwards += 1
            original(forward, *args)

        monkeypatch.setattr(Forward, "__init__", init)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def copies(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield "deepcopy", copy.deepcopy(model)
    yield "pickle", pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    yield "torch.save", torch.load(buffer, weights_only=False)
    yield "EMA", AveragedModel(model)
    yield "copy", copy.copy(model)


def test_copies_of_a_bound_model_are_not_observed(counted: Counted) -> None:
    model, data = net(), batch()
    optimizer = bound(model)
    for name, twin in copies(model):
        twin.train()
        torch.testing.assert_close(twin(data[0]), nn.Sequential(*model.children())(data[0]))
        assert counted.forwards == 0, name
    train(optimizer, model, data)
    assert counted.forwards == 1
    for name, twin in copies(model):
        other = bound(twin)
        if name != "copy":
            train(other, twin, data)
            assert counted.forwards == 2, name
            counted.forwards = 1


class Copies(nn.Module):
    """Adds what copies of its body say, made now and then: they are no part of the model."""

    def __init__(self, body: nn.Module, always: bool) -> None:
        super().__init__()
        self.body = body
        self.twins = [] if always else self.copies()

    def copies(self) -> list[nn.Module]:
        return [copy.deepcopy(self.body), pickle.loads(pickle.dumps(self.body))]

    def forward(self, x: Tensor) -> Tensor:
        output = self.body(x)
        for twin in self.twins or self.copies():
            output = output + twin(x)
        return output


def test_a_copy_made_inside_a_followed_forward_is_not_observed() -> None:
    """Layer hooks are on the layers then; in the copy they do nothing."""
    body, data = net(), batch()
    model, plain = Copies(body, always=True), Copies(copy.deepcopy(body), always=False)
    optimizer, other = bound(model), bound(plain)
    train(optimizer, model, data)
    train(other, plain, data)
    assert_equal(factors(optimizer), factors(other))


def test_forwards_that_do_not_train_are_not_followed(counted: Counted) -> None:
    model, data = net(), batch()
    optimizer = bound(model)
    with torch.no_grad():
        model(data[0])
    with torch.inference_mode():
        model(data[0])
    model.eval()
    model(data[0])
    model.train()
    assert counted.forwards == 0
    train(optimizer, model, data)
    assert counted.forwards == 1


def test_functorch_transforms_are_not_followed(counted: Counted) -> None:
    model, (inputs, labels) = net(), batch()
    optimizer = bound(model)
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    gradient = torch.func.grad(loss)(parameters, inputs, labels)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(
        parameters, inputs.unsqueeze(1), labels.unsqueeze(1)
    )
    torch.func.jvp(lambda x: model(x), (inputs,), (inputs,))
    assert counted.forwards == 0
    train(optimizer, model, (inputs, labels))
    assert counted.forwards == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad)
        torch.testing.assert_close(each[name].mean(0), parameter.grad)


def test_steps_that_are_not_due_attach_nothing_and_keep_nothing(counted: Counted) -> None:
    model, data = net(), batch()
    inside: list[int] = []
    model[1].register_forward_hook(lambda module, args, output: inside.append(hooks(model)))
    base = hooks(model)
    optimizer = bound(model, factor_every=3, scale_every=3, basis_every=3)
    for _ in range(6):
        train(optimizer, model, data)
    assert inside == [base + 4, base + 2, base + 2] * 2
    assert counted.forwards == 2
    assert hooks(model) == base + 2
    assert all(
        not block.state.pending and not block.state.retained
        for block in optimizer._preconditioner.blocks.current()
    )


def test_calling_a_submodule_only_is_an_error_and_changes_nothing() -> None:
    model, data = nn.ModuleDict({"body": net()}), batch()
    optimizer = bound(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    F.cross_entropy(model["body"](data[0]), data[1]).backward()
    with pytest.raises(CaptureError, match="a submodule or a copy was"):
        optimizer.step()
    assert_equal(before, [parameter.detach() for parameter in model.parameters()])
    assert optimizer.steps == 0
    assert not optimizer.state


def test_manual_mode_without_observe_is_an_error() -> None:
    model = net()
    optimizer = bound(model, observe="manual")
    with pytest.raises(CaptureError, match=r"optimizer.observe\(\)"):
        train(optimizer, model, batch())


def test_manual_mode_follows_evaluation_forwards_too() -> None:
    model, (inputs, labels) = net().eval(), batch()
    twin = copy.deepcopy(model).train()
    optimizer, other = bound(model, observe="manual"), bound(twin)
    loss = F.cross_entropy(model(inputs), labels)
    optimizer.observe()
    loss.backward()
    optimizer.step()
    train(other, twin, (inputs, labels))
    assert_equal(factors(optimizer), factors(other))


def test_two_models_in_one_loss() -> None:
    one, two, data = net(), net(), batch()
    alone = [copy.deepcopy(one), copy.deepcopy(two)]
    optimizers = [bound(one, observe="manual"), bound(two)]
    loss = F.cross_entropy(one(data[0]), data[1]) + F.cross_entropy(two(data[0]), data[1])
    optimizers[0].observe()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    for optimizer, twin in zip(optimizers, alone, strict=True):
        other = bound(twin)
        train(other, twin, data)
        assert_equal(factors(optimizer), factors(other))


def test_a_bound_model_inside_a_bound_model() -> None:
    outer, data = nn.Sequential(net(), nn.Linear(3, 3).double()), batch()
    twin = copy.deepcopy(outer)
    inner, whole, other = bound(outer[0]), bound(outer), bound(twin)
    F.cross_entropy(outer(data[0]), data[1]).backward()
    whole.step()
    train(other, twin, data)
    assert_equal(factors(whole), factors(other))
    inner.close()


def test_a_model_that_calls_itself() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            x = torch.tanh(self.layer(x))
            return self(x, depth - 1) if depth > 1 else x

    class Unrolled(Recursive):
        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            return torch.tanh(self.layer(torch.tanh(self.layer(x))))

    model, twin, data = Recursive().double(), Unrolled().double(), batch()
    twin.load_state_dict(model.state_dict())
    optimizer, other = bound(model), bound(twin)
    train(optimizer, model, data)
    train(other, twin, data)
    assert_equal(factors(optimizer), factors(other))


@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_the_users_gradients_and_random_numbers_are_those_of_an_unbound_model(fisher: str) -> None:
    """Dropout draws from the global generator; the pass draws from its own."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    twin, (inputs, labels) = copy.deepcopy(model), batch()
    optimizer = bound(model, fisher=fisher)
    torch.manual_seed(7)
    F.cross_entropy(model(inputs), labels).backward()
    after = torch.get_rng_state()
    torch.manual_seed(7)
    F.cross_entropy(twin(inputs), labels).backward()
    assert torch.equal(after, torch.get_rng_state())
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    optimizer.step()
    assert torch.equal(after, torch.get_rng_state())


def test_inputs_changed_in_place_before_their_gradient_came_are_an_error() -> None:
    model, (inputs, labels) = net(), batch()
    optimizer = bound(model, fisher="empirical")
    output = model(inputs)
    inputs.add_(1)
    with pytest.raises(CaptureError, match=r"'0' was modified in place.*refill"):
        F.cross_entropy(output, labels).backward()
    assert optimizer.steps == 0


def test_arguments_that_are_refilled_before_the_step_are_an_error() -> None:
    model = nn.EmbeddingBag(5, 3).double()
    optimizer = bound(model, curvature="embedding", basis="ekfac")
    tokens, offsets = torch.arange(4), torch.tensor([0, 1])
    F.cross_entropy(model(tokens, offsets), torch.tensor([0, 2])).backward()
    offsets[1] = 2
    with pytest.raises(CaptureError, match="was modified in place"):
        optimizer.step()


@pytest.mark.parametrize("named", [False, True])
def test_the_input_of_a_call_is_the_first_parameter_however_it_is_given(named: bool) -> None:
    bag = nn.EmbeddingBag(5, 3)
    tokens, offsets, weights = torch.arange(4), torch.tensor([0, 1]), torch.ones(4)
    args = () if named else (tokens, offsets)
    kwargs = {"per_sample_weights": weights} | (
        {"offsets": offsets, "input": tokens} if named else {}
    )
    inputs, arguments = call_tensors(bag, args, kwargs)
    assert torch.equal(inputs, tokens)
    assert set(arguments) == {"offsets", "per_sample_weights"}
    assert torch.equal(arguments["offsets"], offsets)


def test_tensors_without_names_are_not_mistaken_for_others() -> None:
    class Several(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return tensors[0]

    one, two = torch.zeros(1), torch.ones(1)
    inputs, arguments = call_tensors(Several(), (one, two), {})
    assert torch.equal(inputs, one)
    assert not arguments


def test_observing_after_the_backward_is_an_error_that_says_so() -> None:
    model, (inputs, labels) = net(), batch()
    optimizer = bound(model, observe="manual")
    F.cross_entropy(model(inputs), labels).backward()
    with pytest.raises(CaptureError, match="between forward and backward"):
        optimizer.observe()


class Threaded(nn.Module):
    """Calls itself in another thread while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor, again: bool = True) -> Tensor:
        if again:
            thread = threading.Thread(target=self, args=(2 * x, False))
            thread.start()
            thread.join()
        return self.body(x)


def test_a_forward_in_another_thread_is_no_part_of_the_one_that_is_followed(
    counted: Counted,
) -> None:
    model, data = Threaded(), batch()
    plain = copy.deepcopy(model.body)
    optimizer, other = bound(model), bound(plain)
    train(optimizer, model, data)
    assert counted.forwards == 1
    train(other, plain, data)
    assert_equal(factors(optimizer), factors(other))


def test_a_forward_whose_signature_cannot_be_read_still_gives_its_keywords() -> None:
    class Unreadable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.body(x)

    x, y = batch()
    mask, measured = torch.tensor([1.0, 1, 0, 1, 0, 1]), []
    for readable in (True, False):
        torch.manual_seed(1)
        model = Unreadable()
        if not readable:
            Unreadable.forward.__signature__ = "none"  # type: ignore[attr-defined]
        optimizer = bound(model, likelihood={"name": "categorical", "weights": "mask"})
        F.cross_entropy(model(x, mask=mask), y).backward()
        optimizer.step()
        measured.append(factors(optimizer))
    assert_equal(*measured)


@pytest.mark.parametrize("late", [False, True])
def test_hooks_that_change_the_output_count_whenever_they_came(late: bool) -> None:
    """G of the last layer is that of the output which the loop sees, four times the plain one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()

    def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 2 * output

    if not late:
        model.register_forward_hook(doubled)
    optimizer = bound(model, fisher="exact", likelihood="gaussian", basis="kfac")
    if late:
        model.register_forward_hook(doubled)
    model(torch.randn(6, 4).double()).square().sum().backward()
    optimizer.step()
    expected = 4 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(optimizer.layers["0"].factors["G"], expected)
