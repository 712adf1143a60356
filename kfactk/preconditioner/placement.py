"""The placement's answer as one rank sees it: what it keeps, what it holds, and whom it hears from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kfactk.assignment import Assignment, Share, Work, Workload
from kfactk.distributed.communicator import Communicator, Members
from kfactk.errors import KfactkError, PluginError, StateError
from kfactk.preconditioner.block import Blocks
from kfactk.stages import Layer, Placement
from kfactk.statistics import split_key
from kfactk.validation import attribute_errors, stage_label

ALONE = Assignment("alone", {}, "one process does everything")


class BlockPlacement:
    """Who does what, decided once and extended when layers appear that had no place yet.

    Args:
        placement: The stage.
        ranks: The ranks that there are.
        blocks: Tell a layer's work.
        workload: Completes works to a workload.
    """

    def __init__(
        self,
        placement: Placement,
        ranks: Communicator,
        blocks: Blocks,
        workload: Callable[..., Workload],
    ) -> None:
        self._placement, self._ranks, self._blocks, self._workload = (
            placement,
            ranks,
            blocks,
            workload,
        )
        self._works: dict[str, Work] = {}
        self.assignment = ALONE

    def extend(self, layers: Sequence[Layer]) -> None:
        """Give a place to the layers that have none; a collective call where there is one."""
        if self._ranks.size == 1 or all(layer.name in self.assignment.shares for layer in layers):
            return
        new = [layer for layer in layers if layer.name not in self.assignment.shares]
        workload = self._workload(tuple(self._blocks.work(layer) for layer in new))
        if not self._ranks.same(repr(workload.works)):
            raise StateError(
                "ranks disagree on the layers of the model: their names or shapes differ. Each rank must hold the same model, bound in the "
                "same way, with the same parameters trained. Where memory is short, divide the model by fully_shard."
            )
        found = self._answer(workload)
        reason = found.reason if self.assignment is ALONE else self.assignment.reason
        self._works |= {work.layer: work for work in workload.works}
        self.assignment = Assignment(
            found.strategy, {**self.assignment.shares, **found.shares}, reason
        )
        self._ranks.prepare(
            group for share in found.shares.values() for group in self._groups(share)
        )

    def _answer(self, workload: Workload) -> Assignment:
        """What the placement says, if it says the same on every rank; a collective call."""
        found, fault = ALONE, None
        try:
            with attribute_errors("placement", self._placement, "dividing the work"):
                found = self._placement.assign(workload, self._ranks.size).check(
                    workload, self._ranks.size
                )
        except KfactkError as error:
            fault = error
        told = sorted(
            (name, sorted(share.inverse_workers.items()), share.gradient_workers)
            for name, share in found.shares.items()
        )
        same = self._ranks.same(repr(told) if fault is None else str(fault))
        if fault is not None:
            raise fault
        if not same:
            raise PluginError(
                f"{stage_label('placement', self._placement)} divided the same work otherwise on another rank, where its answer may depend on "
                "its arguments alone: give each rank the same options; else report it to its authors, or use another placement."
            )
        return found

    def _groups(self, share: Share) -> list[Members]:
        """The groups that messages about one layer travel in."""
        outside = tuple(rank for rank in self._ranks.everyone if rank not in share.gradient_workers)
        inverse_workers = share.inverse_workers.values()
        carried = [
            _union([found[:1], share.gradient_workers])
            for found in inverse_workers
            if len(found) < self._ranks.size
        ]
        heard = [
            self.receivers(share, gradient_worker) for gradient_worker in share.gradient_workers
        ]
        return [
            *inverse_workers,
            share.gradient_workers,
            *carried,
            *heard,
            _union([share.gradient_workers[:1], outside]),
        ]

    def summary(self) -> dict[str, Any]:
        """What was decided, for the record; nothing when alone."""
        found = self.assignment
        return (
            {}
            if found is ALONE
            else {
                "assignment": {
                    "strategy": found.strategy,
                    "ranks": self._ranks.size,
                    "reason": found.reason,
                }
            }
        )

    def shapes(self, layer: str) -> Mapping[str, tuple[int, ...]]:
        """Shapes of a layer's matrices."""
        return self._works[layer].matrices

    def gradient(self, layer: str) -> tuple[int, ...]:
        """Shape of a layer's gradient as a matrix."""
        return self._works[layer].gradient

    def share(self, layer: str) -> Share:
        """Who shares a layer's work."""
        return self.assignment.shares[layer]

    def factor_workers(self, layer: str, factor: str) -> Members:
        """The ranks that keep one averaged statistic: those that decompose the matrix of its name, or any of them."""
        if self._ranks.size == 1:
            return (0,)
        inverse_workers = self.share(layer).inverse_workers
        return (
            inverse_workers[factor]
            if factor in inverse_workers
            else _union(inverse_workers.values())
        )

    def wanted(self, key: str) -> Members:
        """The ranks that want a sum, by its name: those that keep a factor, or hold moments."""
        layer, rest = split_key(key)
        kind, _, name = rest.partition(".")
        return (
            self.factor_workers(layer, name) if kind == "factor" else self.gradient_workers(layer)
        )

    def decomposed_here(self, layer: str) -> frozenset[str]:
        """The matrices of a layer that this rank decomposes."""
        if self._ranks.size == 1:
            return self._blocks.basis.requires
        return frozenset(
            name
            for name, ranks in self.share(layer).inverse_workers.items()
            if self._ranks.rank in ranks
        )

    def gradient_workers(self, layer: str) -> Members:
        """The ranks that precondition a layer's gradient."""
        return (0,) if self._ranks.size == 1 else self.share(layer).gradient_workers

    def holds(self, layer: str) -> bool:
        """Whether this rank does."""
        return self._ranks.size == 1 or self._ranks.rank in self.share(layer).gradient_workers

    def everywhere(self, layer: str) -> bool:
        """Whether every rank does."""
        size = self._ranks.size
        return size == 1 or len(self.share(layer).gradient_workers) == size

    def divided(self, layer: str) -> bool:
        """Whether decompositions of a layer have to travel, or can fail on one rank alone."""
        return self._ranks.size > 1 and any(
            len(ranks) < self._ranks.size for ranks in self.share(layer).inverse_workers.values()
        )

    def apart(self, layer: str) -> bool:
        """Whether different ranks decompose a layer's matrices."""
        return self._ranks.size > 1 and len(set(self.share(layer).inverse_workers.values())) > 1

    def receivers(self, share: Share, gradient_worker: int) -> Members:
        """A holder and the ranks that it gives preconditioned gradients to."""
        others = (
            rank
            for rank in self._ranks.everyone
            if rank not in share.gradient_workers and share.source(rank) == gradient_worker
        )
        return tuple(sorted({gradient_worker, *others}))

    def routes(
        self, layer: str, *, refreshed: bool, visiting: bool
    ) -> dict[str, tuple[int, Members]]:
        """For each matrix whose decomposition travels: its source, and all that take part.

        Args:
            layer: The layer.
            refreshed: Whether it was just decomposed, and lies with its decomposers; otherwise it lies with the holders.
            visiting: Whether every rank is to see it, for samples of its own.
        """
        if self._ranks.size == 1:
            return {}
        share, found = self.share(layer), {}
        for name, inverse_workers in share.inverse_workers.items():
            if refreshed and len(inverse_workers) == self._ranks.size:
                continue
            source = inverse_workers[0] if refreshed else share.gradient_workers[0]
            outside = [
                rank
                for rank in self._ranks.everyone
                if refreshed or rank not in share.gradient_workers
            ]
            members = tuple(sorted({source, *(outside if visiting else share.gradient_workers)}))
            if len(members) > 1:
                found[name] = source, members
        return found


def _union(groups: Iterable[Members]) -> Members:
    return tuple(sorted({rank for group in groups for rank in group}))
