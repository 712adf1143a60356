"""Which ranks do which work: the work of each layer by its shapes, and the ranks that share it.

Pure: no process, no tensor. The work of a layer has two parts, which may lie on different ranks:

    average and decompose each of its matrices, A and G apart    its *inverse workers*
    precondition its gradient in every step                      its *gradient workers*

Every other rank receives the preconditioned gradient from a gradient worker. Strategies:

    replicated   inverse workers all,  gradient workers all        only sums are exchanged
    comm_opt     inverse workers one,  gradient workers all        decompositions travel
    mem_opt      inverse workers one,  gradient workers that one   gradients travel
    hybrid       inverse workers one of the gradient workers, which are a fraction of the ranks

References:
    Pauloski et al. 2021, "KAISA: An Adaptive Second-Order Optimizer Framework for Deep Neural
    Networks", arXiv:2107.01739.
    Pauloski et al. 2020, "Convolutional Neural Network Training with Distributed K-FAC",
    arXiv:2007.00784.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import attrs

from kfactk.errors import PluginError

Key = TypeVar("Key", bound=Hashable)


@attrs.frozen
class Work:
    """The work of one layer.

    Args:
        layer: The layer's name.
        matrices: Shapes `(..., n, m)` of the matrices that its basis decomposes, by name.
        gradient: Shape `(..., d_out, d_in)` of its gradient as a matrix.
        indivisible: Whether all its matrices must lie on the same ranks, because they are made of
            the same statistics, or others are read beside them.
        of_gradient: Whether its matrices are statistics of the gradient, which all ranks have
            alike: no sums travel.
        beside: Shapes of further matrices that decompositions read, by name. They are averaged
            where the layer's matrices are, and are not decomposed.
        follows: Whether decompositions go on from the last ones. Its inverse workers must then be
            among its gradient workers, which keep these.
    """

    layer: str
    matrices: Mapping[str, tuple[int, ...]]
    gradient: tuple[int, ...]
    indivisible: bool = False
    of_gradient: bool = False
    beside: Mapping[str, tuple[int, ...]] = attrs.field(factory=dict)
    follows: bool = False

    @property
    def joined_by(self) -> str:
        """Why its matrices must lie on the same ranks, as a clause; "" where they need not.

        Example:
            >>> sides = {"A": (3, 3), "G": (2, 2)}
            >>> Work("rnn", sides, (2, 3), indivisible=True, beside={"A_next": (3, 3)}).joined_by
            'the basis reads A_next beside them, which is kept where all of them are'
        """
        if not self.indivisible:
            return ""
        if self.beside:
            verb = "are" if len(self.beside) > 1 else "is"
            return (
                f"the basis reads {', '.join(sorted(self.beside))} beside them, which {verb} kept "
                "where all of them are"
            )
        names = ", ".join(sorted(self.matrices))
        if self.follows:
            return f"the decompositions of {names} read each other"
        return f"the curvature makes {names} of the same statistics"

    def flops(self, name: str) -> float:
        """Return the order of FLOPs to decompose a matrix: n^3 if it is square, else its size."""
        shape = self.matrices[name]
        return math.prod(shape) * (shape[-1] if is_square(shape) else 1)

    @property
    def cost(self) -> float:
        """The sum of `flops` over all matrices."""
        return sum(self.flops(name) for name in self.matrices)

    def pieces(self) -> dict[tuple[str, str], float]:
        """Return the `flops` of each piece that can be placed on its own.

        A piece is (layer, matrix), or (layer, "") for all matrices of an indivisible layer.
        """
        flops = {(self.layer, name): float(self.flops(name)) for name in sorted(self.matrices)}
        return {(self.layer, ""): sum(flops.values())} if self.indivisible else flops


@attrs.frozen
class Workload:
    """The work of all layers, and how often it is due.

    Periods that vary are those of the first step.

    Args:
        works: One for each layer, in the model's order.
        factor_every: Steps between refreshes of the factors.
        scale_every: Steps between refreshes of the scale.
        basis_every: Steps between decompositions.
        sampled: Whether moments are measured on the samples of every rank. Every rank then needs
            the decompositions.
        itemsize: Bytes of a number.
        device: Type of the device that holds the parameters.
    """

    works: tuple[Work, ...]
    factor_every: int = 10
    scale_every: int = 10
    basis_every: int = 100
    sampled: bool = True
    itemsize: int = 4
    device: str = "cpu"


@attrs.frozen
class Share:
    """The ranks that share the work of one layer: ascending, counted within the process group.

    Args:
        inverse_workers: For each matrix, the ranks that average and decompose it. The first one
            sends it to gradient workers that are not among them.
        gradient_workers: The ranks that keep decompositions and moments, and precondition.
    """

    inverse_workers: Mapping[str, tuple[int, ...]]
    gradient_workers: tuple[int, ...]

    def source(self, rank: int) -> int:
        """Return the gradient worker that serves `rank`: itself if it is one.

        Example:
            >>> share = Share({"A": (2,), "G": (3,)}, gradient_workers=(2, 3))
            >>> [share.source(rank) for rank in range(4)]
            [2, 3, 2, 3]
        """
        workers = self.gradient_workers
        return rank if rank in workers else workers[rank % len(workers)]


@attrs.frozen
class Assignment:
    """The answer of a placement.

    Args:
        strategy: Name of the chosen strategy, such as "mem_opt".
        shares: One for each layer, by name.
        reason: Why it was chosen, for a reader.

    Example:
        >>> share = Share({"A": (1,), "G": (1,)}, (1,))
        >>> print(Assignment("mem_opt", {"fc": share}, "one rank each"))
        mem_opt: one rank each
        layer  inverse workers  gradient workers
        fc     A 1, G 1         1
    """

    strategy: str
    shares: Mapping[str, Share]
    reason: str = ""

    def __str__(self) -> str:
        rows = [("layer", "inverse workers", "gradient workers")]
        for layer, share in self.shares.items():
            each = (
                f"{m} {_rank_text(ranks)}" for m, ranks in sorted(share.inverse_workers.items())
            )
            rows.append((layer or "(root)", ", ".join(each), _rank_text(share.gradient_workers)))
        first, second = (max(len(row[column]) for row in rows) for column in range(2))
        table = [f"{row[0]:<{first}}  {row[1]:<{second}}  {row[2]}" for row in rows]
        head = f"{self.strategy}: {self.reason}" if self.reason else self.strategy
        return "\n".join([head, *table] if self.shares else [head])

    def check(self, workload: Workload, ranks: int) -> Assignment:
        """Return the assignment itself if it places the whole workload on ranks that exist.

        Raises:
            PluginError: A layer or matrix has no rank, or a rank that cannot be.
        """
        for work in workload.works:
            if fault := self._fault(work, ranks):
                raise PluginError(
                    f"the placement {self.strategy!r} {fault}. "
                    "Report it to its authors, or use another placement."
                )
        return self

    def _fault(self, work: Work, ranks: int) -> str:
        share, layer = self.shares.get(work.layer), f"layer {work.layer!r}"
        if share is None:
            return f"assigned nothing of {layer}, which is part of the workload"
        given, wanted = set(share.inverse_workers), set(work.matrices)
        if missing := sorted(wanted - given):
            return f"did not assign {', '.join(missing)} of {layer}: it gave {share}"
        if unknown := sorted(given - wanted):
            matrices = ", ".join(sorted(wanted)) or "none"
            return (
                f"assigned {', '.join(unknown)} of {layer}, whose matrices are {matrices}: it gave "
                f"{share}"
            )
        for group in (*share.inverse_workers.values(), share.gradient_workers):
            ascending = list(group) == sorted(set(group))
            if not (group and ascending and 0 <= group[0] <= group[-1] < ranks):
                must = f"they must ascend and lie between 0 and {ranks - 1}"
                return f"assigned {layer} to the ranks {group}; {must}"
        if work.indivisible and len(set(share.inverse_workers.values())) > 1:
            ranks_of = sorted(share.inverse_workers.items())
            told = ", ".join(f"{name} on {_rank_text(group)}" for name, group in ranks_of)
            return f"put matrices of {layer} on different ranks ({told}), but {work.joined_by}"
        inverse = set().union(*share.inverse_workers.values())
        if work.follows and not inverse <= set(share.gradient_workers):
            return (
                f"decomposes the matrices of {layer} on the ranks {tuple(sorted(inverse))} and "
                f"keeps the results on {share.gradient_workers}, but they go on from the last "
                "ones: the ranks that decompose it must be among those that precondition it"
            )
        return ""


def is_square(shape: tuple[int, ...]) -> bool:
    """Return whether a shape is that of square matrices."""
    return len(shape) > 1 and shape[-1] == shape[-2]


def _rank_text(ranks: tuple[int, ...]) -> str:
    """Return ranks as text: "2", "0, 3", "0-7"."""
    contiguous = len(ranks) > 2 and ranks == tuple(range(ranks[0], ranks[-1] + 1))
    return f"{ranks[0]}-{ranks[-1]}" if contiguous else ", ".join(map(str, ranks))


def balance(costs: Mapping[Key, float], bins: Iterable[int]) -> dict[Key, int]:
    """Divide pieces of work among bins, longest first, each to the least loaded bin.

    The largest load is at most 4/3 of the least possible. Ties go to the first bin.

    Args:
        costs: Cost of each piece; pieces of equal cost keep their order.
        bins: Numbers of the bins.

    Example:
        >>> balance({"a": 1.0, "b": 5.0, "c": 3.0, "d": 3.0}, range(2))
        {'b': 0, 'c': 1, 'd': 1, 'a': 0}

    References:
        Graham 1969, "Bounds on Multiprocessing Timing Anomalies".
    """
    loads = dict.fromkeys(bins, 0.0)
    bin_of = {}
    for piece in sorted(costs, key=lambda piece: -costs[piece]):
        least = min(loads, key=lambda number: loads[number])
        bin_of[piece] = least
        loads[least] += costs[piece]
    return bin_of


def assign_slots(costs: Mapping[Key, float], slots: int) -> dict[Key, int]:
    """Divide pieces of work among the slots of a staggered schedule.

    The used slots are evenly spaced, and at most `2 ceil(total cost / largest cost)`. With fewer of
    them a step would cost more; with more of them fewer ranks could work at the same time.

    Args:
        costs: Cost of each piece.
        slots: Number of slots.

    Example:
        >>> assign_slots({"a": 1.0, "b": 5.0, "c": 3.0, "d": 1.0}, 80)
        {'b': 0, 'c': 20, 'a': 40, 'd': 60}
    """
    largest = max(costs.values(), default=0.0)
    used = min(slots, 2 * math.ceil(sum(costs.values()) / largest)) if largest else 1
    return {piece: number * slots // used for piece, number in balance(costs, range(used)).items()}


def layers_near_output(works: Sequence[Work]) -> frozenset[str]:
    """Return the layers of the shorter Fisher pass, where two passes share the load.

    A pass ends at its first layer, so the layers nearest the output make the shorter one. They are
    the fewest with nine tenths of the cost to rotate per-example gradients, but never all layers.

    Args:
        works: Work of all layers, in the model's order.

    Example:
        >>> works = [Work(name, {}, (4, 4)) for name in "abcd"]
        >>> sorted(layers_near_output(works))
        ['b', 'c', 'd']
    """
    costs = [math.prod(work.gradient) * sum(work.gradient[-2:]) for work in works]
    first, reached = len(works), 0
    while first > 1 and 10 * reached < 9 * sum(costs):
        first -= 1
        reached += costs[first]
    return frozenset(work.layer for work in works[first:])


def grid(
    workload: Workload,
    ranks: int,
    width: int,
    strategy: str,
    reason: str = "",
    *,
    everyone: bool = False,
) -> Assignment:
    """Arrange the ranks in rows of `width`, and assign each layer to one row.

    All ranks of the row are the layer's gradient workers; each of its matrices has one of them as
    its inverse worker.

    Args:
        workload: The work.
        ranks: Number of ranks.
        width: Ranks in a row; divides `ranks`.
        strategy: Name of the result.
        reason: Why it was chosen, for a reader.
        everyone: Whether every rank of the row is an inverse worker of each matrix.

    Example:
        >>> work = Work("fc", {"A": (3, 3), "G": (2, 2)}, (2, 3))
        >>> grid(Workload((work,)), ranks=4, width=2, strategy="hybrid").shares["fc"]
        Share(inverse_workers={'A': (0,), 'G': (1,)}, gradient_workers=(0, 1))
    """
    works = {work.layer: work for work in workload.works}
    rows = range(ranks // width)
    row_of = balance({name: work.cost for name, work in works.items()}, rows)
    worker: dict[tuple[str, str], int] = {}
    for row in rows:
        mine = (work for name, work in works.items() if row_of[name] == row)
        pieces = {piece: cost for work in mine for piece, cost in work.pieces().items()}
        worker |= balance(pieces, range(row * width, (row + 1) * width))
    shares = {}
    for name, work in works.items():
        workers = tuple(range(row_of[name] * width, (row_of[name] + 1) * width))
        one = {m: (worker[name, "" if work.indivisible else m],) for m in sorted(work.matrices)}
        shares[name] = Share(dict.fromkeys(one, workers) if everyone else one, workers)
    return Assignment(strategy, shares, reason)
