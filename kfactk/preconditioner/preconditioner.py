"""`Preconditioner`: all blocks of one model, through the forwards and the end of each step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfactk.distributed.communicator import Communicator
from kfactk.distributed.packing import TensorSpec
from kfactk.errors import CaptureError, KfactkWarning
from kfactk.preconditioner import saved_block
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.block_set import BlockSet
from kfactk.preconditioner.coverage import ModelSurvey
from kfactk.preconditioner.damage import Damage
from kfactk.preconditioner.exchange import OverlappedReduction, broadcast_gradients
from kfactk.preconditioner.first_moment import FirstMoment
from kfactk.preconditioner.links import Links
from kfactk.preconditioner.pacing import Pacer
from kfactk.preconditioner.placement import BlockPlacement, device_of
from kfactk.preconditioner.plan import BlockPlan
from kfactk.preconditioner.planner import EMPTY, Planner
from kfactk.preconditioner.refresh import Refresh
from kfactk.preconditioner.rules import BlockRule
from kfactk.preconditioner.schedule import UpdateSchedule
from kfactk.preconditioner.state import READY, BlockState, part_of
from kfactk.samples import LayerCall, RowOrder, Samples, Statistic, working_dtype
from kfactk.stages import Layer, Link, Placement
from kfactk.statistics import (
    ReducedStatistic,
    drop_nonfinite,
    join_key,
    local_means,
    split_key,
)
from kfactk.timing import StageTimer
from kfactk.validation import (
    OtherParts,
    input_modified_message,
    layout_message,
    lost_message,
    mended_message,
    missing_samples_message,
    unseen_message,
)

UNSEEN = "unseen: it influences the output also past its own calls (unseen='plain')"
"""Reason in a coverage table."""
JOINS_NONE = (
    "the link joins no two layers of this model, so it changes nothing: "
    "print(recipe.coverage(model)) shows what is linked. Leave out the link, or choose curvatures "
    "that it can join"
)
"""Warning of a bind."""
OTHER_LAYERS = (
    "the saved state tells what another link measured, or this one of other layers than it joins "
    "now. It starts afresh"
)
"""Warning of a load."""


class Preconditioner:
    """The blocks of one model.

    In a forward: `plan_forward`, then `accumulate` for each layer. In a step, inside `blocks.held`:
    `check`, `refresh`, `measure_gradients`, `average`, `precondition`, `count_gradients`, `finish`.

    Args:
        model: The model.
        rules: Which stages treat which layers.
        placement: The placement stage.
        schedule: What is due when.
        factor_decay: Decay of the factors' running means, in [0, 1].
        lag: Steps between the beginning of a decomposition and its use.
        first_moment: How gradients are averaged before they are preconditioned.
        link: The link stage; `None` for none.
        exclude: Patterns of names of layers to leave alone.
        trained: Ids of the parameters that the optimizer trains; the caller keeps it current.
        timer: Times the stages.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Sequence[BlockRule],
        placement: Placement,
        *,
        schedule: UpdateSchedule,
        factor_decay: float,
        trained: Container[int],
        lag: int = 0,
        first_moment: FirstMoment | None = None,
        link: Link | None = None,
        exclude: Sequence[str] = (),
        timer: StageTimer | None = None,
    ) -> None:
        self.timer = StageTimer() if timer is None else timer
        self.communicator = Communicator(placement.process_group, placement.wire_dtype)
        self.placement = BlockPlacement(placement, self.communicator, schedule)
        self.overlapped = OverlappedReduction(self.communicator, self.placement)
        self.survey = ModelSurvey(model, rules, exclude)
        self.blocks = BlockSet(self.survey, self.placement, trained, self.timer)
        self.links = Links(link, self.placement, self.communicator, self.timer)
        self.skipped_batches = 0
        self.failed_decompositions = 0
        self._first_moment = FirstMoment() if first_moment is None else first_moment
        self._planner = Planner(schedule, self.placement, lag)
        self._refresh = Refresh(
            self.placement,
            self.communicator,
            self.overlapped,
            self.timer,
            factor_decay,
            Pacer(self.placement, self.communicator, schedule),
        )
        self._followed: dict[Layer, tuple[Block, BlockPlan]] = {}
        self._plan = EMPTY
        self._planned: tuple[int, list[Block]] | None = None
        self._arrived: Mapping[str, ReducedStatistic] = {}
        self._num_terms: list[Tensor | float] = []
        self._forwards = 0
        self._unseen: list[Block] = []
        self._founded: set[Block] = set()
        self._before: dict[Block, dict[str, Any]] = {}
        self._later: list[Block] = []
        self._warned: set[str] = set()

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.communicator.rank

    # -------------------------------------------------------------------------------- forwards

    def plan_forward(self, step: int) -> list[Layer] | None:
        """Return the layers to follow in a forward that begins now.

        Returns:
            `None` where the forward is of no interest.
        """
        blocks = self.blocks.current()
        self._make_plan(step, blocks)
        followed = self._plan.followed
        self._followed |= {block.layer: (block, self._plan.plans[block]) for block in followed}
        interest = self._plan.of_interest and bool(blocks)
        return [block.layer for block in followed] if interest else None

    def _make_plan(self, step: int, blocks: list[Block]) -> None:
        if self._planned is None or self._planned != (step, blocks):
            self._planned = step, blocks
            self._plan = self._planner.plan(step, blocks)
            self.links.follow(blocks)
            self.links.plan(self._plan)

    def needs_gradients(self) -> bool:
        """Return whether any block is measured on gradients that layers get in a backward."""
        return any(
            block.moments_of_gradient or not block.inputs_suffice
            for block in self.blocks.current()
            if not block.of_gradient
        )

    def expects_forward(self, step: int) -> bool:
        """Prepare for a step between steps, and return whether it needs a forward."""
        self._make_plan(step, self.blocks.current())
        self.overlapped.prepare(self._plan)
        return self._plan.expects_forward

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Surround the passes over one forward: they count all together, or not at all."""
        blocks = list(self._plan.plans)
        savepoints = [block.state.savepoint() for block in blocks]
        forwards = self._forwards
        try:
            yield
        except BaseException:
            for block, savepoint in zip(blocks, savepoints, strict=True):
                block.state.rollback(savepoint)
            self.links.rollback()
            self._forwards = forwards
            raise

    @property
    def alone(self) -> bool:
        """Whether there is one rank."""
        return self.communicator.size == 1

    def begin_forward(self) -> None:
        """Note one forward."""
        self._forwards += 1

    def follows(self, layer: Layer) -> bool:
        """Return whether the calls of a layer are taken in this step."""
        return layer in self._followed

    def tells_examples_apart(self, layer: Layer) -> bool:
        """Return whether anything is measured for each example of a layer."""
        if layer not in self._followed:
            return False
        block = self._followed[layer][0]
        return block.tells_examples_apart or block in self.links.blocks

    def samples_of(self, layer: Layer, call: LayerCall) -> Samples:
        """Return one call of a layer that tells its examples apart, as samples."""
        return self._followed[layer][0].samples([call], num_terms=1.0, first=True)

    def unfold(self, layer: Layer, call: LayerCall, order: RowOrder) -> Sequence[LayerCall]:
        """Return a call by example; nothing where the layer's curvature cannot."""
        return self._followed[layer][0].unfold(call, order)

    def warn_of_output(self, message: str) -> None:
        """Warn of an output whose examples are not known."""
        self._warn("output", message)

    def warn_of_layout(self, faults: Mapping[Layer, str]) -> None:
        """Warn of all layers whose examples are not those of the output."""
        ordered = [layer for layer in self._followed if layer in faults]
        if ordered:
            paths = [layer.path for layer in ordered]
            self._warn("examples", layout_message([faults[layer] for layer in ordered], paths))

    def counts_terms(self) -> bool:
        """Return whether the number of likelihood terms in the user's gradient is needed."""
        return self._plan.counts_terms

    def count_terms(self, num_terms: Tensor | float) -> None:
        """Count the likelihood terms of a forward whose gradient is in `.grad`."""
        self._num_terms.append(num_terms)

    def drop_gathered(self, layers: Collection[Layer] | None = None) -> None:
        """Drop the calls of these layers (`None`: of all) that the step has taken so far."""
        for block in self.blocks.current():
            if layers is None or block.layer in layers:
                block.state.clear_pending()
        self.links.drop(layers)
        if layers is None:
            self._num_terms.clear()

    def accumulate(
        self,
        layer: Layer,
        calls: Sequence[LayerCall],
        num_terms: Tensor | float,
        *,
        first: bool,
        of: object,
    ) -> None:
        """Sum up the calls of one layer in one Fisher pass.

        Args:
            layer: One that `plan_forward` gave in this step.
            calls: Its calls, with gradients.
            num_terms: Number of likelihood terms of the forward.
            first: Whether this is the first pass over the forward.
            of: What tells the pass from others that are not at their end.
        """
        if layer not in self._followed:
            return
        block, plan = self._followed[layer]
        samples = block.accumulate(calls, num_terms, first, plan)
        self.links.take(of, block, samples, calls)

    def end_pass(self, of: object, num_terms: Tensor | float, *, last: bool = False) -> None:
        """Note that a pass over a forward is at its end.

        Args:
            of: As for `accumulate`.
            num_terms: Number of likelihood terms of the forward; 0 on later passes over it.
            last: Whether it is known to be the last one.
        """
        told = self.links.end_pass(of, num_terms)
        if told is not None:
            self._warn("remark", told)
        if last:
            self.links.commit()

    def accumulate_nothing(self, layers: Iterable[Layer], num_terms: Tensor | float) -> None:
        """Count the terms of one forward for followed layers that did not run in it."""
        for layer in layers:
            if layer in self._followed:
                block, plan = self._followed[layer]
                block.accumulate_nothing(num_terms, plan)

    def input_only(self) -> frozenset[str]:
        """Return the names of the followed layers that need no gradients in this step."""
        plans = self._plan.plans.items()
        return frozenset(block.name for block, plan in plans if plan.follows and not plan.passes)

    def needs_pass(self) -> bool:
        """Return whether this step needs the gradients of a Fisher pass."""
        return self._plan.passes

    def mark_seen(self, layers: Iterable[Layer]) -> None:
        """Note that these layers ran in a forward of which nothing counts."""
        for layer in layers:
            if layer in self._followed:
                self._followed[layer][0].state.seen += 1

    def leave(self, layers: Iterable[Layer]) -> None:
        """Follow these layers no more: their parameters go to the update rule as they are."""
        left = list(layers)
        for layer in left:
            self._followed.pop(layer, None)
        self.blocks.leave(left, UNSEEN)
        self._warn(
            "unseen",
            f"{unseen_message([layer.name for layer in left])}The update rule trains them by their "
            "plain gradient from now on",
        )

    def end_forward(self) -> None:
        """Let the sums of the forward leave, if this is all that every rank expects."""
        self.links.commit()
        self.overlapped.begin(self._plan)

    # -------------------------------------------------------------------------------- the step

    def check(
        self,
        step: int,
        gradients: Mapping[str, Tensor],
        *,
        idle: bool = False,
        others: OtherParts | None = None,
    ) -> bool:
        """Plan the step, and check that its statistics are sound, before anything changes.

        Args:
            step: Index of the step, from 0.
            gradients: By layer name, the gradient of each layer that has one.
            idle: Whether every learning rate is zero. Gradients that are zero are no data then.
            others: The parts of the model's output that no likelihood reads, for the message.

        Returns:
            Whether the step only allocates: it is idle, no layer was followed, and every gradient
            is zero.

        Raises:
            CaptureError: A layer is due and has a gradient, but gave no sample.
            CombinationError: The ranks do not plan the same.
        """
        blocks = self.blocks.current()
        self.agree(step)  # first: a rank that has begun other sums would wait for them
        self._arrived = self.overlapped.finish(set(blocks))
        if self.communicator.size > 1:  # plans follow from places
            self._planned = None
        self._make_plan(step, blocks)
        self._unseen = []
        measured = self._plan.measured
        if not measured:
            return False
        for block in measured:
            gradient = gradients.get(block.name) if block.of_gradient else None
            if gradient is not None and not (idle and not bool(gradient.any())):
                block.state.seen = 1
        changed = [block.name for block in measured if _input_changed(block)]
        seen = [float(block.state.seen) for block in measured]
        several = self._forwards != 1
        numbers = [*seen, float(several), float(bool(changed))]
        *passes, uneven, faults = self.communicator.total(numbers, device_of(blocks))
        if self.communicator.size > 1 and self._plan.followed:
            self.overlapped.expect_one_forward(not uneven)
        if changed:
            raise CaptureError(input_modified_message(changed[0]))
        if faults:
            raise CaptureError(
                "another rank found that a layer's input was modified in place after its forward. "
                "See the error of that rank."
            )
        missing = [block for block, count in zip(measured, passes, strict=True) if not count]
        return self._check_missing(missing, gradients, others) and idle if missing else False

    def _check_missing(
        self, missing: list[Block], gradients: Mapping[str, Tensor], others: OtherParts | None
    ) -> bool:
        """Check the layers that no rank has seen; see `check`."""
        silent = [
            block.name
            for block in missing
            if not self._plan.plans[block].waited_for
            and not block.of_gradient
            and block.name in gradients
            and bool(gradients[block.name].any())
        ]
        nonzero = any(bool(gradient.any()) for gradient in gradients.values())
        flags = [float(bool(silent)), float(nonzero)]
        silent_anywhere, nonzero_anywhere = self.communicator.total(flags, device_of(missing))
        if silent:
            some = any(block not in missing for block in self._plan.followed)
            raise CaptureError(missing_samples_message(silent, some=some, others=others))
        if silent_anywhere:
            raise CaptureError(
                "another rank has a gradient for a layer that gave no sample on any rank. See the "
                "error of that rank."
            )
        self._unseen = missing
        return len(missing) == len(self._plan.measured) and not nonzero_anywhere

    def agree(self, step: int | None = None) -> None:
        """Go on with the layers as they are now, if they are the same on all ranks.

        Args:
            step: Index of the step that begins, which must be the same too, as its periods; `None`
                between steps.

        Raises:
            CombinationError: They are not.
        """
        blocks = self.blocks.current()
        clock: tuple[object, ...] = ()
        if step is not None:
            dampings = ", ".join(f"{each:g}" for each in sorted({b.damping for b in blocks}))
            clock = step, *self._planner.schedule.periods(step), dampings
        self.blocks.check_ranks(blocks, self.communicator, clock)
        self.blocks.adopt(blocks)
        self.check_link()
        self.overlapped.retain(set(blocks))

    def check_link(self) -> None:
        """Check that every rank holds the layers that the link joins; refuse what cannot be joined.

        Raises:
            CombinationError: Other ranks hold a layer, or the link cannot join these layers.
        """
        self.links.follow(self.blocks.current())
        self.links.check_holders()
        if self.links.joins_none:
            self._warn("joins none", JOINS_NONE)

    def refresh(self, gradients: Mapping[str, Tensor]) -> None:
        """Reduce and average sums, decompose what is due, measure moments in the new basis.

        Args:
            gradients: By layer name, as matrices; some curvatures measure these.
        """
        self._before = {
            block: block.state.lasting(gradients_alone=not block.of_gradient)
            for block in self.blocks.current()
            if block.name in gradients and (block.of_gradient or self.averages)
        }
        plans = {block: plan for block, plan in self._plan.plans.items() if plan.due}
        if plans:
            self._run_refresh(plans, gradients)
        if beginning := [block for block, plan in self._plan.plans.items() if plan.begins]:
            self._refresh.begin(beginning)

    def undo(self) -> None:
        """Go back, in a step that failed, to what was before it where gradients alone are measured.

        These are there again when the step is tried again; the samples of a forward are not.
        """
        for block, lasting in self._before.items():
            block.state.undo(lasting)
            block.invalidate()

    def _run_refresh(
        self, plans: Mapping[Block, BlockPlan], gradients: Mapping[str, Tensor]
    ) -> None:
        for block in plans:
            block.invalidate()
        self._founded = {b for b, plan in plans.items() if plan.of_gradient and not b.state.ready}
        later = {b for b in plans if b.counts_next} - self._founded
        self.links.hand_over()
        self._later = [block for block in plans if block in later]
        self._take_gradients([block for block in plans if block not in later], gradients)
        assert self._planned is not None
        failures = self._refresh.run(plans, self._unseen, self._arrived, self._planned[0])
        for block in plans:
            if block.name in failures.reasons:
                self._report_failure(block, failures.reasons[block.name])
        if failures.mended:
            self.failed_decompositions += sum(map(bool, failures.mended.values()))
            self._warn("mended", mended_message(failures.mended))
        for failure in self.links.prepare([b for b, plan in plans.items() if plan.basis]):
            self.failed_decompositions += 1
            self._warn("prepared", failure)
        for block, plan in plans.items():
            plan.settle(block.state, seen=block not in self._unseen)

    def count_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Take the statistics of gradients that count from the next step on.

        Those that have made the first directions of a basis are measured in them. So the moments
        are of all gradients that a first moment is the mean of, and bound it.

        Args:
            gradients: By layer name, as matrices.
        """
        self._take_gradients(self._later, gradients)
        founding = {
            block: gradients[block.name]
            for block in self.blocks.current()
            if block in self._founded and block.turns_both_sides and not block.counts_next
            if block.name in gradients and _has_coordinates(block) and self._scale_due(block)
        }
        self._take_moments(founding, dict.fromkeys(founding, 1.0))
        for block in self._founded:
            if block.counts_next and block.name in gradients:
                saved_block.complete(block, averages=self.averages)

    def _take_gradients(self, blocks: Sequence[Block], gradients: Mapping[str, Tensor]) -> None:
        """Take the factors of these blocks' gradients into their means, where they are due."""
        sums: dict[str, Statistic] = {}
        for block in blocks:
            plan, gradient = self._plan.plans[block], gradients.get(block.name)
            if not (plan.of_gradient and plan.factors) or gradient is None:
                continue
            if self.placement.decomposed_here(block):
                with self.timer.timed("factors"):
                    found = block.factors_of_gradient(gradient)
                mine = {key: each for key, each in found.items() if self._keeps(block, key)}
                sums |= _named(block, drop_nonfinite(mine, block.state.nonfinite))
        averages = _by_block(local_means(sums))
        for block in blocks:
            if block.name in averages:
                block.update_factors(averages[block.name], self._refresh.factor_decay)

    def _keeps(self, block: Block, key: str) -> bool:
        """Return whether this rank keeps the factor of a key, "factor.NAME"."""
        name = key.removeprefix("factor.")
        return self.rank in self.placement.factor_workers(block.name, name)

    def _report_failure(self, block: Block, reason: str) -> None:
        self.failed_decompositions += 1
        fallback = (
            "the last good decomposition stays in use"
            if block.state.ready
            else ("its plain gradient is used until the next decomposition")
        )
        self._warn("decomposition", f"layer {block.name!r}: {reason}; {fallback}")

    def measure_gradients(self, gradients: Mapping[str, Tensor], reduction: str) -> None:
        """Measure the moments of the user's own gradient, for bases that want these.

        Blocks whose factors are of the gradient too take it as it is, and count no terms. Where it
        alone has made the directions of both sides, it is diagonal there but for rounding, which is
        no divisor: it is measured after the step.

        Args:
            gradients: By layer name, as matrices.
            reduction: "mean" or "sum": how the user's loss reduces over likelihood terms.
        """
        blocks = self.blocks.current()
        num_terms = 0.0
        if self._plan.counts_terms:
            local = sum(self._num_terms, start=0.0)
            [num_terms] = self.communicator.total([float(local)], device_of(blocks))
        means, terms = dict[Block, Tensor](), dict[Block, Tensor | float]()
        for block in blocks:
            gradient = gradients.get(block.name)
            if gradient is None or not _has_coordinates(block):
                continue
            if block.of_gradient:
                later = block.counts_next or block.turns_both_sides
                if self._scale_due(block) and not (later and block in self._founded):
                    means[block], terms[block] = gradient, 1.0
            elif num_terms:
                means[block] = gradient / num_terms if reduction == "sum" else gradient
                terms[block] = num_terms
        self._take_moments(means, terms)

    def _scale_due(self, block: Block) -> bool:
        """Return whether the moments of a block of gradients are due."""
        return block in self._plan.plans and self._plan.plans[block].scale

    def _take_moments(
        self, means: Mapping[Block, Tensor], terms: Mapping[Block, Tensor | float]
    ) -> None:
        """Take the moments of gradients into the running means of their blocks.

        Args:
            means: The mean gradient of each block.
            terms: Number of likelihood terms that it is the mean over.
        """
        sums: dict[str, Statistic] = {}
        for block, mean in means.items():
            with self.timer.timed("scale"):
                found = block.gradient_moments(mean, terms[block])
                sums |= _named(block, drop_nonfinite(found, block.state.nonfinite))
        averages = _by_block(local_means(sums))
        for block in means:
            block.update_moments(averages.get(block.name, {}))

    @property
    def averages(self) -> bool:
        """Whether gradients are averaged before they are preconditioned."""
        return self._first_moment.decay > 0

    def average(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the running means of the gradients, which are preconditioned in their place.

        Args:
            gradients: By layer name, `[..., d_out, d_in]`.
        """
        found = dict(gradients)
        for block in self.blocks.current():
            if block.name in gradients and not self._only_founded(block):
                found[block.name] = block.average(gradients[block.name], self._first_moment)
        return found

    def _only_founded(self, block: Block) -> bool:
        """Return whether the gradient of this step makes the block's first basis, and no more."""
        return block in self._founded and block.counts_next

    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the preconditioned gradients; the plain one while a layer has no statistics.

        Args:
            gradients: By layer name, `[..., d_out, d_in]`, equal on all ranks.

        Returns:
            The same names, without layers whose gradient is missing on the rank that holds them.
        """
        blocks = self.blocks.current()
        ready = [block for block in blocks if block.ready]
        moved = [block for block in ready if not self.placement.everywhere(block.name)]
        names = {block.name for block in ready}
        found = {
            name: gradient.clone() if self.averages else gradient  # a mean stays as it is
            for name, gradient in gradients.items()
            if name not in names
        }
        if moved:
            specs = {
                block.name: TensorSpec(
                    self.placement.gradient(block.name), working_dtype(block.layer.anchor.dtype)
                )
                for block in moved
            }
            found |= broadcast_gradients(
                moved, specs, gradients, self.placement, self.communicator, device_of(blocks)
            )
        solved = self.links.solved(gradients)
        for block in ready:
            if block.name in solved:
                found[block.name] = gradients[block.name]
            elif block not in moved and block.name in gradients:
                found[block.name] = block.solve(gradients[block.name])
        for block in self._founded:
            if block.name in found and block.counts_next:
                found[block.name] = torch.zeros_like(found[block.name])
        found = self.links.correct(gradients, found)
        return {name: found[name] for name in gradients if name in found}

    @property
    def due(self) -> bool:
        """Whether this step changes anything that is kept, or gathers anything for it."""
        return self._plan.due

    def nonfinite(self) -> bool:
        """Return whether a batch of this rank gave statistics that are not finite."""
        flags = [flag for block in self.blocks for flag in block.state.nonfinite]
        return bool(flags) and bool(torch.stack([flag.to(flags[0].device) for flag in flags]).any())

    def finish(self, fault: str = "") -> None:
        """End the step: count it where it has a `fault`, and drop what is pending."""
        if fault:
            self.skip({fault: 1})
        for block in self.blocks:
            block.state.clear_pending()
        self.blocks.prune()
        self.links.finish()
        self._num_terms.clear()
        self._forwards = 0
        self._followed, self._arrived = {}, {}
        self._founded, self._later, self._before = set(), [], {}
        self._plan, self._planned = EMPTY, None

    def skip(self, faults: Mapping[str, int]) -> None:
        """Count batches that were skipped, so many by each fault."""
        self.skipped_batches += sum(faults.values())
        for fault in faults:
            self._warn(fault, fault)

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{message} (said once)", KfactkWarning, stacklevel=2)

    # ----------------------------------------------------------------------------------- state

    def allocate(self, names: Container[str]) -> None:
        """Create the tensors of layers that have none, so that a checkpoint can be loaded."""
        for block in self.blocks.current():
            if block.name in names and not block.state.allocated:
                holds = self.placement.holds(block.name)
                saved_block.allocate(block, self._kept(block), holds=holds, averages=self.averages)
        self.links.allocate([b.name for b in self.blocks.current() if b.name in names])

    def loaded(
        self, saved: Mapping[int, Mapping[str, Tensor]], damage: Damage
    ) -> dict[str, BlockState]:
        """Return saved states by layer name, checked; nothing is taken over yet.

        Args:
            saved: Curvature entries by the id of the parameter that they are saved under.
            damage: Receives what is found when the tensors' values are read.

        Raises:
            StateError: One does not fit the model or the stages, or lacks what this rank needs.
        """
        states = {}
        for block in self.blocks.current():
            anchor, part = block.layer.anchor, block.layer.part
            if id(anchor) in saved and (READY in part_of(saved[id(anchor)], part) or not part):
                state = BlockState.from_flat(saved[id(anchor)], anchor.device, part, damage)
                holds = self.placement.holds(block.name)
                states[block.name] = saved_block.fitted(
                    block,
                    state,
                    self._kept(block),
                    holds=holds,
                    averages=self.averages,
                    damage=damage,
                )
                if not self._planner.lags:
                    state.ahead = None
        self.links.follow(self.blocks.current())
        if self.links.fit(states, damage):
            self._warn("link", OTHER_LAYERS)
        return states

    def _kept(self, block: Block) -> frozenset[str]:
        """Return the names of the factors of a block that this rank keeps."""
        workers = self.placement.factor_workers
        return frozenset(
            name for name in block.blank_factors() if self.rank in workers(block.name, name)
        )

    def join(self) -> None:
        """Wait for decompositions that are on their way, so that they can be saved."""
        for block in self.blocks.current():
            block.join()

    def forget(self, blocks: Iterable[Block]) -> None:
        """Start these blocks afresh, between forwards; each is measured as soon as it can be."""
        self.overlapped.drop()
        for block in blocks:
            block.replace_state(BlockState())
        self._planned = None

    def replace_states(self, states: Mapping[str, BlockState]) -> None:
        """Go on from these states; blocks without one start afresh."""
        self.overlapped.drop()
        for block in self.blocks:
            block.replace_state(states.get(block.name, BlockState()))
        self.links.loaded()
        self._num_terms.clear()
        self._forwards = 0
        self._plan, self._planned = EMPTY, None

    def check_ahead(self, step: int) -> None:
        """Warn where a loaded state lacks decompositions that were on their way when it was saved.

        Args:
            step: Number of steps that the state has taken.
        """
        lost = [
            block.name
            for block in self._planner.on_the_way(step, self.blocks.current())
            if block.state.ready and block.state.ahead is None
        ]
        if any(block.name in lost and self._refresh.decomposes(block) for block in self.blocks):
            self._warn("ahead", lost_message(lost))


def _named(block: Block, sums: Mapping[str, Statistic]) -> dict[str, Statistic]:
    """Return the sums of one block under names that tell it from others."""
    return {join_key(block.name, key): each for key, each in sums.items()}


def _by_block(averages: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return averages by the name of their block, and by their own names without their kind."""
    found: dict[str, dict[str, Tensor]] = {}
    for joined, value in averages.items():
        layer, key = split_key(joined)
        found.setdefault(layer, {})[key.partition(".")[2]] = value
    return found


def _has_coordinates(block: Block) -> bool:
    """Return whether moments of the user's gradient can be measured on this rank."""
    return block.moments_of_gradient and block.state.ready and bool(block.state.decomposition)


def _input_changed(block: Block) -> bool:
    versions = block.state.input_versions
    return any(inputs._version != version for inputs, version in versions)
