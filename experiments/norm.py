"""BatchNorm over the images of all processes: several processes then train as one does."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Mean(torch.autograd.Function):
    """The mean over processes: of values in the forward pass, of gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _mean(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _mean(gradient)


def _mean(values: Tensor) -> Tensor:
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with the statistics of the whole batch, of which each process has an equal part."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[N, C, H, W]`; in training, forward and backward are collective calls."""
        if not self.training:
            return super().forward(x)
        own_variance, own_mean = (
            each.double() for each in torch.var_mean(x, (0, 2, 3), correction=0)
        )
        mean, square = _Mean.apply(torch.stack([own_mean, own_variance + own_mean**2]))
        variance = (square - mean**2).clamp(min=0)
        with torch.no_grad():
            count = x.numel() // self.num_features * dist.get_world_size()
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(
                (variance * count / (count - 1)).to(self.running_var.dtype), self.momentum
            )
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt().to(x.dtype)
        return x * scale[:, None, None] + (self.bias - mean.to(x.dtype) * scale)[:, None, None]


def share_batch_norms(model: nn.Module) -> None:
    """Replace the BatchNorm layers of a model by those over all processes."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                made = SharedBatchNorm2d(
                    child.num_features, eps=child.eps, momentum=child.momentum
                ).to(child.weight)
                made.load_state_dict(child.state_dict())
                setattr(parent, name, made)
