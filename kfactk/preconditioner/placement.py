"""The placement's answer as one rank sees it: what it keeps, holds and receives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch

from kfactk.assignment import Assignment, Share, Work, Workload
from kfactk.distributed.communicator import Communicator, Members
from kfactk.errors import KfactkError, PluginError, StateError
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.schedule import UpdateSchedule
from kfactk.samples import working_dtype
from kfactk.stages import Placement
from kfactk.statistics import split_key
from kfactk.validation import attribute_errors, stage_label

ALONE = Assignment("alone", {}, "one process does everything")


def workload_of(blocks: Sequence[Block], schedule: UpdateSchedule) -> Workload:
    """Return the work of some blocks, at least one, with what it depends on."""
    anchors = [block.layer.anchor for block in blocks]
    return Workload(
        tuple(block.work() for block in blocks),
        *schedule.periods(0),
        sampled=any(block.sampled for block in blocks),
        itemsize=max(working_dtype(anchor.dtype).itemsize for anchor in anchors),
        device=anchors[0].device.type,
    )


class BlockPlacement:
    """Which rank does what: decided once, and extended when new blocks appear.

    Args:
        placement: The stage.
        communicator: The ranks that there are.
        schedule: Tells how often work comes.
    """

    def __init__(
        self, placement: Placement, communicator: Communicator, schedule: UpdateSchedule
    ) -> None:
        self._placement, self._communicator = placement, communicator
        self._schedule = schedule
        self._works: dict[str, Work] = {}
        self.assignment = ALONE

    def knows(self, layer: str) -> bool:
        """Return whether a layer has a place."""
        return self._communicator.size == 1 or layer in self.assignment.shares

    def extend(self, blocks: Sequence[Block]) -> None:
        """Place the blocks that have no place; a collective call where there is one."""
        new = [block for block in blocks if not self.knows(block.name)]
        if not new:
            return
        workload = workload_of(new, self._schedule)
        if not self._communicator.same(repr(workload.works)):
            raise StateError(
                "ranks disagree on the layers of the model: their names or shapes differ. Each "
                "rank must hold the same model, bound in the same way, with the same parameters "
                "trained. Where memory is short, divide the model by fully_shard."
            )
        found = self._answer(workload)
        reason = found.reason if self.assignment is ALONE else self.assignment.reason
        self._works |= {work.layer: work for work in workload.works}
        shares = {**self.assignment.shares, **found.shares}
        self.assignment = Assignment(found.strategy, shares, reason)
        self._communicator.prepare(
            group for share in found.shares.values() for group in self._groups(share)
        )

    def rename(self, names: Mapping[str, str]) -> None:
        """Let the places of layers follow to the names that they have now.

        Args:
            names: The new name by the old one.
        """
        shares = dict(self.assignment.shares)
        moved = {name: shares.pop(old) for old, name in names.items() if old in shares}
        works = {name: self._works.pop(old) for old, name in names.items() if old in self._works}
        for name in names.values():  # whose layer was there is gone
            shares.pop(name, None)
            self._works.pop(name, None)
        self._works |= works
        self._set_shares({**shares, **moved})

    def forget(self, layer: str) -> None:
        """Drop the place of a layer that was replaced by one of other shapes."""
        shares = dict(self.assignment.shares)
        if shares.pop(layer, None) is not None:
            del self._works[layer]
            self._set_shares(shares)

    def _set_shares(self, shares: Mapping[str, Share]) -> None:
        if self.assignment is not ALONE:
            self.assignment = attrs.evolve(self.assignment, shares=shares)

    def _answer(self, workload: Workload) -> Assignment:
        """Return the stage's answer, where it is the same on every rank; a collective call."""
        found, fault, size = ALONE, None, self._communicator.size
        try:
            with attribute_errors("placement", self._placement, "dividing the work"):
                found = self._placement.assign(workload, size).check(workload, size)
        except KfactkError as error:
            fault = error
        told = sorted(
            (name, sorted(share.inverse_workers.items()), share.gradient_workers)
            for name, share in found.shares.items()
        )
        same = self._communicator.same(repr(told) if fault is None else str(fault))
        if fault is not None:
            raise fault
        if not same:
            raise PluginError(
                f"{stage_label('placement', self._placement)} divided the same work differently on "
                "another rank. Its answer may depend on its arguments alone. Give each rank the "
                "same options; else report it to its authors, or use another placement."
            )
        return found

    def _groups(self, share: Share) -> list[Members]:
        """Return the groups of ranks that messages about one layer travel in."""
        everyone, workers = self._communicator.everyone, share.gradient_workers
        outside = tuple(rank for rank in everyone if rank not in workers)
        inverse = list(share.inverse_workers.values())
        carried = [_union([ranks[:1], workers]) for ranks in inverse if len(ranks) < len(everyone)]
        heard = [self.receivers(share, worker) for worker in workers]
        return [*inverse, workers, *carried, *heard, _union([workers[:1], outside])]

    def summary(self) -> dict[str, Any]:
        """Return what was decided, for the record; nothing in a single process."""
        found = self.assignment
        if found is ALONE:
            return {}
        ranks = self._communicator.size
        told = {"strategy": found.strategy, "ranks": ranks, "reason": found.reason}
        return {"assignment": told}

    def shapes(self, layer: str) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of a layer's matrices."""
        return self._works[layer].matrices

    def gradient(self, layer: str) -> tuple[int, ...]:
        """Return the shape of a layer's gradient as a matrix."""
        return self._works[layer].gradient

    def share(self, layer: str) -> Share:
        """Return who shares a layer's work."""
        return self.assignment.shares[layer]

    def factor_workers(self, layer: str, factor: str) -> Members:
        """Return the ranks that keep one averaged factor.

        They are those that decompose the matrix of its name, or any matrix of the layer.
        """
        if self._communicator.size == 1:
            return (0,)
        workers = self.share(layer).inverse_workers
        return workers[factor] if factor in workers else _union(workers.values())

    def wanted(self, key: str) -> Members:
        """Return the ranks that want a sum: those that keep the factor, or use the moments."""
        layer, rest = split_key(key)
        kind, _, name = rest.partition(".")
        if kind == "factor":
            return self.factor_workers(layer, name)
        return self.gradient_workers(layer)

    def decomposed_here(self, block: Block) -> frozenset[str]:
        """Return the matrices of a block that this rank decomposes."""
        if self._communicator.size == 1:
            return block.requires
        rank, workers = self._communicator.rank, self.share(block.name).inverse_workers
        return frozenset(name for name, ranks in workers.items() if rank in ranks)

    def decomposes(self, layer: str) -> bool:
        """Return whether this rank averages and decomposes any matrix of a layer."""
        if self._communicator.size == 1:
            return True
        workers = self.share(layer).inverse_workers
        return any(self._communicator.rank in ranks for ranks in workers.values())

    def gradient_workers(self, layer: str) -> Members:
        """Return the ranks that precondition a layer's gradient."""
        return (0,) if self._communicator.size == 1 else self.share(layer).gradient_workers

    def holds(self, layer: str) -> bool:
        """Return whether this rank preconditions a layer's gradient."""
        return self._communicator.rank in self.gradient_workers(layer)

    def everywhere(self, layer: str) -> bool:
        """Return whether every rank preconditions a layer's gradient; a new layer's is not."""
        size = self._communicator.size
        return size == 1 or (self.knows(layer) and len(self.gradient_workers(layer)) == size)

    def divided(self, layer: str) -> bool:
        """Return whether decompositions of a layer travel, or can fail on one rank alone."""
        size = self._communicator.size
        if size == 1:
            return False
        return any(len(ranks) < size for ranks in self.share(layer).inverse_workers.values())

    def apart(self, layer: str) -> bool:
        """Return whether different ranks decompose a layer's matrices."""
        if self._communicator.size == 1:
            return False
        return len(set(self.share(layer).inverse_workers.values())) > 1

    def receivers(self, share: Share, worker: int) -> Members:
        """Return a gradient worker and the ranks it sends preconditioned gradients to."""
        outside = (r for r in self._communicator.everyone if r not in share.gradient_workers)
        return tuple(sorted({worker, *(rank for rank in outside if share.source(rank) == worker)}))

    def routes(
        self, layer: str, *, refreshed: bool, visiting: bool
    ) -> dict[str, tuple[int, Members]]:
        """Return, for each matrix whose decomposition travels, its source and all that take part.

        Args:
            layer: The layer.
            refreshed: Whether it was just decomposed. Its decomposition is then on its inverse
                workers, otherwise on its gradient workers.
            visiting: Whether every rank needs it, for samples of its own.
        """
        if self._communicator.size == 1:
            return {}
        share, found = self.share(layer), {}
        everyone, workers = self._communicator.everyone, share.gradient_workers
        for name, inverse in share.inverse_workers.items():
            if refreshed and len(inverse) == len(everyone):
                continue
            source = inverse[0] if refreshed else workers[0]
            outside = [rank for rank in everyone if refreshed or rank not in workers]
            members = tuple(sorted({source, *(outside if visiting else workers)}))
            if len(members) > 1:
                found[name] = source, members
        return found


def device_of(blocks: Iterable[Block]) -> torch.device:
    """Return the device of the first block's parameters; the CPU without blocks."""
    return next((block.layer.anchor.device for block in blocks), torch.device("cpu"))


def _union(groups: Iterable[Members]) -> Members:
    return tuple(sorted({rank for group in groups for rank in group}))
