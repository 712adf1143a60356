"""Count what a link costs: what it measures and corrects without numbers, and what it tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from kfactk.costmodel.communication import numbers_sent
from kfactk.costmodel.cost import NOTHING, Amount, LinkCost
from kfactk.costmodel.metering import Meter
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.footprint import DOUBLE, needing_numbers
from kfactk.preconditioner.links import LinkedBlock, linked, ordered
from kfactk.recipe import Recipe
from kfactk.samples import LayerCall, Statistic, working_dtype
from kfactk.stages import Link, Preparation, Tensors
from kfactk.validation import attribute_errors, stage_label


def link_cost(
    recipe: Recipe, blocks: Sequence[Block], calls: Mapping[Block, Sequence[LayerCall]]
) -> LinkCost | None:
    """Return what the link of a recipe costs; `None` without one.

    Args:
        recipe: The recipe.
        blocks: The blocks, on the meta device.
        calls: What they saw of a mini-batch, without numbers.

    Raises:
        CombinationError: It cannot join their layers.
        PluginError: It failed.
    """
    link = recipe.link
    if link is None:
        return None
    joined = ordered(link, blocks)
    label = stage_label("link", link)
    if not joined:
        return LinkCost(label, frozenset())
    layers = [attrs.evolve(linked(block, 1.0), matrices=block.blank_matrices()) for block in joined]
    rows, gathered, measure = _rows(link, layers, calls)
    sums: Mapping[str, Statistic] | None = None
    with needing_numbers(), attribute_errors("link", link, "on its layers"), Meter() as meter:
        sums = link.statistics(layers, rows or {}, 1.0)
    told: Preparation | None = None
    with needing_numbers(), attribute_errors("link", link, "telling what it prepares"):
        told = link.preparation(layers)
    correct = None
    if sums is not None and told is not None:
        correct = _correct(link, layers, sums, told)
    known = {
        "what it measures": rows is not None and sums is not None,
        "what it prepares": told is not None,
        "its correction": correct is not None,
    }
    untold = tuple(f"{what} of {label}" for what, there in known.items() if not there)
    found = LinkCost(
        label,
        frozenset(block.name for block in joined),
        measure=measure + meter.amount,
        correct=correct or NOTHING,
        gathered=gathered,
        solves=link.solves,
        per_damping=link.damped_at == "refresh",
        requires=link.requires,
        untold=untold,
    )
    found = _with_statistics(found, sums or {})
    return found if told is None else _with_preparation(found, told, joined[0])


def _rows(
    link: Link, layers: Sequence[LinkedBlock], calls: Mapping[Block, Sequence[LayerCall]]
) -> tuple[dict[str, Tensors] | None, float, Amount]:
    """Return what the link keeps of each layer's examples, its bytes, and the amount."""
    found: dict[str, Tensors] = {}
    amount, kept, complete = NOTHING, 0.0, True
    for layer in layers:
        block = layer.block
        if not calls[block]:
            continue
        samples = block.samples(calls[block], num_terms=1.0, first=True)
        block.factors(samples)  # makes what is cached, which the curvature needs anyway
        rows: Tensors | None = None
        where = f"on layer {layer.name!r}"
        with needing_numbers(), attribute_errors("link", link, where), Meter() as meter:
            rows = link.rows(layer, samples)
        if rows is None:
            complete = False
            continue
        amount += meter.amount
        kept += sum(tensor.nbytes for tensor in rows.values())
        found[layer.name] = rows
    return found if complete else None, kept, amount


def _correct(
    link: Link,
    layers: Sequence[LinkedBlock],
    sums: Mapping[str, Statistic],
    told: Preparation,
) -> Amount | None:
    """Return the amount of a correction; `None` where it needs numbers."""
    dtype = working_dtype(layers[0].layer.anchor.dtype)

    def blank(shape: Sequence[int]) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    statistics = {name: each.total for name, each in sums.items() if each.total is not None}
    statistics |= {name: blank(shape) for name, shape in told.tensors.items()}
    gradients = {layer.name: blank(layer.shape) for layer in layers}
    found: Amount | None = None
    with needing_numbers(), attribute_errors("link", link, "on gradients"), Meter() as meter:
        link.correct(
            layers, gradients, {n: blank(g.shape) for n, g in gradients.items()}, statistics
        )
        found = meter.amount
    return found


def _with_statistics(cost: LinkCost, sums: Mapping[str, Statistic]) -> LinkCost:
    """Return a cost with what is averaged, sent and kept of the statistics."""
    totals = {name: each.total for name, each in sums.items() if each.total is not None}
    sent = sum(
        numbers_sent(tuple(total.shape), symmetric=sums[name].symmetric) * total.itemsize
        for name, total in totals.items()
    )
    return attrs.evolve(cost, sums=sent, kept=sum(total.nbytes for total in totals.values()))


def _with_preparation(cost: LinkCost, told: Preparation, first: Block) -> LinkCost:
    """Return a cost with a preparation: it reads and writes what it makes, and its workspace."""
    prepared = working_dtype(first.layer.anchor.dtype).itemsize * told.numbers
    slowdown = DOUBLE if told.double else 1.0
    decomposed = {"eigh": told.eigh, "cholesky": told.cholesky}
    amount = Amount(
        slowdown * told.products,
        triangular=slowdown * told.triangular,
        bytes=2.0 * (prepared + told.workspace),
        launches=float(len(told.tensors) + sum(map(len, decomposed.values()))),
    )
    return attrs.evolve(
        cost,
        prepare=amount,
        decomposed=decomposed,
        slowdown=slowdown,
        kept=cost.kept + prepared,
        prepared=float(prepared),
        workspace=float(told.workspace),
    )
