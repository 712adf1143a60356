"""A model with every kind of layer, ways to divide it by `fully_shard`, and a training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import kfactk
from kfactk import Optimizer

F64 = torch.float64
RECIPE: dict[str, Any] = {
    "curvature": "conv_kfac",
    "basis": "ekfac",
    "clip": {"name": "kl", "limit": 1e-3},
    "update": "adam",
    "fisher": "exact",
    "damping": 0.05,
    "lr": 0.05,
    "factor_every": 1,
    "scale_every": 1,
    "basis_every": 2,
}
BATCH = 12
"""Divisible by 1, 2, 3 and 4 ranks."""


class Net(nn.Module):
    """Layers of 6, 4, 5 and 3 rows: 4 ranks get uneven and empty shards. A module is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.grouped = nn.Conv2d(6, 4, 2, groups=2, stride=2)
        self.middle = nn.Linear(16, 5)
        self.middle.bias.requires_grad_(False)
        self.shared = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x)))
        x = torch.tanh(self.middle(self.grouped(x).flatten(1)))
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


def net(dtype: torch.dtype = F64) -> Net:
    torch.manual_seed(3)
    return Net().to(dtype)


def data(step: int, n: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 2, 4, 4, generator=generator, dtype=F64), torch.randint(
        3, (n,), generator=generator
    )


def part(step: int, n: int = BATCH) -> tuple[Tensor, Tensor]:
    """This rank's share of a step's batch."""
    x, y = data(step, n)
    return x[dist.get_rank() :: dist.get_world_size()], y[dist.get_rank() :: dist.get_world_size()]


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def grid(replicas: int = 2) -> DeviceMesh:
    """For HSDP: replicas of shards."""
    return init_device_mesh(
        "cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=("replicate", "shard")
    )


def root_only(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    return fully_shard(model, mesh=mesh, **options)


def nested(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for child in model.children():
        fully_shard(child, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def in_part(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """Some layers have a unit of their own, the others share the root's."""
    for name in ("grouped", "head"):
        fully_shard(model.get_submodule(name), mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


WAYS: dict[str, Callable[..., nn.Module]] = {
    "root only": root_only,
    "nested": nested,
    "in part": in_part,
}


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """By name, as plain tensors."""
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def found(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Parameters, factors and scales by name, as plain tensors."""
    tensors = parameters(model)
    for name, view in optimizer.layers.items():
        tensors |= {f"{name} {key}": full(value) for key, value in view.factors.items()}
        tensors |= {f"{name} {key}": full(value) for key, value in view.scale.items()}
    return tensors


def bound(model: nn.Module, **recipe: Any) -> Optimizer:
    return kfactk.build(**(RECIPE | recipe)).bind(model)


def train(optimizer: Optimizer, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def deviation(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest deviation of any tensor, relative to its norm."""
    assert ours.keys() == truth.keys()
    assert len(truth) >= 12, "something is missing"
    return max(
        float((ours[name] - tensor).norm() / tensor.norm().clamp(min=1e-30))
        for name, tensor in truth.items()
    )
