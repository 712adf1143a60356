"""Ways in which a model changes after it was bound."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from kfactk import Optimizer

Change = Callable[[nn.Sequential, Optimizer], None]


def net() -> nn.Sequential:
    """Return three layers, of which two have the same shape."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    ).double()


def fresh(d_in: int, d_out: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(d_in + d_out)
    layer = nn.Linear(d_in, d_out).double()
    for parameter in layer.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return layer


def add(optimizer: Optimizer, *modules: nn.Module) -> None:
    optimizer.add_param_group({"params": [p for module in modules for p in module.parameters()]})


def freeze_a_bias(model: nn.Sequential, optimizer: Optimizer) -> None:
    model[2].bias.requires_grad_(False)


def freeze_a_layer(model: nn.Sequential, optimizer: Optimizer) -> None:
    model[0].requires_grad_(False)


def replace_by_other_widths(model: nn.Sequential, optimizer: Optimizer) -> None:
    model[2], model[4] = fresh(4, 7), fresh(7, 3)
    add(optimizer, model[2], model[4])


def replace_by_the_same_width(model: nn.Sequential, optimizer: Optimizer) -> None:
    model[4] = fresh(4, 3)
    add(optimizer, model[4])


def widen_a_weight(model: nn.Sequential, optimizer: Optimizer) -> None:
    """Other shapes in the same module."""
    model[4].weight, model[4].bias = fresh(4, 5).parameters()
    add(optimizer, model[4])


def append(model: nn.Sequential, optimizer: Optimizer) -> None:
    model.append(fresh(3, 3))
    add(optimizer, model[5])


def insert_in_front(model: nn.Sequential, optimizer: Optimizer) -> None:
    """Each layer takes the name of the next one."""
    model.insert(0, nn.Tanh())
    model.insert(0, fresh(4, 4))
    add(optimizer, model[0])


def insert_within(model: nn.Sequential, optimizer: Optimizer) -> None:
    """New layers take names of old ones, which move to names that are new."""
    model[1] = fresh(4, 4)
    model.insert(0, nn.Tanh())
    add(optimizer, model[2])


def remove(model: nn.Sequential, optimizer: Optimizer) -> None:
    model[2] = nn.Identity()


def swap(model: nn.Sequential, optimizer: Optimizer) -> None:
    model[0], model[2] = model[2], model[0]


def wrap(model: nn.Sequential, optimizer: Optimizer) -> None:
    model[2] = nn.Sequential(model[2])


def tie(model: nn.Sequential, optimizer: Optimizer) -> None:
    model[2].weight, model[2].bias = model[0].weight, model[0].bias


def tie_in_part(model: nn.Sequential, optimizer: Optimizer) -> None:
    model[2].weight = model[0].weight


CHANGES: dict[Change, tuple[str, ...]] = {
    freeze_a_bias: ("0", "2", "4"),
    freeze_a_layer: ("2", "4"),
    replace_by_other_widths: ("0", "2", "4"),
    replace_by_the_same_width: ("0", "2", "4"),
    widen_a_weight: ("0", "2", "4"),
    append: ("0", "2", "4", "5"),
    insert_in_front: ("0", "2", "4", "6"),
    insert_within: ("1", "2", "3", "5"),
    remove: ("0", "4"),
    swap: ("0", "2", "4"),
    wrap: ("0", "2.0", "4"),
    tie: ("0", "4"),
    tie_in_part: ("4",),
}
"""Each change, with the names of the layers that have a block afterwards."""
