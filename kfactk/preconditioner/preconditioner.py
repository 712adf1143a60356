"""The flow of all layers: uses to samples, to factors, to decompositions and moments, to preconditioned gradients."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from kfactk.assignment import Work, Workload
from kfactk.distributed.communicator import Communicator
from kfactk.distributed.packing import TensorSpec
from kfactk.errors import CaptureError, KfactkWarning
from kfactk.operators import CurvatureOperator
from kfactk.preconditioner.block import Blocks, LazyMatrices, diagonals
from kfactk.preconditioner.coverage import CoveredLayer, ModelSurvey
from kfactk.preconditioner.exchange import OverlappedReduction, broadcast_gradients
from kfactk.preconditioner.fitting import checked_state
from kfactk.preconditioner.placement import BlockPlacement
from kfactk.preconditioner.plan import BlockPlan, Plan, Planner
from kfactk.preconditioner.refresh import Damping, Refresh
from kfactk.preconditioner.schedule import UpdateSchedule
from kfactk.preconditioner.state import BlockState
from kfactk.samples import LayerCall, Samples, Statistic, working_dtype
from kfactk.stages import Basis, Curvature, Layer, Placement
from kfactk.statistics import ReducedStatistic, RunningMean, add, finite_only, local_means
from kfactk.validation import overwritten, silent_message


class Preconditioner:
    """Curvature, basis and placement at work on the layers of one model.

    Args:
        model: The model.
        curvature: Its stage.
        basis: Its stage.
        placement: Its stage.
        calendar: What is due when.
        factor_decay: Decay epsilon of the factors' running means, in [0, 1].
        exclude: Patterns of names of layers to leave alone.
        trained: Tells whether a parameter is among those the optimizer trains.
        timed: Gives a context that times a stage.
    """

    def __init__(
        self,
        model: nn.Module,
        curvature: Curvature,
        basis: Basis,
        placement: Placement,
        *,
        calendar: UpdateSchedule,
        factor_decay: float,
        exclude: Sequence[str] = (),
        trained: Callable[[nn.Parameter], bool],
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.curvature, self.basis = curvature, basis
        self.blocks = Blocks(curvature, basis)
        self.ranks = Communicator(placement.process_group, placement.wire_dtype)
        self.places = BlockPlacement(placement, self.ranks, self.blocks, self._workload)
        self._agenda = Planner(calendar, self.blocks, self.places)
        self._early = OverlappedReduction(self.ranks, self.places.wanted)
        self._refresh = Refresh(
            self.blocks,
            self.places,
            self.ranks,
            self._early,
            factor_decay,
            timed,
            self._not_decomposed,
        )
        self._arrived: dict[str, ReducedStatistic] = {}
        self.survey = ModelSurvey(model, curvature, exclude)
        self.states: dict[str, BlockState] = {}
        self.skipped_batches = 0
        self.failed_decompositions = 0
        self._trained, self._timed = trained, timed
        self._num_terms: list[Tensor | float] = []
        self._examples = 0
        self._plan: Plan | None = None
        self._unseen: list[str] = []
        self._warned: set[str] = set()
        self._within: tuple[list[CoveredLayer], list[CoveredLayer]] | None = None
        self._foreseen: tuple[object, Plan] | None = None
        self._flat: dict[str, dict[str, Tensor]] = {}
        self._operators: dict[str, tuple[float, CurvatureOperator]] = {}

    @contextlib.contextmanager
    def within_step(self) -> Iterator[None]:
        """Around a step, in which the covered layers and their parameters stay the same: they are looked at once."""
        layers = self._look()
        self._within = layers, [layer.hold() for layer in layers]
        try:
            yield
        finally:
            self._within = None

    def layers(self) -> Sequence[Layer]:
        """The layers covered now. State whose parameters have changed (a bias frozen, say) is dropped."""
        return self._look() if self._within is None else self._within[1]

    def _look(self) -> list[CoveredLayer]:
        layers = self.survey.layers(self._trained)
        for layer in layers:
            state = self.states.get(layer.name)
            if state is None or state.parameters != layer.parameters:
                self.states[layer.name] = BlockState(layer.parameters)
                self._changed(layer.name)
        return layers

    def flat(self, layer: str) -> dict[str, Tensor]:
        """What lasts of a layer's state, under flat keys; the same tensors until they change."""
        if layer not in self._flat:
            self._flat[layer] = self.states[layer].flat()
        return self._flat[layer]

    def _changed(self, *layers: str) -> None:
        """Forget what was made of the states of these layers."""
        for name in layers:
            self._flat.pop(name, None)
            self._operators.pop(name, None)

    def plan(self, step: int) -> Plan:
        """What this step gathers; worked out once a step."""
        if self._plan is None:
            self._plan = self.plan_ahead(step)
        return self._plan

    def plan_ahead(self, step: int) -> Plan:
        """What a step of this number would gather that began now; worked out once for layers and states that stay as they are."""
        layers = self._look() if self._within is None else self._within[0]
        seen = step, [(layer.name, layer.parameters) for layer in layers]
        if self._foreseen is None or self._foreseen[0] != seen:
            self._foreseen = seen, self._agenda.plan(step, layers, self.states)
        return self._foreseen[1]

    def take(
        self, layer: Layer, calls: Sequence[LayerCall], num_terms: Tensor | float, first: bool
    ) -> None:
        """Sum up the uses of one layer in one pass; nothing of them is kept unless the basis is refreshed in this step."""
        if self._plan is None or layer.name not in self._plan.needs:
            return
        need, state = self._plan.needs[layer.name], self.states[layer.name]
        samples = self.blocks.samples(layer, calls, num_terms=num_terms, first=first)
        state.seen += 1
        if need.scale and samples.examples != self._examples:
            self._warn(
                "examples",
                f"layer {layer.name!r} saw {samples.examples} examples where the model's output has {self._examples}: what is measured "
                "for each example (the scale of EKFAC) takes its rows for examples of their own. If dimension 0 of its input is not that "
                "of the examples, see the curvature's batch_dim, or leave the layer alone with exclude=",
            )
        self._gather(need, state, samples)
        state.input_versions += [(call.inputs, call.inputs._version) for call in calls if need.late]

    def pass_by(self, taken: Container[str], num_terms: Tensor | float) -> None:
        """Count the likelihood terms of one forward for the layers that gave it no sample: what they add to the sums is nothing."""
        for name, need in (self._plan.needs if self._plan is not None else {}).items():
            if need.follows and name not in taken:
                self._gather(need, self.states[name], self.blocks.none(need.layer, num_terms))

    def _gather(self, need: BlockPlan, state: BlockState, samples: Samples) -> None:
        layer = need.layer
        if samples.first:
            state.settle()
        sums: dict[str, Statistic] = {}
        if need.factors or need.inputs:
            with self._timed("factors"):
                sums |= self.blocks.factors(
                    layer, samples, inputs=need.inputs, gradients=need.factors
                )
        if need.late:
            state.retained.append(samples)
        elif need.scale:
            with self._timed("scale"):
                sums |= self.blocks.moments(layer, state.decomposition, samples)
        add(state.staged, sums)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around the passes over one forward: what they give counts as a whole or, when one of them fails, not at all."""
        marks, num_terms = (
            {name: state.mark() for name, state in self.states.items()},
            len(self._num_terms),
        )
        try:
            yield
        except BaseException:
            for name, mark in marks.items():
                self.states[name].rollback(mark)
            del self._num_terms[num_terms:]
            raise

    def count(self, num_terms: Tensor | float, examples: int) -> None:
        """Note the likelihood terms and the examples of one forward."""
        self._num_terms.append(num_terms)
        self._examples = examples

    def inputs_only(self) -> frozenset[str]:
        """Names of the followed layers of which no gradient is wanted in this step."""
        needs = {} if self._plan is None else self._plan.needs
        return frozenset(name for name, need in needs.items() if need.follows and not need.passes)

    def wants_gradients(self) -> bool:
        """Whether this step wants the gradients of a Fisher pass."""
        return self._plan is not None and (
            self._plan.counts_terms or any(need.passes for need in self._plan.needs.values())
        )

    def leave(self) -> None:
        """Let the sums of the forward that was just measured leave for the other ranks, if this is all that is expected."""
        if self._plan is not None:
            self._early.begin(self._plan, self.states)

    def pass_over(self, names: Iterable[str]) -> None:
        """Note that these layers ran in a forward of which nothing counts."""
        for name in names:
            self.states[name].seen += 1

    def check(self, gradients: Mapping[str, Tensor]) -> bool:
        """Hold the one invariant against silent failure, before anything changes.

        Args:
            gradients: By layer name, the gradient of each layer that has one.

        Returns:
            Whether this is an allocating step: nothing was followed, and every gradient is zero.

        Raises:
            CaptureError: A layer due for samples has a gradient but gave none.
        """
        needs = self._plan.needs if self._plan is not None else {}
        self._unseen = []
        followed = [name for name, need in needs.items() if need.follows]
        if self._plan is None or not followed:
            return False
        self._arrived = self._early.finish(self._plan, self.states)
        changed = [
            name
            for name in followed
            if any(
                inputs._version != version for inputs, version in self.states[name].input_versions
            )
        ]
        seen = [float(self.states[name].seen) for name in followed]
        several = len(self._num_terms) != 1
        *passes, uneven, faults = self.ranks.total(
            [*seen, float(several), float(bool(changed))], self._device()
        )
        if self.ranks.size > 1:
            self._early.expect(not uneven)
        if changed:
            raise CaptureError(overwritten(changed[0]))
        if faults:
            raise CaptureError(
                "another rank found that a layer's input was modified in place after its forward; see what it says."
            )
        missing = [name for name, count in zip(followed, passes, strict=True) if not count]
        if not missing:
            return False
        silent = [
            name
            for name in missing
            if not needs[name].waited_for and name in gradients and bool(gradients[name].any())
        ]
        nonzero = any(bool(gradient.any()) for gradient in gradients.values())
        others_silent, others_nonzero = self.ranks.total(
            [float(bool(silent)), float(nonzero)], self._device()
        )
        if silent:
            raise CaptureError(silent_message(silent))
        if others_silent:
            raise CaptureError(
                "another rank has a gradient for a layer that gave no sample on any rank; see what it says."
            )
        self._unseen = missing
        return len(missing) == len(followed) and not others_nonzero

    def refresh(self, damping: Damping) -> None:
        """Reduce, average over time, decompose what is due, and measure the moments in the new basis."""
        if self._plan is None or not (
            due := [name for name, need in self._plan.needs.items() if need.due]
        ):
            return
        self._changed(*due)
        self._refresh.run(self._plan.needs, self.states, set(self._unseen), damping, self._arrived)
        self._plan.settle(self.states, self._unseen)

    def measure_gradients(self, gradients: Mapping[str, Tensor], reduction: str) -> None:
        """Moments of the user's own gradient, for bases that want these.

        Args:
            gradients: By layer name, the gradient as a matrix.
            reduction: "mean" or "sum": how the user's loss reduces over likelihood terms.
        """
        if self._plan is None or not self._plan.counts_terms:
            return
        local = sum(self._num_terms, start=0.0)
        [num_terms] = self.ranks.total([float(local)], self._device())
        if not num_terms:
            return
        for layer in self.layers():
            state, gradient = self.states[layer.name], gradients.get(layer.name)
            if state.ready and state.decomposition and gradient is not None:
                mean = gradient / num_terms if reduction == "sum" else gradient
                self._changed(layer.name)
                sums = finite_only(
                    self.blocks.gradient_moments(layer, state.decomposition, mean, num_terms),
                    state.bad,
                )
                for key, value in local_means(sums).items():
                    state.moments.setdefault(key.removeprefix("moment."), RunningMean()).update(
                        value, self.basis.moment_decay
                    )

    def precondition(self, gradients: Mapping[str, Tensor], damping: Damping) -> dict[str, Tensor]:
        """The preconditioned form of the layers' gradients; the plain one while a layer has no statistics.

        Args:
            gradients: By layer name, `[..., d_out, d_in]` each, equal on all ranks.
            damping: Of a layer.

        Returns:
            The same names, but for layers whose gradient is missing on the rank that holds them.
        """
        layers = {layer.name: layer for layer in self.layers()}

        def here(name: str) -> Tensor | None:
            return (
                self.preconditioned(layers[name], gradients[name], damping(layers[name]))
                if name in gradients
                else None
            )

        ready = [name for name in layers if self.states[name].ready]
        moved = (
            []
            if self.ranks.size == 1
            else [name for name in ready if not self.places.everywhere(name)]
        )
        result = {name: gradient for name, gradient in gradients.items() if name not in ready}
        if moved:
            dtypes = {name: working_dtype(layers[name].tensors()["weight"].dtype) for name in moved}
            specs = {name: TensorSpec(self.places.gradient(name), dtypes[name]) for name in moved}
            result |= broadcast_gradients(
                moved, specs, here, self.places, self.ranks, self._device()
            )
        for name in ready:
            if name not in moved and (tensor := here(name)) is not None:
                result[name] = tensor
        return {name: result[name] for name in gradients if name in result}

    def preconditioned(self, layer: Layer, gradient: Tensor, damping: float) -> Tensor:
        """The preconditioned form of one gradient, by a rank that holds the layer."""
        return self.blocks.preconditioned(layer, self.operator(layer, damping), gradient)

    def operator(self, layer: Layer, damping: float) -> CurvatureOperator:
        """F of one layer as an operator, by a rank that holds the layer; kept until its state changes."""
        made_for, operator = self._operators.get(layer.name, (None, None))
        if operator is None or made_for != damping:
            state = self.states[layer.name]
            matrices = LazyMatrices(self.blocks, layer, state.factor_values())
            operator = self.blocks.operator(
                layer, state.decomposition, state.moment_values(), damping, matrices
            )
            self._operators[layer.name] = damping, operator
        return operator

    def matrices(self, layer: Layer) -> dict[str, Tensor]:
        """The averaged factors of a layer as the matrices its basis decomposes, by a rank that keeps them all."""
        return self.blocks.matrices(layer, self.states[layer.name].factor_values())

    def spoiled(self) -> bool:
        """Whether a batch of this rank gave statistics that are not finite, and were left out."""
        bad = [flag for state in self.states.values() for flag in state.bad]
        return bool(bad) and bool(torch.stack([flag.to(bad[0].device) for flag in bad]).any())

    def finish(self, fault: str = "") -> None:
        """End the step: count it where it has a `fault`, and forget what is pending."""
        self.skipped({fault: 1} if fault else {})
        for state in self.states.values():
            state.clear_pending()
        self._num_terms.clear()
        self._arrived = {}
        self._plan = self._foreseen = None

    def skipped(self, faults: Mapping[str, int]) -> None:
        """Count batches that were skipped, so many by each fault."""
        self.skipped_batches += sum(faults.values())
        for fault in faults:
            self._warn(fault, fault)

    def allocate(self, layers: Iterable[Layer], damping: Damping) -> None:
        """Create the tensors of layers that have none, without data, so that a checkpoint can be loaded into them."""
        for layer in layers:
            state = self.states[layer.name]
            if state.allocated:
                continue
            self._changed(layer.name)
            samples, sums = self.blocks.blank(layer)
            rank, factor_workers = self.ranks.rank, self.places.factor_workers
            state.factors = {
                name: _empty(s)
                for name, s in sums.items()
                if rank in factor_workers(layer.name, name)
            }
            if self.places.holds(layer.name):
                blank = {
                    name: torch.zeros_like(s.total)
                    for name, s in sums.items()
                    if s.total is not None
                }
                matrices = self.blocks.matrices(layer, blank)
                state.decomposition = self.blocks.decompose(
                    layer, matrices, damping(layer), diagonals(matrices)
                )
                found = self.blocks.moments(layer, state.decomposition, samples)
                state.moments = {key.removeprefix("moment."): _empty(s) for key, s in found.items()}

    def loaded(self, flat: Mapping[int, Mapping[str, Tensor]]) -> dict[str, BlockState]:
        """Saved states, by the id of each layer's weight, checked against the model and the stages; nothing is taken over yet.

        Raises:
            StateError: One does not fit.
        """
        states = {}
        for layer in self.layers():
            weight = layer.tensors()["weight"]
            if id(weight) in flat:
                state = BlockState.from_flat(layer.parameters, flat[id(weight)], weight.device)
                states[layer.name] = checked_state(
                    layer, state, self.blocks, self.places, self.ranks.rank
                )
        return states

    def adopt(self, states: Mapping[str, BlockState]) -> None:
        """Go on from these states; layers without one start afresh."""
        self._early.drop()
        self.states = dict(states)
        self._flat.clear()
        self._operators.clear()
        self._num_terms.clear()
        self._plan = self._foreseen = None

    def _workload(self, works: tuple[Work, ...]) -> Workload:
        sampled, device = self.basis.moments_from == "samples", self._device()
        dtypes = [
            working_dtype(parameter.dtype).itemsize for parameter in self.survey.model.parameters()
        ]
        return Workload(
            works, *self._agenda.calendar.periods(0), sampled, max(dtypes, default=4), device.type
        )

    def _device(self) -> torch.device:
        return next(
            (parameter.device for parameter in self.survey.model.parameters()), torch.device("cpu")
        )

    def _not_decomposed(self, layer: str, reason: str) -> None:
        self.failed_decompositions += 1
        fallback = (
            "the last good decomposition is kept"
            if self.states[layer].ready
            else "its plain gradient is used until the next one"
        )
        self._warn("decomposition", f"layer {layer!r}: {reason}; {fallback}")

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{message} (said once)", KfactkWarning, stacklevel=2)


def _empty(statistic: Statistic) -> RunningMean:
    return RunningMean(None if statistic.total is None else torch.zeros_like(statistic.total), 0.0)
