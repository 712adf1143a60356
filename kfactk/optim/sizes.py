"""What `bind` says of the size of a model's curvature, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch

from kfactk.errors import MemoryExhaustedError
from kfactk.optim.settings import Settings
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.coverage import LARGE_SECONDS, told_bytes, told_seconds
from kfactk.preconditioner.footprint import Footprint, footprint_of, link_footprint
from kfactk.preconditioner.memory import free_bytes, link_peak, local_ranks, peak_bytes
from kfactk.preconditioner.placement import BlockPlacement
from kfactk.sides import LONG, is_diagonal
from kfactk.timing import SOLVER_RATES

SMALL = 2**25
"""Bytes that are not worth a look at shapes."""
SLOW = LARGE_SECONDS
"""Seconds of a decomposition that is worth a warning."""
SHOWN = 4
"""How many layers a message names."""


def check_sizes(blocks: Sequence[Block], placement: BlockPlacement, recipe: Settings) -> str:
    """Check that the curvature of a model fits into memory, and return a warning, or "".

    Where the bytes that are needed, or free, cannot be known, nothing is refused.

    Args:
        blocks: The blocks of the model.
        placement: Which rank does what.
        recipe: The recipe, for what to paste.

    Raises:
        MemoryExhaustedError: It does not fit.
        CombinationError: A basis does not take what stands for a wide side.
    """
    wide = [b for b in blocks if b.requires != b.basis.requires]
    if not wide and sum(_most_bytes(block) for block in blocks) < SMALL:
        return ""
    averages = recipe.first_moment.decay > 0
    known = {block: footprint_of(block, averages=averages) for block in blocks}
    found = [each for each in known.values() if each is not None]
    _check_memory(found, blocks, placement, recipe)
    unasked = [b for b in wide if not b.curvature.asked_for_stand_ins]
    slow = [each for each in found if (each.seconds or 0.0) >= SLOW]
    return " ".join(
        ([_told_of_wide(unasked, known, recipe)] if unasked else [])
        + ([_told_of_slow(slow, blocks, recipe)] if slow else [])
    )


def _most_bytes(block: Block) -> float:
    """Return more bytes than the matrices of a layer's two sides take.

    A side holds one of the first two dimensions of the weight, and may hold all further ones.
    """
    shape = block.layer.anchor.shape
    return 80 * (shape.numel() / max(1, min(shape[:2], default=1)) + 1) ** 2


def _check_memory(
    found: Sequence[Footprint],
    blocks: Sequence[Block],
    placement: BlockPlacement,
    recipe: Settings,
) -> None:
    device = blocks[0].layer.anchor.device
    free = free_bytes(device)
    if free is None:
        return
    if device.type == "cpu":
        free //= local_ranks()
    mine = [_on_this_rank(each, placement) for each in found]
    link = None if recipe.link is None else link_footprint(recipe.link, blocks)
    needed = peak_bytes(mine, slots=recipe.schedule.slots, lags=recipe.lag > 0, link=link)
    if needed <= free:
        return
    order = sorted(mine, key=lambda each: -(each.kept + each.factors + each.workspace))
    layers = ", ".join(
        f"{_called(each.layer)} {told_bytes(each.kept)} ({each.largest})" for each in order[:SHOWN]
    )
    more = f" and {len(order) - SHOWN} more" if len(order) > SHOWN else ""
    if link is not None:
        more += f"; link {recipe.link_name} {told_bytes(link_peak(link))}"
    remedies = [f"leave layers out, exclude={[order[0].path]}"] if order[0].path else []
    block = next(b for b in blocks if b.name == order[0].layer)
    if (pasted := _with_shorter_sides(block, order[0], recipe)) is not None:
        remedies.append(f"let shorter sides be whole, {pasted}")
    if recipe.schedule.slots == 1 and len(order) > 1:
        remedies.append("decompose layers in different steps, stagger=True")
    remedies.append("or divide the work among ranks, placement='mem_opt'")
    raise MemoryExhaustedError(
        f"the curvature of this model needs {told_bytes(needed)} in the step that decomposes it, "
        f"and {told_bytes(free)} are free on {device}. Layers: {layers}{more}. To lower it: "
        f"{'; '.join(remedies)}."
    )


def _on_this_rank(footprint: Footprint, placement: BlockPlacement) -> Footprint:
    """Return what a layer takes on this rank."""
    if placement.everywhere(footprint.layer) and not placement.divided(footprint.layer):
        return footprint
    keeps = placement.decomposes(footprint.layer)
    holds = placement.holds(footprint.layer)
    return attrs.evolve(
        footprint,
        factors=footprint.factors if keeps else 0,
        decomposition=footprint.decomposition if holds or keeps else 0,
        moments=footprint.moments if holds else 0,
        turned=footprint.turned if holds else 0,
        workspace=footprint.workspace if keeps else 0,
    )


def _told_of_wide(blocks: Sequence[Block], known: Any, recipe: Settings) -> str:
    """Return the warning of layers with a wide side."""
    layers = []
    for block in blocks[:SHOWN]:
        words = known[block].wide if known[block] is not None else ()
        layers.append(f"{_called(block.name)}{' (' + ', '.join(words) + ')' if words else ''}")
    more = f" and {len(blocks) - SHOWN} more" if len(blocks) > SHOWN else ""
    pasted = recipe.with_option([block.curvature for block in blocks], "wide", "diagonal")
    accept = "" if pasted is None else f" To accept that, give {pasted}; 'blocks' keeps more of it."
    if (whole := _whole(blocks[0], recipe)) is not None:
        accept += f" To keep it whole, {whole}."
    return f"layers have a side that is too wide to be a matrix: {', '.join(layers)}{more}.{accept}"


def _whole(block: Block, recipe: Settings) -> str | None:
    """Return what keeps the sides of a block whole, and what it takes; `None` where too long."""
    longest, rates = max(_sides(block)), SOLVER_RATES.get(block.layer.anchor.device.type)
    pasted = recipe.with_option([block.curvature], "max_side", longest)
    if pasted is None or longest > LONG:
        return None
    seconds = "" if rates is None else f", {told_seconds(rates.seconds('eigh', longest))} each time"
    return f"{pasted}{seconds}"


def _sides(block: Block) -> tuple[int, ...]:
    """Return both sides of a layer's matrix."""
    held = {name: torch.empty(p.shape, device="meta") for name, p in block.layer.tensors().items()}
    return tuple(block.curvature.matrix(block.layer, held).shape[-2:])


def _told_of_slow(slow: Sequence[Footprint], blocks: Sequence[Block], recipe: Settings) -> str:
    """Return the warning of layers whose decomposition takes long."""
    slow = sorted(slow, key=lambda each: -(each.seconds or 0.0))
    layers = ", ".join(
        f"{_called(each.layer)} {told_seconds(each.seconds or 0.0)} ({each.largest})"
        for each in slow[:SHOWN]
    )
    block = next(b for b in blocks if b.name == slow[0].layer)
    pasted = _with_shorter_sides(block, slow[0], recipe)
    remedies = [f"let shorter sides be whole, {pasted}"] if pasted is not None else []
    remedies += [f"leave layers out, exclude={[slow[0].path]}"] if slow[0].path else []
    remedies = remedies or ["choose a basis of smaller matrices"]
    return (
        f"one decomposition will take about: {layers}, on one core of a server or an H100, in one "
        f"step of every {_period(recipe)}. To lower it, {'; or '.join(remedies)}."
    )


def _period(recipe: Settings) -> str:
    every = recipe.schedule.basis_every
    return "some" if callable(every) else str(every)


def _called(layer: str) -> str:
    return repr(layer) if layer else "(root)"


def _with_shorter_sides(block: Block, footprint: Footprint, recipe: Settings) -> str | None:
    """Return the argument of `build` that lowers what a layer takes; `None` without any.

    A basis of whole matrices would refuse shorter sides.
    """
    if not (block.of_gradient or block.basis.takes_stand_ins):
        return None
    whole = [n for name, (*_, n) in footprint.shapes.items() if not is_diagonal(name)]
    longest = max(whole, default=0)
    shorter = max(64, min(4096, longest // 4))
    if longest <= shorter:
        return None
    return recipe.with_option([block.curvature], "max_side", shorter)
