"""Messages about curvature: sums that leave before `step()`, and preconditioned gradients.

Where every rank made exactly one forward in the last step that took statistics, the next step is
expected to do the same. Its sums then leave right after the Fisher pass, and travel while the
user's backward runs. A rank that makes no forward, or another one than expected, begins them in
`step()`. Sums of further forwards follow in `step()`. So the messages that are begun, and their
names, are the same on all ranks, whatever a rank does in between.

The last bit of a sum depends on its place in a message. Messages are therefore made up alike,
whether they leave early or not, and whenever their specs were learned: a resumed run, which has yet
to learn, does what the uninterrupted run does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from kfactk.distributed.communicator import Communicator, Members, PendingReduction
from kfactk.distributed.messages import PendingMessage
from kfactk.distributed.packing import TensorSpec, buckets
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.placement import BlockPlacement
from kfactk.preconditioner.planner import EMPTY, StepPlan
from kfactk.samples import Statistic
from kfactk.statistics import ReducedStatistic, join_key, split_key

PRESENT = "present"
"""Name of the flags, one a layer, by which a worker tells which layers it has a gradient for."""


@attrs.frozen(eq=False)
class ExpectedSums:
    """The sums that every rank expects the next step to gather.

    Between steps a rank may replace and rename layers on its own, so all is noted beforehand.

    Args:
        blocks: The blocks by the names they had.
        specs: Specs of the sums, `None` for those without a total.
        routes: For each sum, the ranks that want its total.
    """

    blocks: Mapping[str, Block]
    specs: Mapping[str, TensorSpec | None]
    routes: Mapping[str, Members]

    def wanted(self, key: str) -> Members:
        """Return the ranks that want the total of this name."""
        return self.routes[key]


class OverlappedReduction:
    """The sums of one optimizer that leave before `step()`.

    Args:
        communicator: Moves them.
        placement: Says which ranks want a total.
    """

    def __init__(self, communicator: Communicator, placement: BlockPlacement) -> None:
        self._communicator, self._placement = communicator, placement
        self._specs: dict[Block, dict[str, TensorSpec | None]] = {}
        self._device = torch.device("cpu")
        self._plan = EMPTY
        self._one_forward = False
        self._expected: ExpectedSums | None = None
        self._under_way: PendingReduction | None = None

    def learn(
        self,
        blocks: Iterable[Block],
        specs: Mapping[str, TensorSpec | None],
        device: torch.device,
    ) -> None:
        """Record the names and specs that all ranks' sums of these blocks had."""
        by_name = {block.name: block for block in blocks}
        for key, spec in specs.items():
            layer, rest = split_key(key)
            self._specs.setdefault(by_name[layer], {})[rest] = spec
        self._device = device

    def retain(self, blocks: Collection[Block]) -> None:
        """Forget the specs of all other blocks."""
        if len(self._specs) > len(blocks) or not all(block in blocks for block in self._specs):
            self._specs = {b: specs for b, specs in self._specs.items() if b in blocks}

    def expect_one_forward(self, expected: bool) -> None:
        """Say whether every rank made one forward in this step; the same on every rank."""
        self._one_forward = expected
        if expected:
            self._communicator.stand_aside()

    def prepare(self, plan: StepPlan) -> None:
        """Take the plan that every rank makes of the next step, as the blocks are now."""
        self._plan = plan
        self._expected = self._expect() if self._one_forward and plan.due else None

    def _expect(self) -> ExpectedSums | None:
        """Return the sums that the plan gathers, where the specs of all of them are known."""
        specs: dict[str, TensorSpec | None] = {}
        for block, plan in self._plan.plans.items():
            if plan.of_gradient or block.curvature.row_factors:
                continue  # nothing travels, or how much is known in `step()` only
            known = self._specs.get(block, {})
            kinds = {rest.partition(".")[0] for rest in known}
            if block.state.ready:  # another one may not run
                if (plan.factors or plan.inputs) and "factor" not in kinds:
                    return None
                if plan.scale and not plan.late and "moment" not in kinds:
                    return None
            for rest, spec in known.items():
                if plan.gathers(rest):
                    specs[join_key(block.name, rest)] = spec
        specs = dict(sorted(specs.items()))
        routes = {key: self._placement.wanted(key) for key in specs}
        return ExpectedSums({block.name: block for block in self._plan.plans}, specs, routes)

    def begin(self, plan: StepPlan) -> None:
        """After a forward: let its sums leave, if it gathered what every rank expects."""
        if self._expected is not None and plan.fingerprint() == self._plan.fingerprint():
            self._begin()

    def _begin(self) -> None:
        expected = self._expected
        if expected is None or self._under_way is not None:
            return
        sums: dict[str, Statistic] = {}
        for key, spec in expected.specs.items():
            layer, rest = split_key(key)
            state = expected.blocks[layer].state
            state.commit()
            if rest in state.pending and _fits(state.pending[rest], spec):
                sums[key] = state.pending.pop(rest)
        self._under_way = self._communicator.begin(
            sums, expected.specs, self._device, expected, "sums", aside=True
        )

    def finish(self, current: Collection[Block]) -> dict[str, ReducedStatistic]:
        """Return what has arrived for these blocks; every rank calls it first in each step."""
        self._begin()
        under_way, self._under_way = self._under_way, None
        expected = self._expected
        if under_way is None or expected is None:
            return {}
        arrived: dict[str, ReducedStatistic] = {}
        for key, each in under_way.wait().items():
            layer, rest = split_key(key)
            if (block := expected.blocks[layer]) in current:
                arrived[join_key(block.name, rest)] = each
        return arrived

    def drop(self) -> None:
        """Wait for what is under way, and drop it."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.wait()
        self._plan, self._expected = EMPTY, None


def _fits(statistic: Statistic, spec: TensorSpec | None) -> bool:
    """Return whether a sum can travel under this spec; one that cannot follows in `step()`."""
    if statistic.total is None:
        return True
    return (
        spec is not None
        and tuple(statistic.total.shape) == spec.shape
        and statistic.total.dtype == spec.dtype
        and statistic.symmetric == spec.symmetric
        and statistic.unrounded == spec.unrounded
    )


def merged(
    early: Mapping[str, ReducedStatistic], late: Mapping[str, ReducedStatistic]
) -> dict[str, ReducedStatistic]:
    """Return both sums together, name by name."""
    found = dict(early)
    for name, other in late.items():
        one = found.get(name)
        if one is None:
            found[name] = other
            continue
        totals = [each.total for each in (one, other) if each.total is not None]
        total = totals[0] + totals[1] if len(totals) == 2 else (totals[0] if totals else None)
        found[name] = ReducedStatistic(total, one.count + other.count, one.exists or other.exists)
    return found


def broadcast_gradients(
    blocks: Sequence[Block],
    specs: Mapping[str, TensorSpec],
    gradients: Mapping[str, Tensor],
    placement: BlockPlacement,
    communicator: Communicator,
    device: torch.device,
) -> dict[str, Tensor]:
    """Precondition the gradients of this rank's blocks, and receive the rest.

    Messages leave while the next blocks are still being preconditioned. What is sent follows from
    the blocks that are ready, never from which gradients are there.

    Args:
        blocks: Those that are ready, the same on every rank.
        specs: Specs of their gradients as matrices, by layer name.
        gradients: By layer name.
        placement: Who holds what.
        communicator: Moves them.
        device: Where they are wanted.

    Returns:
        Preconditioned gradients by layer name, without layers that have none on their worker.
    """
    by_name = {block.name: block for block in blocks}
    found: dict[str, Tensor] = {}
    messages: list[tuple[list[str], list[PendingMessage]]] = []
    for worker, members, run in _runs(list(by_name), specs, placement):
        mine: dict[str, Tensor] = {}
        if worker == communicator.rank:
            given = [name for name in run if name in gradients]
            mine = {name: by_name[name].solve(gradients[name]) for name in given}
            found |= mine
        if len(members) > 1 and communicator.rank in members:
            these = {name: specs[name] for name in run}
            sent = _send(these, mine, worker, members, communicator, device)
            messages.append((run, sent))
    for run, pending in messages:
        arrived: dict[str, Tensor] = {}
        for message in pending:
            arrived |= message.wait()
        present = dict(zip(run, arrived.pop(PRESENT).tolist(), strict=True))
        found |= {name: tensor for name, tensor in arrived.items() if present[name]}
    return found


def _runs(
    names: Sequence[str], specs: Mapping[str, TensorSpec], placement: BlockPlacement
) -> list[tuple[int, Members, list[str]]]:
    """Return messages in the order in which every rank sends them.

    The first bucket of each worker comes first, then the second bucket of each.
    """
    routes: dict[tuple[int, Members], dict[str, TensorSpec]] = {}
    for name in names:
        share = placement.share(name)
        for worker in share.gradient_workers:
            route = worker, placement.receivers(share, worker)
            routes.setdefault(route, {})[name] = specs[name]
    runs = []
    for route, these in routes.items():
        runs += [(number, route, run) for number, run in enumerate(buckets(these))]
    runs.sort(key=lambda each: (each[0], each[1]))
    return [(worker, members, run) for _, (worker, members), run in runs]


def _send(
    specs: Mapping[str, TensorSpec],
    mine: Mapping[str, Tensor],
    worker: int,
    members: Members,
    communicator: Communicator,
    device: torch.device,
) -> list[PendingMessage]:
    """Send one bucket, with flags for the layers that have a gradient."""
    dtype = next(iter(specs.values())).dtype
    flags = torch.tensor([float(name in mine) for name in specs], dtype=dtype, device=device)
    given: dict[str, Tensor] = {}
    if worker == communicator.rank:
        given = {
            name: mine[name] if name in mine else spec.blank(device).zero_()
            for name, spec in specs.items()
        }
        given[PRESENT] = flags
    all_specs = {**specs, PRESENT: TensorSpec.of(flags)}
    return communicator.send(given, all_specs, worker, members, "gradients", device)
