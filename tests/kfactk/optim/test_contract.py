"""Whatever `torch.optim.Adam` does under an operation, kfactk does too.

Each operation is run on Adam itself, and on kfactk with Adam as its update rule: once with all
layers left out, where every number must be Adam's, and once with curvature, where all that torch
owns must be: groups, keys of the state, the order of hooks, errors and warnings.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import kfactk
from kfactk import StateError

LR = 0.01


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class Case:
    """One optimizer, its model, and a log of what was seen.

    Args:
        kind: "adam", or "plain" or "curved" for kfactk without and with curvature.
        exact: Whether the log holds the values of parameters and state.
    """

    def __init__(self, kind: str, *, exact: bool) -> None:
        self.kind, self.exact, self.log = kind, exact, []
        self.model = net()
        self.data = [(torch.randn(6, 4).double(), torch.randint(3, (6,))) for _ in range(4)]

    def make(self, params: Any = None, model: nn.Module | None = None, **options: Any) -> Any:
        """Bind the optimizer; its parameters are the model's unless they are given."""
        model = self.model if model is None else model
        if self.kind == "adam":
            params = model.parameters() if params is None else params
            return torch.optim.Adam(params, lr=LR, weight_decay=0.0, **options)
        recipe = kfactk.build(
            update={"name": torch.optim.Adam, **options},
            lr=LR,
            fisher="exact",
            clip="none",
            factor_every=1,
            exclude=["*"] if self.kind == "plain" else [],
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no layer is preconditioned")
            return recipe.bind(model, params)

    def two_groups(self, **options: Any) -> Any:
        first, last = (list(self.model[place].parameters()) for place in (0, 2))
        return self.make([{"params": first}, {"params": last, "lr": 0.02}], **options)

    def step(self, optimizer: Any, times: int = 1) -> None:
        for number in range(times):
            x, y = self.data[number % len(self.data)]
            optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            optimizer.step()

    def note(self, *seen: Any) -> None:
        self.log.extend(seen)

    def name(self, parameter: Any) -> Any:
        """Return the name of a parameter, to compare it with that of another model."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return names.get(id(parameter), type(parameter).__name__)

    def look(self, optimizer: Any) -> None:
        """Note the groups, the state and the parameters."""
        for group in optimizer.param_groups:
            self.note({k: v for k, v in group.items() if k not in ("params", "damping")})
            self.note([self.name(p) for p in group["params"]])
        self.note(self.entries({self.name(p): e for p, e in optimizer.state.items()}))
        if self.exact:
            self.note([p.detach().clone() for p in self.model.parameters()])

    def entries(self, state: Any) -> dict[Any, Any]:
        """Return what torch owns of a state; where nothing is kept, an entry counts for none."""
        found = {key: self.entry(entry) for key, entry in state.items()}
        return {key: entry for key, entry in found.items() if entry != {}}

    def entry(self, entry: Any) -> Any:
        """Return what torch owns of an entry; without exact values, the shapes of its tensors."""
        if not isinstance(entry, dict):
            return entry
        found = {k: v for k, v in entry.items() if not str(k).startswith("kfactk.")}
        return {
            k: (v.dtype, v.shape) if isinstance(v, Tensor) and v.ndim and not self.exact else v
            for k, v in found.items()
        }

    def saved(self, state: Any) -> Any:
        """Return what torch owns of a saved state."""
        entries = self.entries(state["state"])
        groups = [{k: v for k, v in g.items() if k != "damping"} for g in state["param_groups"]]
        more = {k: v for k, v in state.items() if k not in ("state", "param_groups")}
        return {"state": entries, "param_groups": groups, **more}

    def attempt(self, call: Callable[[], Any]) -> None:
        """Note which error a call raises and what warnings it gives."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                call()
            except Exception as error:
                text = "" if isinstance(error, KeyError) else str(error)
                self.note((type(error).__name__, text))
            else:
                self.note("no error")
        self.note({str(each.message) for each in caught})


# -------------------------------------------------------------------------------------- operations


OPERATIONS: list[Callable[[Case], None]] = []


def operation(run: Callable[[Case], None]) -> Callable[[Case], None]:
    OPERATIONS.append(run)
    return run


@operation
def steps(case: Case) -> None:
    optimizer = case.make()
    for _ in range(3):
        case.step(optimizer)
        case.look(optimizer)


@operation
def options(case: Case) -> None:
    for each in (
        {"maximize": True},
        {"amsgrad": True},
        {"betas": (0.8, 0.9), "eps": 1e-6},
        {"foreach": True},
        {"foreach": False},
        {"fused": True},
        {"capturable": False},
    ):
        optimizer = case.make(**each)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1
        case.step(optimizer, 3)
        case.look(optimizer)


@operation
def add_group(case: Case) -> None:
    optimizer = case.make(case.model[0].parameters())
    case.step(optimizer, 2)
    case.note(optimizer.add_param_group({"params": case.model[2].parameters(), "lr": 0.1}))
    case.look(optimizer)
    case.step(optimizer, 2)
    case.look(optimizer)
    optimizer.add_param_group({"params": nn.Parameter(torch.zeros(2))})
    case.step(optimizer)
    case.look(optimizer)


@operation
def groups_assigned(case: Case) -> None:
    optimizer = case.two_groups()
    case.step(optimizer)
    optimizer.param_groups = [{**group, "lr": 0.0} for group in optimizer.param_groups]
    case.step(optimizer, 2)
    case.look(optimizer)
    optimizer.param_groups = list(reversed(optimizer.param_groups))
    case.step(optimizer)
    case.look(optimizer)
    case.note(case.saved(optimizer.state_dict()))


@operation
def groups_assigned_before_the_first_step(case: Case) -> None:
    optimizer = case.two_groups()
    optimizer.param_groups = [{**optimizer.param_groups[1], "lr": 0.3}]
    case.step(optimizer, 2)
    case.look(optimizer)


@operation
def group_replaced(case: Case) -> None:
    optimizer = case.two_groups()
    case.step(optimizer)
    optimizer.param_groups[1] = {**optimizer.param_groups[1], "lr": 0.3}
    case.step(optimizer)
    optimizer.param_groups[0] = dict(optimizer.param_groups[0], betas=(0.5, 0.5))
    case.step(optimizer)
    case.look(optimizer)


@operation
def groups_appended_and_moved(case: Case) -> None:
    optimizer = case.two_groups()
    case.step(optimizer)
    bias = optimizer.param_groups[1]["params"].pop()
    optimizer.param_groups.append({**optimizer.param_groups[1], "params": [bias], "lr": 0.2})
    case.step(optimizer, 2)
    case.look(optimizer)
    optimizer.param_groups.insert(0, optimizer.param_groups.pop())
    case.step(optimizer)
    case.look(optimizer)
    optimizer.param_groups.reverse()
    optimizer.param_groups[0]["params"].reverse()
    case.step(optimizer)
    case.look(optimizer)


@operation
def groups_popped(case: Case) -> None:
    for place in (0, 1):
        optimizer = case.two_groups()
        case.step(optimizer)
        gone = optimizer.param_groups.pop(place)
        case.step(optimizer, 2)
        case.look(optimizer)
        case.attempt(optimizer.state_dict)
        for parameter in gone["params"]:
            del optimizer.state[parameter]
        case.note(case.saved(optimizer.state_dict()))
        optimizer.param_groups.append(gone)
        case.step(optimizer)
        case.look(optimizer)


@operation
def groups_cleared(case: Case) -> None:
    optimizer = case.two_groups()
    case.step(optimizer)
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.param_groups.clear()
    optimizer.state.clear()
    optimizer.add_param_group({"params": everything})
    case.step(optimizer, 2)
    case.look(optimizer)
    del optimizer.param_groups[:]
    case.step(optimizer)
    case.look(optimizer)


@operation
def groups_deleted_by_slice(case: Case) -> None:
    optimizer = case.two_groups()
    optimizer.param_groups[:] = optimizer.param_groups[1:]
    case.step(optimizer)
    case.look(optimizer)
    optimizer.param_groups += [{**optimizer.param_groups[0], "params": [case.model[0].weight]}]
    case.step(optimizer)
    case.look(optimizer)


@operation
def set_state_by_hand(case: Case) -> None:
    optimizer = case.two_groups()
    case.step(optimizer)
    groups = [{**group, "lr": 0.2} for group in optimizer.param_groups]
    optimizer.__setstate__({"param_groups": groups})
    case.note(optimizer.param_groups is groups)
    case.step(optimizer)
    case.look(optimizer)
    optimizer.__setstate__({"state": defaultdict(dict), "mine": 3})
    case.note(optimizer.mine)
    case.look(optimizer)
    case.step(optimizer)
    case.look(optimizer)


@operation
def groups_lack_a_key(case: Case) -> None:
    optimizer = case.two_groups()
    case.step(optimizer)
    optimizer.param_groups = [{"params": optimizer.param_groups[0]["params"], "lr": 0.1}]
    case.attempt(lambda: case.step(optimizer))


@operation
def values_edited_in_place(case: Case) -> None:
    optimizer = case.two_groups()
    for lr in (0.1, 0.0, 0.05):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["betas"] = (0.5, 0.9)
        optimizer.param_groups[1]["mine"] = lr
        optimizer.param_groups[1][3] = "a key that is not text"
        case.step(optimizer)
        case.look(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    case.step(optimizer)
    case.look(optimizer)


@operation
def learning_rate_is_a_tensor(case: Case) -> None:
    optimizer = case.two_groups()
    for group in optimizer.param_groups:
        group.update(lr=torch.tensor(0.03), foreach=False, capturable=False)
    case.step(optimizer, 2)
    optimizer.param_groups[0]["lr"].fill_(0.1)
    case.step(optimizer, 2)
    case.look(optimizer)


@operation
def parameters_replaced_in_a_group(case: Case) -> None:
    optimizer = case.make()
    case.step(optimizer)
    case.model[2] = nn.Linear(5, 3).double()
    optimizer.param_groups[0]["params"][2:] = case.model[2].parameters()
    case.step(optimizer, 2)
    case.look(optimizer)


@operation
def state_written(case: Case) -> None:
    optimizer = case.make()

    def average(each: Any, *_: Any) -> None:
        for group in each.param_groups:
            for p in group["params"]:
                kept = each.state[p].setdefault("ema", p.detach().clone())
                kept.lerp_(p.detach(), 0.1)

    handle = optimizer.register_step_post_hook(average)
    case.step(optimizer, 3)
    case.look(optimizer)
    handle.remove()
    weight = case.model[0].weight
    optimizer.state[weight]["exp_avg"] = torch.ones_like(weight)
    optimizer.state[weight]["exp_avg_sq"].fill_(4)
    optimizer.state[weight]["step"] = torch.tensor(9.0)
    case.step(optimizer)
    case.look(optimizer)
    case.note(case.saved(optimizer.state_dict()))


@operation
def state_written_under_other_keys(case: Case) -> None:
    optimizer = case.make()
    optimizer.state["of the run"] = [1, 2]
    optimizer.state[7] = {"nested": {1: 2}}
    case.step(optimizer)
    optimizer.state[case.model[0].bias][0] = {"m": torch.ones(2).double()}
    case.step(optimizer)
    case.look(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    case.note(case.saved(state))
    optimizer.load_state_dict(state)
    case.look(optimizer)


@operation
def an_entry_held_by_the_user(case: Case) -> None:
    optimizer = case.make()
    case.step(optimizer)
    entry = optimizer.state[case.model[0].weight]
    case.step(optimizer)
    case.note(entry is optimizer.state[case.model[0].weight], entry["step"])
    entry["mine"] = 5
    case.step(optimizer)
    case.look(optimizer)


@operation
def state_emptied(case: Case) -> None:
    for when in ("after a step", "before step()"):
        optimizer = case.make()
        case.step(optimizer, 2)
        weight = case.model[0].weight
        for change in (
            lambda optimizer=optimizer, weight=weight: optimizer.state.update({weight: {}}),
            lambda optimizer=optimizer, weight=weight: optimizer.state.pop(weight),
            lambda optimizer=optimizer, weight=weight: optimizer.state[weight].clear(),
            optimizer.state.clear,
            lambda optimizer=optimizer: setattr(optimizer, "state", defaultdict(dict)),
        ):
            optimizer.zero_grad()
            F.cross_entropy(case.model(case.data[0][0]), case.data[0][1]).backward()
            if when == "before step()":
                change()
            optimizer.step()
            if when == "after a step":
                change()
                case.look(optimizer)
                case.note(case.saved(optimizer.state_dict()))
                case.look(optimizer)
            case.step(optimizer)
            case.look(optimizer)


@operation
def state_moved_to_another_parameter(case: Case) -> None:
    optimizer = case.make()
    case.step(optimizer, 2)
    weight, bias = case.model[0].parameters()
    small = [nn.Parameter(p.detach()[:3].clone()) for p in (weight, bias)]
    case.model[0].weight, case.model[0].bias = small
    case.model[2] = nn.Linear(3, 3).double()
    for old, new in zip((weight, bias), small, strict=True):
        entry = optimizer.state.pop(old)
        mine = {k: v for k, v in entry.items() if not k.startswith("kfactk.")}
        optimizer.state[new] = {k: v[:3] if v.ndim else v for k, v in mine.items()}
    optimizer.param_groups[0]["params"][:2] = small
    optimizer.param_groups[0]["params"][2:] = case.model[2].parameters()
    case.step(optimizer, 2)
    case.look(optimizer)


@operation
def zero_grad(case: Case) -> None:
    optimizer = case.make()
    for none in (True, False):
        F.cross_entropy(case.model(case.data[0][0]), case.data[0][1]).backward()
        optimizer.step()
        case.note(optimizer.zero_grad(set_to_none=none))
        case.note([p.grad for p in case.model.parameters()])
    optimizer.zero_grad(False)
    case.note([p.grad for p in case.model.parameters()])
    optimizer.step()
    case.look(optimizer)


@operation
def closures(case: Case) -> None:
    optimizer = case.make()

    def closure() -> Tensor:
        optimizer.zero_grad()
        case.note(torch.is_grad_enabled())
        loss = F.cross_entropy(case.model(case.data[0][0]), case.data[0][1])
        loss.backward()
        return loss

    for _ in range(2):
        found = optimizer.step(closure)
        case.note(type(found), found.requires_grad, *([found.detach()] if case.exact else []))
    case.look(optimizer)
    optimizer.zero_grad()  # with a gradient and without a forward, curvature would lack its samples
    for answer in (None, 3, 2.5, (1, "two"), {"loss": 3}):
        case.note(optimizer.step(lambda answer=answer: answer))
    case.note(optimizer.step(closure=lambda: 4))
    with torch.no_grad():
        optimizer.step(closure)
    optimizer.zero_grad()
    case.attempt(lambda: optimizer.step(lambda: 1 / 0))
    case.note(torch.is_grad_enabled())
    case.look(optimizer)


@operation
def saved_and_loaded(case: Case) -> None:
    optimizer = case.two_groups()
    case.note(case.saved(optimizer.state_dict()))
    case.step(optimizer, 3)
    for copied in (
        copy.deepcopy,
        lambda state: pickle.loads(pickle.dumps(state)),
        through_file,
        lambda state: OrderedDict(copy.deepcopy(state)),
    ):
        state = copied(optimizer.state_dict())
        case.note(case.saved(state), list(state))
        keys = {number: list(entry) for number, entry in state["state"].items()}
        case.note(optimizer.load_state_dict(state))
        case.note({number: list(entry) for number, entry in state["state"].items()} == keys)
        case.look(optimizer)
        case.step(optimizer)
        case.look(optimizer)
    optimizer.load_state_dict({**copy.deepcopy(optimizer.state_dict()), "state": {}})
    case.look(optimizer)
    case.step(optimizer)
    case.look(optimizer)


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    found: dict[str, Any] = torch.load(buffer, weights_only=True)
    return found


@operation
def resumed_elsewhere(case: Case) -> None:
    optimizer = case.two_groups()
    case.step(optimizer, 3)
    weights, state = (copy.deepcopy(each.state_dict()) for each in (case.model, optimizer))
    case.step(optimizer, 2)
    case.look(optimizer)
    case.model.load_state_dict(weights)
    fresh = case.two_groups()
    fresh.load_state_dict(state)
    case.step(fresh, 2)
    case.look(fresh)


@operation
def loaded_into_groups_that_differ(case: Case) -> None:
    state = case.two_groups().state_dict()
    for params in (
        [{"params": list(case.model.parameters())}],
        [{"params": [case.model[0].weight]}, {"params": list(case.model[2].parameters())}],
    ):
        optimizer = case.make(params)
        case.step(optimizer)
        case.attempt(lambda optimizer=optimizer: optimizer.load_state_dict(copy.deepcopy(state)))
        case.step(optimizer)
        case.look(optimizer)


@operation
def hooks_of_every_kind(case: Case) -> None:
    optimizer = case.make()

    def noting(name: str) -> Callable[..., None]:
        def hook(each: Any, *args: Any) -> None:
            shapes = [type(a).__name__ for a in args]
            case.note((name, each is optimizer, shapes, len(each.state), len(each.param_groups)))

        return hook

    handles = [
        optimizer.register_step_pre_hook(noting("step pre 1")),
        optimizer.register_step_pre_hook(noting("step pre 2")),
        optimizer.register_step_post_hook(noting("step post")),
        register_optimizer_step_pre_hook(of_this(optimizer, noting("all"))),
        register_optimizer_step_post_hook(of_this(optimizer, noting("end"))),
        optimizer.register_state_dict_pre_hook(noting("save pre 1")),
        optimizer.register_state_dict_pre_hook(noting("save pre 0"), prepend=True),
        optimizer.register_state_dict_post_hook(noting("save post 1")),
        optimizer.register_state_dict_post_hook(noting("save post 0"), prepend=True),
        optimizer.register_load_state_dict_pre_hook(noting("load pre 1")),
        optimizer.register_load_state_dict_pre_hook(noting("load pre 0"), prepend=True),
        optimizer.register_load_state_dict_post_hook(noting("load post 1")),
        optimizer.register_load_state_dict_post_hook(noting("load post 0"), prepend=True),
    ]
    case.step(optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    case.step(optimizer)
    case.look(optimizer)
    for handle in handles:
        handle.remove()
    case.note("removed")
    case.step(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def of_this(optimizer: Any, hook: Callable[..., None]) -> Callable[..., None]:
    """Restrict a hook of all optimizers to one: the update rule is another one inside kfactk."""
    return lambda each, *args: hook(each, *args) if each is optimizer else None


@operation
def hooks_that_change_what_passes(case: Case) -> None:
    optimizer = case.make()
    case.step(optimizer, 2)
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    optimizer.register_state_dict_pre_hook(lambda each: each.param_groups[0].update(late=2))
    saved = optimizer.state_dict()
    case.note(case.saved(saved), list(saved))

    def in_place(_: Any, state: dict[str, Any]) -> None:
        state["mine"] = 2
        state["param_groups"][0]["lr"] = 0.5

    optimizer.register_state_dict_post_hook(in_place)
    case.note(case.saved(optimizer.state_dict()), optimizer.param_groups[0]["lr"])

    def adapted(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        case.note(list(state))
        groups = [{**group, "lr": 0.7} for group in state["param_groups"]]
        return {"state": state["state"], "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(adapted)
    given = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(given)
    case.look(optimizer)
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state.pop("state") and None)
    held = {**given}
    with pytest.raises((KeyError, StateError)):
        optimizer.load_state_dict(held)
    case.note(list(held))


@operation
def step_hooks_change_arguments(case: Case) -> None:
    optimizer = case.make()
    case.step(optimizer)
    optimizer.zero_grad()
    optimizer.register_step_pre_hook(lambda each, args, kwargs: ((each, lambda: 3), {}))
    case.note(optimizer.step())
    optimizer.register_step_pre_hook(lambda *_: 4)
    case.attempt(lambda: kind_only(optimizer.step))


def kind_only(call: Callable[[], Any]) -> None:
    """Drop the text of an error: torch's names the function."""
    try:
        call()
    except RuntimeError as error:
        raise RuntimeError from error


@operation
def hooks_that_raise(case: Case) -> None:
    optimizer = case.make()
    case.step(optimizer)
    state = copy.deepcopy(optimizer.state_dict())

    def fail(*_: Any) -> None:
        raise ArithmeticError("stop")

    for register, call in (
        (optimizer.register_state_dict_pre_hook, optimizer.state_dict),
        (optimizer.register_state_dict_post_hook, optimizer.state_dict),
        (optimizer.register_load_state_dict_pre_hook, lambda: optimizer.load_state_dict(state)),
        (optimizer.register_load_state_dict_post_hook, lambda: optimizer.load_state_dict(state)),
        (optimizer.register_step_pre_hook, lambda: case.step(optimizer)),
        (optimizer.register_step_post_hook, lambda: case.step(optimizer)),
    ):
        handle = register(fail)
        case.attempt(call)
        handle.remove()
        case.look(optimizer)
    case.step(optimizer)
    case.look(optimizer)


@operation
def loads_by_name(case: Case) -> None:
    """Torch's own example of a hook: parameters in another order are matched by their names."""
    optimizer = case.make(case.model.named_parameters())
    case.step(optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    turned = case.make(list(reversed(list(case.model.named_parameters()))))

    def matched(each: Any, saved: dict[str, Any]) -> dict[str, Any]:
        names, ours = saved["param_groups"][0]["param_names"], each.param_groups[0]["param_names"]
        entries = {i: saved["state"][names.index(name)] for i, name in enumerate(ours)}
        group = {**saved["param_groups"][0], "param_names": ours}
        return {"state": entries, "param_groups": [group]}

    turned.register_load_state_dict_pre_hook(matched)
    turned.load_state_dict(state)
    case.look(turned)
    case.step(turned, 2)
    case.look(turned)


@operation
def named_parameters(case: Case) -> None:
    named = list(case.model.named_parameters())
    optimizer = case.make([{"params": named[:2]}])
    case.step(optimizer)
    optimizer.add_param_group({"params": named[2:], "lr": 0.1})
    case.step(optimizer)
    case.look(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    case.note(case.saved(state))
    for group in state["param_groups"]:
        del group["param_names"]
    optimizer.load_state_dict(state)
    case.look(optimizer)
    case.attempt(lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}))
    plain = case.make(case.model[0].parameters())
    case.attempt(lambda: plain.add_param_group({"params": named[2:]}))
    case.attempt(lambda: case.make([named[0], named[1][1]]))
    case.look(plain)


@operation
def refused_parameters(case: Case) -> None:
    weight = case.model[0].weight
    leaf = torch.ones(2, requires_grad=True)
    for params in (
        [],
        weight,
        [weight, 3],
        [leaf * 2],
        [{"params": {weight}}],
        [{"params": [weight]}, {"params": [weight]}],
        [{"lr": 0.1}],
        "text",
    ):
        case.attempt(lambda params=params: case.make(params))
    optimizer = case.make([case.model[0].weight])
    case.step(optimizer)
    for group in (
        3,
        [weight],
        {"lr": 0.1},
        {"params": [weight]},
        {"params": {case.model[0].bias}},
        {"params": [leaf * 2]},
        {"params": "text"},
    ):
        case.attempt(lambda group=group: optimizer.add_param_group(group))
    case.look(optimizer)
    case.step(optimizer)
    case.look(optimizer)


@operation
def parameters_twice_in_a_group(case: Case) -> None:
    weight = case.model[0].weight
    case.attempt(lambda: case.make([weight, weight]))
    optimizer = case.make(case.model[2].parameters())
    case.attempt(lambda: optimizer.add_param_group({"params": [weight, weight]}))
    case.look(optimizer)


@operation
def tensors_and_empty_groups(case: Case) -> None:
    optimizer = case.make([{"params": []}, {"params": case.model.parameters()}])
    case.step(optimizer, 2)
    optimizer.add_param_group({"params": []})
    case.step(optimizer)
    case.look(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    case.look(optimizer)
    alone = torch.ones(3, requires_grad=True)
    optimizer.add_param_group({"params": alone})
    optimizer.zero_grad()
    alone.grad = torch.ones(3)
    optimizer.step()
    case.look(optimizer)
    case.note(*([alone.detach()] if case.exact else []))


@operation
def gradients_that_are_missing(case: Case) -> None:
    optimizer = case.make()
    optimizer.step()
    case.look(optimizer)
    case.step(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    case.look(optimizer)
    case.model[0].requires_grad_(False)
    case.step(optimizer, 2)
    case.look(optimizer)
    case.model[0].requires_grad_(True)
    case.step(optimizer)
    case.look(optimizer)


@operation
def gradients_that_are_sparse(case: Case) -> None:
    table = nn.Embedding(5, 4, sparse=True).double()
    optimizer = case.make(table.parameters(), table)
    table(torch.tensor([1, 2])).sum().backward()
    case.attempt(optimizer.step)
    optimizer.zero_grad(set_to_none=False)
    case.note(table.weight.grad.is_sparse, table.weight.grad.to_dense())


@operation
def schedulers(case: Case) -> None:
    for make in (
        lambda each: lr_scheduler.LambdaLR(each, lambda epoch: 0.5**epoch),
        lambda each: lr_scheduler.OneCycleLR(each, 0.1, total_steps=8),
        lambda each: lr_scheduler.CosineAnnealingWarmRestarts(each, 3),
        lambda each: lr_scheduler.SequentialLR(
            each,
            [lr_scheduler.ConstantLR(each, 0.1), lr_scheduler.ExponentialLR(each, 0.9)],
            milestones=[2],
        ),
        lambda each: lr_scheduler.CyclicLR(each, 0.01, 0.1, step_size_up=2),
    ):
        optimizer = case.two_groups()
        scheduler = make(optimizer)
        for _ in range(4):
            case.step(optimizer)
            scheduler.step()
            case.note(scheduler.get_last_lr())
        case.look(optimizer)
        optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
        case.step(optimizer)
        scheduler.step()
        case.look(optimizer)


@operation
def scheduler_on_plateau(case: Case) -> None:
    optimizer = case.two_groups()
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for loss in (1.0, 2.0, 2.0):
        case.step(optimizer)
        scheduler.step(loss)
    case.look(optimizer)
    case.attempt(lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}))
    case.attempt(lambda: scheduler.step(3.0))


@operation
def averaged_weights_follow(case: Case) -> None:
    optimizer = case.two_groups()
    averaged = torch.optim.swa_utils.AveragedModel(case.model)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05)
    for _ in range(3):
        case.step(optimizer)
        averaged.update_parameters(case.model)
        scheduler.step()
    case.look(optimizer)
    case.note(*(averaged.state_dict().values() if case.exact else []))


@operation
def attributes(case: Case) -> None:
    optimizer = case.two_groups()
    case.note({k: v for k, v in optimizer.defaults.items() if k != "damping"})
    case.note(
        isinstance(optimizer, torch.optim.Optimizer), isinstance(optimizer.state, defaultdict)
    )
    shown = repr(optimizer).partition("(")[2]
    case.note([line for line in shown.splitlines() if "damping" not in line])
    for name in ("train", "eval", "nothing", "_step_supports_amp_scaling"):
        case.note(hasattr(optimizer, name))
    case.note(sorted(optimizer.__getstate__()))
    optimizer.mine = 3
    case.note(optimizer.mine)


@operation
def defaults_changed(case: Case) -> None:
    optimizer = case.make(case.model[0].parameters())
    optimizer.defaults["lr"] = 0.5
    optimizer.defaults["amsgrad"] = True
    case.note({k: v for k, v in optimizer.defaults.items() if k != "damping"})
    optimizer.add_param_group({"params": case.model[2].parameters()})
    case.step(optimizer, 2)
    case.look(optimizer)
    optimizer.defaults = {**optimizer.defaults, "lr": 0.25}
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    case.look(optimizer)


# ----------------------------------------------------------------------------------------- compare


def logged(kind: str, run: Callable[[Case], None], *, exact: bool) -> list[Any]:
    torch.manual_seed(0)
    case = Case(kind, exact=exact)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(lr_scheduler|epoch parameter).*")
        run(case)
    return case.log


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """The same types and keys, and the same numbers bit for bit."""
    assert type(one) is type(other), f"{where}: {one!r} and {other!r}"
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), f"{where}: {one} and {other}"
    elif isinstance(one, dict):
        assert set(one) == set(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), f"{where}: {one!r} and {other!r}"
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}/{number}")
    else:
        assert one == other, f"{where}: {one!r} and {other!r}"


@pytest.mark.parametrize("run", OPERATIONS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("kind", ["plain", "curved"])
def test_what_adam_does_kfactk_does(kind: str, run: Callable[[Case], None]) -> None:
    exact = kind == "plain"
    truth, found = (logged(each, run, exact=exact) for each in ("adam", kind))
    assert truth
    assert_same(truth, found)
