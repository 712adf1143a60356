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

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import attrs

from kfactk.assignment import Assignment, Work, Workload
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
    """

    sums: Mapping[str, int]
    kept: Mapping[str, int]
    moments: int

    @classmethod
    def of(cls, work: Work, *, sampled: bool) -> Sizes:
        """Return the sizes that follow from shapes.

        Sums are triangles of symmetric matrices. Decompositions have `n^2` numbers, and with
        moments n more.

        Example:
            >>> Sizes.of(Work("fc", {"A": (3, 3), "G": (2, 2)}, (2, 3)), sampled=True)
            Sizes(sums={'A': 6, 'G': 3}, kept={'A': 12, 'G': 6}, moments=6)
        """
        sums, kept = {}, {}
        for name, shape in sorted(work.matrices.items()):
            n = shape[-1] if is_square(shape) else 0
            groups = math.prod(shape) // (n * n) if n else 1
            sums[name] = groups * n * (n + 1) // 2 if n else math.prod(shape)
            kept[name] = groups * (n * n + sampled * n) if n else math.prod(shape)
        if work.indivisible:
            sums = {"": sum(sums.values())}
        return cls(sums, kept, math.prod(work.gradient) if sampled else 0)


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

    @classmethod
    def of(cls, workload: Workload) -> Frequency:
        """Return the frequencies that follow from the periods.

        Example:
            >>> Frequency.of(Workload((), factor_every=10, scale_every=10, basis_every=100))
            Frequency(factors=0.1, scale=0.1, basis=0.01, scale_alone=0.09, passes=0.1)
        """
        factor, scale, basis = workload.factor_every, workload.scale_every, workload.basis_every
        if not workload.sampled:
            return cls(1 / factor, 0.0, 1 / basis, 0.0, 1 / factor)
        either = due_share(scale, basis)
        return cls(
            1 / factor,
            either,
            1 / basis,
            round(either - 1 / basis, 12),
            due_share(factor, scale, basis),
        )


def due_share(*periods: int) -> float:
    """Return the share of steps that are a multiple of at least one period.

    Example:
        >>> due_share(2, 3), due_share(10, 100)
        (0.6666666666666666, 0.1)
    """
    cycle = math.lcm(*periods)
    sizes = range(1, len(periods) + 1)
    terms = (
        int((-1) ** (size - 1)) * cycle // math.lcm(*some)
        for size in sizes
        for some in itertools.combinations(periods, size)
    )
    return float(sum(terms) / cycle)


@attrs.frozen
class Message:
    """Bytes between ranks.

    Args:
        kind: One of `KINDS`.
        when: Field of `Frequency` that says how often; "" for every step.
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
        if self.collective == "all-reduce":
            return (
                packing
                + 2 * (ranks - 1) / ranks * self.size / link.bandwidth
                + 2 * hops * link.latency
            )
        return packing + self.size / link.bandwidth + hops * link.latency


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
    joined: dict[Message, float] = {}
    for message in _messages(workload, sizes, assignment, ranks):
        if len(message.members) > 1 and message.size:
            key = attrs.evolve(message, size=0.0)
            joined[key] = joined.get(key, 0.0) + message.size * itemsize
    return [attrs.evolve(key, size=size) for key, size in joined.items()]


def _messages(
    workload: Workload, sizes: Mapping[str, Sizes], assignment: Assignment, ranks: int
) -> Iterator[Message]:
    """Yield the messages of each layer, their sizes in numbers."""
    everyone = tuple(range(ranks))
    for work in workload.works:
        share, size = assignment.shares[work.layer], sizes[work.layer]
        others = [rank for rank in everyone if rank not in share.gradient_workers]
        for piece, numbers in size.sums.items() if share.inverse_workers else ():
            receivers = share.inverse_workers[piece or min(share.inverse_workers)]
            yield from _reduce("sums", "factors", numbers, receivers, everyone)
        for name, inverse_workers in share.inverse_workers.items():
            if inverse_workers != everyone:
                receivers = everyone if workload.sampled else share.gradient_workers
                numbers = size.kept[name]
                yield _broadcast("decompositions", "basis", numbers, inverse_workers[0], receivers)
        if workload.sampled:
            yield from _reduce("moments", "scale", size.moments, share.gradient_workers, everyone)
            numbers, source = sum(size.kept.values()), share.gradient_workers[0]
            yield _broadcast("decompositions", "scale_alone", numbers, source, others)
        receivers_of: dict[int, list[int]] = {}
        for rank in others:
            receivers_of.setdefault(share.source(rank), []).append(rank)
        for source, receiving in receivers_of.items():
            yield _broadcast("gradients", "", math.prod(work.gradient), source, receiving)


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
        share = getattr(frequency, message.when) if message.when else 1.0
        moved[message.kind] += message.moved * share
    return moved


def least_bytes(
    workload: Workload,
    ranks: int,
    gradient_workers: int,
    inverse_workers: int = 1,
    *,
    sizes: Mapping[str, Sizes] | None = None,
    itemsize: float | None = None,
) -> dict[str, float]:
    r"""Return the least bytes that any exchange moves in a mean step on all ranks, by kind.

    Of R ranks, each layer has h gradient workers, and each of its matrices d inverse workers. Sums
    of f bytes take R - 1 messages to come together on one rank, and one more for each further rank;
    so do moments of m bytes. Decompositions of b bytes reach h ranks, or all R where moments are
    sampled. Preconditioned gradients of v bytes reach the other R - h ranks:

        sums            (R + d - 2) f / T_factors
        decompositions  (max(h, d) - d) b / T_basis
            sampled:    (R - d) b / T_basis + (R - h) b (1/T_scale - 1/T_basis)
        moments         sampled: (R + h - 2) m / T_scale
        gradients       (R - h) v

    where 1/T_scale counts the steps in which scale or basis is due.

    Args:
        workload: The work.
        ranks: R.
        gradient_workers: h.
        inverse_workers: d; they are among the gradient workers, or include them.
        sizes: Sizes of each layer, by name; `None` for those that follow from shapes.
        itemsize: Bytes of a number on the wire; `None` for the workload's.

    Example:
        >>> fc = Work("fc", {"A": (3, 3), "G": (2, 2)}, (2, 3))
        >>> work = Workload((fc,), factor_every=1, basis_every=2, sampled=False)
        >>> least_bytes(work, ranks=4, gradient_workers=1)
        {'sums': 108.0, 'decompositions': 0.0, 'moments': 0.0, 'gradients': 72.0}
    """
    if sizes is None:
        sizes = {work.layer: Sizes.of(work, sampled=workload.sampled) for work in workload.works}
    itemsize = workload.itemsize if itemsize is None else itemsize
    frequency = Frequency.of(workload)
    f = itemsize * sum(sum(size.sums.values()) for size in sizes.values())
    b = itemsize * sum(sum(size.kept.values()) for size in sizes.values())
    m = itemsize * sum(size.moments for size in sizes.values())
    v = itemsize * sum(math.prod(work.gradient) for work in workload.works)
    reached = ranks if workload.sampled else max(gradient_workers, inverse_workers)
    others = ranks - gradient_workers
    return {
        "sums": (ranks + inverse_workers - 2) * f * frequency.factors,
        "decompositions": (reached - inverse_workers) * b * frequency.basis
        + others * b * frequency.scale_alone,
        "moments": (ranks + gradient_workers - 2) * m * frequency.scale,
        "gradients": float(others * v),
    }


def is_square(shape: tuple[int, ...]) -> bool:
    """Return whether a shape is that of square matrices."""
    return len(shape) > 1 and shape[-1] == shape[-2]
