"""First and second derivatives of elementwise functions, as formulas.

Formulas, and not autograd, so that they also hold where gradients are switched off, and so that
derivatives of them in forward mode exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

Derivatives = tuple[Tensor, Tensor | float, Tensor | float]
"""f(x), f'(x) and f''(x), each of the shape of x or a number."""


def tanh(x: Tensor) -> Derivatives:
    """Return tanh x and its derivatives."""
    y = x.tanh()
    slope = 1 - y * y
    return y, slope, -2 * y * slope


def sin(x: Tensor) -> Derivatives:
    """Return sin x and its derivatives."""
    y = x.sin()
    return y, x.cos(), -y


def cos(x: Tensor) -> Derivatives:
    """Return cos x and its derivatives."""
    y = x.cos()
    return y, -x.sin(), -y


def tan(x: Tensor) -> Derivatives:
    """Return tan x and its derivatives."""
    y = x.tan()
    slope = 1 + y * y
    return y, slope, 2 * y * slope


def atan(x: Tensor) -> Derivatives:
    """Return arctan x and its derivatives."""
    slope = 1 / (1 + x * x)
    return x.atan(), slope, -2 * x * slope * slope


def sinh(x: Tensor) -> Derivatives:
    """Return sinh x and its derivatives."""
    y = x.sinh()
    return y, x.cosh(), y


def cosh(x: Tensor) -> Derivatives:
    """Return cosh x and its derivatives."""
    y = x.cosh()
    return y, x.sinh(), y


def exp(x: Tensor) -> Derivatives:
    """Return e^x and its derivatives."""
    y = x.exp()
    return y, y, y


def expm1(x: Tensor) -> Derivatives:
    """Return e^x - 1 and its derivatives."""
    slope = x.exp()
    return x.expm1(), slope, slope


def log(x: Tensor) -> Derivatives:
    """Return log x and its derivatives."""
    slope = 1 / x
    return x.log(), slope, -slope * slope


def log1p(x: Tensor) -> Derivatives:
    """Return log(1 + x) and its derivatives."""
    slope = 1 / (1 + x)
    return x.log1p(), slope, -slope * slope


def sqrt(x: Tensor) -> Derivatives:
    """Return the square root of x and its derivatives."""
    y = x.sqrt()
    slope = 0.5 / y
    return y, slope, -0.5 * slope / x


def rsqrt(x: Tensor) -> Derivatives:
    """Return x^(-1/2) and its derivatives."""
    y = x.rsqrt()
    slope = -0.5 * y / x
    return y, slope, -1.5 * slope / x


def reciprocal(x: Tensor) -> Derivatives:
    """Return 1 / x and its derivatives."""
    y = 1 / x
    slope = -y * y
    return y, slope, -2 * y * slope


def square(x: Tensor) -> Derivatives:
    """Return x^2 and its derivatives."""
    return x * x, 2 * x, 2.0


def power(x: Tensor, exponent: float) -> Derivatives:
    """Return x to the power of a number, and its derivatives."""
    if exponent in (0, 1):  # a factor of 0 would meet an infinite power at x = 0
        return x**exponent, float(exponent), 0.0
    bend = exponent * (exponent - 1)
    return (
        x**exponent,
        exponent * x ** (exponent - 1),
        bend * x ** (exponent - 2) if exponent != 2 else float(bend),
    )


def erf(x: Tensor) -> Derivatives:
    """Return the error function of x and its derivatives."""
    slope = (-x * x).exp() * (2 / math.sqrt(math.pi))
    return x.erf(), slope, -2 * x * slope


def sigmoid(x: Tensor) -> Derivatives:
    """Return 1 / (1 + e^-x) and its derivatives."""
    y = x.sigmoid()
    slope = y * (1 - y)
    return y, slope, slope * (1 - 2 * y)


def log_sigmoid(x: Tensor) -> Derivatives:
    """Return log sigmoid x and its derivatives."""
    y = x.sigmoid()
    return F.logsigmoid(x), 1 - y, -y * (1 - y)


def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Derivatives:
    """Return log(1 + e^(beta x)) / beta, or x where beta x is above the threshold."""
    y = (beta * x).sigmoid()
    slope = torch.where(beta * x > threshold, torch.ones_like(y), y)
    bend = torch.where(beta * x < threshold, beta * y * (1 - y), torch.zeros_like(y))
    return F.softplus(x, beta, threshold), slope, bend


def silu(x: Tensor) -> Derivatives:
    """Return x sigmoid x and its derivatives."""
    y, slope, bend = sigmoid(x)
    return x * y, y + x * slope, 2 * slope + x * bend


def mish(x: Tensor) -> Derivatives:
    """Return x tanh softplus x and its derivatives."""
    inner, inner_slope, inner_bend = softplus(x)
    y, outer_slope, outer_bend = tanh(inner)
    slope = outer_slope * inner_slope
    bend = outer_bend * inner_slope * inner_slope + outer_slope * inner_bend
    return x * y, y + x * slope, 2 * slope + x * bend


def gelu(x: Tensor, *, approximate: str = "none") -> Derivatives:
    """Return x Phi(x), or what approximates it by tanh, and its derivatives."""
    if approximate == "none":
        density = (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)
        y = 0.5 * (1 + (x / math.sqrt(2)).erf())
        return F.gelu(x), y + x * density, density * (2 - x * x)
    factor = math.sqrt(2 / math.pi)
    inner_slope = factor * (1 + 3 * 0.044715 * x * x)
    y, outer_slope, outer_bend = tanh(factor * (x + 0.044715 * x**3))
    slope = outer_slope * inner_slope
    bend = outer_bend * inner_slope * inner_slope + outer_slope * factor * 6 * 0.044715 * x
    return F.gelu(x, approximate=approximate), 0.5 * (1 + y + x * slope), slope + 0.5 * x * bend


FUNCTIONS: Mapping[str, Callable[..., Derivatives]] = MappingProxyType(
    {
        "atan": atan,
        "arctan": atan,
        "cos": cos,
        "cosh": cosh,
        "erf": erf,
        "exp": exp,
        "expm1": expm1,
        "gelu": gelu,
        "log": log,
        "log1p": log1p,
        "logsigmoid": log_sigmoid,
        "mish": mish,
        "reciprocal": reciprocal,
        "rsqrt": rsqrt,
        "sigmoid": sigmoid,
        "silu": silu,
        "sin": sin,
        "sinh": sinh,
        "softplus": softplus,
        "sqrt": sqrt,
        "square": square,
        "tan": tan,
        "tanh": tanh,
    }
)
"""The functions of one argument and of numbers, by torch's names."""
