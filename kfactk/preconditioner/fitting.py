"""Whether a saved state is this layer's, and what of it belongs to this rank."""

from __future__ import annotations

from kfactk.errors import StateError
from kfactk.preconditioner.block import Blocks, parts_of
from kfactk.preconditioner.placement import BlockPlacement
from kfactk.preconditioner.state import BlockState
from kfactk.stages import Layer


def checked_state(
    layer: Layer, state: BlockState, blocks: Blocks, places: BlockPlacement, rank: int
) -> BlockState:
    """The state with what this rank keeps and holds, whatever the placement it was saved under.

    Args:
        layer: The layer.
        state: Its state, as it was saved; changed in place.
        blocks: The stages: they tell shapes.
        places: Who keeps and holds what.
        rank: This one.

    Raises:
        StateError: It is another layer's or another recipe's, or lacks what this rank needs.
    """
    name = layer.name
    state.factors = {
        factor: mean
        for factor, mean in state.factors.items()
        if rank in places.factor_workers(name, factor)
    }
    if not places.holds(name):
        state.decomposition, state.moments = {}, {}
    if not state.ready and not state.allocated:
        return state  # it had not run yet
    _, sums = blocks.blank(layer)
    totals = {
        factor: s.total
        for factor, s in sums.items()
        if s.total is not None and rank in places.factor_workers(name, factor)
    }
    expected = {factor: tuple(total.shape) for factor, total in totals.items()}
    found = {factor: tuple(value.shape) for factor, value in state.factor_values().items()}
    parts, wanted = parts_of(state.decomposition), blocks.blank_parts(layer, sums)
    lacks_parts = state.ready and places.holds(name) and not parts
    if found.items() <= expected.items() and (found != expected or lacks_parts):
        lacking = [
            *(factor for factor in expected if factor not in found),
            *(["its decomposition"] if lacks_parts else []),
        ]
        raise StateError(
            f"the saved state lacks curvature of layer {name!r} that rank {rank} needs ({', '.join(lacking)}): it is one rank's part of a "
            "state that several ranks shared. Save all of it: by torch.distributed.checkpoint on all ranks, or by state_dict() after "
            "optimizer.consolidate_state_dict() on all ranks."
        )
    if found != expected or (parts and parts != wanted):
        raise StateError(
            f"the saved curvature of layer {name!r} does not fit: factors {found} decomposed as {parts}, where this "
            f"recipe and model have {expected} and {wanted}. Bind the recipe it was saved with, or load "
            "only the update rule's part."
        )
    return state
