"""Hypothesis strategies of the laws: random layers with an input and an output gradient, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

ShapesOf = Callable[[Any], st.SearchStrategy[tuple[int, ...]]]
"""From a module, strategies for the shape of its input."""
CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODES = ("zeros", "circular", "reflect", "replicate")


@attrs.frozen(eq=False)
class Case:
    """A layer, what it was called with, and the gradient of a summed loss with respect to its output; examples in dim 0."""

    module: Any
    inputs: Tensor
    gradient: Tensor

    @property
    def bias(self) -> bool:
        """Whether the layer has a bias."""
        return getattr(self.module, "bias", None) is not None


def seeds() -> st.SearchStrategy[int]:
    """Seeds of generators."""
    return st.integers(0, 2**16)


@st.composite
def case_of(draw: st.DrawFn, modules: st.SearchStrategy[Any], inputs_of: ShapesOf) -> Case:
    """Fill a drawn module's parameters, inputs and gradient with seeded normal numbers."""
    module = draw(modules).double()
    generator = torch.Generator().manual_seed(draw(seeds()))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        inputs = torch.randn(draw(inputs_of(module)), generator=generator, dtype=torch.float64)
        gradient = torch.randn(module(inputs).shape, generator=generator, dtype=torch.float64)
    return Case(module, inputs, gradient)


def linear_cases(max_rank: int = 4) -> st.SearchStrategy[Case]:
    """`nn.Linear` with batched inputs of rank 2 to `max_rank`."""
    modules = st.builds(nn.Linear, st.integers(1, 4), st.integers(1, 4), bias=st.booleans())
    extras = st.lists(st.integers(1, 3), max_size=max_rank - 2)
    return case_of(modules, lambda m: st.builds(lambda n, extra: (n, *extra, m.in_features), st.integers(1, 4), extras))


@st.composite
def convolutions(draw: st.DrawFn) -> Any:
    """A convolution of 1 to 3 dimensions with any geometry torch accepts."""
    dims = draw(st.integers(1, 3))
    largest = {1: 4, 2: 3, 3: 2}[dims]

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation = each(1, largest), each(1, 2)
    mode = draw(st.sampled_from(MODES))
    padding = draw(st.sampled_from(["same", "valid"]) | st.just(each(0, 2)))
    stride = (1,) * dims if padding == "same" else each(1, 3)
    groups = draw(st.integers(1, 3))
    return CONV[dims](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )


@st.composite
def _conv_shape(draw: st.DrawFn, module: Any) -> tuple[int, ...]:
    """A small input shape that the module accepts: patches fit, and reflect and circular padding have what they copy."""
    sizes = []
    for i, kernel in enumerate(module.kernel_size):
        span = module.dilation[i] * (kernel - 1) + 1
        before, after = module._reversed_padding_repeated_twice[-2 * i - 2 :][:2]
        least = max(1, span - before - after)
        if module.padding_mode == "circular":
            least = max(least, before, after)
        if module.padding_mode == "reflect":
            least = max(least, before + 1, after + 1)
        sizes.append(least + draw(st.integers(0, 2)))
    return draw(st.integers(1, 3)), module.in_channels, *sizes


def conv_cases() -> st.SearchStrategy[Case]:
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: strides, dilations, paddings, padding modes, groups, depthwise, with and without bias."""
    return case_of(convolutions(), _conv_shape)


def layer_cases() -> st.SearchStrategy[Case]:
    """Linear layers and convolutions."""
    return linear_cases() | conv_cases()


def single_row_cases() -> st.SearchStrategy[Case]:
    """Layers seen with T = 1: linear ones on `[N, d]`, convolutions whose kernel covers the input."""
    linear = linear_cases(max_rank=2)
    conv = case_of(
        st.builds(
            lambda groups, channels, outputs, kernel, bias: nn.Conv2d(
                groups * channels, groups * outputs, kernel, groups=groups, bias=bias
            ),
            st.integers(1, 2),
            st.integers(1, 2),
            st.integers(1, 2),
            st.tuples(st.integers(1, 2), st.integers(1, 2)),
            st.booleans(),
        ),
        lambda m: st.integers(1, 3).map(lambda n: (n, m.in_channels, *m.kernel_size)),
    )
    return linear | conv
