"""The flow of all layers: uses to samples, to factors, to decompositions and moments, to preconditioned gradients."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from kfactk.averages import RunningMean
from kfactk.blame import blaming, check_matrices, check_parted, check_statistics, naming, square
from kfactk.coverage import Survey
from kfactk.errors import CaptureError, DecompositionError, KfactkWarning, StateError
from kfactk.forward import overwritten, silent_message
from kfactk.layerstate import Kept, LayerState
from kfactk.linalg import mean_diagonal
from kfactk.plan import Need, Plan
from kfactk.samples import Samples, Statistic, Use, working_dtype
from kfactk.schedule import Due
from kfactk.stages import Basis, Coupling, Curvature, Decomposition, Layer, Placement
from kfactk.sums import add, guarded, keyed, means, prefixed, unkeyed

Damping = Callable[[Layer], float]


class Preconditioner:
    """Curvature, basis and placement at work on the layers of one model.

    Args:
        model: The model.
        curvature: Its stage.
        basis: Its stage.
        placement: Its stage.
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
        factor_decay: float,
        exclude: Sequence[str] = (),
        trained: Callable[[nn.Parameter], bool],
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.curvature, self.basis, self.placement = curvature, basis, placement
        self.factor_decay = factor_decay
        self.survey = Survey(model, curvature, exclude)
        self.states: dict[str, LayerState] = {}
        self.skipped_batches = 0
        self.failed_decompositions = 0
        self._trained, self._timed = trained, timed
        self._terms: list[Tensor | float] = []
        self._examples = 0
        self._plan: Plan | None = None
        self._unseen: list[str] = []
        self._warned: set[str] = set()

    def layers(self) -> list[Layer]:
        """The layers covered now. State whose parameters have changed (a bias frozen, say) is dropped."""
        layers = self.survey.layers(self._trained)
        for layer in layers:
            state = self.states.get(layer.name)
            if state is None or state.parameters != layer.parameters:
                self.states[layer.name] = LayerState(layer.parameters)
        return layers

    def plan(self, due: Callable[[], Due]) -> Plan:
        """What this step gathers; worked out once a step."""
        if self._plan is None:
            self._plan = self.foresee(due())
        return self._plan

    def foresee(self, now: Due) -> Plan:
        """What a step would gather that began now."""
        sampled = self.basis.moments_from == "samples"
        needs = {layer.name: Need.of(layer, self.states[layer.name], now, sampled=sampled) for layer in self.layers()}
        return Plan(needs, self.basis.moments_from == "gradient" and (now.scale or any(n.basis for n in needs.values())))

    def take(self, layer: Layer, uses: Sequence[Use], terms: Tensor | float, first: bool) -> None:
        """Sum up the uses of one layer in one pass; nothing of them is kept unless the basis is refreshed in this step."""
        if self._plan is None or layer.name not in self._plan.needs:
            return
        need, state = self._plan.needs[layer.name], self.states[layer.name]
        where = f"on layer {layer.name!r}"
        with blaming("curvature", self.curvature, where):
            samples = self.curvature.samples(layer, uses, terms=terms, first=first)
        state.seen += 1
        if need.scale and samples.examples != self._examples:
            self._warn(
                "examples",
                f"layer {layer.name!r} saw {samples.examples} examples where the model's output has {self._examples}: what is measured "
                "for each example (the scale of EKFAC) takes its rows for examples of their own. If dimension 0 of its input is not that "
                "of the examples, see the curvature's batch_dim, or leave the layer alone with exclude=",
            )
        if first:
            state.settle()
        sums: dict[str, Statistic] = {}
        if need.factors:
            with self._timed("factors"), blaming("curvature", self.curvature, where):
                factors = self.curvature.factors(layer, samples)
            sums |= prefixed("factor", check_statistics("curvature", self.curvature, where, factors, required=True))
        if need.scale and not need.basis:
            with self._timed("scale"):
                sums |= self._moments(layer, samples)
        elif need.scale:
            state.retained.append(samples)
            state.borrowed += [(use.inputs, use.inputs._version) for use in uses]
        add(state.staged, sums)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around the passes over one forward: what they give counts as a whole or, when one of them fails, not at all."""
        marks, terms = {name: state.mark() for name, state in self.states.items()}, len(self._terms)
        try:
            yield
        except BaseException:
            for name, mark in marks.items():
                self.states[name].back_to(mark)
            del self._terms[terms:]
            raise

    def count(self, terms: Tensor | float, examples: int) -> None:
        """Note the likelihood terms and the examples of one forward."""
        self._terms.append(terms)
        self._examples = examples

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
        for name in needs:
            if any(inputs._version != version for inputs, version in self.states[name].borrowed):
                raise CaptureError(overwritten(name))
        seen = {keyed(name, "seen"): Statistic(None, float(self.states[name].seen)) for name, need in needs.items() if need.follows}
        if not seen:
            return False
        total = self._reduced(seen)
        missing = [name for name in needs if (key := keyed(name, "seen")) in total and not float(total[key].count)]
        silent = [n for n in missing if not needs[n].waited_for and n in gradients and bool(gradients[n].any())]
        if silent:
            raise CaptureError(silent_message(silent))
        self._unseen = missing
        return len(missing) == len(seen) and not any(bool(gradient.any()) for gradient in gradients.values())

    def refresh(self, damping: Damping) -> None:
        """Reduce, average over time, decompose what is due, and measure the moments in the new basis."""
        if self._plan is None:
            return
        needs = self._plan.needs
        for name in needs:
            self.states[name].settle()
        sums = {keyed(name, key): value for name in needs for key, value in self.states[name].pending.items()}
        followed = any(need.follows for need in needs.values())
        averages = means(self._reduced(sums)) if followed else {}
        with self._timed("factors"):
            self._average(needs, averages, "factor")
        previous: dict[str, Kept] = {}
        try:
            with self._timed("basis"):
                for name, need in needs.items():
                    if need.basis and name not in self._unseen:
                        previous[name] = self.states[name].keep()
                        self._decompose(need.layer, damping(need.layer))
            with self._timed("scale"):
                self._average(needs, averages, "moment")
                if previous:
                    self._measure(needs, previous)
        except BaseException:  # moments stay together with the basis they were measured in
            for name, kept in previous.items():
                self.states[name].put_back(kept)
            raise
        self._plan.settle(self.states, self._unseen)

    def measure_gradients(self, gradients: Mapping[str, Tensor], reduction: str) -> None:
        """Moments of the user's own gradient, for bases that want these.

        Args:
            gradients: By layer name, the gradient as a matrix.
            reduction: "mean" or "sum": how the user's loss reduces over likelihood terms.
        """
        if self._plan is None or not self._plan.counts_terms:
            return
        local = sum(self._terms, start=0.0)
        terms = self._reduced({"terms": Statistic(None, local)})["terms"].count
        if not float(terms):
            return
        for name, gradient in gradients.items():
            state = self.states[name]
            if state.ready:
                mean = gradient / terms if reduction == "sum" else gradient
                with blaming("basis", self.basis, f"on layer {name!r}"):
                    found = self.basis.gradient_moments(state.decomposition, mean, terms)
                sums = prefixed("moment", check_statistics("basis", self.basis, f"on layer {name!r}", found, required=False))
                for key, value in means(guarded(sums, state.bad)).items():
                    _update(state.moments, key.removeprefix("moment."), value, self.basis.moment_decay)

    def precondition(self, layer: Layer, gradient: Tensor, damping: float) -> Tensor:
        """The preconditioned form of one layer's gradient `[..., d_out, d_in]`; the plain one while the layer has no statistics."""
        state = self.states[layer.name]
        if not state.ready:
            return gradient
        with blaming("basis", self.basis, f"on layer {layer.name!r}"):
            preconditioned = self.basis.precondition(gradient, state.decomposition, state.moment_values(), damping)
            if preconditioned.shape != gradient.shape:
                raise ValueError(f"preconditioned gradient of shape {tuple(preconditioned.shape)} for {tuple(gradient.shape)}")
        return preconditioned

    def finish(self, fault: str = "") -> None:
        """End the step: count what was skipped, the whole step where it has a `fault`, and forget what is pending."""
        bad = [flag for state in self.states.values() for flag in state.bad]
        if not fault and bad and bool(torch.stack([flag.to(bad[0].device) for flag in bad]).any()):
            fault = "a batch gave NaN or inf in its curvature statistics; such batches are skipped and counted"
        if fault:
            self.skipped_batches += 1
            self._warn(fault, fault)
        for state in self.states.values():
            state.clear_pending()
        self._terms.clear()
        self._plan = None

    def allocate(self, layers: Iterable[Layer], damping: Damping) -> None:
        """Create the tensors of layers that have none, without data, so that a checkpoint can be loaded into them."""
        for layer in layers:
            state = self.states[layer.name]
            if state.allocated:
                continue
            samples, sums = self._blank(layer)
            state.factors = {name: _empty(s) for name, s in sums.items()}
            self._decompose(layer, damping(layer))
            found = self._moments(layer, samples)
            state.moments = {key.removeprefix("moment."): _empty(s) for key, s in found.items()}

    def loaded(self, flat: Mapping[int, Mapping[str, Tensor]]) -> dict[str, LayerState]:
        """Saved states, by the id of each layer's weight, checked against the model and the stages; nothing is taken over yet.

        Raises:
            StateError: One does not fit.
        """
        states = {}
        for layer in self.layers():
            weight = layer.tensors()["weight"]
            if id(weight) in flat:
                state = LayerState.from_flat(layer.parameters, flat[id(weight)], weight.device)
                self._check_fit(layer, state)
                states[layer.name] = state
        return states

    def adopt(self, states: Mapping[str, LayerState]) -> None:
        """Go on from these states; layers without one start afresh."""
        self.states = dict(states)
        self._terms.clear()
        self._plan = None

    def _blank(self, layer: Layer) -> tuple[Samples, dict[str, Statistic]]:
        """A layer's samples and sums of a use on zeros: shapes without data."""
        with blaming("curvature", self.curvature, f"on layer {layer.name!r}"):
            samples = self.curvature.samples(layer, [self.curvature.blank(layer)], terms=1.0, first=True)
            return samples, self.curvature.factors(layer, samples)

    def _reduced(self, sums: Mapping[str, Statistic]) -> dict[str, Statistic]:
        with naming("placement", self.placement, "joining statistics"):
            return self.placement.reduce(sums)

    def _check_fit(self, layer: Layer, state: LayerState) -> None:
        _, sums = self._blank(layer)
        expected = {name: tuple(s.total.shape) for name, s in sums.items() if s.total is not None}
        found = {name: tuple(value.shape) for name, value in state.factor_values().items()}
        parts, wanted = _parts(state.decomposition), self._blank_parts(layer, sums)
        if found != expected or (parts and parts != wanted):
            raise StateError(
                f"the saved curvature of layer {layer.name!r} does not fit: factors {found} decomposed as {parts}, where this "
                f"recipe and model have {expected} and {wanted}. Bind the recipe it was saved with, or load "
                "only the update rule's part."
            )

    def _blank_parts(self, layer: Layer, sums: Mapping[str, Statistic]) -> list[str]:
        """What the basis makes of the layer's matrices, learnt from their corners: decomposing them whole would cost as much as a step."""
        where = f"on layer {layer.name!r}"
        with blaming("curvature", self.curvature, where):
            matrices = self.curvature.assemble(layer, {n: torch.zeros_like(s.total) for n, s in sums.items() if s.total is not None})
        with blaming("basis", self.basis, where):
            return _parts(self._decomposed({n: m[..., :1, :1] if square(m) else m for n, m in matrices.items()}, 1.0))

    def _decomposed(self, matrices: Mapping[str, Tensor], damping: float) -> dict[str, dict[str, Tensor]]:
        coupling = Coupling(damping, {name: mean_diagonal(matrix) for name, matrix in matrices.items() if square(matrix)})
        return {name: self.basis.decompose(name, matrices[name], coupling) for name in sorted(self.basis.requires)}

    def matrices(self, layer: Layer) -> dict[str, Tensor]:
        """The averaged factors of a layer as the matrices its basis decomposes."""
        where = f"on layer {layer.name!r}"
        with blaming("curvature", self.curvature, where):
            found = self.curvature.assemble(layer, self.states[layer.name].factor_values())
        return dict(check_matrices(self.curvature, where, found, self.basis.requires))

    def joined(self, layer: Layer, tensors: Mapping[str, Tensor | None]) -> Tensor:
        """Tensors shaped like a layer's parameters as its matrix, float32 at least; `None` counts as zeros."""
        named = {}
        for name, parameter in layer.tensors().items():
            tensor = tensors.get(name)
            tensor = torch.zeros_like(parameter) if tensor is None else tensor
            named[name] = tensor.detach().to(working_dtype(tensor.dtype))
        with blaming("curvature", self.curvature, f"on layer {layer.name!r}"):
            return self.curvature.matrix(layer, named)

    def parted(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        """Inverse of `joined`."""
        with blaming("curvature", self.curvature, f"on layer {layer.name!r}"):
            return check_parted(layer.tensors(), self.curvature.tensors(layer, matrix))

    def _decompose(self, layer: Layer, damping: float) -> None:
        state = self.states[layer.name]
        if not state.factors:
            return
        matrices = self.matrices(layer)
        try:
            with blaming("basis", self.basis, f"on layer {layer.name!r}"):
                state.decomposition = self._decomposed(matrices, damping)
        except DecompositionError as error:
            self.failed_decompositions += 1
            fallback = "the last good decomposition is kept" if state.decomposition else "its plain gradient is used until the next one"
            self._warn("decomposition", f"layer {layer.name!r}: {error}; {fallback}")

    def _measure(self, needs: Mapping[str, Need], previous: dict[str, Kept]) -> None:
        sums: dict[str, Statistic] = {}
        carried: dict[str, dict[str, RunningMean]] = {}
        for name, (old, _) in previous.items():
            state = self.states[name]
            for samples in state.retained if state.ready else ():
                if samples.first:
                    state.settle()
                add(state.staged, self._moments(needs[name].layer, samples))
            state.settle()
            sums |= {keyed(name, key): value for key, value in state.pending.items() if key.startswith("moment.")}
            if old and state.moments and state.decomposition is not old:
                with blaming("basis", self.basis, f"on layer {name!r}"):
                    there = self.basis.transport(state.moment_values(), old, state.decomposition)
                carried[name] = {n: RunningMean(there[n], mean.weight) for n, mean in state.moments.items() if n in there}
            state.retained.clear()
        averages = means(self._reduced(sums)) if self.basis.moments_from == "samples" else {}
        for name, moments in carried.items():
            self.states[name].moments = moments
        self._average(needs, averages, "moment")
        previous.clear()

    def _moments(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        where = f"on layer {layer.name!r}"
        with blaming("basis", self.basis, where):
            found = self.basis.moments(self.states[layer.name].decomposition, samples)
        return prefixed("moment", check_statistics("basis", self.basis, where, found, required=False))

    def _average(self, needs: Mapping[str, Need], averages: Mapping[str, Tensor], kind: str) -> None:
        for key, value in averages.items():
            layer, rest = unkeyed(key)
            if rest.startswith(f"{kind}.") and layer in needs:
                state = self.states[layer]
                target, decay = (state.factors, self.factor_decay) if kind == "factor" else (state.moments, self.basis.moment_decay)
                _update(target, rest.removeprefix(f"{kind}."), value, decay)

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{message} (said once)", KfactkWarning, stacklevel=2)


def _parts(decomposition: Decomposition) -> list[str]:
    """The parts by name and number of dimensions; their sizes follow from the factors'."""
    return sorted(f"{name}.{part} ({tensor.ndim}-D)" for name, parts in decomposition.items() for part, tensor in parts.items())


def _update(into: dict[str, RunningMean], name: str, value: Tensor, decay: float) -> None:
    into.setdefault(name, RunningMean()).update(value, decay)


def _empty(statistic: Statistic) -> RunningMean:
    return RunningMean(None if statistic.total is None else torch.zeros_like(statistic.total), 0.0)
