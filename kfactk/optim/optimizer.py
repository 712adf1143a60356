"""`Optimizer`: the flow of the stages behind the interface of `torch.optim.Optimizer`."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, overload

import torch
from torch import Tensor, nn

from kfactk.assignment import Assignment
from kfactk.capture.entries import FORWARD, entry_names
from kfactk.capture.forward import Forward
from kfactk.capture.hooks import ModelHooks
from kfactk.capture.support import supported_model
from kfactk.capture.torch_modes import full_precision
from kfactk.distributed.consistency import check_group, check_recipes
from kfactk.distributed.gathering import LoadOnAllRanks
from kfactk.errors import CaptureError, KfactkError, KfactkWarning
from kfactk.optim import checkpoint, gradients
from kfactk.optim.binding import check_blocks, controlled, fisher_pass_of, preconditioner_of
from kfactk.optim.control import Control
from kfactk.optim.direction import Direction
from kfactk.optim.groups import (
    ParameterGroups,
    check_averaged_once,
    check_group_numbers,
    trained,
    without_lr,
)
from kfactk.optim.loading import StateLoader
from kfactk.optim.masks import Masks
from kfactk.optim.metrics import MetricsRecorder
from kfactk.optim.micro_batches import MicroBatches
from kfactk.optim.nonfinite import NonFiniteGuard
from kfactk.optim.predicted import with_notes
from kfactk.optim.run import RunState, called_by_scaler
from kfactk.optim.settings import Settings
from kfactk.optim.shown import Removed, ShownState, flat_by_anchor
from kfactk.optim.update_rule import MODES, RuleStep, UnboundRule
from kfactk.optim.views import (
    BlockView,
    by_layer,
    by_parameter,
    conditions,
    intervals,
    preconditioned,
)
from kfactk.preconditioner.coverage import Coverage
from kfactk.preconditioner.coverage_watch import CoverageWatch
from kfactk.preconditioner.footprint import with_footprints
from kfactk.preconditioner.links import with_link
from kfactk.registry.registry import registry
from kfactk.stages import Layer
from kfactk.timing import Profile, StageTimer
from kfactk.validation import note_stage

Params = Iterable[nn.Parameter] | Iterable[dict[str, Any]] | Iterable[tuple[str, nn.Parameter]]


class Optimizer(torch.optim.Optimizer):
    """A recipe bound to a model. Made by `Recipe.bind`; used like any torch optimizer.

    `param_groups` hold `lr`, `damping`, `weight_decay` and the update rule's own options, so that
    schedulers and per-group values work. `state` shows the update rule's state of each parameter
    together with the curvature's, under keys that begin with `kfactk.`.

    `state` and `param_groups` are the update rule's own, so that it follows whatever is written or
    assigned to them. Where a parameter's whole entry is taken out of `state`, its layer is measured
    anew.

    Args:
        recipe: What to do.
        model: The module whose forwards are followed. `DistributedDataParallel` is unwrapped.
            `fully_shard` may be called before or after: where it replaces parameters, they are
            replaced in `param_groups`.
        params: Parameters or groups to train, as for any torch optimizer; `None` for all of the
            model's.
        scaler: The loop's `torch.amp.GradScaler`. Only a recipe that listens to the user's own
            backward (`empirical`) needs it. It works with `fully_shard`: what overflows in one
            rank's shard holds up all ranks.
        masks: By parameter name, what gradients are multiplied by, after preconditioning too.
            Where the mask is 0, the update rule gets no gradient: what it does by itself (weight
            decay, momentum of steps before the mask, rules that mix entries such as Muon) still
            changes the parameter. Masks are not saved.
        entry: The method of the model whose calls are its forwards, or a list of them.

    Raises:
        CombinationError: The model cannot be followed, or (with `strict`) a trained parameter has
            no block.
        OptionError: A group has a value that cannot work.

    Example:
        >>> import kfactk, torch
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = kfactk.build(lr=0.1, damping=0.01).bind(model)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> torch.nn.functional.cross_entropy(model(x), y).backward(); optimizer.step()
        >>> sorted(optimizer.layers[""].factors)
        ['A', 'G']
    """

    _control: Control | None = None

    def __init__(
        self,
        recipe: Settings,
        model: nn.Module,
        params: Params | None = None,
        *,
        scaler: Any = None,
        masks: Mapping[str, Tensor] | None = None,
        entry: str | Sequence[str] = FORWARD,
    ) -> None:
        self.recipe = recipe
        self._run = RunState()
        self._groups = ParameterGroups(recipe)
        self._inner: Any = UnboundRule()
        self._model = supported_model(model)
        multiplied = Masks(self._model, masks)
        entries = entry_names(self._model, entry)
        self._needs_scaler = scaler is None and not recipe.fisher.own_pass
        self._shown = ShownState()
        decay = recipe.weight_decay
        defaults = {"lr": recipe.lr, "damping": self._groups.damping, "weight_decay": decay}
        defaults |= {} if recipe.controller is None else recipe.controller.numbers
        super().__init__(model.parameters() if params is None else params, defaults)
        groups = self.param_groups
        with note_stage("update", recipe.update, "making the optimizer"):
            self._inner = recipe.update.make(groups, lr=recipe.lr, weight_decay=decay)
        self._inner.param_groups = groups
        options = tuple(self._inner.defaults)
        self.defaults = {**self._inner.defaults, **defaults}
        self._timer = StageTimer()
        self._preconditioner = pre = preconditioner_of(
            recipe, self._model, self._groups.by_parameter, self._timer
        )
        self._index()
        self._guard = NonFiniteGuard(self._inner, pre, recipe.max_skipped)
        check_recipes(recipe.shared(), pre.communicator)
        check_group(model, trained(self.param_groups), pre.communicator)
        pre.blocks.adopt(pre.blocks.current())
        self._recorder = MetricsRecorder(
            recipe.tracker if pre.rank == 0 else None,
            recipe.summary() | pre.placement.summary(),
            self._timer,
        )
        manual = recipe.observe == "manual"
        self._fisher_pass = fisher_pass_of(recipe, pre, scaler)
        self._watch = CoverageWatch(pre.survey)
        self._hooks = ModelHooks(self._model, self, evaluation=manual, entries=entries)
        try:
            check_blocks(pre, self._groups.by_parameter, recipe, masks or ())
            locate = self._fisher_pass.reader.locate
            self._control = controlled(
                recipe, self._model, pre, locate, groups, self.defaults, scaler
            )
        except KfactkError:
            self.close()
            raise
        self._micro_batches = MicroBatches(
            self._fisher_pass, self._control, self._timer, manual=manual
        )
        self._direction = Direction(
            recipe, pre, multiplied, self._groups, self._recorder, self._timer
        )
        self._rule_step = RuleStep(self._inner, recipe, self._control, self._recorder, self._timer)
        self._loader = StateLoader(recipe, self._model, pre, self._inner, options)
        self._look_for_losses()
        self._expect_forward()

    # --------------------------------------------------------------------------------- reading

    @property
    def layers(self) -> Mapping[str, BlockView]:
        """The preconditioned layers by name, for reading curvature, and for products with it."""
        pre = self._preconditioner
        self._index()
        self._forget_removed()
        return {
            block.name: BlockView(
                block,
                float(self._groups.by_parameter[id(block.layer.anchor)]["damping"]),
                pre.placement,
                pre.communicator,
            )
            for block in pre.blocks.current()
        }

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return int(self._step)

    @property
    def _step(self) -> Tensor:
        return self._run.step

    @property
    def counters(self) -> dict[str, int]:
        """Number of skipped batches and failed decompositions; may wait for the device."""
        self._guard.read()
        pre = self._preconditioner
        return {
            "skipped_batches": pre.skipped_batches,
            "failed_decompositions": pre.failed_decompositions,
        }

    @property
    def placement(self) -> Assignment:
        """Which rank does what, and why; prints as a table."""
        return self._preconditioner.placement.assignment

    @property
    def moved_bytes(self) -> dict[str, float]:
        """Bytes that this rank has sent or received for curvature since bind, by their kind."""
        return dict(self._preconditioner.communicator.moved)

    def coverage(self) -> Coverage:
        """Return which parameters are preconditioned now, by which block, or why not."""
        self._index()
        pre, blocks = self._preconditioner, self._preconditioner.blocks.current()
        found = pre.survey.coverage(self._groups.by_parameter)
        found = with_footprints(found, blocks, averages=pre.averages)
        found = with_link(found, self.recipe.link, self.recipe.link_name, blocks)
        return with_notes(found, self.recipe, blocks)

    def fisher_product(
        self, tensors: Mapping[str, Tensor], *, strict: bool = True
    ) -> dict[str, Tensor]:
        """Return `F v` for v given by parameter name.

        Parameters of a layer that are left out count as zero.

        Args:
            tensors: v, each with the shape, the device and the dtype of its parameter (float32,
                too, where that is a half precision).
            strict: Refuse names of parameters without a block. With `False` they are skipped, and
                missing from the answer.

        Raises:
            OptionError: A name belongs to no parameter or (with `strict`) to one without a block,
                or a tensor is not like its parameter.
            KfactkError: No curvature has been measured yet.
        """
        views = self.layers
        grouped = by_layer(views, tensors, self._model, strict=strict)
        found = {name: views[name].fisher_product(group) for name, group in grouped.items()}
        return by_parameter(views, found)

    def precondition(
        self, tensors: Mapping[str, Tensor], *, strict: bool = True
    ) -> dict[str, Tensor]:
        """Return `P v = (F + damping I)^-1 v`, likewise.

        Where the recipe has a link, P is corrected by it. It then answers for all layers that the
        link joins with those of v.

        Args:
            tensors: As for `fisher_product`.
            strict: Likewise.

        Raises:
            OptionError: As for `fisher_product`.
            KfactkError: No curvature has been measured yet.
        """
        views = self.layers
        grouped = by_layer(views, tensors, self._model, strict=strict)
        return by_parameter(views, preconditioned(views, grouped, self._preconditioner.links))

    # ------------------------------------------------------------------------------- observing

    def observe(self, **batch: Any) -> None:
        """Count the last forward, with `observe="manual"`; otherwise do nothing.

        Call it between a forward and its backward.

        Args:
            **batch: What the likelihood asks for by name (labels, masks, sample weights), besides
                the model's own arguments.

        Raises:
            CaptureError: Curvature is due, and no forward was made since the last call.
        """
        if self.recipe.observe == "manual" and self._layers_to_follow() is not None:
            self._micro_batches.observe(batch, self.steps)

    def record(self, **metrics: Tensor | float) -> None:
        """Hand metrics (loss, accuracy) to the tracker, with those of the next recorded step."""
        if self._control is None or not self._control.repeating:
            self._recorder.add(metrics)

    def profile(self) -> AbstractContextManager[Profile]:
        """Time the stages of the steps inside a `with` block; see `Profile`.

        Example:
            >>> import kfactk, torch
            >>> optimizer = kfactk.build().bind(torch.nn.Linear(3, 2))
            >>> with optimizer.profile() as profile:
            ...     pass
            >>> print(profile)
            no steps
        """
        return self._recorder.profiled(self)

    def _begin_forward(self) -> Sequence[Layer] | None:
        """Return the layers to follow; see `kfactk.capture.hooks.ForwardListener`."""
        layers = self._layers_to_follow()
        if layers is not None and self._control is not None:
            self._control.begin_forward()
        return layers

    def _layers_to_follow(self) -> Sequence[Layer] | None:
        """Return them; none where a controller alone is interested in the forward."""
        if Control.running_again:
            return [] if self._control is not None and self._control.repeating else None
        self._follow_model()
        self._forget_removed()
        layers = self._preconditioner.plan_forward(self.steps)
        evaluating = self._control is not None and self._control.evaluating
        return [] if layers is None and evaluating else layers

    def _end_forward(self, forward: Forward) -> None:
        """Measure a followed forward, or keep it until `observe` is called."""
        if forward.output is not None or self.recipe.finds_output:
            self._micro_batches.take(forward, self.steps)

    def _expect_forward(self) -> None:
        """Prepare for the forwards of the next step."""
        due = self._preconditioner.expects_forward(self.steps)
        self._hooks.expect(due or self._control is not None)

    # -------------------------------------------------------------------------------- stepping

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step. `.grad` is left as it was found.

        Args:
            closure: Evaluates the model again and returns the loss, as for any torch optimizer. A
                controller needs one, and calls it once more after some steps, to compare the loss.

        Raises:
            CaptureError: Curvature is due, and a layer with a gradient gave no sample. Nothing has
                been changed.
            KfactkError: The optimizer was closed, or (`max_skipped`) too many batches in a row held
                NaN or inf.
            OptionError: A group has a momentum beside the recipe's first moment.
        """
        if self._run.closed:
            raise KfactkError(
                "this optimizer was closed, and has no hooks on the model any more. Bind the "
                "recipe again to go on."
            )
        self._hooks.reset()
        if self._needs_scaler and self._preconditioner.needs_gradients() and called_by_scaler():
            raise CaptureError(
                "a GradScaler takes this step, and the Fisher stage measures your own backward, "
                "whose gradients it has scaled. Give it to bind: recipe.bind(model, "
                "scaler=scaler). This step changed nothing."
            )
        loss: float | None = self._evaluate(closure)
        self._follow_model()
        self._groups.set_damping(self.steps)
        usual = self.defaults.get("momentum")
        check_averaged_once(self.param_groups, self.recipe.first_moment.decay, usual)
        devices = (parameter.device.type for parameter in trained(self.param_groups))
        with full_precision(devices), self._preconditioner.blocks.held(self._groups.by_parameter):
            self._look_for_losses()
            self._step_once(closure)
        return loss

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """Return the loss of a closure, and record it; `None` where there is none."""
        control, loss = self._control, None
        if control is not None and not (closure is None and without_lr(self.param_groups)):
            control.check(self.param_groups, closure=closure is not None)
        if closure is not None and control is not None:
            parameters = list(trained(self.param_groups))
            loss = control.evaluate(closure, parameters, self.steps)
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()
        if loss is not None:
            self.record(loss=loss)
        return loss

    def _step_once(self, closure: Callable[[], Any] | None) -> None:
        """Take the step: statistics, gradients, refresh, precondition, clip, update."""
        pre, recipe, known = self._preconditioner, self.recipe, self._groups.by_parameter
        removed = self._shown.removed(self.state)
        self._shown.hide(self.state)
        self._run.gathered = {}
        fault, allocated = "", False
        try:
            self._fisher_pass.finish()
            blocks = pre.blocks.current()
            decays = recipe.weight_decay_at == "gradient"
            measured = {block for block in blocks if block.of_gradient and decays}
            read = gradients.read(blocks, known, decayed=measured)
            allocated = pre.check(
                self.steps,
                read.matrices,
                idle=without_lr(self.param_groups),
                others=self._fisher_pass.reader.others,
            )
            if allocated:
                pre.allocate(read.matrices)
            else:
                pre.refresh(read.matrices)
                pre.measure_gradients(read.matrices, recipe.reduction)
            plain = read.matrices
            if decays and len(measured) < len(blocks):
                read = gradients.read(blocks, known, decayed=set(blocks))
            if pre.averages and not allocated:
                read = gradients.averaged(blocks, read, pre.average(read.matrices))
            replaced, pairs = self._direction.of(blocks, read, self.param_groups)
            pre.count_gradients(plain)
            recorded = self._recorder.due(self.steps)
            if recorded:
                self._recorder.add_norms(pairs)
            decision = None
            if self._control is not None and closure is not None and not allocated:
                dampings = self._control.dampings(self.steps, self.param_groups)
                replaced, decision = self._direction.decide(
                    self._control, blocks, read, replaced, dampings, self.param_groups, self.state
                )
            del pairs, plain, read
            given = [p.grad for p in trained(self.param_groups) if p.grad is not None]
            judged = [new for _, new in replaced]
            if decision is not None:
                judged.append(decision.values)
            verdict = self._guard.judge(given, judged, recorded=recorded)
            self._run.recorded, fault = verdict.recorded, verdict.fault
            if verdict.stepping:
                self._rule_step.take(verdict, replaced, decision, closure, self.steps)
        except BaseException:
            self._recorder.discard()
            pre.undo()
            self._end_step("", removed)
            if self.steps or self._inner.state:
                self._show_state()
            self._hooks.expect(True)  # the step may be tried again
            raise
        self._end_step(fault, removed)
        self._show_state()
        if not allocated:  # otherwise the step made empty state, for a checkpoint to be loaded
            self._run.step += 1
        self._expect_forward()
        if not allocated:
            self._report()
        self._guard.check(trained(self.param_groups))

    def _end_step(self, fault: str, removed: Removed) -> None:
        """Drop what the step gathered, and count it where it has a fault."""
        self._preconditioner.finish(fault)
        if self._control is not None:
            self._control.finish()
        self._micro_batches.clear()
        self._start_afresh(removed)

    def _report(self) -> None:
        """Record the metrics of the step just taken, and call the hook `kfactk_stepped`."""
        more: dict[str, Tensor | float] = {}
        if self._run.recorded:
            more |= conditions(self.layers, self._preconditioner.communicator)
            more |= intervals(self.layers)
        if self._recorder.due(self.steps - 1):
            group = self.param_groups[0]
            more |= {name: float(group[name]) for name in ("lr", "damping")}
            more |= {name: float(value) for name, value in self.counters.items()}
            for name, value in self.moved_bytes.items():
                more[f"bytes/{name}"] = value - self._run.reported_bytes.get(name, 0.0)
        found = self._recorder.finish(self.steps - 1, more)
        self._run.reported_bytes = self.moved_bytes
        registry().hook.kfactk_stepped(optimizer=self, step=self.steps - 1, metrics=found)

    # ------------------------------------------------------------------------ groups and state

    @property
    def defaults(self) -> dict[str, Any]:
        """What a group gets that does not say otherwise; the update rule's own."""
        defaults: dict[str, Any] = self._inner.defaults
        return defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._inner.defaults = defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups, which are the update rule's."""
        groups: list[dict[str, Any]] = self._inner.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._inner.param_groups = groups

    @property
    def state(self) -> defaultdict[Any, Any]:
        """The update rule's state by parameter, with curvature under `kfactk.*` keys."""
        state: defaultdict[Any, Any] = self._inner.state
        return state

    @state.setter
    def state(self, state: defaultdict[Any, Any]) -> None:
        self._inner.state = state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over attributes, as for any torch optimizer; the update rule takes its own."""
        shared = ("defaults", "state", "param_groups")
        rule = {name: state[name] for name in shared if name in state}
        super().__setstate__({k: value for k, value in state.items() if k not in rule})
        if rule:
            self._inner.__setstate__(rule)
            self._index()

    def __getattr__(self, name: str) -> Any:
        """Return `train` or `eval` of an update rule that has them, such as schedule-free ones."""
        if name in MODES and "_inner" in self.__dict__:
            return getattr(self._inner, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its own `lr`, `damping`, `weight_decay` or options of the rule."""
        own = isinstance(param_group, dict) and "damping" in param_group
        if isinstance(param_group, dict):
            check_group_numbers(param_group)
        if isinstance(self._inner, UnboundRule):
            super().add_param_group(param_group)
        else:
            self._inner.add_param_group(param_group)
        if self._control is not None:
            self._control.join(self.param_groups[-1], self.param_groups[0])
        self._groups.join(self.param_groups[-1], own=own)
        if not isinstance(self._inner, UnboundRule):
            self._index()

    def _follow_model(self) -> None:
        """Follow the model: parameters may have been replaced, and wrappers put around it."""
        self._index()
        check_group(self._model, trained(self.param_groups), self._preconditioner.communicator)

    def _index(self) -> None:
        """Note the group of each parameter, by the parameters and groups as they are now."""
        tracker = self._preconditioner.survey.tracker
        if replaced := tracker.follow(self.param_groups, self.state):
            self._shown.move(self.state, replaced)
        self._groups.index(self.param_groups)

    def _look_for_losses(self) -> None:
        """Warn where trained parameters have lost their block since the last look."""
        parameters = list(trained(self.param_groups))
        layers = self._preconditioner.blocks.current()
        if lost := self._watch.look(parameters, any_layer=bool(layers)):
            warnings.warn(lost, KfactkWarning, stacklevel=7)

    def _show_state(self) -> None:
        blocks = self._preconditioner.blocks.current()
        self._shown.show(self.state, self.param_groups, blocks, self._step)

    def _forget_removed(self) -> None:
        """Between steps, start afresh what was taken out of `state`."""
        removed = self._shown.removed(self.state)
        if removed.parameters:
            self._start_afresh(removed)
            self._expect_forward()

    def _start_afresh(self, removed: Removed) -> None:
        """Forget the curvature of these blocks; an emptied state has taken no step."""
        if removed.blocks:
            self._preconditioner.forget(removed.blocks)
        if removed.everything:
            self._run.step = torch.zeros((), dtype=torch.int64)
        self._shown.forget(removed)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, as torch's own optimizers do; between steps only.

        Where ranks share the curvature this is the part of this rank.
        `torch.distributed.checkpoint` puts parts together. For one file, call
        `consolidate_state_dict` before.
        """
        self._guard.read()
        self._preconditioner.join()
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._index()
        with self._hidden() as shown:
            found: dict[str, Any] = self._inner.state_dict()
        if shown or int(self._step) or found["state"]:
            flat = flat_by_anchor(self._preconditioner.blocks.current())
            for key, tensors in self._run.gathered.items():
                flat.setdefault(key, {}).update(tensors)
            found = checkpoint.joined(found, self.param_groups, flat, self._step)
        for changing in self._optimizer_state_dict_post_hooks.values():
            changed = changing(self, found)
            found = found if changed is None else changed
        return found

    @contextlib.contextmanager
    def _hidden(self) -> Iterator[bool]:
        """Surround what the update rule does with its own state: curvature is not in it.

        Yields:
            Whether any was.
        """
        self._forget_removed()
        shown = self._shown.hide(self.state)
        try:
            yield shown
        finally:
            if shown:
                self._show_state()

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Bring what other ranks have of the curvature to one rank, until the next step.

        That rank's `state_dict()` is then the whole. Every rank calls it. Nothing moves in a single
        process, and where every rank has everything (placement `replicated`). What arrives is in
        the CPU's memory. Every rank has the update rule's state already; with `fully_shard` it
        stays in shards. The method is that of `torch.distributed.optim.ZeroRedundancyOptimizer`,
        and Lightning calls it by itself.

        Args:
            to: The rank whose `state_dict()` is to be whole, counted within the placement's process
                group; `None` for all ranks.

        Raises:
            OptionError: There is no such rank.

        Example:
            >>> import kfactk, torch
            >>> optimizer = kfactk.build().bind(torch.nn.Linear(3, 2))
            >>> optimizer.consolidate_state_dict()  # on every rank; then on rank 0:
            >>> saved = optimizer.state_dict()
        """
        pre = self._preconditioner
        pre.join()
        device = next((p.device for p in trained(self.param_groups)), torch.device("cpu"))
        blocks = pre.blocks.current()
        self._run.gathered = checkpoint.gathered(blocks, pre.communicator, to, device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state; that of the bare update rule (say, a plain Adam run) works too.

        A whole state can be loaded under any placement and on any number of ranks: each takes what
        it needs. Every rank calls it, and all of them load it, or none does.

        Raises:
            StateError: Its curvature or its update rule is not this model's and recipe's, or
                something of it is missing or damaged, on this rank or another. Everything is
                checked before anything is taken over: nothing has been changed.
            ValueError: The parameter groups have other sizes (torch's own check).
        """
        pre = self._preconditioner
        self._follow_model()
        pre.agree()
        with LoadOnAllRanks(pre.communicator) as load:
            state_dict = copy.copy(state_dict)
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                changed = hook(self, state_dict)
                state_dict = state_dict if changed is None else changed
            found = self._loader.checked(state_dict)
            with self._hidden(), checkpoint.all_or_nothing(self._inner, fits=found.fits):
                given = {"state": found.entries, "param_groups": found.groups}
                self._inner.load_state_dict({**state_dict, **given})
                load.agree(checkpoint.progress_of(int(found.step), found.curvature))
        self._run.step, self._run.gathered = found.step, {}
        self._micro_batches.clear()
        self._groups.replace(self.param_groups)
        pre.replace_states(found.curvature)
        if self._control is not None:
            self._control.forget()
        self._index()
        self._shown.hide(self.state)
        if state_dict["state"]:
            self._show_state()
        pre.check_ahead(self.steps)
        self._expect_forward()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __reduce__(self) -> NoReturn:
        raise KfactkError(
            "an optimizer cannot be copied or pickled: hooks bind it to its model. Save "
            "optimizer.state_dict(), and load it into recipe.bind(model) where it is wanted."
        )

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as for any torch optimizer."""
        if self._control is not None:
            self._control.clear()
            if self._control.repeating:
                super().zero_grad(set_to_none)
                return
        self._hooks.reset()
        self._fisher_pass.forget()
        self._forget_removed()
        super().zero_grad(set_to_none)

    def close(self) -> None:
        """Take all hooks off the model and close the tracker; may be called twice."""
        self._run.closed = True
        self._hooks.close()
        self._recorder.close()
        self._guard.read()
