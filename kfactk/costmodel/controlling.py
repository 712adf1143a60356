"""Count what a controller costs: forwards along directions, products, losses evaluated again."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from kfactk.capture.heads import Head, HeadView
from kfactk.capture.linearized import (
    HeadDerivatives,
    ModelContext,
    forward_mode,
    make_dual,
    run_along,
    unpack_dual,
)
from kfactk.costmodel.cost import Amount, ControlCost
from kfactk.costmodel.metering import Meter
from kfactk.optim.control import inner_products
from kfactk.optim.predicted import control_rates
from kfactk.preconditioner.footprint import DOUBLE
from kfactk.recipe import Recipe

COPIES = 3
"""Tensors of each parameter that are copied before the loss is evaluated again: its value, its last
step and its gradient."""


def control_cost(
    recipe: Recipe, model: nn.Module, batch: Tensor, returned: Any
) -> ControlCost | None:
    """Return what the controller of a recipe costs; `None` without one.

    Args:
        recipe: The recipe.
        model: The model, on the meta device.
        batch: A rank's mini-batch, likewise.
        returned: What the model returned for it.

    Raises:
        CaptureError: An operation of the model has no derivative along a direction.
        PluginError: The controller failed.
    """
    if recipe.controller is None:
        return None
    rates = control_rates(recipe)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    direction, heads = _direction(recipe.heads, model, batch, trained)
    products, stacked = {}, {}
    largest = max((parameter.numel() for parameter in trained), default=0)
    for tries in rates.tries:
        products[tries] = _products(heads, trained, tries)
        stacked[tries] = (tries + 1.0) * largest * (DOUBLE + 1) * trained[0].itemsize
    with Meter() as copying:
        for parameter in trained:
            for _ in range(COPIES):
                parameter.detach().clone()
            parameter.detach().copy_(parameter.detach())
    return ControlCost(
        rates,
        direction,
        products,
        copies=copying.amount + _restoring(model),
        moved=float(sum(parameter.nbytes for parameter in trained)),
        stacked=stacked,
    )


def _direction(
    heads: Sequence[Head], model: nn.Module, batch: Tensor, trained: Sequence[nn.Parameter]
) -> tuple[Amount, list[HeadDerivatives]]:
    """Return the amount of a forward along one direction, and how the heads move."""
    tangents = {id(parameter): torch.empty_like(parameter) for parameter in trained}
    with forward_mode():
        with Meter() as meter:
            output = run_along(model, functools.partial(model, batch), tangents)
        found = []
        for head in heads:
            located = head.locate(output)
            if located is not None:
                found.append(_moved(head, located))
    return meter.amount + _restoring(model), found


def _moved(head: Head, output: Tensor) -> HeadDerivatives:
    """Return how a head moves, where the whole output counts."""
    now, tangent = unpack_dual(output)
    again = now.detach().requires_grad_()
    with torch.enable_grad():
        dual = again if tangent is None else make_dual(again, tangent)
        view, along = unpack_dual(head.likelihood.view(dual))
    view = view.detach()
    terms = float(view.shape[0] * view.shape[1])
    moved = torch.zeros_like(view) if along is None else along.detach()
    return HeadDerivatives(HeadView(now, view, None, terms, head), [moved])


def _products(
    heads: Sequence[HeadDerivatives], trained: Sequence[nn.Parameter], tries: int
) -> Amount:
    """Return the amount of all products of directions, in double precision."""
    with Meter() as meter:
        for head in heads:
            several = HeadDerivatives(head.head, list(head.moved) * (tries + 1))
            several.products(head.head.terms)
        for parameter in trained:
            value = parameter.detach()
            moves = [-value for _ in range(tries)]
            inner_products([*moves, value], value, value)
    found: Amount = meter.amount
    return attrs.evolve(found, products=DOUBLE * found.products)


def _restoring(model: nn.Module) -> Amount:
    """Return the amount to set the buffers of a model, and to set them back."""
    context = ModelContext.now(model)
    with Meter() as meter, context.restored(model):
        pass
    found: Amount = meter.amount
    return found
