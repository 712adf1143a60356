"""`Optimizer`: the flow of the stages behind the interface of `torch.optim.Optimizer`."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from kfactk.assignment import Assignment
from kfactk.capture.fisher_pass import FisherPass
from kfactk.capture.forward import Forward
from kfactk.capture.hooks import ModelHooks, weakly
from kfactk.capture.support import model_output, supported_model
from kfactk.capture.torch_modes import full_precision
from kfactk.distributed.consistency import check_group, check_recipes
from kfactk.distributed.sharding import ShardedProducts
from kfactk.errors import CaptureError, CombinationError, KfactkError, KfactkWarning
from kfactk.optim.checkpoint import StatefulOptimizer
from kfactk.optim.gradients import (
    NamedGradients,
    gradient_pairs,
    gradients_of,
    sharded,
    swapped_gradients,
)
from kfactk.optim.metrics import MetricsRecorder
from kfactk.optim.nonfinite import NonFiniteGuard
from kfactk.optim.profile import Profile
from kfactk.optim.views import BlockView, conditions, products
from kfactk.options import number_at, plain
from kfactk.preconditioner.coverage import Coverage
from kfactk.preconditioner.preconditioner import Preconditioner
from kfactk.stages import Layer
from kfactk.validation import attribute_errors, check_clipped, note_stage

if TYPE_CHECKING:
    from kfactk.recipe import Recipe

Params = Iterable[nn.Parameter] | Iterable[dict[str, Any]] | Iterable[tuple[str, nn.Parameter]]


class Optimizer(StatefulOptimizer):
    """A recipe bound to a model. Made by `Recipe.bind`; used like any torch optimizer.

    `param_groups` hold `lr`, `damping`, `weight_decay` and the update rule's own options, so schedulers and per-group values work;
    `state` shows the update rule's state of each parameter together with the curvature's, under keys that begin with `kfactk.`.

    Args:
        recipe: What to do.
        model: The module whose forwards are observed. `DistributedDataParallel` is seen through, and so is `fully_shard`, called before
            or after: parameters that it replaces are replaced in `param_groups`.
        params: Parameters or groups to train, as for any torch optimizer; `None` for all of the model's.
        scaler: The `torch.amp.GradScaler` of the loop; needed only where the recipe listens to the user's own backward (`empirical`).
            It is the one for `fully_shard`, too: what overflows in one rank's shard holds up all ranks.
        stepped: Called at the end of each step with `optimizer`, `step` and `metrics`, as the hook `kfactk_stepped` is.

    Raises:
        CombinationError: The model cannot be followed, or (with `strict`) a trained parameter has no block.
        OptionError: A group has a value that cannot work.

    Example:
        >>> import kfactk, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = kfactk.build(lr=0.1, damping=0.01).bind(model)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 3)), torch.randint(2, (8,)))
        >>> loss.backward(); optimizer.step()
        >>> sorted(optimizer.layers[""].factors)
        ['A', 'G']
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        params: Params | None = None,
        *,
        scaler: Any = None,
        stepped: Callable[..., Any] | None = None,
    ) -> None:
        self.recipe = recipe
        self._stepped = stepped
        self._ready, self._closed = False, False
        self._model = supported_model(model)
        self._step = torch.zeros((), dtype=torch.int64)
        self._brought = {}
        self._own_damping: list[bool] = []
        self._groups: dict[int, dict[str, Any]] = {}
        defaults = {
            "lr": recipe.lr,
            "damping": number_at("damping", recipe.damping, 0),
            "weight_decay": recipe.weight_decay,
        }
        super().__init__(model.parameters() if params is None else params, defaults)
        with note_stage("update", recipe.update, "making the optimizer"):
            self._inner = recipe.update.make(
                self.param_groups, lr=recipe.lr, weight_decay=recipe.weight_decay
            )
        self._inner.param_groups = self.param_groups
        self.defaults = {**self._inner.defaults, **self.defaults}
        me = weakref.ref(self)
        self._preconditioner = Preconditioner(
            self._model,
            recipe.curvature,
            recipe.basis,
            recipe.placement,
            calendar=recipe.calendar,
            factor_decay=recipe.factor_decay,
            exclude=recipe.exclude,
            timed=weakly(me, "_timed"),
            trained=lambda parameter, groups=self._groups: id(parameter) in groups,  # type: ignore[misc]
        )
        self._index()
        pre = self._preconditioner
        self._verdicts = NonFiniteGuard(self._inner, pre.ranks, pre.skipped)
        check_recipes(recipe.shared(), pre.ranks)
        check_group(model, self._trained(), pre.ranks)
        pre.places.extend(pre.layers())
        self._recorder = MetricsRecorder(
            recipe.tracker if pre.ranks.rank == 0 else None,
            lambda: recipe.summary() | pre.places.summary(),
        )
        self._observer = FisherPass(
            self._preconditioner,
            recipe.fisher,
            recipe.likelihood,
            recipe.output or model_output,
            reduction=recipe.reduction,
            loss_scale=(lambda: float(scaler.get_scale())) if scaler is not None else (lambda: 1.0),
        )
        self._micro_batch, self._recorded = 0, False
        self._told: dict[str, float] = {}
        self._pending: Forward | None = None
        self._capture = ModelHooks(
            self._model,
            weakly(me, "_follow"),
            weakly(me, "_forwarded"),
            evaluation=recipe.observe == "manual",
        )
        if recipe.strict and self.coverage().plain:
            self.close()
            raise CombinationError(
                f"strict=True, and no block preconditions {', '.join(self.coverage().plain)}. See print(recipe.coverage(model)) for the "
                "reasons; leave these out of params, choose a curvature that supports them, or drop strict."
            )
        if not self._preconditioner.layers():
            warnings.warn(
                "no layer is preconditioned: the update rule alone trains this model. See print(recipe.coverage(model)) for the reasons; "
                "are these parameters this model's?",
                KfactkWarning,
                stacklevel=3,
            )
        self._ready = True
        self._expect()

    # ------------------------------------------------------------------------------------------------------------ reading

    @property
    def layers(self) -> Mapping[str, BlockView]:
        """The preconditioned layers by name, for reading factors, decompositions, scales, and for products with them."""
        pre = self._preconditioner
        return {layer.name: BlockView(layer, self._damping(layer), pre) for layer in pre.layers()}

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return int(self._step)

    @property
    def counters(self) -> dict[str, int]:
        """What went wrong and was survived: skipped batches, failed decompositions. Waits for the device where it has yet to tell."""
        self._verdicts.read()
        pre = self._preconditioner
        return {
            "skipped_batches": pre.skipped_batches,
            "failed_decompositions": pre.failed_decompositions,
        }

    @property
    def placement(self) -> Assignment:
        """Which rank does what, and why: `strategy`, `reason`, and each layer's `shares`; prints as a table."""
        return self._preconditioner.places.assignment

    @property
    def moved_bytes(self) -> dict[str, float]:
        """Bytes that this rank has sent or received for curvature since bind, by what they were."""
        return dict(self._preconditioner.ranks.moved)

    def coverage(self) -> Coverage:
        """Which parameters are preconditioned now, by which block, or why not."""
        return self._preconditioner.survey.coverage(lambda parameter: id(parameter) in self._groups)

    def fisher_product(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`F v` for v given by parameter name; parameters of a layer that are left out count as zero.

        Raises:
            OptionError: A name belongs to no preconditioned parameter.
            KfactkError: No curvature has been measured yet.
        """
        return products(self.layers, tensors, BlockView.fisher_product)

    def precondition(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`P v = (F + damping I)^-1 v`, likewise."""
        return products(self.layers, tensors, BlockView.precondition)

    # ---------------------------------------------------------------------------------------------------------- observing

    def observe(self, **batch: Any) -> None:
        """With `observe="manual"`: count the last forward, between it and its backward. In the automatic mode a harmless no-op.

        Args:
            **batch: Whatever the likelihood asks for by name (labels, masks, sample weights), besides the model's own arguments.

        Raises:
            CaptureError: Curvature is due and no forward has been made since the last call.
        """
        if self.recipe.observe != "manual" or self._follow() is None:
            return
        forward, self._pending = self._pending, None
        if forward is None:
            raise CaptureError(
                "observe() was called, but the model has made no forward since the last step() or observe() that could count."
            )
        self._observe(forward, batch)

    def record(self, **metrics: Tensor | float) -> None:
        """Hand training figures (loss, accuracy, ...) to the tracker with those of the next recorded step."""
        self._recorder.add(metrics)

    def profile(self) -> AbstractContextManager[Profile]:
        """Time the stages of the steps inside: `with optimizer.profile() as profile:` and then `print(profile)`; see `Profile`."""
        return self._recorder.profiled(self)

    def _look(self) -> None:
        self._index()
        check_group(self._model, self._trained(), self._preconditioner.ranks)

    def _follow(self) -> list[Layer] | None:
        self._look()
        return self._preconditioner.plan(self.steps).follow()

    def _trained(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _expect(self) -> None:
        """Between steps: prepare for the next one's forwards."""
        self._capture.expect(self._preconditioner.plan_ahead(self.steps).expects())

    def _forwarded(self, forward: Forward) -> None:
        if self.recipe.observe == "manual":
            self._pending = forward
        else:
            self._observe(forward, {})

    def _observe(self, forward: Forward, batch: Mapping[str, Any]) -> None:
        with self._recorder.timed("fisher"):
            self._observer.observe(forward, batch, step=self.steps, micro_batch=self._micro_batch)
        self._micro_batch += 1

    def _timed(self, stage: str) -> AbstractContextManager[None]:
        return self._recorder.timed(stage)

    def _figures(self) -> dict[str, Tensor | float]:
        """What a tracker is told of this optimizer, besides norms, clip factor and seconds."""
        metrics: dict[str, Tensor | float] = {
            name: float(self.param_groups[0][name]) for name in ("lr", "damping")
        }
        metrics |= {name: float(value) for name, value in self.counters.items()}
        metrics |= {
            f"bytes/{name}": value - self._told.get(name, 0.0)
            for name, value in self.moved_bytes.items()
        }
        return metrics

    # ----------------------------------------------------------------------------------------------------------- stepping

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step. `.grad` is left as it was found.

        Args:
            closure: Evaluates the model again and returns the loss, as for any torch optimizer.

        Raises:
            CaptureError: Curvature is due, and a layer with a gradient gave no sample; nothing has been changed.
            KfactkError: The optimizer was closed.
        """
        if self._closed:
            raise KfactkError(
                "this optimizer was closed, and has no hooks on the model any more: bind the recipe again to go on."
            )
        self._capture.reset()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if loss is not None:
                self.record(loss=loss)
        self._look()
        with (
            full_precision(parameter.device.type for parameter in self._trained()),
            self._preconditioner.within_step(),
        ):
            self._step_once()
        return loss

    def _step_once(self) -> None:
        self._set_damping()
        self._brought = {}
        self._capture.expect(self._preconditioner.plan(self.steps).expects())
        fault = ""
        try:
            self._observer.finish()
            layers = [
                layer
                for layer in self._preconditioner.layers()
                if layer.tensors()["weight"].grad is not None
            ]
            raw, gradients = gradients_of(layers, self._preconditioner.blocks)
            allocating = self._preconditioner.check(gradients) and all(
                float(group["lr"]) == 0 for group in self.param_groups
            )
            if allocating:
                self._preconditioner.allocate(layers, self._damping)
            else:
                with self._changing():
                    self._preconditioner.refresh(self._damping)
                    self._preconditioner.measure_gradients(gradients, self.recipe.reduction)
            if self.recipe.weight_decay_at == "gradient":
                raw, gradients = gradients_of(
                    layers, self._preconditioner.blocks, partial(self._setting, "weight_decay")
                )
            fault = self._apply(layers, raw, gradients)
        except BaseException:
            self._recorder.forget()
            raise
        finally:
            self._preconditioner.finish(fault)
            self._pending, self._micro_batch = None, 0
        self._show_state()
        if not allocating:
            self._step += 1
        self._expect()
        if not allocating:
            pre = self._preconditioner
            found = conditions(self.layers, pre.ranks) if self._recorded else {}
            metrics = self._recorder.finish(self.steps - 1, lambda: self._figures() | found)
            self._told = self.moved_bytes
            if self._stepped is not None:
                self._stepped(optimizer=self, step=self.steps - 1, metrics=metrics)

    def _apply(
        self, layers: Sequence[Layer], raw: NamedGradients, gradients: Mapping[str, Tensor]
    ) -> str:
        """Precondition, clip, and let the update rule step on what came out, in place of the gradients; or say why it is not to."""
        with self._recorder.timed("precondition"):
            found = self._preconditioner.precondition(gradients, self._damping)
            parameters, whole = gradient_pairs(
                layers, raw, found, self._preconditioner.blocks, partial(self._setting, "lr")
            )
            pairs = sharded(parameters, whole)
        if self._recorder.due(self.steps):
            self._recorder.see(whole)
        del found, whole
        with self._recorder.timed("clip"):
            with attribute_errors("clip", self.recipe.clip, "on the preconditioned gradients"):
                answer = self.recipe.clip.clip(pairs, ShardedProducts(parameters))
            clipped, factor = check_clipped(
                self.recipe.clip, answer, [pair.preconditioned for pair in pairs]
            )
        self._recorder.add({"clip_factor": factor})
        given = [parameter.grad for parameter in self._trained() if parameter.grad is not None]
        due, recorded = self._preconditioner.plan(self.steps).due(), self._recorder.due(self.steps)
        verdict = self._verdicts.on(
            given, clipped, reading=due, recorded=recorded, spoiled=self._preconditioner.spoiled
        )
        self._recorded = verdict.recorded
        if verdict.stepping:
            with verdict.around:
                self._take_step(list(zip(parameters, clipped, strict=True)))
        return verdict.fault

    def _take_step(self, replaced: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Run the update rule with these gradients in place of the user's, and put the user's back."""
        there = swapped_gradients(
            self.param_groups, replaced, decayed=self.recipe.weight_decay_at == "gradient"
        )
        with (
            there,
            self._recorder.timed("update"),
            note_stage("update", self.recipe.update, "taking the step"),
        ):
            self._inner.step()

    def _damping(self, layer: Layer) -> float:
        return self._setting("damping", layer.tensors()["weight"])

    def _setting(self, name: str, parameter: nn.Parameter) -> float:
        return float(self._groups[id(parameter)][name])

    def _set_damping(self) -> None:
        for group, own in zip(self.param_groups, self._own_damping, strict=True):
            if callable(self.recipe.damping) and not own:
                group["damping"] = number_at("damping", self.recipe.damping, self.steps)
            number_at("damping of a parameter group", plain(group["damping"]), self.steps)

    # ------------------------------------------------------------------------------------------------- groups, state, end

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its own `lr`, `damping`, `weight_decay` or update-rule options if it has them."""
        for name in ("lr", "damping", "weight_decay"):
            if name in param_group:
                number_at(f"{name} of a parameter group", plain(param_group[name]), 0)
        own = "damping" in param_group
        super().add_param_group(param_group)
        self._own_damping.append(own)
        if self._ready:
            self._index()

    def _index(self) -> None:
        """Which group a parameter is in, by the parameters as they are now."""
        self._preconditioner.survey.originals.follow(self.param_groups, self._inner.state)
        self._groups.clear()
        self._groups.update(
            (id(parameter), group) for group in self.param_groups for parameter in group["params"]
        )

    def _prepare_places(self) -> None:
        self._expect()

    def _taken_over(self) -> None:
        self._index()
        self._pending, self._micro_batch = None, 0
        self._expect()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as for any torch optimizer."""
        self._capture.reset()
        super().zero_grad(set_to_none)

    def close(self) -> None:
        """Take all hooks off the model and close the tracker; may be called twice."""
        self._closed = True
        self._capture.close()
        self._recorder.close()
        self._verdicts.read()
