"""Plugins that raise, in every method of every stage and every hook.

The error names the culprit, and training goes on afterwards.
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfactk
from kfactk import KfactkError, KfactkWarning, Optimizer, PluginError, hookimpl
from kfactk.registry import hookspecs
from kfactk.registry.inspection import BASE_CLASSES, PROTOCOLS
from kfactk.registry.registry import Registry, registry
from tests.covering import covering
from tests.kfactk.optim.test_faults import EACH, batches, close
from tests.kfactk.small import batch, factors, hooks, net, train, values

STAGES: dict[str, list[Any]] = {
    "curvature": ["kfac"],
    "basis": ["ekfac", {"name": "ekfac", "scale": "running", "scale_decay": 0.0}, "soap"],
    "fisher": ["exact", "mc"],
    "likelihood": ["categorical"],
    "link": ["two_level"],
    "clip": ["norm"],
    "update": ["adam"],
    "controller": [{"name": "quadratic", "model_damping": 0.1, "adapt_every": 1}],
    "pace": ["similar"],
    "placement": ["replicated"],
    "tracker": [None],
}
"""Stages of ours which together are asked for all that their family's protocol has."""
UNASKED = {"tracker": {"flush"}, "placement": {"assign"}, "curvature": {"factors", "unfold"}}
"""Methods for users to call, or called on several ranks or flattened tokens only, or that no stage
replaces."""
RAW = ("update", "placement")
"""Families whose errors keep their kind, for callers know torch's own. Notes name the stage."""


class Ledger:
    """A tracker that keeps nothing."""

    every = 1

    def start(self, recipe: Any) -> None:
        pass

    def record(self, step: int, metrics: Any) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class Sabotaged:
    """A stage whose method `member` raises at its call number `at`, from 1, and works otherwise."""

    def __init__(self, original: Any, member: str, at: int, error: BaseException) -> None:
        self.original, self.member, self.at, self.error = original, member, at, error
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.original, name)
        return (
            found
            if name != self.member
            else lambda *args, **kwargs: self._call(found, *args, **kwargs)
        )

    def _call(self, found: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return found(*args, **kwargs)


def sabotaged(family: str, original: Any, member: str, at: int, error: BaseException) -> Any:
    """Return a sabotaged stage, which derives from the base class of its family if there is one."""
    base = BASE_CLASSES.get(family)
    if base is None:
        return Sabotaged(original, member, at, error)
    namespace: dict[str, Any] = {
        name: property(lambda self, name=name: getattr(self.original, name))
        for name in dir(base)
        if not name.startswith("_") and name not in methods(family)
    }
    for name in set(methods(family)) - UNASKED.get(family, set()):
        namespace[name] = property(lambda self, name=name: Sabotaged.__getattr__(self, name))
    module = {"__module__": Sabotaged.__module__, "__qualname__": Sabotaged.__qualname__}
    made = type(base)("Sabotaged", (Sabotaged, base), namespace | module)
    return made(original, member, at, error)


def methods(family: str) -> list[str]:
    """The methods that a stage of the family has to have, by its protocol."""
    protocol = PROTOCOLS[family]
    return [
        name
        for name, member in vars(protocol).items()
        if inspect.isfunction(member) and not name.startswith("_")
    ]


class Life:
    """All that happens to an optimizer, in parts that can be repeated."""

    def __init__(self, family: str, stage: Any) -> None:
        torch.manual_seed(3)
        self.model, self.fresh = net(), net()
        self.recipe = {
            "fisher": "exact",
            "clip": "none",
            "update": "sgd",
            "lr": 0.01,
            "damping": 0.1,
            **EACH,
            "factor_decay": 0.0,
        }
        self.recipe[family] = stage
        if family == "basis" and "L" in stage.requires:
            self.recipe["curvature"] = "gradient"
        self.controlled = family == "controller"
        if self.controlled:
            self.recipe |= {"update": "velocity", "basis": {"name": "kfac", "solver": "eigh"}}
            del self.recipe["damping"], self.recipe["lr"]
        self.optimizer: Any = None
        self.other: Any = None

    def bind(self) -> None:
        self.optimizer = kfactk.build(**self.recipe).bind(self.model)

    def survey(self) -> None:
        """Ask for the coverage of tied modules."""
        tied = net()
        tied.append(nn.Linear(5, 3).double())
        tied[3].weight, tied[3].bias = tied[2].weight, tied[2].bias
        assert kfactk.build(**self.recipe).coverage(tied).rows

    def step(self, number: int) -> Callable[[], None]:
        data = batches(3)[number]

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(data[0]), data[1])
            loss.backward()
            return loss

        if self.controlled:
            return lambda: self.optimizer.step(closure) and None
        return lambda: train(self.optimizer, self.model, data) and None

    def read(self) -> None:
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        self.optimizer.fisher_product(gradients)
        self.optimizer.precondition(gradients)
        assert all(float(view.condition()) > 0 for view in self.optimizer.layers.values())

    def bind_other(self) -> None:
        self.other = kfactk.build(**self.recipe).bind(self.fresh)

    def make_room(self) -> None:
        """As distributed checkpoints do before they load."""
        for parameter in self.fresh.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.other.param_groups[0]["lr"] = 0.0
        self.other.step()

    def load(self) -> None:
        self.other.load_state_dict(self.optimizer.state_dict())

    def close(self) -> None:
        self.optimizer.close()
        self.other.close()

    def parts(self) -> list[Callable[[], None]]:
        return [
            self.survey,
            self.bind,
            self.step(0),
            self.step(1),
            self.read,
            self.bind_other,
            self.make_room,
            self.load,
            self.step(2),
            self.close,
        ]

    def outcome(self) -> list[torch.Tensor]:
        return [*values(self.model), *factors(self.optimizer)]


def subject(family: str, number: int) -> Any:
    stage = STAGES[family][number]
    return Ledger() if stage is None else registry().resolve(family, stage)


def lived(
    family: str, stage: Any, member: str, on_error: Callable[[BaseException], None] | None = None
) -> Life:
    life = Life(family, stage)
    if family == "likelihood" and member in ("sample", "nll"):
        life.recipe["fisher"] = "mc"
    if member == "factor_rows":
        life.recipe |= {"link": "block_tridiagonal", "basis": "kfac"}
    for part in life.parts():
        steps = 0 if life.optimizer is None else life.optimizer.steps
        try:
            part()
        except BaseException as error:
            if on_error is None:
                raise
            on_error(error)
            assert all(
                bool(torch.isfinite(parameter).all()) for parameter in life.model.parameters()
            )
            if (
                life.optimizer is None or life.optimizer.steps == steps
            ):  # else the step was complete when it was interrupted
                part()
    return life


CASES = [
    (family, member)
    for family in PROTOCOLS
    for member in methods(family)
    if member not in UNASKED.get(family, ())
]


def counted(family: str, member: str) -> tuple[int, int, Life]:
    """Which of the family's stages is asked for the method, how often, and the undisturbed life."""
    for number in range(len(STAGES[family])):
        stage = sabotaged(family, subject(family, number), member, -1, RuntimeError())
        life = lived(family, stage, member)
        if stage.calls:
            return number, stage.calls, life
    raise AssertionError(
        f"nothing here makes kfactk call {member} of a {family}: add a stage, or a part of a life"
    )


@covering(strength=1, method=CASES, kind=[RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_every_method_of_every_stage(method: tuple[str, str], kind: type[BaseException]) -> None:
    """At the first call and at the last, the error names the stage, and the life goes on."""
    family, member = method
    number, calls, undisturbed = counted(family, member)
    for at in {1, calls}:
        caught: list[BaseException] = []
        stage = sabotaged(family, subject(family, number), member, at, kind("sabotage"))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            life = lived(family, stage, member, caught.append)
        if family == "tracker" and kind is not KeyboardInterrupt:
            assert caught == []
            assert (
                sum(
                    "the tracker failed, and training goes on without its records"
                    in str(each.message)
                    for each in said
                )
                == 1
            )
        else:
            [error] = caught
            assert "sabotage" in str(error)
            assert isinstance(
                error, PluginError if kind is RuntimeError and family not in RAW else kind
            )
            told = "\n".join([str(error), *getattr(error, "__notes__", ())])
            named = f"{family} {Sabotaged.__module__}:Sabotaged"
            assert named in told or (kind is not RuntimeError and family not in RAW), told
        close(life.outcome(), undisturbed.outcome())
        assert hooks(life.model) == hooks(life.fresh) == 0


class Unpunctual(Ledger):
    """Does not know how often."""

    def __init__(self, answer: Callable[[], int]) -> None:
        self._answer = answer

    @property
    def every(self) -> int:  # type: ignore[override]
        return self._answer()


@pytest.mark.parametrize(
    "answer", [lambda: 0, lambda: 1 // 0, lambda: "often"], ids=["zero", "raises", "text"]
)
def test_a_tracker_that_does_not_know_how_often(answer: Callable[[], Any]) -> None:
    model = net()
    optimizer = kfactk.build(tracker=Unpunctual(answer)).bind(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            train(optimizer, model, batch())
    assert [each.category for each in said] == [KfactkWarning]
    assert "the tracker failed, and training goes on without its records" in str(said[0].message)
    assert optimizer.steps == 3


# -------------------------------------------------------------------------------------------- hooks


def hook(name: str, body: Callable[..., Any]) -> Any:
    """A plugin with one hook; pluggy reads the names of its arguments."""
    takes = inspect.signature(getattr(hookspecs, name)).parameters
    scope: dict[str, Any] = {"body": body}
    exec(f"def {name}({', '.join(takes)}):\n    return body({', '.join(takes)})", scope)
    return types.SimpleNamespace(**{name: hookimpl(scope[name])})


def fail(*args: Any) -> Any:
    raise RuntimeError("sabotage")


HOOKS = [name for name in vars(hookspecs) if name.startswith("kfactk_")]


def test_all_hooks_are_here() -> None:
    assert set(hookspecs.STAGE_HOOKS.values()) < set(HOOKS)
    assert set(HOOKS) - set(hookspecs.STAGE_HOOKS.values()) == {"kfactk_bound", "kfactk_stepped"}, (
        "a new hook wants a test of its faults"
    )


@pytest.mark.parametrize("name", sorted(hookspecs.STAGE_HOOKS.values()))
def test_a_stage_hook_that_raises_when_its_plugin_is_registered(name: str) -> None:
    fresh = Registry()
    with pytest.raises(PluginError, match=rf"'saboteur' cannot be registered: .*{name}.*sabotage"):
        fresh.register(hook(name, fail), name="saboteur")
    assert fresh.plugins() == []
    assert fresh.stages() == []
    fresh.register(hook(name, dict), name="saboteur")


def within(name: str, body: Callable[..., Any], call: Callable[[], None]) -> None:
    plugin = hook(name, body)
    registry().register(plugin, name="saboteur")
    try:
        call()
    finally:
        registry().unregister(plugin)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_hook_that_raises_at_bind_leaves_no_optimizer_behind(kind: type[BaseException]) -> None:
    model = net()

    def sabotage(optimizer: Optimizer) -> None:
        assert hooks(model) == 2
        raise kind("sabotage")

    def call() -> None:
        with pytest.raises(kind, match="sabotage"):
            kfactk.build().bind(model)

    within("kfactk_bound", sabotage, call)
    assert hooks(model) == 0
    train(kfactk.build().bind(model), model, batch())


@pytest.mark.parametrize("kind", [RuntimeError, KfactkError, KeyboardInterrupt])
def test_a_hook_that_raises_after_a_step_finds_it_taken(kind: type[BaseException]) -> None:
    """The step is complete; the loop that goes on is the one in which nothing was raised."""
    torch.manual_seed(1)
    models = [net() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [kfactk.build(fisher="exact", **EACH).bind(model) for model in models]
    data = batches(3)

    def sabotage(optimizer: Optimizer, step: int, metrics: Any) -> None:
        if step == 1:
            raise kind("sabotage")

    def call() -> None:
        train(optimizers[0], models[0], data[0])
        with pytest.raises(kind, match="sabotage"):
            train(optimizers[0], models[0], data[1])
        assert optimizers[0].steps == 2
        train(optimizers[0], models[0], data[2])

    within("kfactk_stepped", sabotage, call)
    for each in data:
        train(optimizers[1], models[1], each)
    close(values(models[0]), values(models[1]))
    close(factors(optimizers[0]), factors(optimizers[1]))


def test_a_model_that_cannot_be_bound_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    with pytest.raises(KfactkError, match="strict=True"):
        kfactk.build(strict=True).bind(model)
    assert hooks(model) == 0
    F.cross_entropy(model(torch.randn(2, 4)), torch.tensor([0, 1])).backward()
