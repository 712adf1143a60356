"""The refresh of curvature inside `step()`.

    sums of every rank -> factor workers: mean over time -> inverse workers: decompose
    -> gradient workers, and every rank that has samples: moments -> gradient workers

What is done, and in which order messages go, follows from the plan of the step. The plan is the
same on every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import attrs
import torch
from torch import Tensor

from kfactk.distributed.communicator import Communicator
from kfactk.distributed.messages import PendingMessage
from kfactk.distributed.packing import TensorSpec, sum_of_bits
from kfactk.errors import DecompositionError, KfactkError
from kfactk.preconditioner.ahead import Ahead, Parts
from kfactk.preconditioner.block import Block, mean_diagonals
from kfactk.preconditioner.exchange import OverlappedReduction, merged
from kfactk.preconditioner.pacing import Pacer
from kfactk.preconditioner.placement import BlockPlacement
from kfactk.preconditioner.plan import BlockPlan
from kfactk.samples import Statistic
from kfactk.sides import groups_of_shape, with_sides
from kfactk.statistics import ReducedStatistic, RunningMean, add_sums, join_key, means, split_key
from kfactk.timing import StageTimer

Plans = Mapping[Block, BlockPlan]
Diagonals = dict[str, Tensor]


@attrs.frozen
class Report:
    """What a rank tells of one matrix that it decomposed.

    Args:
        specs: The spec of each part.
        bits: A number for each part that tells different results apart.
    """

    specs: dict[str, TensorSpec] = attrs.field(hash=False)
    bits: tuple[int, ...]

    @classmethod
    def of(cls, parts: Mapping[str, Tensor]) -> Report:
        """Return the report on these parts."""
        return cls(_specs(parts), tuple(sum_of_bits(parts[name]) for name in sorted(parts)))


@attrs.frozen
class Failures:
    """What failed in a refresh, the same on every rank.

    Args:
        reasons: For each block that could not be decomposed on any rank, the reason.
        mended: Blocks that some ranks did not decompose as others did, and took from these; with
            the reason where one of them failed, else "".
    """

    reasons: dict[str, str] = attrs.field(factory=dict)
    mended: dict[str, str] = attrs.field(factory=dict)


@attrs.frozen(eq=False)
class Refresh:
    """Refreshes blocks.

    Args:
        placement: Who does what.
        communicator: Moves tensors between ranks.
        overlapped: Learns which sums there are.
        timer: Times the stages.
        factor_decay: Decay of the factors' running means, in [0, 1].
        pacer: Decides when paced blocks are due again.
    """

    placement: BlockPlacement
    communicator: Communicator
    overlapped: OverlappedReduction
    timer: StageTimer
    factor_decay: float
    pacer: Pacer

    def run(
        self,
        plans: Plans,
        unseen: Sequence[Block],
        arrived: Mapping[str, ReducedStatistic],
        step: int,
    ) -> Failures:
        """Average, decompose and measure what is due.

        Args:
            plans: What is due for each block.
            unseen: Blocks that no rank's samples reached.
            arrived: Sums that left before the step.
            step: Index of the step.

        Returns:
            What could not be decomposed.
        """
        for block in plans:
            block.state.commit()
        averages = self._averages(plans, unseen, arrived)
        seen = {block: plan for block, plan in plans.items() if block not in unseen}
        with self._timed("factors", any(plan.factors or plan.inputs for plan in plans.values())):
            self._update(seen, averages, "factor")
            self._update(seen, averages, "link")
        measured = [
            block
            for block, plan in seen.items()
            if plan.factors or (plan.inputs and block.inputs_suffice)
        ]
        compared = self.pacer.compare(measured, averages)
        due = [block for block, plan in seen.items() if plan.basis]
        before = {block: block.state.snapshot() for block in due}
        measures = any(
            (plan.scale and not plan.of_gradient) or (plan.basis and block.sampled)
            for block, plan in plans.items()
        )
        try:
            with self._timed("basis", bool(due)):
                made, failures = self._decompose(due)
            intervals = self.pacer.decide(compared)
            with self._timed("scale", measures):
                self._update(seen, averages, "moment")
                self._measure(seen, made)
        except BaseException:  # moments belong to the basis they were measured in
            for block, snapshot in before.items():
                block.state.restore(snapshot)
                block.invalidate()
            raise
        refreshed = {b: n for b, n in intervals.items() if b.name not in failures.reasons}
        self.pacer.settle(step, measured, compared, refreshed)
        for block in plans:
            block.state.retained.clear()
        return failures

    def _timed(self, stage: str, due: bool) -> AbstractContextManager[None]:
        return self.timer.timed(stage) if due else nullcontext()

    # ------------------------------------------------------------------------------- averaging

    def _averages(
        self, plans: Plans, unseen: Sequence[Block], arrived: Mapping[str, ReducedStatistic]
    ) -> dict[str, Tensor | None]:
        """Reduce the sums of this step over ranks, and divide them by their counts."""
        if not any(plan.follows for plan in plans.values()):
            return {}
        sums = {
            join_key(block.name, key): statistic
            for block in plans
            for key, statistic in block.state.pending.items()
        }
        if self.communicator.size == 1:
            reduced = self.communicator.reduce(sums, self.placement, "sums")
        else:
            rows: Mapping[str, int] = {}
            if any(block.curvature.row_factors for block in plans):
                sums, rows = self.communicator.joining(sums)
            specs, device = self.communicator.agree(sums)
            self.overlapped.learn(plans, specs, device)
            reduced = self.communicator.begin(sums, specs, device, self.placement, "sums").wait()
            reduced |= {key: attrs.evolve(reduced[key], rows=rows[key]) for key in rows}
        left_out = {block.name for block in unseen}
        averages = means(merged(arrived, reduced))
        return {k: value for k, value in averages.items() if split_key(k)[0] not in left_out}

    def _update(self, plans: Plans, averages: Mapping[str, Tensor | None], kind: str) -> None:
        """Take averages of one kind, "factor", "moment" or "link", into the running means."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in averages.items():
            layer, rest = split_key(key)
            if value is not None and rest.startswith(f"{kind}."):
                found.setdefault(layer, {})[rest.removeprefix(f"{kind}.")] = value
        for block in plans:
            if block.name not in found:
                continue
            if kind == "factor":
                block.update_factors(found[block.name], self.factor_decay)
            elif kind == "link":
                block.update_links(found[block.name], self.factor_decay)
            else:
                block.update_moments(found[block.name])

    # ----------------------------------------------------------------------------- decomposing

    def _decompose(self, due: Sequence[Block]) -> tuple[dict[Block, Parts], Failures]:
        """Decompose what this rank decomposes.

        Returns:
            For each block whose matrices were all decomposed, on some rank, this rank's part; and
            what failed.
        """
        made: dict[Block, Parts] = {}
        reasons: dict[str, str] = {}
        fault: Exception | None = None
        known = self._shared_diagonals([b for b in due if self.placement.apart(b.name)])
        try:
            for block in due:
                matrices = self._matrices(block)
                if not matrices:
                    continue
                try:
                    made[block] = self._made(block, matrices, known.get(block.name))
                except DecompositionError as error:
                    reasons[block.name] = str(error)
        except Exception as error:
            for block in due:
                block.take_ahead()  # a step that is tried again decomposes all of them
            if self.communicator.size == 1:
                raise
            fault = error
        if self.communicator.size == 1 or not due:
            return made, Failures(reasons)
        return self._agree(due, made, reasons, fault)

    def begin(self, blocks: Sequence[Block]) -> None:
        """Begin decompositions of these blocks, of their factors as they are now."""
        known = self._shared_diagonals([b for b in blocks if self.placement.apart(b.name)])
        for block in blocks:
            matrices = self._matrices(block)
            if matrices:
                made = functools.partial(
                    block.decompose, block.damping, diagonals=known.get(block.name)
                )
                block.begin(Ahead.begin(made, matrices))

    def _made(
        self, block: Block, matrices: Mapping[str, Tensor], diagonals: Diagonals | None
    ) -> Parts:
        """Return the decomposition of a block: the one that was begun, or a new one."""
        ahead = block.take_ahead()
        if ahead is not None:
            found = ahead.result()
            if found.keys() == matrices.keys() & block.requires:
                return found
        return block.decompose(block.damping, matrices, diagonals)

    def decomposes(self, block: Block) -> bool:
        """Return whether this rank decomposes a matrix of the block."""
        return bool(self.placement.decomposed_here(block))

    def _matrices(self, block: Block) -> dict[str, Tensor]:
        """Return the measured matrices of a block that this rank decomposes."""
        names = self.placement.decomposed_here(block)
        return block.matrices(names) if names and block.state.measured else {}

    def _shared_diagonals(self, blocks: Sequence[Block]) -> dict[str, Diagonals]:
        """Return the mean diagonals of blocks whose matrices are on different ranks."""
        numbers: list[float] = []
        spans: list[tuple[str, str, slice, tuple[int, ...]]] = []
        mine: dict[str, Tensor] = {}
        for block in blocks:
            layer, matrices = block.name, self._matrices(block)
            if matrices:
                mine[layer] = next(iter(matrices.values()))
            found = mean_diagonals(matrices)
            for name, shape in self.placement.shapes(layer).items():
                groups = groups_of_shape(name, shape)
                if groups is None or name in block.curvature.row_factors:
                    continue  # data of single examples may look square
                size = torch.Size(groups).numel()
                worker = self.placement.share(layer).inverse_workers[name][0]
                told = name in found and worker == self.communicator.rank
                spans.append((layer, name, slice(len(numbers), len(numbers) + size), groups))
                numbers += found[name].double().reshape(-1).tolist() if told else [0.0] * size
        total = self.communicator.total(numbers)
        result: dict[str, Diagonals] = {}
        for layer, name, span, shape in spans:
            if (like := mine.get(layer)) is not None:
                result.setdefault(layer, {})[name] = like.new_tensor(total[span]).reshape(shape)
        for layer, found in result.items():
            sizes = {name: self.placement.shapes(layer)[name][-1] for name in found}
            result[layer] = with_sides(found, sizes)
        return result

    def _agree(
        self,
        due: Sequence[Block],
        made: dict[Block, Parts],
        reasons: Mapping[str, str],
        fault: Exception | None,
    ) -> tuple[dict[Block, Parts], Failures]:
        """Return what was made and what failed, the same on every rank.

        Ranks that decompose the same matrix, and do not find the same bits, take what the first of
        them found.

        Raises:
            KfactkError: Another rank failed for a reason of its own.
        """
        mine = {
            block.name: {name: Report.of(parts) for name, parts in found.items()}
            for block, found in made.items()
        }
        told = None if fault is None else f"{type(fault).__name__}: {fault}"
        divided = any(self.placement.divided(block.name) for block in due)
        if not divided and self.communicator.same(repr((mine, reasons, told))) and fault is None:
            return made, Failures(dict(reasons))
        reports = self.communicator.gathered((mine, reasons, told))
        if fault is not None:
            raise fault
        for rank, (_, _, theirs) in enumerate(reports):
            if theirs is not None:
                raise KfactkError(
                    f"rank {rank} failed while it decomposed curvature ({theirs}), and so all "
                    "ranks stop. Correct the cause on that rank, and start again."
                )
        failures = Failures({name: why for _, theirs, _ in reports for name, why in theirs.items()})
        whole: dict[Block, Parts] = {}
        for block in due:
            found = [theirs.get(block.name, {}) for theirs, _, _ in reports]
            if set().union(*found) != set(block.requires):
                continue
            if block.name in failures.reasons:
                failures.mended[block.name] = failures.reasons.pop(block.name)
            sources = {
                name: next(rank for rank, each in enumerate(found) if name in each)
                for name in sorted(block.requires)
            }
            block.state.specs = {name: found[rank][name].specs for name, rank in sources.items()}
            whole[block] = made.get(block, {})
            for name, source in sources.items():
                if self._differ(block, name, found):
                    whole[block] = whole[block] | self._from(source, block, name, made)
                    failures.mended.setdefault(block.name, "")
        return whole, failures

    def _differ(self, block: Block, name: str, found: Sequence[Mapping[str, Report]]) -> bool:
        """Return whether the ranks that decompose a matrix found different things, or nothing.

        Args:
            block: The block.
            name: The matrix.
            found: For each rank, what it found of the block's matrices.
        """
        workers = self.placement.share(block.name).inverse_workers[name]
        return len({found[rank].get(name) for rank in workers}) > 1

    def _from(self, source: int, block: Block, name: str, made: Mapping[Block, Parts]) -> Parts:
        """Return the decomposition of a matrix that one rank made, on the ranks that make it too.

        Every rank takes part: others drop it.
        """
        mine = made[block][name] if self.communicator.rank == source else {}
        device = block.layer.anchor.device
        arrived: dict[str, Tensor] = {}
        for message in self.communicator.send(
            mine,
            block.state.specs[name],
            source,
            self.communicator.everyone,
            "decompositions",
            device,
        ):
            arrived |= message.wait()
        return {name: arrived} if name in self.placement.decomposed_here(block) else {}

    # ------------------------------------------------------------------------------- measuring

    def _measure(self, plans: Plans, made: Mapping[Block, Parts]) -> None:
        """Send decompositions to where they are needed, and measure moments on kept samples."""
        late = [b for b, plan in plans.items() if b in made or (plan.late and b.state.ready)]
        if not all(self.placement.everywhere(block.name) for block in late):
            self._learn_specs([block for block in late if block not in made])
        sums: dict[str, Statistic] = {}
        carried: dict[Block, dict[str, RunningMean]] = {}
        for block, whole in self._received(late, made, plans):
            state = block.state
            for samples in state.retained if block.sampled else ():
                if samples.first:
                    state.commit()
                add_sums(state.staged, block.moments(whole, samples))
            state.commit()
            for key, value in state.pending.items():
                if key.startswith("moment."):
                    sums[join_key(block.name, key)] = value
            state.retained.clear()
            if block in made:
                if self.placement.holds(block.name):
                    carried[block] = block.adopt(whole)
                state.ready = True
                block.invalidate()
        sampled = any(block.sampled for block in late)
        reduced = self.communicator.reduce(sums, self.placement, "moments") if sampled else {}
        for block, moments in carried.items():
            block.state.moments = moments
        self._update(plans, means(reduced), "moment")

    def _received(
        self, late: Sequence[Block], made: Mapping[Block, Parts], plans: Plans
    ) -> Iterator[tuple[Block, Parts]]:
        """Yield blocks with their whole decomposition, as far as this rank needs it.

        The decomposition of the next block is under way meanwhile.
        """
        begun: list[tuple[Block, Parts, list[PendingMessage]]] = []
        for block in late:
            own = dict(made.get(block, block.state.decomposition))
            messages = self._fetch(block, own, refreshed=block in made, visiting=plans[block].scale)
            begun.append((block, own, messages))
            if len(begun) > 1:
                yield _complete(*begun.pop(0))
        for each in begun:
            yield _complete(*each)

    def _fetch(
        self, block: Block, own: Parts, *, refreshed: bool, visiting: bool
    ) -> list[PendingMessage]:
        """Begin the messages that carry a block's decomposition."""
        found: list[PendingMessage] = []
        messages: dict[tuple[int, tuple[int, ...]], list[str]] = {}
        routes = self.placement.routes(block.name, refreshed=refreshed, visiting=visiting)
        for matrix, route in sorted(routes.items()):
            if self.communicator.rank in route[1]:
                messages.setdefault(route, []).append(matrix)
        for (source, members), matrices in messages.items():
            specs = {
                f"{matrix}|{part}": spec
                for matrix in matrices
                for part, spec in block.state.specs[matrix].items()
            }
            tensors: dict[str, Tensor] = {}
            if self.communicator.rank == source:
                for matrix in matrices:
                    tensors |= {f"{matrix}|{part}": own[matrix][part] for part in own[matrix]}
            device = block.layer.anchor.device
            found += self.communicator.send(
                tensors, specs, source, members, "decompositions", device
            )
        return found

    def _learn_specs(self, blocks: Sequence[Block]) -> None:
        """Tell ranks the specs of decompositions they do not hold, after a state was loaded."""
        asked = [block for block in blocks if not self.placement.everywhere(block.name)]
        if not self.communicator.any(any(not block.state.specs for block in asked)):
            return
        mine = {
            block.name: {m: _specs(parts) for m, parts in block.state.decomposition.items()}
            for block in asked
        }
        by_name = {block.name: block for block in asked}
        for theirs in self.communicator.gathered(mine):
            for name, specs in theirs.items():
                state = by_name[name].state
                state.specs = specs or state.specs


def _complete(block: Block, own: Parts, messages: Sequence[PendingMessage]) -> tuple[Block, Parts]:
    for message in messages:
        for key, tensor in message.wait().items():
            matrix, _, part = key.partition("|")
            own[matrix] = {**own.get(matrix, {}), part: tensor}
    return block, own


def _specs(parts: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec.of(tensor) for name, tensor in parts.items()}
