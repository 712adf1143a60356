"""Formulas of derivatives against autograd, also where they have limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfactk import derivatives

X = torch.linspace(-30, 30, 241, dtype=torch.float64)
EVERYWHERE = sorted(derivatives.FUNCTIONS.keys() - {"log", "log1p", "sqrt", "rsqrt", "reciprocal"})


def truth(name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    owner = torch.nn.functional if hasattr(torch.nn.functional, name) else torch
    y = getattr(owner, name)(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    bend = torch.zeros_like(x)
    if slope.requires_grad:
        (bend,) = torch.autograd.grad(slope.sum(), x)
    return y.detach(), slope.detach(), bend


@pytest.mark.parametrize("name", EVERYWHERE)
def test_large_arguments_give_what_autograd_gives(name: str) -> None:
    x = X if name not in ("exp", "expm1", "sinh", "cosh", "tan") else X / 30
    found = derivatives.FUNCTIONS[name](x)
    for each, expected in zip(found, truth(name, x), strict=True):
        assert torch.isfinite(torch.as_tensor(each)).all()
        whole = torch.as_tensor(each, dtype=x.dtype).expand_as(expected)
        torch.testing.assert_close(whole, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 1.0, 2.0])
def test_whole_powers_have_derivatives_at_zero(exponent: float) -> None:
    value, slope, bend = derivatives.power(torch.zeros(1, dtype=torch.float64), exponent)
    expected = {0: (1, 0, 0), 1: (0, 1, 0), 2: (0, 0, 2), 3: (0, 0, 0)}[int(exponent)]
    assert (float(value), float(slope), float(bend)) == expected
