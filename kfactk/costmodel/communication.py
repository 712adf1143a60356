"""Which messages an assignment makes, how many bytes they move, and the least that would do. Pure: no process, no tensor.

For each factor refresh the sums of each matrix go to the ranks that decompose it; for each basis refresh its decomposition goes to the
ranks that hold it, and, where moments are measured on samples, through every rank; so it does again where the scale alone is refreshed,
and then the moments go to the holders. In every step ranks that do not hold a layer get its preconditioned gradient.

x bytes reduced to one of g ranks, or broadcast by one, move (g - 1) x in all; an all-reduce moves twice that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import attrs

from kfactk.assignment import Assignment, Work, Workload, is_square
from kfactk.costmodel.hardware import Machine

BUCKET = 25 * 2**20
"""Bytes at which messages between the same ranks are divided."""
HANDLING = 10
"""Operations that pack a message and take it out again, which read and write its bytes twice."""
KINDS = ("sums", "decompositions", "moments", "gradients")
"""Kinds of messages."""


@attrs.frozen
class Sizes:
    """How many numbers of one layer travel and are kept.

    Args:
        sums: Of each piece of its statistics, by matrix, or "" for all of them together.
        kept: Of each matrix's decomposition.
        moments: Of its moments.
    """

    sums: Mapping[str, int]
    kept: Mapping[str, int]
    moments: int

    @classmethod
    def of(cls, work: Work, *, sampled: bool) -> Sizes:
        """What follows from shapes: triangles of symmetric matrices, decompositions of `n^2` and, with moments, n numbers.

        Example:
            >>> Sizes.of(Work("fc", {"A": (3, 3), "G": (2, 2)}, (2, 3)), sampled=True)
            Sizes(sums={'A': 6, 'G': 3}, kept={'A': 12, 'G': 6}, moments=6)
        """
        sums, kept = {}, {}
        for name, shape in sorted(work.matrices.items()):
            sums[name] = numbers_sent(shape)
            eigenvalues = math.prod(shape[:-1]) if sampled and is_square(shape) else 0
            kept[name] = math.prod(shape) + eigenvalues
        if work.indivisible:
            sums = {"": sum(sums.values())}
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
    """How often in a step, on average, something is due; everything is due at step 0."""

    factors: float
    scale: float
    basis: float
    scale_alone: float
    passes: float
    step: float = 1.0

    @classmethod
    def of(cls, workload: Workload) -> Frequency:
        """From the periods. A refresh of the basis is one of the scale; `passes` counts steps in which samples are wanted at all.

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
    """The share of steps that are a multiple of one period at least.

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
        way: "all-reduce", "reduce" or "broadcast".
        members: The ranks that take part, ascending.
        size: Bytes of what is reduced or broadcast.
        source: To which rank it is reduced, or which one broadcasts.
    """

    kind: str
    when: str
    way: str
    members: tuple[int, ...]
    size: float
    source: int = 0

    @property
    def moved(self) -> float:
        """Bytes that all members together send."""
        return (len(self.members) - 1) * self.size * (2 if self.way == "all-reduce" else 1)

    def seconds(self, machine: Machine) -> float:
        """From packing to unpacking; on the wire bandwidth is that of rings and pipelines, latency that of trees."""
        ranks, buckets = len(self.members), max(1, math.ceil(self.size / BUCKET))
        link, hops = machine.link(self.members), math.ceil(math.log2(ranks)) * buckets
        handling = buckets * HANDLING * machine.launch + 4 * self.size / machine.bandwidth
        reduced = self.way == "all-reduce"
        carried = 2 * (ranks - 1) / ranks * self.size if reduced else self.size
        return handling + carried / link.bandwidth + (1 + reduced) * hops * link.latency


def messages(
    workload: Workload,
    sizes: Mapping[str, Sizes],
    assignment: Assignment,
    ranks: int,
    itemsize: float,
) -> list[Message]:
    """What an assignment makes the ranks send, messages of one kind between the same ranks joined.

    Args:
        workload: The work.
        sizes: By layer.
        assignment: Who does what.
        ranks: Number of ranks.
        itemsize: Bytes of a number on the wire.
    """
    joined: dict[Message, float] = {}
    for message in _messages(workload, sizes, assignment, ranks):
        if len(message.members) > 1 and message.size:
            key = attrs.evolve(message, size=0.0)
            joined[key] = joined.get(key, 0.0) + message.size * itemsize
    return [attrs.evolve(key, size=size) for key, size in joined.items()]


def _messages(
    workload: Workload, sizes: Mapping[str, Sizes], assignment: Assignment, ranks: int
) -> Iterator[Message]:
    everyone = tuple(range(ranks))
    for work in workload.works:
        share, size = assignment.shares[work.layer], sizes[work.layer]
        workers, inverse_workers = share.gradient_workers, share.inverse_workers
        outside = sorted(set(everyone) - set(workers))
        for piece, numbers in size.sums.items() if inverse_workers else ():
            wanting = inverse_workers[piece or min(inverse_workers)]
            yield from _reduced("sums", "factors", numbers, wanting, everyone)
        for name, ready in inverse_workers.items():
            if ready != everyone:
                visited = everyone if workload.sampled else workers
                yield _broadcast("decompositions", "basis", size.kept[name], ready[0], visited)
        if workload.sampled:
            yield from _reduced("moments", "scale", size.moments, workers, everyone)
            kept = sum(size.kept.values())
            yield _broadcast("decompositions", "scale_alone", kept, workers[0], outside)
        waiting: dict[int, list[int]] = {}
        for rank in outside:
            waiting.setdefault(share.source(rank), []).append(rank)
        for source, receivers in waiting.items():
            yield _broadcast("gradients", "step", math.prod(work.gradient), source, receivers)


def _reduced(
    kind: str, when: str, size: float, wanting: tuple[int, ...], everyone: tuple[int, ...]
) -> Iterator[Message]:
    if wanting == everyone:
        yield Message(kind, when, "all-reduce", everyone, size)
        return
    yield Message(kind, when, "reduce", everyone, size, wanting[0])
    yield Message(kind, when, "broadcast", wanting, size, wanting[0])


def _broadcast(kind: str, when: str, size: float, source: int, receivers: Sequence[int]) -> Message:
    return Message(kind, when, "broadcast", tuple(sorted({source, *receivers})), size, source)


def bytes_a_step(found: list[Message], workload: Workload) -> dict[str, float]:
    """Bytes that messages move in a step on average, all ranks together, by kind."""
    often = Frequency.of(workload)
    moved = dict.fromkeys(KINDS, 0.0)
    for message in found:
        moved[message.kind] += message.moved * getattr(often, message.when)
    return moved
