"""Who does what: a layer's work by its shapes, and the ranks that share it. Pure: no process, no tensor.

The work of a layer has parts that may lie on different ranks (KAISA's terms in brackets):

    keeping and decomposing each of its matrices, A and G apart    its *decomposers*  [inverse workers]
    preconditioning its gradient in every step                     its *holders*      [gradient workers]

Every rank that is no holder is sent the preconditioned gradient by one of them. Known strategies are choices of these:

    replicated   decomposers all,  holders all         no message but the sums
    comm_opt     decomposers one,  holders all         decompositions travel, gradients do not
    mem_opt      decomposers one,  holders that one    gradients travel, nothing is held twice
    hybrid       decomposers one of a group of holders; each group is one gradient-worker fraction of the ranks

References:
    Pauloski et al. 2021, "KAISA: An Adaptive Second-Order Optimizer Framework for Deep Neural Networks", arXiv:2107.01739.
    Pauloski et al. 2020, "Convolutional Neural Network Training with Distributed K-FAC", arXiv:2007.00784.
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
    """One layer's work.

    Args:
        layer: The layer's name.
        matrices: Shapes `(..., n, m)` of the matrices its basis decomposes, by name.
        gradient: Shape `(..., d_out, d_in)` of its gradient as a matrix.
        together: Whether its matrices cannot be kept apart, because they are made of common statistics.
    """

    layer: str
    matrices: Mapping[str, tuple[int, ...]]
    gradient: tuple[int, ...]
    together: bool = False

    def flops(self, name: str) -> float:
        """Order of the operations that decomposing one matrix takes: n^3 for each square one, and its size for any other."""
        shape = self.matrices[name]
        return math.prod(shape) * (shape[-1] if is_square(shape) else 1)

    @property
    def cost(self) -> float:
        """The `flops` of all its matrices."""
        return sum(self.flops(name) for name in self.matrices)

    def units(self) -> dict[tuple[str, str], float]:
        """What can be placed on its own, (layer, matrix) or (layer, "") for all its matrices, with its `flops`."""
        each = {(self.layer, name): float(self.flops(name)) for name in sorted(self.matrices)}
        return {(self.layer, ""): sum(each.values())} if self.together else each


@attrs.frozen
class Workload:
    """The work of all layers, and how often it comes.

    Args:
        works: One for each layer, in the model's order.
        factor_every: Steps between refreshes of the factors, at the first step where that varies; so are the next two.
        scale_every: Steps between refreshes of the scale.
        basis_every: Steps between decompositions.
        sampled: Whether moments are measured on every rank's samples, for which decompositions must visit every rank.
        itemsize: Bytes of a number.
        device: Type of the device that the parameters are on.
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
    """The ranks that share one layer's work. Ranks ascend and count from 0 within the process group.

    Args:
        inverse_workers: For each matrix, the ranks that keep and decompose it; the first one sends it to holders that are not among them.
        gradient_workers: The ranks that keep its decompositions and moments, and precondition its gradient.
    """

    inverse_workers: Mapping[str, tuple[int, ...]]
    gradient_workers: tuple[int, ...]

    def source(self, rank: int) -> int:
        """The holder that gives `rank` the preconditioned gradient: itself if it is one.

        Example:
            >>> share = Share({"A": (2,), "G": (3,)}, gradient_workers=(2, 3))
            >>> [share.source(rank) for rank in range(4)]
            [2, 3, 2, 3]
        """
        workers = self.gradient_workers
        return rank if rank in workers else workers[rank % len(workers)]


@attrs.frozen
class Assignment:
    """What a placement answers.

    Args:
        strategy: Name of what was chosen, such as "mem_opt".
        shares: By layer.
        reason: Why, for a reader.

    Example:
        >>> print(Assignment("mem_opt", {"fc": Share({"A": (1,), "G": (1,)}, (1,))}, "each layer belongs to one rank"))
        mem_opt: each layer belongs to one rank
        layer  decomposed by  held by
        fc     A 1, G 1       1
    """

    strategy: str
    shares: Mapping[str, Share]
    reason: str = ""

    def __str__(self) -> str:
        rows = [("layer", "decomposed by", "held by")]
        for layer, share in self.shares.items():
            each = (f"{m} {_span(ranks)}" for m, ranks in sorted(share.inverse_workers.items()))
            rows.append((layer or "(root)", ", ".join(each), _span(share.gradient_workers)))
        first, second = (max(len(row[column]) for row in rows) for column in range(2))
        table = [f"{row[0]:<{first}}  {row[1]:<{second}}  {row[2]}" for row in rows]
        head = f"{self.strategy}: {self.reason}" if self.reason else self.strategy
        return "\n".join([head, *table] if self.shares else [head])

    def check(self, workload: Workload, ranks: int) -> Assignment:
        """Itself, if every piece of the work has ranks that exist.

        Raises:
            PluginError: A layer or matrix has no rank, or ranks that cannot be; says which.
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
        if share is None or set(share.inverse_workers) != set(work.matrices):
            matrices = ", ".join(sorted(work.matrices))
            return f"left work of {layer} to nobody: {share}, where its matrices are {matrices}"
        for group in (*share.inverse_workers.values(), share.gradient_workers):
            ascending = list(group) == sorted(set(group))
            if not (group and ascending and 0 <= group[0] <= group[-1] < ranks):
                return (
                    f"gave work of {layer} to the ranks {group}; "
                    f"they must ascend and lie between 0 and {ranks - 1}"
                )
        if work.together and len(set(share.inverse_workers.values())) > 1:
            return f"divided the matrices of {layer}, which are made of common statistics"
        return ""


def is_square(shape: tuple[int, ...]) -> bool:
    """Return whether a shape is that of square matrices."""
    return len(shape) > 1 and shape[-1] == shape[-2]


def _span(ranks: tuple[int, ...]) -> str:
    """Ranks in words: "2", "0, 3", "0-7"."""
    together = len(ranks) > 2 and ranks == tuple(range(ranks[0], ranks[-1] + 1))
    return f"{ranks[0]}-{ranks[-1]}" if together else ", ".join(map(str, ranks))


def balance(costs: Mapping[Key, float], bins: Iterable[int]) -> dict[Key, int]:
    """Divide pieces of work among bins: the longest first, each to the least loaded bin, the first one among equals.

    The largest load is at most 4/3 of the least possible.

    Args:
        costs: Of each piece; the order of pieces of equal cost counts.
        bins: Numbers of the bins.

    Example:
        >>> balance({"a": 1.0, "b": 5.0, "c": 3.0, "d": 3.0}, range(2))
        {'b': 0, 'c': 1, 'd': 1, 'a': 0}

    References:
        Graham 1969, "Bounds on Multiprocessing Timing Anomalies".
    """
    loads = dict.fromkeys(bins, 0.0)
    placed = {}
    for piece in sorted(costs, key=lambda piece: -costs[piece]):
        least = min(loads, key=lambda number: loads[number])
        placed[piece] = least
        loads[least] += costs[piece]
    return placed


def assign_slots(costs: Mapping[Key, float], slots: int) -> dict[Key, int]:
    """Divide pieces of work among turns: those used are evenly spread over those there are, and no more than twice as many as would
    be, were each as dear as the dearest piece. Fewer would let a step bear more, more would leave less for several ranks to do at a time.

    Args:
        costs: Of each piece.
        slots: How many there are.

    Example:
        >>> assign_slots({"a": 1.0, "b": 5.0, "c": 3.0, "d": 1.0}, 80)
        {'b': 0, 'c': 20, 'a': 40, 'd': 60}
    """
    dearest = max(costs.values(), default=0.0)
    wanted = min(slots, 2 * math.ceil(sum(costs.values()) / dearest)) if dearest else 1
    return {piece: slot * slots // wanted for piece, slot in balance(costs, range(wanted)).items()}


def late_layers(works: Sequence[Work]) -> frozenset[str]:
    """The layers that share a Fisher pass, where two passes share the load: those nearest the output.

    Their pass is the shorter one, since it ends at the first of them; so they are as many as it takes to have nine tenths of what it
    takes to rotate the gradients of an example, but never all.

    Args:
        works: Of all layers, in the model's order.

    Example:
        >>> works = [Work(name, {}, (4, 4)) for name in "abcd"]
        >>> sorted(late_layers(works))
        ['b', 'c', 'd']
    """
    costs = [math.prod(work.gradient) * sum(work.gradient[-2:]) for work in works]
    late: list[int] = []
    while len(late) < len(works) - 1 and 10 * sum(costs[place] for place in late) < 9 * sum(costs):
        late.append(len(works) - 1 - len(late))
    return frozenset(works[place].layer for place in late)


def grid(
    workload: Workload,
    ranks: int,
    width: int,
    strategy: str,
    reason: str = "",
    *,
    everyone: bool = False,
) -> Assignment:
    """Ranks in rows of `width`: a layer belongs to one row, whose ranks hold it, and each of its matrices to one rank of that row.

    Args:
        workload: The work.
        ranks: Number of ranks.
        width: Ranks in a row; divides `ranks`.
        strategy: What to call the result.
        reason: Why, for a reader.
        everyone: Whether all ranks of the row keep and decompose each matrix, rather than one of them.

    Example:
        >>> work = Work("fc", {"A": (3, 3), "G": (2, 2)}, (2, 3))
        >>> grid(Workload((work,)), ranks=4, width=2, strategy="hybrid").shares["fc"]
        Share(inverse_workers={'A': (0,), 'G': (1,)}, gradient_workers=(0, 1))
    """
    works = {work.layer: work for work in workload.works}
    row_of = balance(
        {name: sum(work.units().values()) for name, work in works.items()}, range(ranks // width)
    )
    worker: dict[tuple[str, str], int] = {}
    for row in range(ranks // width):
        mine = (work for name, work in works.items() if row_of[name] == row)
        units = {unit: cost for work in mine for unit, cost in work.units().items()}
        worker |= balance(units, range(row * width, (row + 1) * width))
    shares = {}
    for name, work in works.items():
        workers = tuple(range(row_of[name] * width, (row_of[name] + 1) * width))
        one = {m: (worker[name, "" if work.together else m],) for m in sorted(work.matrices)}
        shares[name] = Share(dict.fromkeys(one, workers) if everyone else one, workers)
    return Assignment(strategy, shares, reason)
