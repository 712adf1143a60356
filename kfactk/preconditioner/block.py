"""`Block`: one layer with its curvature, its basis and its state.

Every call of these two stages is made here, and what they return is checked. A stage that fails is
named in the error, together with the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from kfactk.assignment import Work
from kfactk.errors import CaptureError, CombinationError
from kfactk.operators import CurvatureOperator
from kfactk.preconditioner.ahead import Ahead, Parts
from kfactk.preconditioner.first_moment import FirstMoment
from kfactk.preconditioner.pace_state import LONGEST
from kfactk.preconditioner.plan import BlockPlan
from kfactk.preconditioner.state import BlockState
from kfactk.samples import LayerCall, RowOrder, Samples, Statistic, to_working_dtype
from kfactk.sides import groups_of_shape, is_diagonal, mean_of, side_of, with_sides
from kfactk.stages import (
    Basis,
    Curvature,
    Decomposition,
    FactorContext,
    GradientCurvature,
    Layer,
    Pace,
    Tensors,
)
from kfactk.statistics import RunningMean, add_prefix, add_sums
from kfactk.timing import StageTimer
from kfactk.validation import (
    attribute_errors,
    check_matrices,
    check_statistics,
    check_tensors,
    jet_message,
    square,
    stage_label,
)

"""For the name of each matrix, the tensors that its decomposition consists of."""


@attrs.define(eq=False)
class Block:
    """The curvature of one layer.

    Args:
        layer: The layer.
        curvature: Its curvature stage.
        basis: Its basis stage.
        timer: Times the stages.
        state: What is kept between steps.
        damping: tau of the current step.
        pace: What decides when it is due; `None` for the periods of the recipe.
    """

    layer: Layer
    curvature: Curvature
    basis: Basis
    timer: StageTimer = attrs.field(factory=StageTimer)
    state: BlockState = attrs.field(factory=BlockState)
    damping: float = 0.0
    pace: Pace | None = None
    _operator: tuple[float, CurvatureOperator] | None = None
    _flat: dict[str, Tensor] | None = None
    _input_factors: frozenset[str] | None = None
    _inputs_suffice: bool | None = None
    _stood_for: dict[str, str] | None = None
    _stand_ins: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict)
    _shape: tuple[int, ...] = ()

    @property
    def requires(self) -> frozenset[str]:
        """Names of the matrices that are decomposed: those that the basis requires, or stand-ins.

        Those that it reads beside them are not among these.

        Raises:
            CombinationError: The basis does not take the layer's stand-ins.
        """
        if self._stood_for is None:
            with attribute_errors("curvature", self.curvature, self._where):
                stand_ins = self.curvature.stand_ins(self.layer)
            if self.basis.reads & stand_ins.keys() and not self.basis.takes_stand_ins:
                bases = "'soap', 'shampoo' or 'kl'" if self.of_gradient else "'ekfac' or 'kfac'"
                raise CombinationError(
                    f"layer {self.name!r} has a side that is wider than the curvature's max_side, "
                    f"and {stage_label('basis', self.basis)} decomposes whole matrices alone. Use "
                    f"the basis {bases} there, leave the layer out with "
                    f"exclude=[{self.layer.path!r}], or set the curvature's max_side=None."
                )
            self._stand_ins = stand_ins
            needed = sorted(self.basis.requires)
            self._stood_for = {
                each: name for name in needed for each in stand_ins.get(name, (name,))
            }
        return frozenset(self._stood_for)

    def beside(self, name: str) -> tuple[str, ...]:
        """Return what the decomposition of a matrix reads beside it, stand-ins by their names.

        Args:
            name: One of `requires`.
        """
        if not self.basis.beside:
            return ()
        stood_for = name
        if name in self.requires and self._stood_for is not None:
            stood_for = self._stood_for[name]
        names = self.basis.beside.get(stood_for, ())
        return tuple(each for n in names for each in self._stand_ins.get(n, (n,)))

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    @property
    def sampled(self) -> bool:
        """Whether moments are measured on samples."""
        return self.basis.moments_from == "samples"

    @property
    def tells_examples_apart(self) -> bool:
        """Whether anything that is measured depends on which rows are of one example."""
        return self.sampled or self.curvature.tells_examples_apart

    @property
    def moments_of_gradient(self) -> bool:
        """Whether moments are measured on the user's gradient."""
        return self.basis.moments_from == "gradient"

    @property
    def of_gradient(self) -> bool:
        """Whether its factors are statistics of the user's gradient: no forward is followed."""
        return self.curvature.statistics_from == "gradient"

    @property
    def inputs_suffice(self) -> bool:
        """Whether inputs alone make all that its basis requires: no gradient is measured then.

        That can be for matrices of the input side only: A, its stand-ins, C and K.
        """
        if self._inputs_suffice is None:
            of_inputs = {name for name in self.requires if side_of(name) in ("A", "C", "K")}
            may = bool(of_inputs) and of_inputs == self.requires and not self.sampled
            self._inputs_suffice = may and bool(self.input_factors())
            if self._inputs_suffice:
                samples = self.blank_samples()
                with attribute_errors("curvature", self.curvature, self._where):
                    found = self.curvature.input_factors(self.layer, samples)
                    made = self.curvature.assemble(self.layer, zeros_of(found))
                self._inputs_suffice = self.requires <= set(made)
        return self._inputs_suffice

    @property
    def measures_nothing(self) -> bool:
        """Whether its basis measures nothing: it preconditions at once, and nothing is due."""
        return not self.basis.requires and self.basis.moments_from is None

    @property
    def ready(self) -> bool:
        """Whether the block can precondition, on this rank or another."""
        return self.state.ready or self.measures_nothing

    @property
    def turns_both_sides(self) -> bool:
        """Whether its basis has directions of its own for two sides, on this rank."""
        turned = {
            side_of(name)
            for name, parts in self.state.decomposition.items()
            if not is_diagonal(name) and any(map(_has_directions, parts.values()))
        }
        return len(turned) > 1

    @property
    def counts_next(self) -> bool:
        """Whether a gradient counts from the next step on."""
        return isinstance(self.curvature, GradientCurvature) and self.curvature.counts_next

    # ---------------------------------------------------------------------------- accumulating

    def accumulate(
        self, calls: Sequence[LayerCall], num_terms: Tensor | float, first: bool, plan: BlockPlan
    ) -> Samples:
        """Sum up the calls of the layer in one Fisher pass, and return them as samples.

        Nothing of the calls is kept unless `plan` refreshes the basis first.

        Args:
            calls: With their gradients, or zeros where the plan needs none.
            num_terms: Number of likelihood terms of the forward.
            first: Whether this is the first pass over the forward.
            plan: What is due.
        """
        samples = self.samples(calls, num_terms=num_terms, first=first)
        self.state.seen += 1
        self._gather(samples, plan)
        if plan.late:
            read = (each for call in calls for each in (call.inputs, *call.arguments.values()))
            self.state.input_versions += [(each, each._version) for each in read]
        return samples

    def accumulate_nothing(self, num_terms: Tensor | float, plan: BlockPlan) -> None:
        """Count the terms of a forward in which the layer did not run: its sums are zero."""
        with attribute_errors("curvature", self.curvature, self._where):
            call = self.curvature.blank(self.layer)
            empty = attrs.evolve(call, inputs=call.inputs[:0], gradient=call.gradient[:0])
            samples = self.curvature.samples(self.layer, [empty], num_terms=num_terms, first=True)
        self._gather(samples, plan)

    def _gather(self, samples: Samples, plan: BlockPlan) -> None:
        state = self.state
        if samples.first:
            state.commit()
        sums: dict[str, Statistic] = {}
        if plan.factors or plan.inputs:
            with self.timer.timed("factors"):
                sums |= self.factors(samples, inputs=plan.inputs, gradients=plan.factors)
        if plan.late:
            state.retained.append(samples)
        elif plan.scale:
            with self.timer.timed("scale"):
                sums |= self.moments(state.decomposition, samples)
        add_sums(state.staged, sums)

    def samples(
        self, calls: Sequence[LayerCall], *, num_terms: Tensor | float, first: bool
    ) -> Samples:
        """Return the layer's calls in one pass as samples.

        Raises:
            CaptureError: A call was given a jet, and the curvature would count its bias wrongly.
        """
        if not self.curvature.reads_ones and any(call.ones is not None for call in calls):
            label = stage_label("curvature", self.curvature)
            raise CaptureError(jet_message(self.layer.name, self.layer.path, label))
        with attribute_errors("curvature", self.curvature, self._where):
            return self.curvature.samples(self.layer, calls, num_terms=num_terms, first=first)

    def unfold(self, call: LayerCall, order: RowOrder) -> Sequence[LayerCall]:
        """Return a call by example; nothing where the curvature cannot."""
        with attribute_errors("curvature", self.curvature, self._where):
            return self.curvature.unfold(self.layer, call, order)

    def factors(
        self, samples: Samples, *, inputs: bool = True, gradients: bool = True
    ) -> dict[str, Statistic]:
        """Return sums and counts of the factors, as "factor.NAME".

        Args:
            samples: What the layer saw.
            inputs: Whether the factors made of inputs alone are wanted.
            gradients: Whether the others are.
        """
        found: dict[str, Statistic] = {}
        with attribute_errors("curvature", self.curvature, self._where):
            if inputs:
                found |= self.curvature.input_factors(self.layer, samples)
            if gradients:
                found |= self.curvature.gradient_factors(self.layer, samples)
        checked = check_statistics("curvature", self.curvature, self._where, found, required=True)
        return add_prefix("factor", checked)

    def factors_of_gradient(self, gradient: Tensor) -> dict[str, Statistic]:
        """Return the factors of a mini-batch gradient `[..., d_out, d_in]`, as "factor.NAME".

        The basis may weigh the gradient by the last decomposition, for each factor apart.
        """
        assert isinstance(self.curvature, GradientCurvature)
        last = self.state.decomposition if self.state.ready else {}
        with attribute_errors("basis", self.basis, self._where):
            weighed = self.basis.weighed(last, gradient)
            if strange := sorted(weighed.keys() - self.basis.requires):
                raise ValueError(f"weighs a gradient for {strange[0]!r}, which it does not require")
        with attribute_errors("curvature", self.curvature, self._where):
            found = self.curvature.weighed_factors(self.layer, gradient, weighed)
        checked = check_statistics("curvature", self.curvature, self._where, found, required=True)
        return add_prefix("factor", checked)

    def moments(self, decomposition: Decomposition, samples: Samples) -> dict[str, Statistic]:
        """Return sums and counts of the moments on samples, as "moment.NAME"."""
        with attribute_errors("basis", self.basis, self._where):
            found = self.basis.moments(decomposition, samples)
        checked = check_statistics("basis", self.basis, self._where, found, required=False)
        return add_prefix("moment", checked)

    def gradient_moments(self, gradient: Tensor, num_terms: Tensor | float) -> dict[str, Statistic]:
        """Return the moments of a mini-batch mean gradient, as "moment.NAME"."""
        decomposition, coordinates = self.state.decomposition, self.coordinates(gradient)
        with attribute_errors("basis", self.basis, self._where):
            if coordinates is None:
                found = self.basis.gradient_moments(decomposition, gradient, num_terms)
            else:
                found = self.basis.coordinate_moments(decomposition, coordinates, num_terms)
                self.state.turned.measured = gradient, coordinates
        checked = check_statistics("basis", self.basis, self._where, found, required=False)
        return add_prefix("moment", checked)

    # ------------------------------------------------------------------------------- averaging

    def update_factors(self, means: Tensors, decay: float) -> None:
        """Take the factors of one step into their running means.

        Args:
            means: Averages over the step's samples, by factor name.
            decay: Decay of the running means, in [0, 1]; rows are replaced.
        """
        row_factors = self.curvature.row_factors
        rows = {name: value for name, value in means.items() if name in row_factors}
        _update(self.state.factors, rows, 0.0)
        _update(self.state.factors, {n: v for n, v in means.items() if n not in rows}, decay)
        self.invalidate()

    def update_moments(self, means: Tensors) -> None:
        """Take the moments of one step into their running means."""
        _update(self.state.moments, means, self.basis.moment_decay)
        self.invalidate()

    def update_links(self, means: Tensors, decay: float) -> None:
        """Take what a link measured in one step into the running means."""
        _update(self.state.links, means, decay)
        self._flat = None

    def keep_prepared(self, tensors: Tensors) -> None:
        """Keep what a link has prepared, in place of what it had before."""
        self.state.prepared = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._flat = None

    def drop_links(self) -> None:
        """Drop what a link has measured and prepared."""
        self.state.links.clear()
        self.state.prepared.clear()
        self._flat = None

    def average(self, gradient: Tensor, moment: FirstMoment) -> Tensor:
        """Take a gradient into its running mean, and return what is preconditioned.

        A gradient that is not finite, or whose sum is not, leaves the mean as it is.

        Args:
            gradient: `[..., d_out, d_in]`.
            moment: How gradients are averaged.
        """
        self._flat = None
        state = self.state
        return state.turned.average(state.gradients, gradient, moment, self.coordinates)

    def coordinates(self, matrix: Tensor) -> Tensor | None:
        """Return a matrix in the coordinates that the basis has; `None` where it has none."""
        if not self.moments_of_gradient or not self.state.decomposition:
            return None
        with attribute_errors("basis", self.basis, self._where):
            return self.basis.coordinates(self.state.decomposition, matrix)

    def matrices(
        self, names: frozenset[str] | None = None, factors: Tensors | None = None
    ) -> dict[str, Tensor]:
        """Return averaged factors as matrices.

        Args:
            names: Those that are needed, and what the basis reads beside them; `None` for all that
                it requires.
            factors: The means; `None` for those that are kept.
        """
        factors = self.state.factor_values() if factors is None else factors
        with attribute_errors("curvature", self.curvature, self._where):
            found = self.curvature.assemble(self.layer, factors)
        names = self.requires if names is None else names
        required = names.union(*map(self.beside, names))
        return check_matrices(self.curvature, self._where, found, required)

    # ----------------------------------------------------------------------------- decomposing

    def decompose(
        self, damping: float, matrices: Tensors | None = None, diagonals: Tensors | None = None
    ) -> Parts:
        """Decompose matrices of the block; nothing is changed.

        Results are laid out row by row, as they are on a rank that receives them and after a load:
        the last bit of a product depends on the layout.

        Args:
            damping: tau.
            matrices: Those to decompose, and what is read beside them; `None` for all.
            diagonals: What `mean_diagonals` gives of all matrices; `None` for those given.

        Raises:
            DecompositionError: A matrix cannot be decomposed.
        """
        matrices = self.matrices() if matrices is None else matrices
        diagonals = mean_diagonals(matrices) if diagonals is None else diagonals
        last = self.state.decomposition if self.state.ready else {}
        made: Parts = {}
        with attribute_errors("basis", self.basis, self._where):
            for name in sorted(matrices.keys() & self.requires):
                names = self.beside(name)
                beside = {each: matrices[each] for each in names}
                others = {each: last[each] for each in names if each in last}
                context = FactorContext(damping, diagonals, last.get(name), beside, others)
                parts = self.basis.decompose(name, matrices[name], context)
                made[name] = {part: tensor.contiguous() for part, tensor in parts.items()}
        return made

    def adopt(self, decomposition: Parts) -> dict[str, RunningMean]:
        """Use a new decomposition from now on.

        Returns:
            The old moments, carried into the new basis.
        """
        state, carried = self.state, {}
        if state.decomposition and state.moments:
            with attribute_errors("basis", self.basis, self._where):
                there = self.basis.transport(
                    state.moment_values(), state.decomposition, decomposition
                )
            for name, mean in state.moments.items():
                if name in there:
                    carried[name] = RunningMean(there[name], mean.weight)
        state.leave_basis()
        state.decomposition = decomposition
        self.invalidate()
        return carried

    def begin(self, ahead: Ahead) -> None:
        """Keep a decomposition that is on its way, in place of an earlier one."""
        self.state.ahead, self._flat = ahead, None

    def take_ahead(self) -> Ahead | None:
        """Return the decomposition that was begun, and keep it no more."""
        ahead, self.state.ahead = self.state.ahead, None
        self._flat = None
        return ahead

    def join(self) -> None:
        """Wait for the decomposition that is on its way, so that it can be saved."""
        if self.state.ahead is not None:
            self.state.ahead.parts()
            self._flat = None

    # ----------------------------------------------------------------------------------- pacing

    @property
    def keeps(self) -> int:
        """With how many earlier refreshes its pace compares a new one; 0 without a pace."""
        return 0 if self.pace is None else self.pace.keeps

    def next_interval(self, changes: Sequence[float]) -> int:
        """Return the interval that the pace decides on.

        Args:
            changes: As for `Pace.interval`.
        """
        assert self.pace is not None
        with attribute_errors("pace", self.pace, self._where):
            found = self.pace.interval(changes, self.state.pace.known_intervals)
            good = isinstance(found, int) and not isinstance(found, bool)
            if not good or not 1 <= found <= LONGEST:
                raise ValueError(
                    f"interval gave {found!r}, and must give a whole number from 1 to {LONGEST}"
                )
        return found

    # --------------------------------------------------------------------------------- solving

    def operator(self, damping: float | None = None) -> CurvatureOperator:
        """Return F in the block's basis; kept until the block changes or damping does.

        Args:
            damping: tau; `None` for that of the current step.
        """
        damping = self.damping if damping is None else damping
        if self._operator is None or self._operator[0] != damping:
            state = self.state
            with attribute_errors("basis", self.basis, self._where):
                made = self.basis.operator(
                    state.decomposition, state.moment_values(), damping, LazyMatrices(self)
                )
            self._operator = damping, made
        return self._operator[1]

    def solve(self, gradient: Tensor, damping: float | None = None) -> Tensor:
        """Return the preconditioned form of a gradient `[..., d_out, d_in]`."""
        operator, coordinates = self.operator(damping), self.state.turned.coordinates(gradient)
        with attribute_errors("basis", self.basis, self._where):
            if coordinates is None:
                found = operator.solve(gradient)
            else:
                found = operator.solve_coordinates(coordinates)
            if found.shape != gradient.shape:
                raise ValueError(
                    f"solve gave the shape {tuple(found.shape)} for {tuple(gradient.shape)}"
                )
        return found

    def multiply(self, vector: Tensor, damping: float | None = None) -> Tensor:
        """Return `F v` for `[..., d_out, d_in]`."""
        operator = self.operator(damping)
        with attribute_errors("basis", self.basis, self._where):
            return operator.multiply(vector)

    def condition(self, damping: float | None = None) -> Tensor | None:
        """Return the condition number of the damped curvature, or a lower bound of it, if any."""
        operator = self.operator(damping)
        with attribute_errors("basis", self.basis, self._where):
            return operator.condition()

    # ---------------------------------------------------------------------------------- shapes

    def matrix(self, tensors: Tensors) -> Tensor:
        """Join tensors shaped like the layer's parameters into its matrix, float32 at least.

        Missing tensors count as zeros.
        """
        named = {}
        for name, parameter in self.layer.tensors().items():
            tensor = tensors.get(name)
            if tensor is None:
                tensor = torch.zeros(
                    parameter.shape, dtype=parameter.dtype, device=parameter.device
                )
            named[name] = to_working_dtype(tensor.detach())
        with attribute_errors("curvature", self.curvature, self._where):
            return self.curvature.matrix(self.layer, named)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's matrix, `[..., d_out, d_in]`."""
        if not self._shape:
            self._shape = tuple(self.matrix({}).shape)
        return self._shape

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the inverse of `matrix`."""
        with attribute_errors("curvature", self.curvature, self._where):
            found = self.curvature.tensors(self.layer, matrix)
            return check_tensors(self.layer.tensors(), found)

    def blank_samples(self) -> Samples:
        """Return samples of a call on zeros: shapes without data."""
        with attribute_errors("curvature", self.curvature, self._where):
            calls = [self.curvature.blank(self.layer)]
            return self.curvature.samples(self.layer, calls, num_terms=1.0, first=True)

    def blank_factors(self) -> dict[str, Statistic]:
        """Return the sums of factors without data; none where the basis measures nothing."""
        if self.measures_nothing:
            return {}
        if self.of_gradient:
            found = self.factors_of_gradient(self.matrix({}))
            return {key.removeprefix("factor."): each for key, each in found.items()}
        samples, suffice = self.blank_samples(), self.inputs_suffice
        with attribute_errors("curvature", self.curvature, self._where):
            measure = self.curvature.input_factors if suffice else self.curvature.factors
            return measure(self.layer, samples)

    def factor_rows(self, samples: Samples) -> tuple[Tensor, Tensor] | None:
        """Return the rows that A and G are sums over; `None` where they are no such sums."""
        with attribute_errors("curvature", self.curvature, self._where):
            return self.curvature.factor_rows(self.layer, samples)

    def blank_matrices(self) -> dict[str, Tensor]:
        """Return matrices of zeros, those that the basis requires."""
        return self.matrices(factors=zeros_of(self.blank_factors()))

    def blank_moments(self, decomposition: Decomposition) -> dict[str, Statistic]:
        """Return moments without data, by their names."""
        if not self.of_gradient:
            found = self.moments(decomposition, self.blank_samples())
            return {key.removeprefix("moment."): each for key, each in found.items()}
        with attribute_errors("basis", self.basis, self._where):
            return self.basis.gradient_moments(decomposition, self.matrix({}), 1.0)

    def input_factors(self) -> frozenset[str]:
        """Return the names of the factors made of inputs alone."""
        if self._input_factors is None:
            found: Mapping[str, Statistic] = {}
            if not self.of_gradient:
                samples = self.blank_samples()
                with attribute_errors("curvature", self.curvature, self._where):
                    found = self.curvature.input_factors(self.layer, samples)
            self._input_factors = frozenset(found)
        return self._input_factors

    def work(self, sums: Mapping[str, Statistic] | None = None) -> Work:
        """Return the layer's work, by its shapes.

        Matrices can be kept apart where each is made of the one statistic of its name.

        Args:
            sums: Its factors without data; `None` to make them.
        """
        blank = zeros_of(self.blank_factors() if sums is None else sums)
        matrices = self.matrices(factors=blank)
        shapes = {name: tuple(matrices[name].shape) for name in sorted(self.requires)}
        beside = {n: tuple(m.shape) for n, m in sorted(matrices.items()) if n not in shapes}
        apart = set(blank) == set(shapes) and all(
            self._alone(name, blank[name], shapes[name]) for name in shapes
        )
        return Work(
            self.name,
            shapes,
            tuple(self.matrix({}).shape),
            indivisible=not apart or bool(self.basis.beside),
            of_gradient=self.of_gradient,
            beside=beside,
            follows=self.basis.follows,
        )

    def _alone(self, name: str, factor: Tensor, shape: tuple[int, ...]) -> bool:
        try:
            found = self.curvature.assemble(self.layer, {name: factor})
        except Exception:  # a curvature that needs all its factors at once fails in its own way
            return False
        return self.requires & set(found) == {name} and tuple(found[name].shape) == shape

    def parts_of_corners(self, matrices: Tensors) -> list[str]:
        """Return what the basis makes of matrices of zeros, as `parts_of` names it.

        It decomposes a corner of each: whole ones would cost as much as a step.
        """
        corners = {n: m[..., :1, :1] if square(m) else m for n, m in matrices.items()}
        return parts_of(Block(self.layer, self.curvature, self.basis).decompose(1.0, corners))

    # ----------------------------------------------------------------------------------- state

    def flat(self) -> dict[str, Tensor]:
        """Return the lasting tensors under flat keys; the same dict until the block changes."""
        if self._flat is None:
            self._flat = self.state.flat(self.layer.part)
        return self._flat

    def invalidate(self) -> None:
        """Drop what was derived from the state: call it after every change of the state."""
        self._flat = self._operator = None

    def replace_state(self, state: BlockState) -> None:
        """Go on from another state."""
        self.state = state
        self.invalidate()

    @property
    def _where(self) -> str:
        return f"on layer {self.name!r}"


@attrs.frozen(eq=False)
class LazyMatrices(Mapping[str, Tensor]):
    """The averaged matrices of a block, each made when it is read."""

    block: Block

    def __getitem__(self, name: str) -> Tensor:
        return self.block.matrices(frozenset({name}))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.block.requires))

    def __len__(self) -> int:
        return len(self.block.requires)


def mean_diagonals(matrices: Tensors) -> dict[str, Tensor]:
    """Return `trace / dimension` of each square matrix and diagonal, and of sides in parts."""
    found = {
        name: mean_of(name, matrix)
        for name, matrix in matrices.items()
        if groups_of_shape(name, tuple(matrix.shape)) is not None
    }
    return with_sides(found, {name: matrices[name].shape[-1] for name in found})


def parts_of(decomposition: Decomposition) -> list[str]:
    """Return the parts by name and number of dimensions; sizes follow from the factors."""
    return sorted(
        f"{name}.{part} ({tensor.ndim}-D)"
        for name, parts in decomposition.items()
        for part, tensor in parts.items()
    )


def _has_directions(part: Tensor) -> bool:
    """Return whether a part of a decomposition is a matrix of more than one direction."""
    return square(part) and part.shape[-1] > 1


def zeros_of(sums: Mapping[str, Statistic]) -> dict[str, Tensor]:
    """Return zeros in the shape of the totals of statistics."""
    return {n: torch.zeros_like(s.total) for n, s in sums.items() if s.total is not None}


def _update(running: dict[str, RunningMean], means: Tensors, decay: float) -> None:
    for name, value in means.items():
        running.setdefault(name, RunningMean()).update(value, decay)
