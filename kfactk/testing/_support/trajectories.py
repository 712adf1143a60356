"""Problems on which update rules are compared: small parameters and a moving quadratic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
Groups = list[dict[str, Any]]
Make = Callable[..., torch.optim.Optimizer]


@attrs.frozen
class Group:
    """One parameter group of a drawn problem.

    Args:
        shapes: Of its parameters.
        options: Its `lr` and `weight_decay`, where they differ from the problem's.
    """

    shapes: tuple[tuple[int, ...], ...]
    options: Mapping[str, float]


@attrs.frozen
class Problem:
    """Parameters to train, with gradients of a moving quadratic.

    Args:
        groups: The parameter groups.
        lr: Learning rate of groups that set none.
        weight_decay: Weight decay of groups that set none.
        drops: Factor on every learning rate before each step; one for each step.
        dtype: Of the parameters.
        seed: Of their values.
    """

    groups: tuple[Group, ...]
    lr: float
    weight_decay: float
    drops: tuple[float, ...]
    dtype: torch.dtype
    seed: int

    def start(self) -> Groups:
        """Return new groups with new parameters, with the same values every time."""
        generator = torch.Generator().manual_seed(self.seed)

        def parameter(shape: tuple[int, ...]) -> nn.Parameter:
            return nn.Parameter(
                (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.1).to(self.dtype)
            )

        return [
            {"params": [parameter(shape) for shape in group.shapes], **group.options}
            for group in self.groups
        ]

    def made(self, make: Make, groups: Groups) -> torch.optim.Optimizer:
        """Return the optimizer over these groups."""
        return make(groups, lr=self.lr, weight_decay=self.weight_decay)

    def without_decay(self) -> Problem:
        """Return the same problem without any weight decay."""
        groups = (
            attrs.evolve(
                group, options={k: v for k, v in group.options.items() if k != "weight_decay"}
            )
            for group in self.groups
        )
        return attrs.evolve(self, groups=tuple(groups), weight_decay=0.0)


# Hypothesis examines each strategy once: those that are made once draw faster.
_RATES, _DECAYS = st.sampled_from([0.001, 0.02, 0.1]), st.sampled_from([0.0, 0.01, 0.2])
_SHAPES = st.lists(st.sampled_from([(), (1,), (3,), (2, 3)]), min_size=1, max_size=2).map(tuple)
_OPTIONS = st.fixed_dictionaries({}, optional={"lr": _RATES, "weight_decay": _DECAYS})
_GROUPS = st.lists(st.builds(Group, _SHAPES, _OPTIONS), min_size=1, max_size=3)
_DROPS = st.lists(st.sampled_from([1.0, 1.0, 0.1, 2.0]), min_size=2, max_size=8)
_SEEDS = st.integers(0, 2**16)


def problems(dtypes: Sequence[torch.dtype] = DTYPES) -> st.SearchStrategy[Problem]:
    """Draw up to three groups of small parameters, and a few steps with changing learning rates."""
    return st.builds(
        Problem,
        _GROUPS.map(tuple),
        _RATES,
        _DECAYS,
        _DROPS.map(tuple),
        st.sampled_from(dtypes),
        _SEEDS,
    )


def gradient(parameter: Tensor, step: int) -> Tensor:
    """Return the gradient of a quadratic whose minimum moves with the step.

    Its curvature grows along the entries.
    """
    curvature = torch.linspace(0.5, 3.0, max(1, parameter.numel()), dtype=torch.float64).reshape(
        parameter.shape
    )
    return (curvature * parameter.detach().double() + torch.sin(torch.tensor(float(step)))).to(
        parameter.dtype
    )


def walk(
    optimizer: torch.optim.Optimizer, drops: Sequence[float], first: int = 0
) -> list[list[Tensor]]:
    """Take one step for each of `drops`, and return the parameters after each step.

    Before each step, the learning rates are multiplied by the step's drop.
    """
    history = []
    for step, drop in enumerate(drops, first):
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * drop
            for parameter in group["params"]:
                parameter.grad = gradient(parameter, step)
        optimizer.step()
        history.append(values(optimizer.param_groups))
    return history


def values(groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """Return copies of the parameters."""
    return [parameter.detach().clone() for group in groups for parameter in group["params"]]
