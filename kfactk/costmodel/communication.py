"""Messages that an assignment causes, the bytes that they move, and the least bytes possible.

Pure: no process, no tensor. At each refresh of the factors, the sums of a matrix go to its inverse
workers. At each refresh of the basis, its decomposition goes to the gradient workers; where moments
are measured on samples, it goes to every rank. The same holds where the scale alone is refreshed.
The moments then go to the gradient workers. In every step, the other ranks receive the
preconditioned gradient.

x bytes reduced to one of g ranks, or broadcast by one, move (g - 1) x in all; an all-reduce moves
twice that.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from kfactk.assignment import Assignment, Share, Work, Workload, is_square
from kfactk.costmodel.hardware import Machine

BUCKET_BYTES = 25 * 2**20
"""Bytes at which messages between the same ranks are divided."""
PACKING_LAUNCHES = 10
"""Operations that pack and unpack a message; they read and write its bytes twice."""
KINDS = ("sums", "decompositions", "moments", "gradients")
"""Kinds of messages."""


@attrs.frozen
class Sizes:
    """Numbers of one layer that travel and are kept.

    Args:
        sums: Size of each piece of its statistics, by matrix, or "" for all of them.
        kept: Size of each matrix's decomposition.
        moments: Size of its moments.
        mean: Size of the running mean of its gradient, which every rank keeps.
        turned: Size of that mean in the coordinates of the basis.
    """

    sums: Mapping[str, int]
    kept: Mapping[str, int]
    moments: int
    mean: int = 0
    turned: int = 0

    @classmethod
    def of(cls, work: Work, *, sampled: bool) -> Sizes:
        """Return the sizes that follow from shapes.

        Sums are triangles of symmetric matrices. Decompositions have `n^2` numbers, and with
        moments n more.

        Example:
            >>> Sizes.of(Work("fc", {"A": (3, 3), "G": (2, 2)}, (2, 3)), sampled=True)
            Sizes(sums={'A': 6, 'G': 3}, kept={'A': 12, 'G': 6}, moments=6, mean=0, turned=0)
        """
        sums, kept = {}, {}
        for name, shape in sorted(work.matrices.items()):
            sums[name] = numbers_sent(shape)
            eigenvalues = math.prod(shape[:-1]) if sampled and is_square(shape) else 0
            kept[name] = math.prod(shape) + eigenvalues
        if work.of_gradient:
            sums = {}
        elif work.indivisible:
            beside = sum(math.prod(shape) for shape in work.beside.values())
            sums = {"": sum(sums.values()) + beside}
        return cls(sums, kept, math.prod(work.gradient) if sampled else 0)


def numbers_sent(shape: tuple[int, ...], *, symmetric: bool = True) -> int:
    """Return how many numbers of a tensor travel: of square symmetric matrices a triangle.

    Example:
        >>> numbers_sent((2, 3, 3)), numbers_sent((2, 3)), numbers_sent((3, 3), symmetric=False)
        (12, 6, 9)
    """
    whole = math.prod(shape)
    return (whole + math.prod(shape[:-1])) // 2 if symmetric and is_square(shape) else whole


@attrs.frozen
class Frequency:
    """Share of steps in which something is due; everything is due at step 0.

    Args:
        factors: Share of steps that refresh factors.
        scale: Share of steps that refresh the scale, with the basis or alone.
        basis: Share of steps that refresh the basis.
        scale_alone: Share of steps that refresh the scale, but not the basis.
        passes: Share of steps that need samples.
    """

    factors: float
    scale: float
    basis: float
    scale_alone: float
    passes: float
    step: float = 1.0

    @classmethod
    def of(cls, workload: Workload) -> Frequency:
        """Return the frequencies that follow from the periods.

        Example:
            >>> Frequency.of(Workload((), factor_every=10, scale_every=10, basis_every=100))
            Frequency(factors=0.1, scale=0.1, basis=0.01, scale_alone=0.09, passes=0.1, step=1.0)
        """
        factor, scale, basis = workload.factor_every, workload.scale_every, workload.basis_every
        if not workload.sampled:
            return cls(1 / factor, 0.0, 1 / basis, 0.0, 1 / factor)
        either = due_share(scale, basis)
        alone = round(either - 1 / basis, 12)
        return cls(1 / factor, either, 1 / basis, alone, due_share(factor, scale, basis))


def due_share(*periods: int) -> float:
    """Return the share of steps that are a multiple of at least one period.

    Example:
        >>> due_share(2, 3), due_share(10, 100)
        (0.6666666666666666, 0.1)
    """
    cycle = math.lcm(*periods)
    terms = (
        int((-1) ** (size - 1)) * cycle // math.lcm(*some)
        for size in range(1, len(periods) + 1)
        for some in itertools.combinations(periods, size)
    )
    return sum(terms) / cycle


@attrs.frozen
class Message:
    """Bytes between ranks.

    Args:
        kind: One of `KINDS`.
        when: Field of `Frequency` that says how often.
        collective: "all-reduce", "reduce" or "broadcast".
        members: The ranks that take part, ascending.
        size: Bytes that are reduced or broadcast.
        source: The rank that receives the reduction, or that broadcasts.
    """

    kind: str
    when: str
    collective: str
    members: tuple[int, ...]
    size: float
    source: int = 0

    @property
    def moved(self) -> float:
        """Bytes that all members send."""
        return (len(self.members) - 1) * self.size * (2 if self.collective == "all-reduce" else 1)

    def seconds(self, machine: Machine) -> float:
        """Return the seconds from packing to unpacking.

        Bandwidth is that of rings and pipelines, latency that of trees.
        """
        ranks, buckets = len(self.members), max(1, math.ceil(self.size / BUCKET_BYTES))
        link, hops = machine.link(self.members), math.ceil(math.log2(ranks)) * buckets
        packing = buckets * PACKING_LAUNCHES * machine.launch + 4 * self.size / machine.bandwidth
        reduced = self.collective == "all-reduce"
        carried = 2 * (ranks - 1) / ranks * self.size if reduced else self.size
        return packing + carried / link.bandwidth + (1 + reduced) * hops * link.latency


def messages(
    workload: Workload,
    sizes: Mapping[str, Sizes],
    assignment: Assignment,
    ranks: int,
    itemsize: float,
) -> list[Message]:
    """Return the messages of an assignment; those of one kind between the same ranks are joined.

    Args:
        workload: The work.
        sizes: Sizes of each layer, by name.
        assignment: Which ranks do which work.
        ranks: Number of ranks.
        itemsize: Bytes of a number on the wire.
    """
    joined: dict[tuple[Any, ...], float] = {}
    for m in _messages(workload, sizes, assignment, ranks):
        if len(m.members) > 1 and m.size:
            key = m.kind, m.when, m.collective, m.members, m.source
            joined[key] = joined.get(key, 0.0) + m.size * itemsize
    return [
        Message(kind, when, collective, members, size, source)
        for (kind, when, collective, members, source), size in joined.items()
    ]


def _messages(
    workload: Workload, sizes: Mapping[str, Sizes], assignment: Assignment, ranks: int
) -> Iterator[Message]:
    """Yield the messages of each layer, their sizes in numbers."""
    everyone = tuple(range(ranks))
    for work in workload.works:
        share, size = assignment.shares[work.layer], sizes[work.layer]
        workers, inverse_workers = share.gradient_workers, share.inverse_workers
        others = sorted(set(everyone) - set(workers))
        for piece, numbers in size.sums.items() if inverse_workers else ():
            receivers = inverse_workers[piece or min(inverse_workers)]
            yield from _reduce("sums", "factors", numbers, receivers, everyone)
        for name, ready in inverse_workers.items():
            if ready != everyone:
                receivers = everyone if workload.sampled else workers
                yield _broadcast("decompositions", "basis", size.kept[name], ready[0], receivers)
        if workload.sampled:
            yield from _reduce("moments", "scale", size.moments, workers, everyone)
            kept = sum(size.kept.values())
            yield _broadcast("decompositions", "scale_alone", kept, workers[0], others)
        for source, members in _served(workers, ranks):
            numbers = math.prod(work.gradient)
            yield Message("gradients", "step", "broadcast", members, numbers, source)


@functools.lru_cache(maxsize=4096)  # many layers have the same workers
def _served(workers: tuple[int, ...], ranks: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Return each gradient worker that serves others, and all ranks of its broadcast."""
    receivers_of: dict[int, list[int]] = {}
    share = Share({}, workers)
    for rank in sorted(set(range(ranks)) - set(workers)):
        receivers_of.setdefault(share.source(rank), []).append(rank)
    return tuple(
        (source, tuple(sorted((source, *receiving)))) for source, receiving in receivers_of.items()
    )


def _reduce(
    kind: str, when: str, size: float, receivers: tuple[int, ...], everyone: tuple[int, ...]
) -> Iterator[Message]:
    """Yield the messages of a sum over all ranks that reaches some of them."""
    if receivers == everyone:
        yield Message(kind, when, "all-reduce", everyone, size)
        return
    yield Message(kind, when, "reduce", everyone, size, receivers[0])
    yield Message(kind, when, "broadcast", receivers, size, receivers[0])


def _broadcast(kind: str, when: str, size: float, source: int, receivers: Sequence[int]) -> Message:
    return Message(kind, when, "broadcast", tuple(sorted({source, *receivers})), size, source)


def bytes_per_step(found: list[Message], workload: Workload) -> dict[str, float]:
    """Return the bytes that messages move in a mean step on all ranks, by kind."""
    frequency = Frequency.of(workload)
    moved = dict.fromkeys(KINDS, 0.0)
    for message in found:
        moved[message.kind] += message.moved * getattr(frequency, message.when)
    return moved
