"""Common to tests on several ranks: a model of many kinds of layers, data, loop, and results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from kfactk import Optimizer
from tests.kfactk.small import F64, bound

Batch = tuple[Tensor, Tensor]

EACH: dict[str, Any] = {"factor_every": 1, "scale_every": 2, "basis_every": 2}
"""Something is due at each step, and each kind of refresh falls on a step without some other."""
PLACEMENTS: dict[str, Any] = {
    "replicated": "replicated",
    "comm_opt": "comm_opt",
    "mem_opt": "mem_opt",
    "hybrid": {"name": "hybrid", "fraction": 0.5},
}
PRECISION = 1e-10
CURVATURE = ("kfactk.factor.", "kfactk.basis.", "kfactk.moment.", "kfactk.overdue")


class Mixed(nn.Module):
    """Convolutions, a norm that mixes no examples, a frozen layer, a layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped, self.norm = (
            nn.Conv2d(2, 4, 2),
            nn.Conv2d(4, 4, 2, groups=2),
            nn.GroupNorm(2, 4),
        )
        self.frozen, self.hidden, self.out = (
            nn.Linear(16, 6).requires_grad_(False),
            nn.Linear(6, 4, bias=False),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.grouped(torch.tanh(self.conv(x)))))
        return self.out(torch.tanh(self.hidden(torch.tanh(self.frozen(x.flatten(1))))))


def mixed(dtype: torch.dtype = F64) -> Mixed:
    """The same on every rank."""
    torch.manual_seed(3)
    return Mixed().to(dtype)


def images(step: int, n: int = 8, dtype: torch.dtype = F64) -> Batch:
    """A batch for `Mixed`, drawn from its number."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 2, 4, 4, generator=generator, dtype=F64).to(dtype), torch.randint(
        3, (n,), generator=generator
    )


def part(batch: Batch, rank: int, ranks: int = 2) -> Batch:
    """This rank's part of a batch."""
    return batch[0][rank::ranks], batch[1][rank::ranks]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def accumulate(optimizer: Optimizer, wrapped: nn.Module, batches: Sequence[Batch]) -> None:
    """Take a step on several micro-batches; DDP communicates in the last backward only."""
    optimizer.zero_grad()
    for number, batch in enumerate(batches, start=1):
        wait = number < len(batches) and isinstance(wrapped, nn.parallel.DistributedDataParallel)
        with wrapped.no_sync() if wait else contextlib.nullcontext():
            (loss_of(wrapped, batch) / len(batches)).backward()
    optimizer.step()


def left(
    optimizer: Optimizer, model: nn.Module, *, decompositions: bool = True
) -> dict[str, Tensor]:
    """Parameters, and everything that the optimizer keeps: of the curvature and of the update rule.

    Args:
        optimizer: Bound to the model.
        model: With the names of the parameters.
        decompositions: Whether to include eigenvectors and the scale, whose signs may differ
            between processes that differ in the last bit.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {name: parameter.detach().clone() for parameter, name in names.items()}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if decompositions or not key.startswith(("kfactk.basis.", "kfactk.moment.")):
                found[f"{names[parameter]} {key}"] = torch.as_tensor(value).detach().clone()
    return found


def several(found: Mapping[str, Tensor], placement: str) -> dict[str, Tensor]:
    """The results that every rank has; the placement decides which ranks have curvature."""
    return {
        name: value
        for name, value in found.items()
        if placement == "replicated" or not name.partition(" ")[2].startswith(CURVATURE)
    }


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert one
    for name, value in one.items():
        assert torch.equal(value, other[name]), f"{name}: {value} and {other[name]}"


def assert_near(
    ours: Mapping[str, Tensor], truth: Mapping[str, Tensor], precision: float = PRECISION
) -> None:
    """Each tensor to a precision relative to its largest element."""
    assert ours.keys() == truth.keys()
    assert ours
    for name, value in truth.items():
        largest = float(value.double().abs().max()) if value.numel() else 0.0
        difference = (
            float((ours[name].double() - value.double()).abs().max()) if value.numel() else 0.0
        )
        assert difference <= precision * largest, (
            f"{name}: off by {difference}, where the largest element is {largest}"
        )


def assert_moved(model: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Assert that exactly the trained parameters differ from the fresh model."""
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, found[name]) != parameter.requires_grad, name


def one_process(steps: Iterable[Sequence[Batch]], **recipe: Any) -> tuple[Optimizer, Mixed]:
    """The run of one process on whole batches: for each step its micro-batches."""
    model = mixed()
    optimizer = bound(model, **recipe)
    for batches in steps:
        accumulate(optimizer, model, batches)
    return optimizer, model


def averaged(model: nn.Module) -> None:
    """Gradients joined by hand, as a loop without wrapper does; a rank without any adds zeros."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient)
            parameter.grad = gradient / dist.get_world_size()
