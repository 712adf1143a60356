"""Hypothesis strategies of the laws: random layers with data in float64, and modules to refuse."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from kfactk.stages import Curvature, Layer

ShapeOf = Callable[[st.DrawFn, Any], tuple[int, ...]]
"""Draws the shape of a module's input."""
Fill = Callable[[Any, tuple[int, ...], torch.Generator], Tensor]
"""From a module, a shape and a generator, the input."""
CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
LAZY: dict[type[nn.Module], Any] = {
    nn.Linear: nn.LazyLinear,
    nn.Conv1d: nn.LazyConv1d,
    nn.Conv2d: nn.LazyConv2d,
    nn.Conv3d: nn.LazyConv3d,
    nn.ConvTranspose1d: nn.LazyConvTranspose1d,
    nn.ConvTranspose2d: nn.LazyConvTranspose2d,
    nn.ConvTranspose3d: nn.LazyConvTranspose3d,
}
MODES = ("zeros", "circular", "reflect", "replicate")


CalledWith = Callable[[nn.Module, Tensor], tuple[Tensor, ...]]
"""From a module and its input, all that it is called with."""


def arguments(module: nn.Module, inputs: Tensor) -> tuple[Tensor, ...]:
    """Return what a module is called with: attention attends to the inputs themselves."""
    return (inputs,) * (3 if isinstance(module, nn.MultiheadAttention) else 1)


def first_output(found: Any) -> Tensor:
    """Return the tensor, or the first of several."""
    output: Tensor = found[0] if isinstance(found, tuple) else found
    return output


@attrs.frozen(eq=False, repr=False)
class Case:
    """A layer, its input, and the gradient of a summed loss with respect to its output.

    Examples are in dimension 0.

    Args:
        module: The layer.
        inputs: Its input.
        gradient: The gradient, of its output's shape.
        further: Input and gradient of each further call of the layer in the same forward, with the
            same number of examples.
        seed: Seed of the numbers; for the repr.
        part: The part of the module that is the layer.
        names: Its parameters; `None` for all of the module's own.
        called_with: What the module is called with, of its input.
    """

    module: Any
    inputs: Tensor
    gradient: Tensor
    further: tuple[tuple[Tensor, Tensor], ...] = ()
    seed: int | None = None
    part: str = ""
    names: tuple[str, ...] | None = None
    called_with: CalledWith = arguments

    def __repr__(self) -> str:
        calls = ", ".join(f"{list(x.shape)} -> {list(g.shape)}" for x, g in self.calls)
        frozen = [
            name
            for name, parameter in self.module.named_parameters()
            if not parameter.requires_grad
        ]
        more = [f"{' and '.join(frozen)} frozen"] if frozen else []
        part = f"[{self.part}]" if self.part else ""
        told = [f"{self.module}{part}", f"called {calls}", str(self.gradient.dtype), *more]
        return f"Case({', '.join([*told, f'seed {self.seed}'])})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # what Hypothesis prints: tensors would say less in more lines

    @property
    def bias(self) -> bool:
        """Whether the layer has a bias."""
        return getattr(self.module, "bias", None) is not None

    @property
    def layer(self) -> Layer:
        """The layer as stages get it; a frozen bias is not among its parameters."""
        own = [name for name, _ in self.module.named_parameters(recurse=False)]
        names = [
            name
            for name in (own if self.names is None else self.names)
            if self.module.get_parameter(name).requires_grad
        ]
        name = f"layer[{self.part}]" if self.part else "layer"
        return Layer(name, self.module, tuple(names), self.part)

    def output(self, inputs: Tensor) -> Tensor:
        """Return the module's output, the first one where it returns several."""
        return first_output(self.module(*self.called_with(self.module, inputs)))

    @property
    def calls(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Input and gradient of each call."""
        return ((self.inputs, self.gradient), *self.further)

    def rows(self, examples: Sequence[int]) -> Case:
        """Return the case with these examples, in this order."""
        index = torch.tensor(examples, dtype=torch.long)
        return self._each(lambda inputs, gradient: (inputs[index], gradient[index]))

    def to(self, dtype: torch.dtype) -> Case:
        """Return the case in another precision, parameters included; integer inputs stay."""
        moved = self._each(
            lambda inputs, gradient: (
                inputs.to(dtype) if inputs.is_floating_point() else inputs,
                gradient.to(dtype),
            )
        )
        return attrs.evolve(moved, module=copy.deepcopy(self.module).to(dtype))

    def times(self, *, inputs: float = 1.0, gradients: float = 1.0) -> Case:
        """Return the case with the inputs, or the gradients, multiplied by a number."""
        return self._each(lambda x, g: (x if inputs == 1.0 else x * inputs, g * gradients))

    def _each(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Case:
        (inputs, gradient), *further = [change(*call) for call in self.calls]
        return attrs.evolve(self, inputs=inputs, gradient=gradient, further=tuple(further))


# Hypothesis examines each strategy once: those that are made once draw faster.
@functools.cache
def whole(low: int, high: int) -> st.SearchStrategy[int]:
    """Draw whole numbers within these bounds."""
    return st.integers(low, high)


def seeds() -> st.SearchStrategy[int]:
    """Draw seeds of generators."""
    return whole(0, 2**16)


def normal(module: Any, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return normal numbers."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def indices(module: Any, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return indices of rows of a table."""
    return torch.randint(module.num_embeddings, shape, generator=generator)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """Draw precisions of a layer and its data."""
    return st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def binary_exponents() -> st.SearchStrategy[int]:
    """Draw exponents of powers of two from 1e-20 to 1e20: such factors change no digits."""
    return st.sampled_from([1, -1, 20, -20, 66, -66])


def decimal_exponents() -> st.SearchStrategy[int]:
    """Draw exponents of ten from -20 to 20, with float32's limits for a square."""
    return st.sampled_from([0, 4, -4, 10, -10, 17, 18, -18, 20, -20])


@st.composite
def case_of(
    draw: st.DrawFn,
    modules: st.SearchStrategy[Any],
    shape_of: ShapeOf,
    *,
    most_calls: int = 1,
    freeze: bool = False,
    fill: Fill = normal,
    called_with: CalledWith = arguments,
) -> Case:
    """Fill a drawn module's parameters, inputs and gradient with seeded normal numbers.

    Args:
        draw: Given by Hypothesis.
        modules: The module.
        shape_of: Draws the shape of its input, examples first.
        most_calls: Most calls of the module in one forward; further ones have shapes of their own.
        freeze: Whether the bias may be frozen.
        fill: What the inputs hold.
        called_with: What the module is called with, of its input.
    """
    module = draw(modules).double()
    shapes = [
        shape_of(draw, module) for _ in range(draw(whole(1, most_calls)) if most_calls > 1 else 1)
    ]
    if freeze and getattr(module, "bias", None) is not None:
        module.bias.requires_grad_(not draw(st.booleans()))
    seed = draw(seeds())
    generator = torch.Generator().manual_seed(seed)
    calls = []
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for shape in shapes:
            inputs = fill(module, (shapes[0][0], *shape[1:]), generator)
            output = first_output(module(*called_with(module, inputs)))
            gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            calls.append((inputs, gradient))
    return Case(module, *calls[0], tuple(calls[1:]), seed, called_with=called_with)


@functools.cache
def linear_cases(
    max_rank: int = 4, *, most_calls: int = 1, freeze: bool = False
) -> st.SearchStrategy[Case]:
    """Draw `nn.Linear` with batched inputs of rank 2 to `max_rank`; see `case_of`."""
    modules = st.builds(nn.Linear, st.integers(1, 4), st.integers(1, 4), bias=st.booleans())
    extras = st.lists(st.integers(1, 3), max_size=max_rank - 2)

    def shape(draw: st.DrawFn, module: nn.Linear) -> tuple[int, ...]:
        return draw(whole(1, 4)), *draw(extras), module.in_features

    return case_of(modules, shape, most_calls=most_calls, freeze=freeze)


_MODES = st.sampled_from(MODES)
_PADDING: st.SearchStrategy[str | None] = st.sampled_from(["same", "valid"]) | st.none()


@st.composite
def convolutions(draw: st.DrawFn, dimensions: Sequence[int] = (1, 2, 3)) -> Any:
    """Draw a convolution of 1 to 3 dimensions with any geometry that torch accepts."""
    dims = draw(st.sampled_from(dimensions))
    largest = {1: 4, 2: 3, 3: 2}[dims]

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(whole(low, high)) for _ in range(dims))

    kernel, dilation = each(1, largest), each(1, 2)
    mode = draw(_MODES)
    padding = draw(_PADDING) or each(0, 2)
    stride = (1,) * dims if padding == "same" else each(1, 3)
    groups = draw(whole(1, 3))
    return CONV[dims](
        groups * draw(whole(1, 2)),
        # Eigenvectors of 2 x 2 matrices are symmetric and hide a transposition.
        groups * draw(whole(1, 3)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )


def _conv_shape(draw: st.DrawFn, module: Any) -> tuple[int, ...]:
    """Draw a small input shape that the module accepts.

    Patches fit, and reflect and circular padding have enough to copy.
    """
    sizes = []
    for i, kernel in enumerate(module.kernel_size):
        span = module.dilation[i] * (kernel - 1) + 1
        before, after = module._reversed_padding_repeated_twice[-2 * i - 2 :][:2]
        least = max(1, span - before - after)
        if module.padding_mode == "circular":
            least = max(least, before, after)
        if module.padding_mode == "reflect":
            least = max(least, before + 1, after + 1)
        sizes.append(least + draw(whole(0, 2)))
    return draw(whole(1, 3)), module.in_channels, *sizes


@functools.cache
def conv_cases(
    dimensions: Sequence[int] = (1, 2, 3), *, most_calls: int = 1, freeze: bool = False
) -> st.SearchStrategy[Case]:
    """Draw `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` of every geometry, with and without bias.

    Geometry means strides, dilations, paddings, padding modes and groups, depthwise included.
    """
    return case_of(convolutions(dimensions), _conv_shape, most_calls=most_calls, freeze=freeze)


@st.composite
def transposed_convolutions(draw: st.DrawFn, dims: int) -> Any:
    """Draw a transposed convolution with any geometry that torch accepts."""
    largest = {1: 4, 2: 3, 3: 2}[dims]

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(whole(low, high)) for _ in range(dims))

    stride, dilation, groups = each(1, 3), each(1, 2), draw(whole(1, 3))
    pairs = zip(stride, dilation, strict=True)
    return TRANSPOSED[dims](
        groups * draw(whole(1, 2)),
        groups * draw(whole(1, 3)),
        each(1, largest),
        stride=stride,
        padding=each(0, 2),
        output_padding=tuple(draw(whole(0, max(pair) - 1)) for pair in pairs),
        groups=groups,
        bias=draw(st.booleans()),
        dilation=dilation,
    )


def _transposed_shape(draw: st.DrawFn, module: Any) -> tuple[int, ...]:
    """Draw a small input shape for which there is an output."""
    sizes = []
    for dim, kernel in enumerate(module.kernel_size):
        alone = module.dilation[dim] * (kernel - 1) + 1 + module.output_padding[dim]
        missing = max(0, 1 + 2 * module.padding[dim] - alone)
        sizes.append(1 + -(-missing // module.stride[dim]) + draw(whole(0, 2)))
    return draw(whole(1, 3)), module.in_channels, *sizes


@functools.cache
def transposed_cases(
    dims: int, *, most_calls: int = 1, freeze: bool = False
) -> st.SearchStrategy[Case]:
    """Draw `nn.ConvTranspose1d` to `3d` of every geometry; see `case_of`."""
    modules = transposed_convolutions(dims)
    return case_of(modules, _transposed_shape, most_calls=most_calls, freeze=freeze)


@functools.cache
def pixel_transposed_cases(dims: int) -> st.SearchStrategy[Case]:
    """Draw transposed convolutions of one tap on images of one pixel: one input, one output."""
    modules = st.builds(
        lambda groups, channels, outputs, stride, bias: TRANSPOSED[dims](
            groups * channels, groups * outputs, 1, stride, groups=groups, bias=bias
        ),
        st.integers(1, 2),
        st.integers(1, 2),
        st.integers(1, 2),
        st.integers(1, 2),
        st.booleans(),
    )
    return case_of(modules, lambda draw, m: (draw(whole(1, 3)), m.in_channels, *[1] * dims))


@functools.cache
def norm_cases(*, most_calls: int = 1, freeze: bool = False) -> st.SearchStrategy[Case]:
    """Draw `nn.LayerNorm` over the last dimension, inputs of rank 2 and 3."""
    modules = st.builds(nn.LayerNorm, st.integers(2, 4), bias=st.booleans())
    extras = st.lists(st.integers(1, 3), max_size=1)
    return case_of(
        modules,
        lambda draw, m: (draw(whole(1, 3)), *draw(extras), *m.normalized_shape),
        most_calls=most_calls,
        freeze=freeze,
    )


@functools.cache
def embedding_cases(*, most_calls: int = 1) -> st.SearchStrategy[Case]:
    """Draw `nn.Embedding`, inputs of rank 1 and 2."""
    modules = st.builds(nn.Embedding, st.integers(1, 4), st.integers(1, 3))
    shapes = st.lists(st.integers(1, 3), min_size=1, max_size=2)
    return case_of(
        modules,
        lambda draw, m: tuple(draw(shapes)),
        most_calls=most_calls,
        fill=indices,
    )


@functools.cache
def bag_cases(*, most_calls: int = 1) -> st.SearchStrategy[Case]:
    """Draw `nn.EmbeddingBag` of sums and means, with and without padding, inputs of rank 2."""
    modules = st.builds(
        nn.EmbeddingBag,
        st.integers(2, 4),
        st.integers(1, 3),
        mode=st.sampled_from(["sum", "mean"]),
        padding_idx=st.none() | st.integers(0, 1),
    )
    return case_of(
        modules,
        lambda draw, m: (draw(whole(1, 3)), draw(whole(1, 3))),
        most_calls=most_calls,
        fill=indices,
    )


@functools.cache
def attention_cases(*, most_calls: int = 1, most_positions: int = 3) -> st.SearchStrategy[Case]:
    """Draw `nn.MultiheadAttention` that attends to its inputs, examples first."""
    modules = st.builds(
        lambda heads, width, bias: nn.MultiheadAttention(
            heads * width, heads, bias=bias, batch_first=True
        ),
        st.integers(1, 2),
        st.integers(1, 3),
        st.booleans(),
    )
    return case_of(
        modules,
        lambda draw, m: (draw(whole(1, 3)), draw(whole(1, most_positions)), m.embed_dim),
        most_calls=most_calls,
    )


@functools.cache
def recurrent_cases(*, most_calls: int = 1, most_positions: int = 3) -> st.SearchStrategy[Case]:
    """Draw recurrent modules of one layer or two, examples first."""
    modules = st.builds(
        lambda cls, d_in, width, layers, bias: cls(
            d_in, width, layers, bias=bias, batch_first=True
        ),
        st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]),
        st.integers(1, 3),
        st.integers(1, 2),
        st.integers(1, 2),
        st.booleans(),
    )
    return case_of(
        modules,
        lambda draw, m: (draw(whole(1, 3)), draw(whole(1, most_positions)), m.input_size),
        most_calls=most_calls,
    )


@functools.cache
def cell_cases(*, most_calls: int = 1) -> st.SearchStrategy[Case]:
    """Draw cells of recurrent modules, from a state of zeros."""
    modules = st.builds(
        lambda cls, d_in, width, bias: cls(d_in, width, bias=bias),
        st.sampled_from([nn.RNNCell, nn.LSTMCell, nn.GRUCell]),
        st.integers(1, 3),
        st.integers(1, 2),
        st.booleans(),
    )
    return case_of(
        modules, lambda draw, m: (draw(whole(1, 3)), m.input_size), most_calls=most_calls
    )


@functools.cache
def layer_cases(*, most_calls: int = 1, freeze: bool = False) -> st.SearchStrategy[Case]:
    """Draw linear layers and convolutions; see `case_of`."""
    return linear_cases(most_calls=most_calls, freeze=freeze) | conv_cases(
        most_calls=most_calls, freeze=freeze
    )


@functools.cache
def single_row_cases() -> st.SearchStrategy[Case]:
    """Draw layers with T = 1: linear ones on `[N, d]`, convolutions that cover their input."""
    return linear_cases(max_rank=2) | covering_conv_cases(2)


@functools.cache
def covering_conv_cases(dims: int) -> st.SearchStrategy[Case]:
    """Draw convolutions of `dims` dimensions whose kernel covers the input."""
    modules = st.builds(
        lambda groups, channels, outputs, kernel, bias: CONV[dims](
            groups * channels, groups * outputs, kernel, groups=groups, bias=bias
        ),
        st.integers(1, 2),
        st.integers(1, 2),
        st.integers(1, 2),
        st.tuples(*(st.integers(1, 2) for _ in range(dims))),
        st.booleans(),
    )
    return case_of(modules, lambda draw, m: (draw(whole(1, 3)), m.in_channels, *m.kernel_size))


@attrs.frozen(eq=False)
class Kind:
    """One kind of layer.

    Args:
        probes: Small modules of the kind, to ask a stage whether it takes any.
        cases: All configurations, up to three calls in one forward, the bias frozen or not.
        single_row: Cases with one call and T = 1; `None` where the layer has no rows that its
            weight multiplies.
    """

    probes: tuple[nn.Module, ...]
    cases: st.SearchStrategy[Case]
    single_row: st.SearchStrategy[Case] | None = None

    def supported_by(self, curvature: Curvature) -> bool:
        """Return whether a curvature takes any of the probes."""
        return any(curvature.unsupported(probe) is None for probe in self.probes)


def kinds() -> list[Kind]:
    """Return the kinds of layers that the laws of curvatures can draw."""
    both = (True, False)
    return [
        Kind(
            tuple(nn.Linear(2, 3, bias=bias) for bias in both),
            linear_cases(most_calls=3, freeze=True),
            linear_cases(max_rank=2),
        ),
        *(
            Kind(
                tuple(conv(2, 2, 1, bias=bias) for bias in both),
                conv_cases((dims,), most_calls=2, freeze=True),
                covering_conv_cases(dims),
            )
            for dims, conv in CONV.items()
        ),
        *(
            Kind(
                tuple(conv(2, 2, 1, bias=bias) for bias in both),
                transposed_cases(dims, most_calls=2, freeze=True),
                pixel_transposed_cases(dims),
            )
            for dims, conv in TRANSPOSED.items()
        ),
        Kind(
            tuple(nn.LayerNorm(2, bias=bias) for bias in both),
            norm_cases(most_calls=2, freeze=True),
        ),
        Kind((nn.Embedding(3, 2),), embedding_cases(most_calls=2)),
        Kind((nn.EmbeddingBag(3, 2),), bag_cases(most_calls=2)),
    ]


def kinds_inside() -> list[Kind]:
    """Return the kinds of modules whose layers lie inside: their calls run again."""
    return [
        Kind(
            (nn.MultiheadAttention(2, 1, batch_first=True),),
            attention_cases(most_calls=2),
            attention_cases(most_positions=1),
        ),
        Kind(
            tuple(cls(2, 2, batch_first=True) for cls in (nn.RNN, nn.LSTM, nn.GRU)),
            recurrent_cases(most_calls=2),
            recurrent_cases(most_positions=1),
        ),
        Kind(
            tuple(cls(2, 2) for cls in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)),
            cell_cases(most_calls=2),
            cell_cases(),
        ),
    ]


def foreign_modules() -> Iterator[nn.Module]:
    """Yield modules of many classes, most of which a curvature cannot treat."""
    yield from (
        nn.Linear(2, 2),
        nn.Conv1d(2, 2, 1),
        nn.Conv2d(2, 2, 1),
        nn.Conv3d(2, 2, 1),
        nn.Bilinear(2, 2, 2),
    )
    yield from (
        nn.ConvTranspose1d(2, 2, 1),
        nn.ConvTranspose2d(2, 2, 1),
        nn.LazyConvTranspose2d(2, 1),
        nn.LazyBatchNorm2d(),
    )
    yield from (
        nn.BatchNorm1d(2),
        nn.BatchNorm2d(2),
        nn.BatchNorm2d(2, affine=False),
        nn.GroupNorm(1, 2),
        nn.LayerNorm(2),
        nn.RMSNorm(2),
    )
    yield from (
        nn.Embedding(3, 2),
        nn.EmbeddingBag(3, 2),
        nn.MultiheadAttention(2, 1),
        nn.LSTM(2, 2),
        nn.GRUCell(2, 2),
        nn.PReLU(),
    )
    yield from (
        nn.ReLU(),
        nn.Identity(),
        nn.Sequential(nn.Linear(2, 2)),
        nn.ModuleList(),
        nn.ParameterList([torch.ones(2)]),
    )


def tampered(plain: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield forms of `plain` that no curvature for it can treat exactly, each with its description.

    Such a layer does not compute what its class says, or trains something else than its weight.
    """
    cls, (anchor, *_) = type(plain), dict(plain.named_parameters(recurse=False))

    def changed(change: Callable[[Any], object]) -> nn.Module:
        module = copy.deepcopy(plain)
        change(module)
        return module

    def subclass(module: Any) -> None:
        module.__class__ = type(
            f"Doubled{cls.__name__}",
            (cls,),
            {"forward": lambda self, *args: 2 * cls.forward(self, *args)},
        )

    def as_buffer(module: Any) -> None:
        weight = getattr(module, anchor).detach()
        delattr(module, anchor)
        module.register_buffer(anchor, weight)

    def as_complex(module: Any) -> None:
        setattr(module, anchor, nn.Parameter(getattr(module, anchor).detach().to(torch.complex64)))

    def prune_half(module: Any, name: str) -> None:
        prune.l1_unstructured(module, name, 0.5)  # type: ignore[no-untyped-call]

    yield f"a subclass of {cls.__name__} with a forward of its own", changed(subclass)
    yield (
        f"{cls.__name__} with another forward set on the instance",
        changed(lambda m: setattr(m, "forward", torch.tanh)),
    )
    yield f"{cls.__name__} whose {anchor} is a buffer", changed(as_buffer)
    yield f"{cls.__name__} with complex weights", changed(as_complex)
    for name, _ in plain.named_parameters(recurse=False):
        parametrized = functools.partial(
            parametrize.register_parametrization, tensor_name=name, parametrization=nn.Tanh()
        )
        yield f"{cls.__name__} whose {name} is parametrized", changed(parametrized)
        yield (
            f"{cls.__name__} whose {name} is pruned",
            changed(functools.partial(prune_half, name=name)),
        )
    if cls is nn.Linear:
        yield (
            "the output projection of nn.MultiheadAttention, which is never called",
            nn.MultiheadAttention(2, 1).out_proj,
        )
    if cls in LAZY:
        yield (
            f"{LAZY[cls].__name__} before its first forward",
            LAZY[cls](2) if cls is nn.Linear else LAZY[cls](2, 1),
        )


@attrs.frozen(eq=False)
class Terms:
    """Likelihood terms.

    Args:
        rows: Their parameters, `[N, S, C]`.
        weights: The weight of each, `[N, S]`; `None` where all are 1.
    """

    rows: Tensor
    weights: Tensor | None


@st.composite
def terms(
    draw: st.DrawFn,
    widths: Sequence[int] = (2, 3, 4),
    scales: Sequence[float] = (1.0, 0.0, 4.0),
    weights: Sequence[float] = (),
) -> Terms:
    """Draw a few examples of a few terms: normal numbers times a scale.

    Each term has one of `weights`, if there are any.
    """
    n, s, c = draw(whole(1, 3)), draw(whole(1, 3)), draw(st.sampled_from(widths))
    generator = torch.Generator().manual_seed(draw(seeds()))
    rows = draw(st.sampled_from(scales)) * torch.randn(
        n, s, c, generator=generator, dtype=torch.float64
    )
    if not weights:
        return Terms(rows, None)
    given = draw(st.none() | st.lists(st.sampled_from(weights), min_size=n * s, max_size=n * s))
    return Terms(
        rows, None if given is None else torch.tensor(given, dtype=torch.float64).reshape(n, s)
    )
