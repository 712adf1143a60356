"""Each law of recipes catches a stage, or an optimizer, that breaks it, and says so."""

from __future__ import annotations

import random
import types
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, ClassVar

import attrs
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import kfactk
from kfactk import Layer, Optimizer, Statistic, hookimpl
from kfactk.capture.hooks import ModelHooks
from kfactk.optim.update_rule import RuleStep
from kfactk.registry.registry import registry
from kfactk.testing import PipelineLaws
from kfactk.testing._support.models import Scale
from kfactk.testing._support.training import Recipes, flattened, identical
from kfactk.testing.pipeline import EXACT
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.clip.none import NoClip
from kfactk_stages.curvature.kfac import Kfac
from kfactk_stages.fisher.mc import MonteCarlo
from tests.kfactk.small import hooks
from tests.kfactk.testing.broken import caught, laws_of
from tests.kfactk.testing.broken_bases import Changed


def found(law: str, **recipe: Any) -> str:
    """What one law says of a recipe; nothing if it is kept."""
    return caught(PipelineLaws, None, law, recipe=recipe).get(law, "")


class Global(MonteCarlo):
    """Draws from the global generator."""

    def losses(
        self, view: Tensor, likelihood: Any, weights: Any, generator: torch.Generator
    ) -> Iterator[Tensor]:
        return super().losses(view, likelihood, weights, torch.default_generator)


class Peeking(MonteCarlo):
    """Draws from a copy of the global generator, which stays where it is."""

    def losses(
        self, view: Tensor, likelihood: Any, weights: Any, generator: torch.Generator
    ) -> Iterator[Tensor]:
        generator.set_state(torch.get_rng_state())
        return super().losses(view, likelihood, weights, generator)


class Gambling(NoClip):
    """Draws from the module random."""

    def clip(self, pairs: Any, dot: Any) -> Any:
        return [pair.preconditioned * random.random() for pair in pairs], torch.ones(())


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"fisher": Global()}, "training changed torch's global random state"),
        (
            {"fisher": Peeking()},
            "two runs of one recipe with different global random states are not the same: ",
        ),
        ({"clip": Gambling()}, "training changed the random state of the module random"),
    ],
)
def test_the_global_random_state_is_neither_read_nor_moved(
    recipe: dict[str, Any], says: str
) -> None:
    assert says in found("test_equal_seeds_give_equal_runs", **recipe)


class Forgetful(torch.optim.SGD):
    """Anneals by a count that is not in its state."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count = getattr(self, "count", 0) + 1
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad, alpha=0.01 / self.count)


class Unsaved(torch.optim.SGD):
    """Keeps in its state what only pickle can write."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["part"] = Fraction(1, 2)


def test_what_is_not_in_the_state_is_not_resumed() -> None:
    law = "test_a_resumed_run_is_the_uninterrupted_one"
    said = found(law, update=Forgetful, lr=0.01)
    assert "steps and resumed, the run has left the uninterrupted one at step" in said
    assert "continues bit for bit" in said
    assert "the state holds more than tensors, numbers and text" in found(law, update=Unsaved)


def test_a_step_count_that_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Optimizer.load_state_dict
    monkeypatch.setattr(
        Optimizer, "load_state_dict", lambda self, state: (load(self, state), self._step.zero_())
    )
    assert "and the resumed optimizer has 0" in found("test_a_resumed_run_is_the_uninterrupted_one")


class FirstFirst(NoClip):
    """Favours the layer that comes first."""

    def clip(self, pairs: Any, dot: Any) -> Any:
        return [
            pair.preconditioned * (2.0 if number == 0 else 1.0) for number, pair in enumerate(pairs)
        ], torch.ones(())


@pytest.mark.parametrize("layers", [None, ["hidden", "out"]], ids=["model's", "named"])
def test_a_link_may_want_the_order_of_the_model(layers: list[str] | None) -> None:
    link = {"name": "block_tridiagonal", "layers": layers}
    law = "test_the_order_of_layers_does_not_matter"
    assert not found(law, basis="kfac", fisher="empirical", link=link, clip="none")


def test_the_order_of_layers() -> None:
    said = found(
        "test_the_order_of_layers_does_not_matter", clip=FirstFirst(), update="sgd", lr=0.1
    )
    assert (
        "with its layers registered in another order (reversed) the model trains differently: "
        in said
    )


@attrs.frozen(kw_only=True)
class Counting(Kfac):
    """Takes one batch for `count` examples, whatever it has."""

    count: float = 1.0

    def input_factors(self, layer: Layer, samples: Any) -> dict[str, Statistic]:
        return self.counted(super().input_factors(layer, samples))

    def gradient_factors(self, layer: Layer, samples: Any) -> dict[str, Statistic]:
        return self.counted(super().gradient_factors(layer, samples))

    def counted(self, found: dict[str, Statistic]) -> dict[str, Statistic]:
        return {name: Statistic(each.total, self.count) for name, each in found.items()}


def test_batches_that_are_split_or_repeated() -> None:
    split = found(
        "test_accumulated_micro_batches_are_one_batch", curvature=Counting(), basis="kfac"
    )
    assert "a batch of 6 accumulated in micro-batches of [" in split
    assert "differs" in split
    repeated = found(
        "test_a_batch_several_times_over_is_one_batch", curvature=Counting(count=6.0), basis="kfac"
    )
    assert "with every example 2 times in its batch the model trains differently" in repeated


class Rough(torch.optim.SGD):
    """Halves gradients in place."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.mul_(0.5)
        super().step()


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    law = "test_gradients_stay_as_they_were"
    assert "step 0 changed a gradient: scale.factor differs" in found(law, update=Rough)
    run = RuleStep._run

    def keep(self: RuleStep, replaced: Any) -> None:
        run(self, replaced)
        for parameter, new in replaced:
            parameter.grad = new

    monkeypatch.setattr(RuleStep, "_run", keep)
    assert "after step 0 the gradient of conv.weight is another tensor" in found(law)


def test_forwards_that_must_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    law = "test_evaluation_changes_nothing"
    monkeypatch.setattr(ModelHooks, "_counts", lambda self: torch.is_grad_enabled())
    assert "with evaluation " in found(law)
    monkeypatch.setattr(ModelHooks, "_counts", lambda self: self.root.training)
    assert "does not require gradients" in found(law)


def test_closures(monkeypatch: pytest.MonkeyPatch) -> None:
    law, step = "test_a_closure_is_the_loop", Optimizer.step
    monkeypatch.setattr(
        Optimizer,
        "step",
        lambda self, closure=None: (closure and closure(), step(self, closure))[1],
    )
    assert "step(closure) trains differently from the loop" in found(law)
    monkeypatch.setattr(Optimizer, "step", lambda self, closure=None: (step(self, closure), 0.0)[1])
    assert "step(closure) returned 0.0, but the closure's loss is" in found(law)


class Ageing(KfacInverse):
    """Remembers how often it was asked."""

    calls = 0

    def operator(self, *given: Any) -> Changed:
        type(self).calls += 1
        scale = 1 + 1e-3 * self.calls
        right = super().operator(*given)
        return Changed(right, {"solve": lambda right, v: right.solve(v) * scale})


@attrs.frozen
class Diluted(NoClip):
    """Loses its strength when copied."""

    strength: float = 0.5
    hidden: float = attrs.field(default=0.5, eq=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Diluted:
        return Diluted(strength=self.strength if self.strength == 0.5 else 1.0, hidden=1.0)

    def clip(self, pairs: Any, dot: Any) -> Any:
        return [pair.preconditioned * self.hidden for pair in pairs], torch.ones(())


class Learning:
    """Changes its own options."""

    def __init__(self, limit: float = 1.0) -> None:
        self.limit = limit

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Learning({self.limit})"

    def clip(self, pairs: Any, dot: Any) -> Any:
        self.limit += 1
        return NoClip().clip(pairs, dot)


def test_copies_of_recipes() -> None:
    law = "test_a_copied_recipe_is_the_same"
    assert (
        "a recipe that is bound again trains differently: a stage remembers the first run"
        in found(law, basis=Ageing())
    )
    assert "a deep copy of the recipe differs from it" in found(law, clip=Diluted(strength=0.7))
    assert "a deep copy of the recipe trains differently" in found(law, clip=Diluted())
    assert "training changed the recipe" in found(law, clip=Learning())


class Clinging(Kfac):
    """Leaves a hook on every layer."""

    def samples(self, layer: Layer, calls: Any, *, num_terms: Any, first: bool) -> Any:
        layer.module.register_forward_hook(lambda *_: None)
        return super().samples(layer, calls, num_terms=num_terms, first=first)


def test_what_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    law = "test_nothing_is_left_behind"
    assert "after close() the model has the hooks {" in found(law, curvature=Clinging())
    kept: list[Optimizer] = []
    plugin = types.SimpleNamespace(kfactk_bound=hookimpl(lambda optimizer: kept.append(optimizer)))
    registry().register(plugin, name="keeper")
    try:
        assert "the optimizer stays alive after close()" in found(law)
    finally:
        registry().unregister(plugin)
    monkeypatch.setattr(Optimizer, "close", lambda self: self._hooks.close())
    assert (
        "step() after close() does not say that the optimizer was closed, but: curvature is due"
        in found(law)
    )


class Doubled(KfacInverse):
    """Half as long a step as it claims."""

    laws = frozenset({EXACT})

    def operator(self, *given: Any) -> Changed:
        right = super().operator(*given)
        return Changed(right, {"solve": lambda right, v: right.solve(v) / 2})


class Undamped(KfacInverse):
    """Knows no damping."""

    def decompose(self, name: str, matrix: Tensor, context: Any) -> dict[str, Tensor]:
        return super().decompose(name, matrix, attrs.evolve(context, damping=1e-6))


def test_a_quadratic() -> None:
    assert "one Newton step did not reach the least-squares solution" in found(
        "test_a_quadratic_is_solved_in_one_step", basis=Doubled()
    )
    sound = type("Sound", (KfacInverse,), {"laws": frozenset({EXACT})})()
    assert found("test_a_quadratic_is_solved_in_one_step", basis=sound) == ""
    law = "test_huge_damping_makes_a_gradient_step"
    assert "under huge damping the step is not lr / damping times the gradient" in found(
        law, basis=Undamped()
    )


class ConvolutionsOnly(Kfac):
    def unsupported(self, module: nn.Module) -> str | None:
        return "it is linear"


@pytest.mark.parametrize(
    ("law", "recipe", "why"),
    [
        (
            "test_a_quadratic_is_solved_in_one_step",
            {"basis": type("Modest", (KfacInverse,), {"laws": frozenset()})()},
            "does not claim",
        ),
        (
            "test_huge_damping_makes_a_gradient_step",
            {"curvature": ConvolutionsOnly()},
            "does not support nn.Linear",
        ),
        (
            "test_huge_damping_makes_a_gradient_step",
            {"curvature": "gradient", "basis": "ekfac", "clip": "none"},  # soap takes the layers
            "waives 'damped-inverse'",
        ),
        (
            "test_a_batch_several_times_over_is_one_batch",
            {"basis": {"name": "ekfac", "scale": "running"}},
            "independent examples",
        ),
        (
            "test_a_batch_several_times_over_is_one_batch",
            {"reduction": "sum"},
            "grows with its batch",
        ),
    ],
)
def test_a_law_that_a_recipe_does_not_claim_is_skipped_with_the_reason(
    law: str, recipe: dict[str, Any], why: str
) -> None:
    made = type("TestOne", (PipelineLaws,), {"recipe": recipe})()
    with pytest.raises(pytest.skip.Exception, match=why):
        getattr(made, law)()


def test_a_drawn_recipe_that_does_not_claim_a_law_is_passed_over() -> None:
    tried: list[Any] = []

    class Drawn(PipelineLaws):
        def recipes(self) -> Recipes:
            return st.sampled_from([{"reduction": "sum"}, {}]).map(
                lambda recipe: tried.append(recipe) or recipe
            )

    Drawn().test_a_batch_several_times_over_is_one_batch()
    assert {"reduction": "sum"} in tried


class Tokens(nn.Module):
    """Two terms an example, and an order that means something."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.body(x)}


class TestAnotherModelBatchAndLoss(PipelineLaws):
    """The members that authors may write."""

    recipe: ClassVar[dict[str, Any]] = {
        "likelihood": {"name": "gaussian", "class_axis": -1},
        "output": lambda output: output["scores"],
        "fisher": "empirical",
        "basis": "kfac",
        "update": "sgd",
        "factor_every": 1,
    }

    def model(self) -> nn.Module:
        return Tokens()

    def batch(self, generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
        inputs, targets = (
            torch.randn(examples, 2, width, generator=generator, dtype=torch.float64)
            for width in (3, 2)
        )
        return inputs, targets

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        return (output["scores"] - targets).square().sum(-1).mean() / 2


def test_the_recipe_is_named() -> None:
    laws = type("TestOne", (PipelineLaws,), {"recipe": {"update": "sgd"}})()
    assert laws.label() == "recipe {'update': 'sgd'}"
    assert laws.subject() == kfactk.build(update="sgd")
    assert len(laws_of(PipelineLaws)) == 13


def test_the_model_has_what_no_curvature_supports() -> None:
    laws = PipelineLaws()
    assert torch.equal(*(next(laws.fresh().parameters()) for _ in range(2)))
    assert [name for name, module in laws.fresh().named_modules() if isinstance(module, Scale)] == [
        "scale"
    ]
    optimizer = laws.subject().bind(model := laws.fresh())
    assert optimizer.coverage().plain == ("scale.factor",) or list(optimizer.coverage().plain) == [
        "scale.factor"
    ]
    assert hooks(model) == 2


def test_comparisons_tell_names_types_and_values_apart() -> None:
    nested = {"b": [1, {"c": torch.ones(1)}], "a": None}
    pairs = flattened(nested)
    assert [path for path, _ in pairs] == ["/a", "/b/0", "/b/1/c"]
    identical(pairs, pairs, "same")
    for other, says in (
        ({"b": [1, {"c": torch.ones(1)}]}, "different names"),
        ({"b": [2, {"c": torch.ones(1)}], "a": None}, "is 2, not 1"),
        (
            {"b": [1, {"c": torch.ones(1).double()}], "a": None},
            "is torch.float64, not torch.float32",
        ),
        ({"b": [1, {"c": torch.ones(1) + 1e-6}], "a": None}, "c differs"),
    ):
        with pytest.raises(AssertionError, match=says):
            identical(pairs, flattened(other), "two states")
