"""`BlockSet`: the blocks of a model's layers, which follows the model as it changes."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from kfactk.distributed.communicator import Communicator
from kfactk.errors import CombinationError
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.coverage import Candidate, CoveredLayer, ModelSurvey
from kfactk.preconditioner.placement import BlockPlacement
from kfactk.preconditioner.schedule import NOTHING
from kfactk.stages import Layer
from kfactk.timing import StageTimer


class BlockSet:
    """The blocks of one model.

    A block belongs to modules and parameters, whatever the layer's name. A layer of other modules,
    parameters or shapes gets a new block. It stands beside the old one until a step adopts it,
    since a layer may change for one forward only.

    Args:
        survey: Finds the layers.
        placement: Says which rank does what.
        trained: Ids of the parameters that the optimizer trains; the caller keeps it current.
        timer: Times the stages.
    """

    def __init__(
        self,
        survey: ModelSurvey,
        placement: BlockPlacement,
        trained: Container[int],
        timer: StageTimer,
    ) -> None:
        self._survey, self._placement = survey, placement
        self._trained, self._timer = trained, timer
        self._adopted: dict[Hashable, Block] = {}
        self._new: dict[Hashable, Block] = {}
        self._named: Sequence[Candidate] = ()
        self._pruned: Sequence[Candidate] = ()
        self._held: list[Block] | None = None

    def __iter__(self) -> Iterator[Block]:
        """Yield the adopted blocks, those of layers that are frozen for now included."""
        return iter(self._adopted.values())

    def current(self) -> list[Block]:
        """Return the blocks of the layers that are covered now, in the model's order."""
        return self._look() if self._held is None else self._held

    def _look(self) -> list[Block]:
        """Follow the model: find or make the block of each layer that is covered now."""
        layers = self._survey.layers(self._trained)
        self._rename()
        found = []
        for layer, rule in layers:
            key = layer.key, id(rule)
            block = self._adopted.get(key) or self._new.get(key)
            if block is None:
                block = Block(layer, rule.curvature, rule.basis, self._timer, pace=rule.pace)
                self._new[key] = block
            found.append(block)
        return found

    def _rename(self) -> None:
        """Give blocks the names that their layers have in the model now."""
        candidates = self._survey.candidates
        if candidates is self._named:
            return
        self._named = candidates
        names = {candidate.place: candidate.name for candidate in candidates}
        moved: dict[str, str] = {}
        for block in [*self._adopted.values(), *self._new.values()]:
            layer = block.layer
            name = names.get((layer.module, layer.part), layer.name)
            if name != layer.name:
                moved[layer.name] = name
                block.layer = attrs.evolve(layer, name=name)
        self._placement.rename(moved)

    def adopt(self, blocks: Sequence[Block]) -> None:
        """Go on with these blocks, and place the new ones; a collective call where there are any.

        Blocks of layers that are frozen for now are kept.

        Args:
            blocks: Those of the layers that are covered now, the same on every rank.
        """
        current = set(blocks)
        new = {key: block for key, block in self._new.items() if block in current}
        self._new.clear()
        if new:
            places = {_place(block) for block in new.values()}
            kept = {k: block for k, block in self._adopted.items() if _place(block) not in places}
            self._adopted = {**kept, **new}
        for block in new.values():
            self._placement.forget(block.name)
        self._placement.extend(blocks)

    @contextlib.contextmanager
    def held(self, groups: Mapping[int, Mapping[str, Any]]) -> Iterator[None]:
        """Surround a step, in which layers and parameters stay the same: look at them once.

        Args:
            groups: The parameter group of each trained parameter, by id; they hold the damping.
        """
        blocks = self._look()
        layers = [block.layer for block in blocks]
        for block, layer in zip(blocks, layers, strict=True):
            assert isinstance(layer, CoveredLayer)
            block.layer = layer.hold()
            block.damping = float(groups[id(block.layer.anchor)]["damping"])
        self._held = blocks
        try:
            yield
        finally:
            self._held = None
            for block, layer in zip(blocks, layers, strict=True):
                block.layer = layer

    def leave(self, layers: Sequence[Layer], reason: str) -> None:
        """Leave these layers alone from now on, also within a step.

        Args:
            layers: The layers.
            reason: Why, for the coverage table.
        """
        self._survey.leave(layers, reason)
        if self._held is not None:
            places = {(layer.module, layer.part) for layer in layers}
            self._held = [block for block in self._held if _place(block) not in places]

    def prune(self) -> None:
        """Drop blocks that no step adopted, and those whose layer is no longer in the model."""
        self._new.clear()
        if self._survey.candidates is not self._pruned:
            self._pruned = self._survey.candidates
            places = {candidate.place for candidate in self._pruned}
            self._adopted = {
                k: block for k, block in self._adopted.items() if _place(block) in places
            }

    def check_ranks(
        self, blocks: Sequence[Block], communicator: Communicator, clock: tuple[Any, ...]
    ) -> None:
        """Check that every rank trains the same layers, and at the same time; a collective call.

        Args:
            blocks: Those of the layers that are covered now.
            communicator: Joins the ranks.
            clock: The step that begins, its `factor_every`, `scale_every` and `basis_every`, and
                the dampings of the blocks; empty between steps.

        Raises:
            CombinationError: They are not the same.
        """
        if communicator.size == 1:
            return
        new = set(self._new.values())
        mine = [_standing(block, new=block in new) for block in blocks]
        if communicator.same(repr((mine, clock))):
            return
        told = {block.name: _told(each) for block, each in zip(blocks, mine, strict=True)}
        reports: list[Any] = communicator.gathered((told, clock))
        for rank, (_, theirs) in enumerate(reports):
            for name, first, other in zip(CLOCK, reports[0][1], theirs, strict=False):
                if first != other:
                    raise CombinationError(
                        f"ranks are not at the same point: {name} is {first} on rank 0 and {other} "
                        f"on rank {rank}. Every rank must call step() equally often, and a period "
                        "or damping that is a function of the step must return the same on all "
                        "ranks."
                    )
        everyone: list[dict[str, str]] = [each for each, _ in reports]
        for rank, theirs in enumerate(everyone):
            for name in {**everyone[0], **theirs}:
                first, other = (each.get(name, "none") for each in (everyone[0], theirs))
                if first != other:
                    raise CombinationError(
                        f"ranks train different parameters of layer {name!r}: {first} on rank 0, "
                        f"{other} on rank {rank}. Freeze, unfreeze, replace and tie parameters on "
                        "all ranks before step()."
                    )
        raise CombinationError(
            "ranks have the same layers in different orders. Build the same model on all ranks."
        )


CLOCK = ("the number of steps taken", "factor_every", "scale_every", "basis_every", "damping")
"""What `check_ranks` compares besides the layers."""


def _place(block: Block) -> tuple[nn.Module, str]:
    return block.layer.module, block.layer.part


def _standing(block: Block, *, new: bool) -> tuple[object, ...]:
    """Return what the messages of a step depend on."""
    state = block.state
    overdue = () if state.overdue == NOTHING else attrs.astuple(state.overdue)
    layer = block.layer
    due = state.pace.due
    return layer.name, layer.parameters, len(layer.sites), new, state.ready, overdue, due


def _told(standing: tuple[Any, ...]) -> str:
    """Return such a standing in words: "weight, bias (new)"."""
    _, parameters, sites, new, ready, overdue, due = standing
    names = ", ".join(parameters) + (f" of {sites} modules" if sites > 1 else "")
    if new:
        return f"{names} (new)"
    paced = f", due at step {due}" if due else ""
    return f"{names} ({'' if ready else 'not '}measured{', overdue' if overdue else ''}{paced})"
