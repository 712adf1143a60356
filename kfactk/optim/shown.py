"""What an optimizer shows of its curvature in `state`, beside the update rule's entries."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import attrs
from torch import Tensor

from kfactk.errors import KfactkWarning
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.state import STEP, is_ours

Groups = Sequence[Mapping[str, Any]]
Entries = MutableMapping[Any, Any]


@attrs.frozen(eq=False)
class Removed:
    """What was taken out of `state` since it was shown.

    Args:
        parameters: The parameters whose entries are gone.
        blocks: Their blocks.
        everything: Whether nothing is left of what was shown.
    """

    parameters: Sequence[Any]
    blocks: Sequence[Block]
    everything: bool


class ShownState:
    """The curvature entries in an optimizer's `state`.

    An optimizer and its update rule have one `state`, so that neither misses what is written to
    it. The rule never sees curvature: its entries are hidden while the rule reads or steps.
    """

    def __init__(self) -> None:
        self._shown: dict[Any, dict[str, Tensor]] = {}
        self._blocks: dict[Any, list[Block]] = {}
        self._warned = False

    def show(self, state: Entries, groups: Groups, blocks: Sequence[Block], step: Tensor) -> None:
        """Bring the entries up to date; they are the tensors themselves.

        Args:
            state: To be changed.
            groups: The parameter groups.
            blocks: Their curvature is shown under their anchors.
            step: Number of steps taken.
        """
        if self._shown:
            self.hide(state)
        flat = flat_by_anchor(blocks)
        for block in blocks:
            self._blocks.setdefault(block.layer.anchor, []).append(block)
        for group in groups:
            for parameter in group["params"]:
                if parameter not in state and parameter.requires_grad:
                    state[parameter] = {}
                entry = state.get(parameter)
                if isinstance(entry, MutableMapping):
                    mine = {STEP: step, **flat.get(id(parameter), {})}
                    entry.update(mine)
                    self._shown[parameter] = mine

    def hide(self, state: Entries) -> bool:
        """Take all curvature out of `state`; warn once where the user has written to it.

        Returns:
            Whether anything was shown.
        """
        shown = bool(self._shown)
        written: dict[str, None] = {}
        for parameter, entry in list(state.items()):
            if not isinstance(entry, MutableMapping):
                continue
            mine = self._shown.get(parameter, {})
            ours = [key for key in entry if is_ours(key)]
            for key in ours:
                if entry.pop(key) is not mine.get(key):
                    written[key] = None
            if ours and not entry:
                del state[parameter]
        self._shown, self._blocks = {}, {}
        if written and not self._warned:
            self._warned = True
            warnings.warn(
                f"optimizer.state was given other values of {', '.join(sorted(written)[:3])}. "
                "They are not used: curvature goes on as it was measured. Load curvature by "
                "load_state_dict, or remove a parameter's whole entry to measure it anew (said "
                "once)",
                KfactkWarning,
                stacklevel=4,
            )
        return shown

    def removed(self, state: Entries) -> Removed:
        """Return whose entries were emptied, replaced or taken out since they were shown."""
        gone = [parameter for parameter in self._shown if not _has_step(state.get(parameter))]
        blocks = [block for parameter in gone for block in self._blocks.get(parameter, ())]
        everything = bool(gone) and not any(map(_has_step, state.values()))
        return Removed(gone, blocks, everything)

    def forget(self, removed: Removed) -> None:
        """Go on without what was removed."""
        for parameter in removed.parameters:
            self._shown.pop(parameter, None)
            self._blocks.pop(parameter, None)

    def move(self, state: Entries, replaced: Mapping[Any, Any]) -> None:
        """Move entries to the parameters that have come in place of theirs.

        Args:
            state: To be changed.
            replaced: By the old parameter, the new one.
        """
        for old, new in replaced.items():
            if old in state:
                state[new] = state.pop(old)
            if old in self._shown:
                self._shown[new] = self._shown.pop(old)
                self._blocks[new] = self._blocks.pop(old, [])


def flat_by_anchor(blocks: Sequence[Block]) -> dict[int, dict[str, Tensor]]:
    """Return the blocks' curvature entries by the id of the parameter that they stand under."""
    flat: dict[int, dict[str, Tensor]] = {}
    for block in blocks:
        flat.setdefault(id(block.layer.anchor), {}).update(block.flat())
    return flat


def _has_step(entry: Any) -> bool:
    return isinstance(entry, Mapping) and STEP in entry
