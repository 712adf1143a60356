"""Adapters of peft: bound before and after they come, merged, switched and taken off again.

Truth is EKFAC written again for the adapters' own matrices; the base is frozen.
"""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfactk import KfactkWarning, Optimizer
from tests.situations.by_hand import Hand, assert_same, bound, categorical, draw, sgd, take

EXAMPLES, STEPS = 8, 3


@pytest.fixture(scope="module")
def peft() -> ModuleType:
    """Import it here: it takes seconds."""
    import peft

    return peft


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x).tanh()).tanh())
        return out


def config(peft: ModuleType, **options: Any) -> Any:
    """Two layers have adapters, and the head is trained in full."""
    given = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "init_lora_weights": False}
    given |= {"target_modules": ["first", "second"], "modules_to_save": ["head"]}
    return peft.LoraConfig(**{**given, **options})


def adapted(peft: ModuleType, model: nn.Module, **options: Any) -> Any:
    """Return a PeftModel, with the same adapters each time."""
    torch.manual_seed(1)
    return peft.get_peft_model(model, config(peft, **options))


def adapters(model: nn.Module, adapter: str = "default") -> list[str]:
    """Return the names of the linear layers that train with an adapter."""
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.endswith(f".{adapter}")
    ]


def batch(step: int) -> tuple[Tensor, Tensor]:
    return draw(EXAMPLES, 4, seed=step), (torch.arange(EXAMPLES) + step) % 3


def one(model: nn.Module, fisher: str, x: Tensor, y: Tensor) -> list[Tensor]:
    logits = model(x[None])
    return categorical(logits) if fisher == "exact" else [F.cross_entropy(logits, y[None])]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step_of(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    x, y = batch(number)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def step_by_hand(model: nn.Module, layers: list[str], number: int, fisher: str = "exact") -> None:
    x, y = batch(number)
    hand = Hand(model, layers)
    for row, label in zip(x, y, strict=True):
        hand.example(one, model, fisher, row, label)
    take(sgd(model), hand, loss_of(model, x, y))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("params", ["all", "trained"])
@pytest.mark.parametrize("whole", ["the adapted", "the base"])
def test_bound_with_adapters(peft: ModuleType, whole: str, params: str, fisher: str) -> None:
    """The adapters have blocks of their own; the frozen base is left as it is.

    The base is changed in place, so that a loop may also bind and call that one.
    """
    base = Net()
    model = adapted(peft, base)
    bind = base if whole == "the base" else model
    twin = copy.deepcopy(bind)
    optimizer = bound(bind, trained(bind) if params == "trained" else None, fisher=fisher)
    layers = adapters(twin)
    assert len(layers) == 5
    for number in range(STEPS):
        step_of(bind, optimizer, number)
        step_by_hand(twin, layers, number, fisher)
    assert set(optimizer.layers) == set(layers)
    assert_same(bind, twin)


def test_adapters_that_come_after_bind(peft: ModuleType) -> None:
    """What the optimizer trains is frozen, and it says so; with new groups it goes on."""
    model = Net()
    optimizer = bound(model)
    step_of(model, optimizer, 0)
    whole = adapted(peft, model)
    twin, kept = copy.deepcopy(model), copy.deepcopy(model)
    with pytest.warns(KfactkWarning, match="no layer is preconditioned any more.*adapters"):
        step_of(whole, optimizer, 1)
    assert_same(model, kept)
    optimizer.param_groups[0]["params"] = trained(model)
    for number in range(2, 2 + STEPS):
        step_of(whole, optimizer, number)
        step_by_hand(twin, adapters(twin), number)
    assert_same(model, twin)


def test_adapters_in_a_group_of_their_own(peft: ModuleType) -> None:
    """`add_param_group` after bind, with another learning rate."""
    model = Net()
    optimizer = bound(model, lr=0.5)
    step_of(model, optimizer, 0)
    adapted(peft, model, modules_to_save=None)
    model.head.requires_grad_(True)
    lora = [p for name, p in model.named_parameters() if "lora_" in name]
    optimizer.add_param_group({"params": lora, "lr": 0.1})
    twin = copy.deepcopy(model)
    for number in range(1, 1 + STEPS):
        step_of(model, optimizer, number)
        x, y = batch(number)
        hand = Hand(twin, [*adapters(twin), "head"])
        for row in x:
            hand.example(lambda row: categorical(twin(row[None])), row)
        groups: list[dict[str, Any]] = [
            {"params": twin.head.parameters(), "lr": 0.5},
            {"params": [p for name, p in twin.named_parameters() if "lora_" in name], "lr": 0.1},
        ]
        take(torch.optim.SGD(groups), hand, loss_of(twin, x, y))
    assert_same(model, twin)


def test_merging_for_an_evaluation(peft: ModuleType) -> None:
    """`merge_adapter`, an evaluation, and `unmerge_adapter` between steps."""
    model = adapted(peft, Net())
    twin = copy.deepcopy(model)
    optimizer = bound(model)
    for number in range(STEPS):
        step_of(model, optimizer, number)
        step_by_hand(twin, adapters(twin), number)
        model.merge_adapter()
        model.eval()
        with torch.no_grad():
            model(batch(number)[0])
        model.train()
        model.unmerge_adapter()
    assert_same(model, twin)


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_adapters_that_are_taken_off(peft: ModuleType, how: str) -> None:
    """All of the base is then trained by the same optimizer, which is bound to it."""
    model = Net()
    whole = adapted(peft, model)
    optimizer = bound(model)
    step_of(whole, optimizer, 0)
    base = getattr(whole, how)()
    assert base is model
    base.requires_grad_(True)
    optimizer.param_groups[0]["params"] = list(base.parameters())
    twin = copy.deepcopy(base)
    for number in range(1, 1 + STEPS):
        step_of(base, optimizer, number)
        step_by_hand(twin, ["first", "second", "head"], number)
    assert set(optimizer.layers) == {"first", "second", "head"}
    assert_same(base, twin)


def test_adapters_that_take_turns(peft: ModuleType) -> None:
    """As for several tasks: `set_adapter` decides which one a step trains."""
    model = adapted(peft, Net(), modules_to_save=None)
    torch.manual_seed(2)
    model.add_adapter("other", config(peft, modules_to_save=None))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    twin = copy.deepcopy(model)
    optimizer = bound(model)
    for number in range(2 * STEPS):
        active = ("default", "other")[number % 2]
        for each in (model, twin):
            each.set_adapter(active)
        step_of(model, optimizer, number)
        step_by_hand(twin, adapters(twin, active), number)
    assert_same(model, twin)


def preferred(model: Any, x: Tensor, y: Tensor, quiet: bool) -> Tensor:
    """DPO's loss of an example: its label against the next, relative to the base alone."""

    def margin() -> Tensor:
        log_p = model(x).log_softmax(-1)
        other = (y + 1) % 3
        return (log_p.gather(-1, y[:, None]) - log_p.gather(-1, other[:, None])).squeeze(-1)

    with model.disable_adapter(), torch.set_grad_enabled(not quiet):
        reference = margin()
    return -F.logsigmoid(margin() - reference.detach())


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_reference_without_the_adapter(peft: ModuleType, fisher: str, quiet: bool) -> None:
    """As DPO and GRPO: `disable_adapter` gives the base's answer, with gradients off or on."""
    model = adapted(peft, Net(), modules_to_save=None)
    twin = copy.deepcopy(model)
    optimizer = bound(model, fisher=fisher)
    for number in range(STEPS):
        x, y = batch(number)
        optimizer.zero_grad()
        preferred(model, x, y, quiet).mean().backward()
        optimizer.step()
        hand = Hand(twin, adapters(twin))
        for row, label in zip(x, y, strict=True):
            hand.example(preference, twin, fisher, row[None], label[None])
        take(sgd(twin), hand, preferred(twin, x, y, True).mean())
    assert_same(model, twin)


def preference(model: Any, fisher: str, x: Tensor, y: Tensor) -> list[Tensor]:
    return categorical(model(x)) if fisher == "exact" else list(preferred(model, x, y, True))


def test_a_magnitude_of_weights(peft: ModuleType) -> None:
    """DoRA calls its matrices a second time, on the identity, for a norm without gradients."""
    model = adapted(peft, Net(), use_dora=True)
    twin = copy.deepcopy(model)
    optimizer = bound(model)
    for number in range(STEPS):
        step_of(model, optimizer, number)
        step_by_hand(twin, adapters(twin), number)
    assert_same(model, twin)
