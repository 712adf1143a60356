"""Saved states of one block: room for them, and what of them fits a layer, a recipe and a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfactk.errors import StateError
from kfactk.preconditioner.block import Block, parts_of, zeros_of
from kfactk.preconditioner.damage import Damage
from kfactk.preconditioner.forms import check_forms, precise
from kfactk.preconditioner.gradient_mean import MEAN, TURNED
from kfactk.preconditioner.pace_state import PaceState
from kfactk.preconditioner.state import PREFIX, BlockState
from kfactk.samples import Statistic
from kfactk.sides import is_diagonal
from kfactk.stages import Tensors
from kfactk.statistics import RunningMean


def allocate(block: Block, factor_names: frozenset[str], *, holds: bool, averages: bool) -> None:
    """Create the tensors without data, so that a checkpoint can be loaded into them.

    Args:
        block: The block.
        factor_names: The factors that this rank keeps.
        holds: Whether this rank preconditions the layer.
        averages: Whether the gradient is averaged.
    """
    sums, state = block.blank_factors(), block.state
    state.factors = {n: _empty(s) for n, s in sums.items() if n in factor_names}
    state.gradients, state.moments = {}, {}
    if block.keeps and not block.measures_nothing:
        state.pace = PaceState.blank(state.factor_values(), block.keeps)
    if holds and not block.measures_nothing:
        blank = block.matrices(factors=zeros_of(sums))
        state.decomposition = block.decompose(block.damping, blank)
    complete(block, averages=averages)
    block.invalidate()


def complete(block: Block, *, averages: bool) -> None:
    """Create the running means that a block has from its first whole step on, where it has none.

    So a checkpoint holds the same tensors after every step.

    Args:
        block: The block; it has its decomposition, where this rank keeps one.
        averages: Whether the gradient is averaged.
    """
    state = block.state
    if averages:
        state.gradients.setdefault(MEAN, RunningMean(block.matrix({}), 0.0))
    if not state.decomposition:
        return
    for name, blank in block.blank_moments(state.decomposition).items():
        state.moments.setdefault(name, _empty(blank))
    if averages and block.moments_of_gradient and TURNED not in state.gradients:
        turned = block.coordinates(block.matrix({}))
        if turned is not None:
            state.gradients[TURNED] = RunningMean(turned, 0.0)


def fitted(
    block: Block,
    state: BlockState,
    factor_names: frozenset[str],
    *,
    holds: bool,
    averages: bool = False,
    damage: Damage | None = None,
) -> BlockState:
    """Return what this rank keeps of a saved state, whatever placement it was saved under.

    Args:
        block: The block.
        state: The saved state; changed in place.
        factor_names: The factors that this rank keeps.
        holds: Whether this rank preconditions the layer.
        averages: Whether the gradient is averaged.
        damage: Receives what is found when the tensors' values are read; without it, that is
            raised here.

    Raises:
        StateError: It is another layer's or another recipe's, or lacks what this rank needs.
    """
    sums = block.blank_factors()
    elsewhere = sums.keys() - factor_names
    state.factors = {n: mean for n, mean in state.factors.items() if n not in elsewhere}
    if not holds:
        state.decomposition, state.moments = {}, {}
    means = {MEAN, TURNED} if holds else {MEAN}
    _fit_gradients(block, state, means if averages else set())
    state.pace = state.pace.fitted(block.keeps, factor_names)
    if not state.ready and not (state.factors or state.decomposition):
        return state  # the layer had not run yet
    totals = {n: s.total for n, s in sums.items() if s.total is not None}
    expected = {n: _fixed(block, n, total) for n, total in totals.items() if n in factor_names}
    found = {name: _fixed(block, name, value) for name, value in state.factor_values().items()}
    matrices = block.matrices(factors=zeros_of(sums))
    parts, wanted = parts_of(state.decomposition), block.parts_of_corners(matrices)
    lacks_parts = state.ready and holds and not parts
    mine = found.items() <= expected.items() and set(parts) <= set(wanted)
    if mine and (found != expected or lacks_parts):
        lacking = [name for name in expected if name not in found]
        lacking += ["its decomposition"] if lacks_parts else []
        raise StateError(
            f"the saved state lacks curvature of layer {block.name!r} that this rank needs "
            f"({', '.join(lacking)}): it is one rank's part of a state that several ranks "
            "shared. Save all of it: by torch.distributed.checkpoint on all ranks, or by "
            "state_dict() after optimizer.consolidate_state_dict() on all ranks."
        )
    if found != expected or (parts and parts != wanted):
        raise StateError(
            f"the saved curvature of layer {block.name!r} does not fit: factors {found} "
            f"decomposed as {parts}, where this recipe and model have {expected} and {wanted}. "
            "Bind the recipe it was saved with, or load only the update rule's part."
        )
    found_damage = Damage() if damage is None else damage
    _check_forms(block, state, sums, matrices, found_damage)
    _check_pace(block, state, expected, found_damage)
    _fit_ahead(block, state, matrices, wanted, found_damage)
    if damage is None:
        found_damage.refuse()
    return state


def _check_pace(
    block: Block, state: BlockState, expected: Mapping[str, tuple[int, ...]], damage: Damage
) -> None:
    """Check that a saved state has the factors that its next refresh is compared with."""
    layer, pace = f"of layer {block.name!r}", state.pace
    if 0 in pace.intervals[: len(pace.known_intervals) or 1]:
        damage.note(f"kfactk.pace.interval.0 {layer} is not there")
    for place, values in enumerate(pace.values):
        found = {name: tuple(value.shape) for name, value in values.items()}
        if found != expected:
            damage.note(
                f"kfactk.pace.value.{place} {layer} has the factors {found}, where this recipe "
                f"and model have {expected}"
            )
        for name, value in values.items():
            precise(f"{PREFIX}pace.value.{place}.{name} {layer}", value, damage)


def _fit_ahead(
    block: Block, state: BlockState, matrices: Tensors, wanted: Sequence[str], damage: Damage
) -> None:
    """Drop a saved decomposition that waits, where this recipe has others; check its values.

    A lag may have changed, and the placement: the block is then decomposed when it is due.
    """
    parts = {} if state.ahead is None else state.ahead.parts()
    if not set(parts_of(parts)) <= set(wanted):
        state.ahead = None
    elif parts:
        layer = f" of layer {block.name!r}"
        check_forms(block.basis, parts, {}, matrices, (), layer, damage, kind="ahead")


def _fit_gradients(block: Block, state: BlockState, wanted: set[str]) -> None:
    """Drop saved means of gradients that are not wanted here; check the shape of others."""
    state.gradients = {n: each for n, each in state.gradients.items() if n in wanted}
    expected = tuple(block.matrix({}).shape) if state.gradients else ()
    for mean in state.gradients.values():
        if mean.value is not None and tuple(mean.value.shape) != expected:
            raise StateError(
                f"the saved mean of the gradients of layer {block.name!r} has the shape "
                f"{tuple(mean.value.shape)}, where this model has {expected}. Bind the recipe "
                "it was saved with, or load only the update rule's part."
            )


def _check_forms(
    block: Block,
    state: BlockState,
    sums: Mapping[str, Statistic],
    matrices: Tensors,
    damage: Damage,
) -> None:
    """Check shapes, dtypes and values of a saved state whose names are known to fit."""
    layer, factors = f" of layer {block.name!r}", state.factor_values()
    made = {each.total.dtype for each in sums.values() if each.total is not None}
    if len({value.dtype for value in factors.values()}) > len(made):
        damage.note(f"the factors{layer} have several dtypes")
    for name, value in factors.items():
        where = f"{PREFIX}factor.{name}{layer}"
        if not precise(where, value, damage):
            continue
        if sums[name].symmetric:
            damage.check_form(where, value, "semidefinite")
        elif is_diagonal(name):
            damage.check_form(where, value, "nonnegative")
    check_forms(
        block.basis,
        state.decomposition,
        {name: mean.value for name, mean in state.moments.items() if mean.value is not None},
        matrices,
        tuple(block.matrix({}).shape) if state.moments else (),
        layer,
        damage,
    )


def _fixed(block: Block, name: str, value: Tensor) -> tuple[int, ...]:
    """Return the part of a factor's shape that does not follow the data."""
    return tuple(value.shape[2:] if name in block.curvature.row_factors else value.shape)


def _empty(statistic: Statistic) -> RunningMean:
    total = statistic.total
    return RunningMean(None if total is None else torch.zeros_like(total), 0.0)
