"""When paced blocks are due: what is kept of their last refreshes, and the choice of the next one.

    averages of a refresh -> changes since the last refreshes, on the factor workers -> all ranks
    -> the interval that the pace decides on -> the step at which the block is due again

Ranks agree in one small sum, in steps that refresh something. The device is waited for after the
decompositions, which have waited for it already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from kfactk.distributed.communicator import Communicator
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.placement import BlockPlacement, device_of
from kfactk.preconditioner.schedule import UpdateSchedule
from kfactk.statistics import split_key

LAST = 2**53
"""Latest step at which a block may be due: numbers of steps stay exact in double precision."""
Averages = dict[str, Tensor | None]
"""By factor, its average in this refresh; `None` on ranks that do not keep it."""


@attrs.frozen(eq=False)
class Compared:
    """The paced blocks of one refresh, with what has changed.

    Args:
        averages: The averages of each block that was measured.
        places: For each number, its block, and which of the earlier refreshes it compares with.
        numbers: The changes that this rank knows, 0 for others; on the device.
    """

    averages: Mapping[Block, Averages]
    places: Sequence[tuple[Block, int]]
    numbers: Tensor


@attrs.frozen(eq=False)
class Pacer:
    """Decides, for the blocks that have a pace, when they are due again.

    Args:
        placement: Who keeps which factor.
        communicator: The ranks.
        schedule: Its `factor_every` is the unit of intervals.
    """

    placement: BlockPlacement
    communicator: Communicator
    schedule: UpdateSchedule

    def compare(self, blocks: Sequence[Block], averages: Mapping[str, Tensor | None]) -> Compared:
        """Compare what a refresh has measured with earlier refreshes; no device is waited for.

        Args:
            blocks: The blocks whose factors were due and were seen.
            averages: What the step measured, by joined names; the same names on every rank.
        """
        paced = {block.name: block for block in blocks if block.pace is not None}
        if not paced:
            return Compared({}, (), torch.zeros(0, device="cpu"))
        found: dict[Block, Averages] = {}
        for key, value in sorted(averages.items()):
            layer, rest = split_key(key)
            kind, _, factor = rest.partition(".")
            if kind == "factor" and layer in paced:
                found.setdefault(paced[layer], {})[factor] = value
        places: list[tuple[Block, int]] = []
        numbers: list[Tensor] = []
        device = device_of(found)
        nothing = torch.zeros((), device=device)
        for block, mine in found.items():
            pace = block.state.pace
            for place in range(len(pace.known_intervals)):
                for factor, value in mine.items():
                    places.append((block, place))
                    told = self.placement.factor_workers(block.name, factor)[0]
                    number = nothing
                    if value is not None and told == self.communicator.rank:
                        number = relative_change(value, pace.values[place][factor])
                    numbers.append(number.to(device, torch.float32))
        stacked = torch.stack(numbers) if numbers else torch.zeros(0, device=device)
        return Compared(found, places, stacked)

    def decide(self, compared: Compared) -> dict[Block, int]:
        """Return the next interval of each block that was measured, the same on every rank."""
        numbers = self.communicator.total(compared.numbers.tolist(), compared.numbers.device)
        changes: dict[Block, list[float]] = {block: [] for block in compared.averages}
        for (block, place), number in zip(compared.places, numbers, strict=True):
            known = changes[block]
            if place == len(known):
                known.append(number)
            known[place] = max(known[place], number)
        return {block: block.next_interval(known) for block, known in changes.items()}

    def settle(
        self, step: int, blocks: Sequence[Block], compared: Compared, intervals: Mapping[Block, int]
    ) -> None:
        """Note when blocks are due again, and keep what they are compared with then.

        A block that was not refreshed, as every batch was bad or its decomposition failed, is due
        again after one unit.

        Args:
            step: Index of the step.
            blocks: The blocks whose factors were due and were seen.
            compared: What `compare` gave.
            intervals: What `decide` gave, of the blocks that were refreshed.
        """
        unit = self.schedule.periods(step)[0]
        for block in blocks:
            if block.pace is None:
                continue
            pace = block.state.pace
            if block in intervals:
                pace.note(intervals[block], compared.averages[block], block.keeps)
            pace.due = min(step + intervals.get(block, 1) * unit, LAST)
            block.invalidate()


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """Return `||new - old||_F / ||old||_F` on the device.

    It is 0 where they are equal, and inf where `old` alone is 0. Squares neither overflow nor
    vanish.

    Example:
        >>> relative_change(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]))
        tensor(0.2000)
    """
    largest = torch.linalg.vector_norm(old, math.inf)
    size = torch.where(largest > 0, largest, 1.0)
    difference = torch.linalg.vector_norm((new - old) / size)
    change = difference / torch.linalg.vector_norm(old / size)
    return torch.where(difference > 0, change, 0.0)
