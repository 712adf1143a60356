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

from kfactk.assignment import Assignment, Work, Workload
from kfactk.costmodel.hardware import Machine

BUCKET = 25 * 2**20
"""Bytes at which messages between the same ranks are divided."""
HANDLING = 10
"""Operations that pack a message and take it out again, which read and write its bytes twice."""


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
            n = shape[-1] if is_square(shape) else 0
            many = math.prod(shape) // (n * n) if n else 1
            sums[name] = many * n * (n + 1) // 2 if n else math.prod(shape)
            kept[name] = many * (n * n + sampled * n) if n else math.prod(shape)
        if work.indivisible:
            sums = {"": sum(sums.values())}
        return cls(sums, kept, math.prod(work.gradient) if sampled else 0)


@attrs.frozen
class Frequency:
    """How often in a step, on average, something is due; everything is due at step 0."""

    factors: float
    scale: float
    basis: float
    scale_alone: float
    passes: float

    @classmethod
    def of(cls, workload: Workload) -> Frequency:
        """From the periods. A refresh of the basis is one of the scale; `passes` counts steps in which samples are wanted at all.

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
    """The share of steps that are a multiple of one period at least.

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
        kind: "sums", "decompositions", "moments", "gradients".
        when: Field of `Frequency` that says how often; "" for every step.
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
        if self.way == "all-reduce":
            return (
                handling
                + 2 * (ranks - 1) / ranks * self.size / link.bandwidth
                + 2 * hops * link.latency
            )
        return handling + self.size / link.bandwidth + hops * link.latency


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
        holding = set(share.gradient_workers)
        outside = [rank for rank in everyone if rank not in holding]
        for piece, numbers in size.sums.items() if share.inverse_workers else ():
            yield from _reduced(
                "sums",
                "factors",
                numbers,
                share.inverse_workers[piece or min(share.inverse_workers)],
                everyone,
            )
        for name, inverse_workers in share.inverse_workers.items():
            if inverse_workers != everyone:
                visited = everyone if workload.sampled else share.gradient_workers
                yield _sent("decompositions", "basis", size.kept[name], inverse_workers[0], visited)
        if workload.sampled:
            yield from _reduced("moments", "scale", size.moments, share.gradient_workers, everyone)
            yield _sent(
                "decompositions",
                "scale_alone",
                sum(size.kept.values()),
                share.gradient_workers[0],
                outside,
            )
        waiting: dict[int, list[int]] = {}
        for rank in outside:
            waiting.setdefault(share.source(rank), []).append(rank)
        for source, receivers in waiting.items():
            yield _sent("gradients", "", math.prod(work.gradient), source, receivers)


def _reduced(
    kind: str, when: str, size: float, wanting: tuple[int, ...], everyone: tuple[int, ...]
) -> Iterator[Message]:
    if wanting == everyone:
        yield Message(kind, when, "all-reduce", everyone, size)
        return
    yield Message(kind, when, "reduce", everyone, size, wanting[0])
    yield Message(kind, when, "broadcast", wanting, size, wanting[0])


def _sent(kind: str, when: str, size: float, source: int, receivers: Sequence[int]) -> Message:
    return Message(kind, when, "broadcast", tuple(sorted({source, *receivers})), size, source)


def bytes_a_step(found: list[Message], workload: Workload) -> dict[str, float]:
    """Bytes that messages move in a step on average, all ranks together, by kind."""
    often = Frequency.of(workload)
    moved = dict.fromkeys(("sums", "decompositions", "moments", "gradients"), 0.0)
    for message in found:
        moved[message.kind] += message.moved * (
            getattr(often, message.when) if message.when else 1.0
        )
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
    r"""The least bytes a step that any exchange can do with, on average and all ranks together, by kind.

    Of R ranks h hold a layer and d decompose each of its matrices. Sums of f bytes over R ranks need R - 1 messages to come together in
    one place and one more for each further place; so do the moments of m bytes. Decompositions of b bytes reach h ranks, or all R where
    moments are sampled; preconditioned gradients of v bytes reach the R - h that do not hold:

        sums            (R + d - 2) f / T_factors
        decompositions  (max(h, d) - d) b / T_basis;  sampled:  (R - d) b / T_basis + (R - h) b (1/T_scale - 1/T_basis)
        moments         sampled:  (R + h - 2) m / T_scale
        gradients       (R - h) v

    where 1/T_scale counts the steps in which scale or basis is due.

    Args:
        workload: The work.
        ranks: R.
        gradient_workers: h.
        inverse_workers: d, which are holders, or hold among them.
        sizes: By layer; `None` for what follows from the shapes.
        itemsize: Bytes of a number on the wire; `None` for the workload's.

    Example:
        >>> work = Workload((Work("fc", {"A": (3, 3), "G": (2, 2)}, (2, 3)),), factor_every=1, basis_every=2, sampled=False)
        >>> least_bytes(work, ranks=4, gradient_workers=1)
        {'sums': 108.0, 'decompositions': 0.0, 'moments': 0.0, 'gradients': 72.0}
    """
    sizes = (
        {work.layer: Sizes.of(work, sampled=workload.sampled) for work in workload.works}
        if sizes is None
        else sizes
    )
    itemsize, often = workload.itemsize if itemsize is None else itemsize, Frequency.of(workload)
    f, b, m, v = (
        itemsize * total
        for total in (
            sum(sum(size.sums.values()) for size in sizes.values()),
            sum(sum(size.kept.values()) for size in sizes.values()),
            sum(size.moments for size in sizes.values()),
            sum(math.prod(work.gradient) for work in workload.works),
        )
    )
    reached = (
        ranks if workload.sampled else max(gradient_workers, inverse_workers)
    ) - inverse_workers
    return {
        "sums": (ranks + inverse_workers - 2) * f * often.factors,
        "decompositions": reached * b * often.basis
        + (ranks - gradient_workers) * b * often.scale_alone,
        "moments": (ranks + gradient_workers - 2) * m * often.scale,
        "gradients": float((ranks - gradient_workers) * v),
    }


def is_square(shape: tuple[int, ...]) -> bool:
    """Whether a shape is that of square matrices."""
    return len(shape) > 1 and shape[-1] == shape[-2]
