"""Other gradients in place of the user's, for as long as the update rule takes its step; and whether a step can be taken on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfactk.linalg import as_gradient


@contextlib.contextmanager
def standing_in(groups: Sequence[dict[str, Any]], replaced: Sequence[tuple[nn.Parameter, Tensor]], *, decayed: bool) -> Iterator[None]:
    """Put gradients in place of the user's; after the block, however it ends, `.grad` and weight decay are as they were.

    Args:
        groups: The parameter groups.
        replaced: Parameters, each with its gradient.
        decayed: Whether weight decay is in these gradients, so that it is added to those of the other parameters too, and the update
            rule adds none.
    """
    found = [(parameter, parameter.grad, float(group["weight_decay"])) for group in groups for parameter in group["params"]]
    decays = [group["weight_decay"] for group in groups]
    try:
        if decayed:
            for parameter, gradient, decay in found:
                if gradient is not None and decay:
                    parameter.grad = gradient.add(parameter, alpha=decay)
            for group in groups:
                group["weight_decay"] = 0.0
        for parameter, new in replaced:
            parameter.grad = as_gradient(new, parameter)
        yield
    finally:
        for parameter, gradient, _ in found:
            parameter.grad = gradient
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = decay


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor, dense or sparse, holds NaN or inf; one transfer from each device.

    Example:
        >>> all_finite([torch.ones(2), torch.tensor([1.0, float("nan")])])
        False
    """
    values = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors]
    values = [value for value in values if value.numel()]
    if bool(torch.isfinite(torch.nn.utils.get_total_norm(values))):
        return True
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(values, float("inf"))))  # the squares alone may be out of range
