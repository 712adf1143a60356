"""An update rule and a wrapper keep what they do by themselves; curvature follows the contract."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import kfactk
from kfactk import KfactkError, KfactkWarning
from kfactk.preconditioner.parameters import ParameterTracker
from tests.kfactk.small import batch, bound, factors, net, train, values

# ------------------------------------------------------------------------------ the rule's methods


class Precise(torch.optim.Optimizer):
    """Float32 moments for bfloat16 parameters: torch casts them at a load, so it loads them itself.

    It keeps them under a number, and something for all parameters.
    """

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})
        self.calls: list[str] = []
        self.register_load_state_dict_post_hook(lambda each: each.calls.append("hook"))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert not any("kfactk" in str(key) for entry in self.state.values() for key in entry)
        self.state["all"] = {"count": self.state.get("all", {}).get("count", 0) + 1}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    entry = self.state[p].setdefault(0, {"m": torch.zeros(p.shape)})
                    entry["m"].lerp_(p.grad.float(), 0.1)
                    p.sub_((30 * group["lr"] * entry["m"]).to(p.dtype))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        param_group["mine"] = len(self.param_groups)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        assert not any("kfactk" in str(key) for entry in self.state.values() for key in entry)
        return {**super().state_dict(), "version": 2}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict["version"] == 2
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in enumerate(parameters):
            self.state[p] = copy.deepcopy(state_dict["state"][number])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.calls.append("set state")


def half(seed: int) -> tuple[nn.Sequential, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(seed)
    data = [(torch.randn(6, 4).bfloat16(), torch.arange(6) % 3) for _ in range(8)]
    return net().to(torch.bfloat16), data


@pytest.mark.parametrize("covered", [False, True])
def test_a_rule_saves_and_loads_by_itself(covered: bool) -> None:
    """Resumed runs are the uninterrupted ones, as with the bare rule."""
    kinds: dict[str, Any] = {
        "bare": lambda model: Precise(model.parameters()),
        "kfactk": lambda model: kfactk.build(
            update=Precise, lr=0.01, fisher="exact", clip="none", exclude=[] if covered else ["*"]
        ).bind(model),
    }
    ends = {}
    for kind, make in kinds.items():
        model, data = half(0)
        optimizer = make(model)
        for each in data[:4]:
            train(optimizer, model, each)
        fresh = copy.deepcopy(model)
        resumed = make(fresh)
        saved = copy.deepcopy(optimizer.state_dict())
        assert saved["version"] == 2
        resumed.load_state_dict(saved)
        rule = resumed if kind == "bare" else resumed._inner
        assert rule.calls == ["set state", "hook"]
        assert resumed.state[fresh[0].weight][0]["m"].dtype == torch.float32
        assert resumed.state["all"]["count"] == 4
        for each in data[4:]:
            train(optimizer, model, each)
            train(resumed, fresh, each)
        for one, other in zip(values(model), values(fresh), strict=True):
            assert torch.equal(one, other)
        ends[kind] = values(model)
    same = [torch.equal(a, b) for a, b in zip(*ends.values(), strict=True)]
    assert all(same) == (not covered)


def test_a_rule_adds_groups_by_itself() -> None:
    model = net()
    optimizer = kfactk.build(update=Precise).bind(model, model[0].parameters())
    optimizer.add_param_group({"params": model[2].parameters(), "damping": 0.3})
    assert [group["mine"] for group in optimizer.param_groups] == [0, 1]
    assert optimizer.param_groups[1]["damping"] == 0.3
    assert set(optimizer.layers) == {"0", "2"}


class TwoModes(torch.optim.SGD):
    """Steps in training mode only, as schedule-free rules do."""

    training = False

    def train(self) -> None:
        self.training = True

    def eval(self) -> None:
        self.training = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.training, "call train() first"
        super().step()


def test_train_and_eval_reach_a_rule_that_has_them() -> None:
    model = net()
    optimizer = kfactk.build(update=TwoModes).bind(model)
    with pytest.raises(AssertionError, match="call train"):
        train(optimizer, model, batch())
    optimizer.train()
    train(optimizer, model, batch())
    optimizer.eval()
    with pytest.raises(AssertionError, match="call train"):
        train(optimizer, model, batch())
    assert not hasattr(bound(net()), "train")
    with pytest.raises(AttributeError, match="'Optimizer' object has no attribute 'nothing'"):
        _ = optimizer.nothing


def test_a_rule_around_the_optimizer_keeps_its_part_in_the_state() -> None:
    """`ScheduleFreeWrapper` keeps its average in the state of the optimizer that it wraps."""
    model = net()
    optimizer = bound(model, update="momentum")
    for number in range(3):
        for p in model.parameters():
            optimizer.state[p].setdefault("z", torch.full_like(p, number))
        train(optimizer, model, batch())
    assert all((optimizer.state[p]["z"] == 0).all() for p in model.parameters())
    assert all("z" in entry for entry in optimizer.state_dict()["state"].values())


# ---------------------------------------------------------------------------------------- wrappers


class Wrapper:
    """Takes on the optimizer's class, but has attributes of its own, as Lightning's do."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        kinds = (type(self), type(optimizer))
        self.__class__ = type("Wrapped", kinds, {})  # type: ignore[assignment]

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def test_methods_work_through_a_wrapper_and_leave_nothing_there() -> None:
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    recipe = {"observe": "manual", "factor_every": 2, "update": "adam"}
    optimizer, plain = bound(model, **recipe), bound(twin, **recipe)
    wrapped: Any = Wrapper(optimizer)
    for _ in range(4):
        data = batch()
        train(wrapped, model, data, observe=True)
        train(plain, twin, data, observe=True)
    wrapped.param_groups = plain.param_groups = []
    assert optimizer.param_groups == []
    wrapped.add_param_group({"params": list(model.parameters())})
    wrapped.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    wrapped.record(loss=1.0)
    wrapped.consolidate_state_dict()
    wrapped.state = defaultdict(dict)
    assert wrapped.state_dict()["state"] == {} == dict(optimizer.state)
    assert wrapped.steps == optimizer.steps == 0
    assert set(wrapped.__dict__) == {"_optimizer"}
    for one, other in zip(values(model), values(twin), strict=True):
        assert torch.equal(one, other)
    wrapped.close()
    with pytest.raises(KfactkError, match="was closed"):
        optimizer.step()


# --------------------------------------------------------------------------------- curvature


class Turned(nn.Module):
    """A network whose layers can be declared in another order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(4, 4).double())

    def forward(self, x: Any) -> Any:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))  # type: ignore[operator]


def test_a_hook_that_matches_names_moves_curvature_too() -> None:
    model, other = Turned("abc"), Turned("bac")
    optimizer = bound(model, model.named_parameters(), update="adam", lr=0.01)
    for _ in range(3):
        train(optimizer, model, batch())
    other.load_state_dict(model.state_dict())
    resumed = bound(other, other.named_parameters(), update="adam", lr=0.01)

    def matched(each: Any, saved: dict[str, Any]) -> dict[str, Any]:
        names, ours = (s["param_groups"][0]["param_names"] for s in (saved, vars_of(each)))
        entries = {i: saved["state"][names.index(name)] for i, name in enumerate(ours)}
        return {
            "state": entries,
            "param_groups": [saved["param_groups"][0] | {"param_names": ours}],
        }

    resumed.register_load_state_dict_pre_hook(matched)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, view in optimizer.layers.items():
        for factor, value in view.factors.items():
            assert torch.equal(resumed.layers[name].factors[factor], value)
    for _ in range(3):
        data = batch()
        train(optimizer, model, data)
        train(resumed, other, data)
    for name, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(name))


def vars_of(optimizer: Any) -> dict[str, Any]:
    return {"param_groups": optimizer.param_groups}


ONCE: dict[str, Any] = {"factor_every": 100, "scale_every": 100, "basis_every": 100}


def test_an_emptied_state_is_that_of_a_new_optimizer() -> None:
    model = net()
    optimizer = bound(model, update="adam", **ONCE)
    for _ in range(2):
        train(optimizer, model, batch())
    twin = copy.deepcopy(model)
    optimizer.state.clear()
    other = bound(twin, update="adam", **ONCE)
    for _ in range(2):
        data = batch()
        train(optimizer, model, data)
        train(other, twin, data)
    assert optimizer.steps == other.steps == 2
    for one, two in zip(factors(optimizer), factors(other), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(values(model), values(twin), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("when", ["between steps", "before step()"])
def test_a_layer_whose_entry_was_taken_out_is_measured_anew(when: str) -> None:
    model = net()
    optimizer = bound(model, update="adam", **ONCE)
    train(optimizer, model, batch())
    old = [factor.clone() for factor in factors(optimizer)]
    optimizer.zero_grad()
    if when == "between steps":
        del optimizer.state[model[0].weight]
        assert not optimizer.layers["0"].factors
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    if when == "before step()":
        optimizer.state[model[0].weight] = {}
    optimizer.step()
    train(optimizer, model, batch())
    assert optimizer.steps == 3
    same = [torch.equal(a, b) for a, b in zip(old, factors(optimizer), strict=True)]
    assert same == [False, False, True, True]


def test_damping_is_followed_in_groups_that_are_assigned() -> None:
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "damping": 0.7}]
    optimizer = bound(model, groups, damping=lambda step: 1.0 / (1 + step))
    train(optimizer, model, batch())
    optimizer.param_groups = [dict(group) for group in reversed(optimizer.param_groups)]
    train(optimizer, model, batch())
    assert [group["damping"] for group in optimizer.param_groups] == [0.7, 0.5]
    fresh = bound(model, [dict(group) for group in optimizer.param_groups], damping=lambda _: 3.0)
    fresh.param_groups.append({"params": [nn.Parameter(torch.ones(1))], "lr": 0.1})
    del fresh.param_groups[0]["damping"]
    assert [fresh.layers[name].damping for name in ("0", "2")] == [0.5, 3.0]


# ------------------------------------------------------------------------------------ lost layers


def told(optimizer: Any, model: nn.Module, times: int = 2) -> list[str]:
    """Return the warnings of some steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            train(optimizer, model, batch())
    ours = [w for w in caught if issubclass(w.category, KfactkWarning)]
    assert all(w.filename.endswith("small.py") for w in ours), "it points at the call of step()"
    return [str(w.message) for w in ours]


def test_parameters_that_a_load_replaced_are_told_once() -> None:
    model = net()
    optimizer = bound(model, update="adam")
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    [message] = told(optimizer, model)
    assert "0.weight, 0.bias, 2.weight, 2.bias of the model are new parameters" in message
    assert optimizer.coverage().covered == ()
    optimizer.param_groups[0]["params"][:] = model.parameters()
    assert told(optimizer, model) == []
    assert set(optimizer.layers) == {"0", "2"}


def test_new_parameters_under_other_names_are_told() -> None:
    model = net()
    optimizer = bound(model, update="adam")
    train(optimizer, model, batch())
    nn.utils.parametrizations.weight_norm(model[2])
    [message] = told(optimizer, model)
    assert "2.parametrizations.weight.original0" in message
    assert "are new parameters" in message


def test_a_parameter_that_has_its_name_again_has_its_block_again() -> None:
    model = net()
    optimizer = bound(model, update="adam")
    train(optimizer, model, batch())
    prune.l1_unstructured(model[0], "weight", 0.5)
    assert "0.weight_orig" in told(optimizer, model)[0]
    prune.remove(model[0], "weight")
    assert told(optimizer, model) == []
    assert set(optimizer.layers) == {"0", "2"}
    assert len(optimizer.coverage().covered) == 4


class Adapted(nn.Module):
    """A frozen layer with an adapter beside it, as peft makes."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(4, 1, bias=False).double()
        self.lora_B = nn.Linear(1, 5, bias=False).double()

    def forward(self, x: Any) -> Any:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_adapters_that_were_put_in_after_bind_are_told_of() -> None:
    model = net()
    optimizer = bound(model)
    train(optimizer, model, batch())
    model[0] = Adapted(model[0])
    model[2].requires_grad_(False)
    [message] = told(optimizer, model)
    assert "no layer is preconditioned any more" in message
    assert "not 0.lora_A.weight, 0.lora_B.weight of the model" in message
    optimizer.add_param_group({"params": [p for p in model.parameters() if p.requires_grad]})
    assert told(optimizer, model) == []
    assert set(optimizer.layers) == {"0.lora_A", "0.lora_B"}


def test_flat_parameters_in_the_groups_are_told_of() -> None:
    """DeepSpeed's ZeRO puts one flat tensor in place of the parameters."""
    model = net()
    optimizer = bound(model)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    optimizer.param_groups[0]["params"] = [flat]
    [message] = told(optimizer, model)
    assert "param_groups hold 1 tensors that are not the model's, in place of 0.weight" in message
    assert optimizer.coverage().plain == optimizer.coverage().covered == ()


def test_parameters_tied_so_that_no_block_fits_are_told_of_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    optimizer = bound(model)
    model[2].weight = model[0].weight
    [message] = told(optimizer, model)
    assert "0.weight, 0.bias (tied: it shares a parameter with 2.weight)" in message
    assert message.count("have lost their block, and train with the plain gradient") == 1
    assert optimizer.coverage().covered == ()


def test_what_the_user_said_is_not_told() -> None:
    model = net()
    optimizer = bound(model, [{"params": [p]} for p in model.parameters()])
    assert told(optimizer, model) == []
    model[0].requires_grad_(False)
    assert told(optimizer, model) == []
    model[2].requires_grad_(False)
    model[0].requires_grad_(True)
    assert told(optimizer, model) == []
    model[2] = nn.Linear(5, 3).double()
    optimizer.add_param_group({"params": model[2].parameters()})
    assert told(optimizer, model) == []
    del optimizer.param_groups[:2]
    assert told(optimizer, model) == []
    assert set(optimizer.layers) == {"2"}


def test_coverage_sees_a_model_that_was_filled_and_takes_nothing_from_the_next_step() -> None:
    with torch.device("meta"):
        model = net()
    optimizer = bound(model)
    model.to_empty(device="cpu").load_state_dict(net().state_dict())
    names = tuple(name for name, _ in model.named_parameters())
    assert optimizer.coverage().covered == names
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == list(map(id, model.parameters()))
    assert told(optimizer, model) == []
    assert set(optimizer.layers) == {"0", "2"}


@pytest.mark.parametrize("change", ["pop", "reverse", "put in"])
def test_a_group_that_moved_replaces_no_parameter(change: str) -> None:
    """Layers of one shape: what stands where another stood is not that other."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).double()
    tracker = ParameterTracker(model)
    groups: list[dict[str, Any]] = [{"params": list(model[n].parameters())} for n in (0, 1)]
    tracker.follow(groups, {})
    if change == "pop":
        del groups[0]
    elif change == "reverse":
        groups.reverse()
    else:
        groups[0]["params"][:] = model[2].parameters()
    assert tracker.follow(groups, {}) == {}
    assert dict(tracker._known) == {
        (module, name): p for module in model for name, p in module.named_parameters()
    }
