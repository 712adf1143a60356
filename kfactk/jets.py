"""Jets: the value and the derivatives of a network's hidden states, carried forward together.

A loss of physics-informed networks holds derivatives of a network u in its inputs. A `Jet` carries
them through the layers. For each point x it has rows

    u,   du/dv_1, ..., du/dv_m,   L_1 u, ..., L_K u,      L_k = sum_i c_ki d^2/dv_i^2

along directions v_i, by default the coordinates, with one L, the Laplacian. Each row of each
operation follows from those before:

    linear       W u + b,     W du/dv,                W L u
    f(u)         f(u),        f'(u) du/dv,            f'(u) L u + f''(u) sum_i c_i (du/dv_i)^2
    u w          u w,         u dw/dv + w du/dv,      u L w + w L u + 2 sum_i c_i du/dv_i dw/dv_i

So a linear layer maps all rows by one weight, and its bias is added to values alone. That is what
makes a Kronecker product of its curvature: see the curvature "taylor".

A jet is no tensor, so that no code can take its rows for those of a batch. It looks like one of
shape `[N, width]` to the operations that have a rule here, and all others refuse it.

References:
    Dangel, Mueller & Zeinhofer 2024, "Kronecker-Factored Approximate Curvature for Physics-Informed
    Neural Networks", arXiv:2405.15603. It calls the rows with a Laplacian the forward Laplacian, of
    Li et al. 2023, arXiv:2307.08214.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import register_pytree_node

from kfactk import derivatives
from kfactk.errors import CaptureError, OptionError

NAMESPACES = (torch, torch.Tensor, F, torch.special)
"""Where torch keeps its functions; one may be in several."""
FEATURES = (-1, 1)
"""The dimension of `[N, width]` that operations may work along."""


@attrs.frozen(eq=False)
class Directions:
    """What the rows of jets mean; jets of one call of `jet` share it.

    Args:
        first: Number m of first derivatives.
        second: Coefficients c of the second derivatives, `[K, m]`.
        laplacian: Whether the one second derivative is the Laplacian in the coordinates.
        ones: 1 in the row of the value, else 0, `[1 + m + K]`.
        grad: Whether gradients were on when the jet was made.
    """

    first: int
    second: Tensor
    laplacian: bool
    ones: Tensor
    grad: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many rows are values, first and second derivatives."""
        return 1, self.first, len(self.second)

    def contracted(self, products: Tensor) -> Tensor:
        """Return `sum_i c_ki p_i` of products of first derivatives `[N, m, width]`, `[N, K, ...]`.

        Where all coefficients are known to be one, it is a sum.
        """
        if self.laplacian:
            return products.sum(1, keepdim=True)
        return self.second.to(products) @ products


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Jet:
    """Values at N points, with their derivatives in the points; made by `kfactk.jet`.

    It goes through modules and functions as a tensor `[N, width]` does: linear layers and `@`,
    elementwise functions, `+ - * /` of jets of the same points and with constants, powers,
    `torch.cat` and columns (`x[:, :1]`). An operation without a rule raises `CaptureError`.

    Args:
        rows: `[N, 1 + m + K, width]`: the value, first and second derivatives.
        directions: What the rows mean.

    Raises:
        CaptureError: It comes from one that was made with gradients, and they are switched off;
            or its rows have another shape.
    """

    rows: Tensor
    directions: Directions

    def __post_init__(self) -> None:
        if isinstance(self.rows, Tensor) and self.rows.shape[1:-1] != self.ones.shape:
            raise CaptureError(
                f"a jet was given rows of shape {list(self.rows.shape)} in place of "
                f"[N, {len(self.ones)}, width]. torch.func.vmap divides jets by points, which they "
                "need not: call the network with the jet of all points."
            )
        if self.directions.grad and not torch.is_grad_enabled():
            raise CaptureError(
                "a jet that was made with gradients is used where they are switched off, so that "
                "its graph would be lost: in a torch.autograd.Function, under reentrant "
                "checkpointing, or under torch.no_grad(). Write the function with operations on "
                "jets, checkpoint with use_reentrant=False, or call kfactk.jet(points) under "
                "torch.no_grad() too."
            )

    # ------------------------------------------------------------------------ what it holds

    @property
    def value(self) -> Tensor:
        """The value, `[N, width]`."""
        return self.rows[:, 0]

    @property
    def gradient(self) -> Tensor:
        """The first derivatives along the directions, `[N, m, width]`."""
        return self.rows[:, 1 : 1 + self.directions.first]

    @property
    def second(self) -> Tensor:
        """The second derivatives that were asked for, `[N, K, width]`."""
        return self.rows[:, 1 + self.directions.first :]

    @property
    def laplacian(self) -> Tensor:
        """The sum of the second derivatives along the coordinates, `[N, width]`.

        Raises:
            CaptureError: Others were asked for.
        """
        if not self.directions.laplacian:
            raise CaptureError(
                "this jet was made with directions or second derivatives of its own, so that it "
                "has no Laplacian. Read them from u.second, [N, K, width]; or call "
                "kfactk.jet(points) alone, which has the Laplacian."
            )
        return self.rows[:, -1]

    @property
    def ones(self) -> Tensor:
        """What a bias is multiplied by in each row: 1 for the value, else 0, `[1 + m + K]`."""
        return self.directions.ones

    def constant(self, tensor: Tensor) -> Jet:
        """Return a tensor that does not depend on the points as a jet: its derivatives are zero.

        Args:
            tensor: `[N, width]`, such as parameters of the equation for each point.

        Raises:
            OptionError: It has another shape.
        """
        if tensor.ndim != 2 or len(tensor) != len(self):
            raise OptionError(
                f"constant() wants a tensor [{len(self)}, width], a row for each point, and was "
                f"given one of shape {list(tensor.shape)}. A number or a tensor [width] needs no "
                "constant(): add or multiply it as it is."
            )
        rest = tensor.new_zeros(len(tensor), len(self.ones) - 1, tensor.shape[1])
        return Jet(torch.cat([tensor.unsqueeze(1), rest], 1), self.directions)

    # ---------------------------------------------------------------- what a tensor would say

    @property
    def shape(self) -> torch.Size:
        """`[N, width]`."""
        return torch.Size((self.rows.shape[0], self.rows.shape[2]))

    @property
    def ndim(self) -> int:
        """2."""
        return 2

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.rows.device

    @property
    def requires_grad(self) -> bool:
        """Whether the rows depend on parameters that are trained."""
        return self.rows.requires_grad

    def size(self, dim: int | None = None) -> Any:
        """Return `shape`, or one number of it."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Return 2."""
        return 2

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def __repr__(self) -> str:
        _, first, second = self.directions.sizes
        return f"Jet(shape={list(self.shape)}, first={first}, second={second})"

    def __bool__(self) -> bool:
        raise _refusal("bool")

    def __iter__(self) -> Any:
        raise _refusal("iteration")

    # ------------------------------------------------------------------------------ operations

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the rule of a function of torch.

        Raises:
            CaptureError: It has none, or none for these arguments.
        """
        rule = RULES.get(func)
        if rule is None:
            raise _refusal(_name(func))
        try:
            bound = rule.signature.bind(*args, **(kwargs or {}))
        except TypeError as error:
            raise _refusal(_name(func), f" for these arguments ({error})") from error
        return rule.function(*bound.args, **bound.kwargs)

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch.Tensor, name, None)
        if found is None or name.startswith("__"):
            raise AttributeError(f"'Jet' object has no attribute {name!r}")
        if not callable(found):  # a property of tensors
            raise _refusal(name)
        return partial(self._call, found)

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return Jet.__torch_function__(function, (Jet,), (self, *args), kwargs)

    def __add__(self, other: Any) -> Jet:
        return _add(self, other)

    def __sub__(self, other: Any) -> Jet:
        return _subtract(self, other)

    def __mul__(self, other: Any) -> Jet:
        return _multiply(self, other)

    def __truediv__(self, other: Any) -> Jet:
        return _divide(self, other)

    def __matmul__(self, other: Any) -> Jet:
        return _matmul(self, other)

    def __pow__(self, exponent: Any) -> Jet:
        return _power(self, exponent)

    def __radd__(self, other: Any) -> Jet:
        return _add(other, self)

    def __rsub__(self, other: Any) -> Jet:
        return _subtract(other, self)

    def __rmul__(self, other: Any) -> Jet:
        return _multiply(other, self)

    def __rtruediv__(self, other: Any) -> Jet:
        return _divide(other, self)

    def __rpow__(self, other: Any) -> Jet:
        return _power(other, self)

    def __neg__(self) -> Jet:
        return _negative(self)

    def __getitem__(self, index: Any) -> Jet:
        return _columns(self, index)

    def _in_place(self, other: Any) -> Jet:
        raise _refusal("an operation in place", ": write x = x + y in place of x += y")

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ipow__ = __imatmul__ = _in_place


def jet(points: Tensor, *, directions: Any = None, second: Any = None) -> Jet:
    """Return points as the jet of the function that maps each to itself.

    What a network makes of it holds the network's derivatives in the points.

    Args:
        points: `[N, d]`.
        directions: Directions of the derivatives, `[m, d]`, or `[N, m, d]` where each point has
            its own; `None` for the d coordinates.
        second: Which second derivatives are carried: coefficients `[K, m]` of those along the
            directions, a row for each sum; `None` for one row, the sum of all. `[[0, 1]]` is u_xx
            of points (t, x), and an empty list is none at all.

    Returns:
        The jet, of `1 + m + K` rows a point. Each costs as much as a forward of the network.

    Raises:
        OptionError: The points, directions or coefficients have another shape.

    Example:
        >>> import kfactk
        >>> points = torch.tensor([[0.5, 2.0]], dtype=torch.float64)
        >>> x = kfactk.jet(points)
        >>> u = x[:, :1] ** 3 * x[:, 1:]
        >>> u.value.item(), u.gradient.flatten().tolist(), u.laplacian.item()
        (0.25, [1.5, 0.125], 6.0)
        >>> x = kfactk.jet(points, second=[[1, 0], [0, 1]])
        >>> (x[:, :1] ** 3 * x[:, 1:]).second.flatten().tolist()
        [6.0, 0.0]
    """
    if not isinstance(points, Tensor) or points.ndim != 2 or not points.is_floating_point():
        got = list(points.shape) if isinstance(points, Tensor) else type(points).__name__
        raise OptionError(
            f"jet() wants points [N, d] of a floating type, and was given {got}. Put the "
            "coordinates of each point in a row."
        )
    count, d = points.shape
    along = _along(points, directions)
    weights = _coefficients(points, along.shape[-2], second)
    rest = points.new_zeros(count, len(weights), d)
    rows = torch.cat([points.unsqueeze(1), along.expand(count, -1, d), rest], 1)
    ones = points.new_zeros(rows.shape[1])
    ones[0] = 1
    meaning = Directions(
        along.shape[-2],
        weights,
        directions is None and second is None,
        ones,
        torch.is_grad_enabled(),
    )
    return Jet(rows, meaning)


def _along(points: Tensor, directions: Any) -> Tensor:
    """Return directions as `[m, d]` or `[N, m, d]`."""
    count, d = points.shape
    if directions is None:
        return torch.eye(d, dtype=points.dtype, device=points.device)
    along = torch.as_tensor(directions, dtype=points.dtype, device=points.device)
    each = along.ndim == 3 and len(along) == count
    if along.shape[-1] != d or not (along.ndim == 2 or each):
        raise OptionError(
            f"directions have shape {list(along.shape)}; for points {list(points.shape)} give "
            f"[m, {d}], or [{count}, m, {d}] where each point has its own."
        )
    return along


def _coefficients(points: Tensor, first: int, second: Any) -> Tensor:
    """Return the coefficients of second derivatives as `[K, m]`."""
    if second is None:
        return torch.ones(1, first, dtype=points.dtype, device=points.device)
    weights = torch.as_tensor(second, dtype=points.dtype, device=points.device)
    if weights.numel() == 0:
        weights = weights.reshape(0, first)
    if weights.ndim != 2 or weights.shape[1] != first:
        raise OptionError(
            f"second has shape {list(weights.shape)}; give coefficients [K, {first}] of the second "
            f"derivatives along the {first} directions, such as {[[1.0] * first]} for their sum."
        )
    return weights


def rows_of(value: Any) -> Any:
    """Return the rows of a jet, and anything else as it is.

    Example:
        >>> rows_of(jet(torch.ones(5, 2))).shape, rows_of("x")
        (torch.Size([5, 4, 2]), 'x')
    """
    return value.rows if isinstance(value, Jet) else value


# -------------------------------------------------------------------------------------- refusals


def _name(func: Callable[..., Any]) -> str:
    return str(getattr(func, "__name__", func))


def _refusal(name: str, why: str = "") -> CaptureError:
    return CaptureError(
        f"{name} has no rule for a jet{why}: its derivatives would be lost. A jet goes through "
        "linear layers and @, + - * / and ** with numbers, torch.cat and x[:, a:b] of columns, and "
        f"{', '.join(sorted(derivatives.FUNCTIONS))}. Write the function with these; or apply it "
        "to u.value, u.gradient, u.laplacian or u.second, which are tensors."
    )


def _same(one: Jet, other: Jet) -> None:
    """Check that two jets are of the same points.

    Raises:
        CaptureError: They were made by two calls of `jet`.
    """
    if one.directions is not other.directions:
        raise CaptureError(
            "two jets that were made by different calls of kfactk.jet cannot be combined: their "
            "derivatives may be along other directions. Make one jet of all coordinates, "
            "x = kfactk.jet(torch.cat([t, x], 1)), and take its columns, x[:, :1]; make a tensor "
            "that does not depend on the points a jet by x.constant(tensor)."
        )


def _constant(one: Jet, other: Any, name: str) -> Any:
    """Return a number or tensor that all points share.

    Raises:
        CaptureError: It may depend on the points, or is none.
    """
    if isinstance(other, int | float):
        return other
    if not isinstance(other, Tensor):
        raise _refusal(name, f" and {type(other).__name__}")
    shared = other.ndim < 2 or (other.ndim == 2 and len(other) == 1)
    if shared and (other.ndim < 2 or len(one) > 1 or isinstance(other, nn.Parameter)):
        return other
    raise CaptureError(
        f"{name} of a jet of shape {list(one.shape)} and a tensor of shape {list(other.shape)}: "
        "the tensor may depend on the points, and its derivatives in them are not known. Compute "
        "it from the jet of the points, x = kfactk.jet(points); or, where it does not depend on "
        "them, give x.constant(tensor). A tensor [width] is taken as a constant."
    )


# ------------------------------------------------------------------------------------------ rules


def _linear(input: Jet, weight: Tensor, bias: Tensor | None = None) -> Jet:
    """Map all rows by the weight, and add the bias to values."""
    if not isinstance(input, Jet) or weight.ndim != 2:
        raise _refusal("linear", " as a weight")
    rows = F.linear(input.rows, weight)
    return Jet(rows if bias is None else rows + _in_value(input, rows, bias), input.directions)


def _matmul(input: Any, other: Any) -> Jet:
    """Multiply all rows by a matrix `[width, k]`."""
    if not isinstance(input, Jet) or not isinstance(other, Tensor) or other.ndim != 2:
        raise _refusal("matmul", " unless it is a jet @ a matrix [width, k]")
    return Jet(input.rows @ other, input.directions)


def _in_value(one: Jet, rows: Tensor, constant: Any) -> Tensor:
    """Return a constant in the row of the value, zeros in the others."""
    ones = one.ones.to(rows).unsqueeze(1)
    return ones * (constant.to(rows.dtype) if isinstance(constant, Tensor) else constant)


def _add(input: Any, other: Any, *, alpha: float = 1) -> Jet:
    """Add jets, or a jet and a constant."""
    if alpha != 1:
        other = _multiply(other, alpha) if isinstance(other, Jet) else other * alpha
    if not isinstance(input, Jet):
        input, other = other, input
    if isinstance(other, Jet):
        _same(input, other)
        return Jet(input.rows + other.rows, input.directions)
    constant = _constant(input, other, "add")
    return Jet(input.rows + _in_value(input, input.rows, constant), input.directions)


def _subtract(input: Any, other: Any, *, alpha: float = 1) -> Jet:
    """Subtract jets, or a jet and a constant."""
    return _add(input, other, alpha=-alpha)


def _reverse_subtract(input: Any, other: Any, *, alpha: float = 1) -> Jet:
    """Subtract the first from the second."""
    return _add(other, input, alpha=-alpha)


def _negative(input: Jet) -> Jet:
    """Change the sign."""
    return Jet(-input.rows, input.directions)


def _multiply(input: Any, other: Any) -> Jet:
    """Multiply jets by the product rule, or all rows of a jet by a constant."""
    if not isinstance(input, Jet):
        input, other = other, input
    if not isinstance(other, Jet):
        return Jet(input.rows * _constant(input, other, "mul"), input.directions)
    if other is input:
        return _chained(input, *derivatives.square(input.rows[:, :1]))
    _same(input, other)
    directions = input.directions
    u, first_u, second_u = torch.split_with_sizes(input.rows, directions.sizes, 1)
    w, first_w, second_w = torch.split_with_sizes(other.rows, directions.sizes, 1)
    crossed = 2 * directions.contracted(first_u * first_w)
    parts = [u * w, u * first_w + w * first_u, u * second_w + w * second_u + crossed]
    return Jet(torch.cat(parts, 1), directions)


def _divide(input: Any, other: Any) -> Jet:
    """Divide a jet by a constant, or anything by a jet."""
    if isinstance(other, Jet):
        return _multiply(input, _chained(other, *derivatives.reciprocal(other.rows[:, :1])))
    return Jet(input.rows / _constant(input, other, "div"), input.directions)


def _power(input: Any, exponent: Any) -> Jet:
    """Raise a jet to the power of a number."""
    if not isinstance(input, Jet) or not isinstance(exponent, int | float):
        raise _refusal("pow", " unless the exponent is a number")
    return _chained(input, *derivatives.power(input.rows[:, :1], exponent))


def _chained(one: Jet, value: Tensor, slope: Tensor | float, bend: Tensor | float) -> Jet:
    """Return f(u) by the chain rule.

    Args:
        one: u.
        value: f(u), `[N, 1, width]`.
        slope: f'(u), likewise or a number.
        bend: f''(u), likewise.
    """
    directions = one.directions
    _, first, second = torch.split_with_sizes(one.rows, directions.sizes, 1)
    parts = [value, slope * first, slope * second + bend * directions.contracted(first * first)]
    return Jet(torch.cat(parts, 1), directions)


def _elementwise(
    function: Callable[..., derivatives.Derivatives],
) -> Callable[..., Jet]:
    """Return the rule of a function of one argument and of numbers."""

    def rule(input: Jet, *args: Any, inplace: bool = False, **kwargs: Any) -> Jet:
        if inplace:
            raise _refusal(function.__name__, " in place: leave out inplace=True")
        return _chained(input, *function(input.rows[:, :1], *args, **kwargs))

    own = inspect.signature(function)
    inplace = inspect.Parameter("inplace", inspect.Parameter.KEYWORD_ONLY, default=False)
    rule.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*own.parameters.values(), inplace], return_annotation=Jet
    )
    return rule


def _cat(tensors: Sequence[Any], dim: int = 0) -> Jet:
    """Join columns."""
    first = next(each for each in tensors if isinstance(each, Jet))
    if dim not in FEATURES:
        raise _refusal("cat", " along dimension 0: join columns, dim=1")
    for each in tensors:
        if not isinstance(each, Jet):
            raise _refusal("cat", " and a tensor: make it a jet first, by x.constant(tensor)")
        _same(first, each)
    return Jet(torch.cat([each.rows for each in tensors], -1), first.directions)


def _columns(input: Jet, index: Any) -> Jet:
    """Return some columns: `x[:, a:b]`, `x[..., a:b]` or `x[:, [a, b]]`."""
    first, *others = index if isinstance(index, tuple) else (index,)
    every = first is Ellipsis or (isinstance(first, slice) and first == slice(None))
    kept = others[0] if len(others) == 1 else None
    many = isinstance(kept, slice | list) or (isinstance(kept, Tensor) and kept.ndim == 1)
    if not every or not many:
        raise _refusal("indexing", " unless it takes columns of all points, as x[:, :1] does")
    return Jet(input.rows[..., kept], input.directions)


def _split(tensor: Jet, split_size_or_sections: Any, dim: int = 0) -> list[Jet]:
    """Divide the columns."""
    if dim not in FEATURES:
        raise _refusal("split", " along dimension 0")
    parts = torch.split(tensor.rows, split_size_or_sections, -1)
    return [Jet(each, tensor.directions) for each in parts]


def _chunk(input: Jet, chunks: int, dim: int = 0) -> list[Jet]:
    """Divide the columns into a number of parts."""
    if dim not in FEATURES:
        raise _refusal("chunk", " along dimension 0")
    return [Jet(each, input.directions) for each in input.rows.chunk(chunks, -1)]


def _over_columns(name: str) -> Callable[..., Jet]:
    """Return the rule of a sum or a mean over the columns."""

    def rule(input: Jet, dim: int | None = None, keepdim: bool = False) -> Jet:
        if dim not in FEATURES or not keepdim:
            raise _refusal(name, " unless it is over the columns, dim=1, with keepdim=True")
        rows = getattr(input.rows, name)(-1, keepdim=True)
        return Jet(rows, input.directions)

    return rule


def _by_rows(name: str) -> Callable[..., Jet]:
    """Return the rule of a method that means the same for each row by itself."""

    def rule(input: Jet, *args: Any, **kwargs: Any) -> Jet:
        return Jet(getattr(input.rows, name)(*args, **kwargs), input.directions)

    return rule


def _dropout(input: Jet, p: float = 0.5, training: bool = True, inplace: bool = False) -> Jet:
    """Return the jet where nothing is dropped."""
    if training and p > 0:
        raise _refusal("dropout", " in training: a solution of an equation has no noise in it")
    return input


def _zeros_like(input: Jet) -> Jet:
    """Return zeros, which are constant."""
    return Jet(torch.zeros_like(input.rows), input.directions)


def _ones_like(input: Jet) -> Jet:
    """Return ones, which are constant."""
    return Jet(torch.zeros_like(input.rows) + _in_value(input, input.rows, 1), input.directions)


@attrs.frozen(eq=False)
class Rule:
    """What a function of torch does to jets.

    Args:
        function: Takes what the function takes.
        signature: Its signature, to tell arguments that it does not know.
    """

    function: Callable[..., Any]
    signature: inspect.Signature = attrs.field(
        default=attrs.Factory(lambda self: inspect.signature(self.function), takes_self=True)
    )


def _rules() -> dict[Any, Rule]:
    """Return the rules by the functions of torch that they are of."""
    named: dict[str, Callable[..., Any]] = {
        name: _elementwise(function) for name, function in derivatives.FUNCTIONS.items()
    }
    named |= {name: _over_columns(name) for name in ("sum", "mean")}
    named |= {
        name: _by_rows(name)
        for name in ("to", "float", "double", "half", "bfloat16", "clone", "contiguous", "detach")
    }
    named |= dict.fromkeys(("sub", "subtract"), _subtract)
    named |= dict.fromkeys(("mul", "multiply"), _multiply)
    named |= dict.fromkeys(("div", "divide", "true_divide"), _divide)
    named |= dict.fromkeys(("neg", "negative"), _negative)
    named |= dict.fromkeys(("matmul", "mm"), _matmul)
    named |= dict.fromkeys(("cat", "concat", "concatenate"), _cat)
    named |= {
        **{"add": _add, "rsub": _reverse_subtract, "pow": _power, "linear": _linear},
        **{"split": _split, "chunk": _chunk, "dropout": _dropout, "zeros_like": _zeros_like},
        **{"ones_like": _ones_like},
    }
    return {
        found: Rule(rule)
        for name, rule in named.items()
        for namespace in NAMESPACES
        if callable(found := getattr(namespace, name, None))
    }


RULES = _rules()
"""By function of torch, what it does to jets."""
# Wrappers of modules, as fully_shard's, look for tensors in pytrees or, later, in dataclasses.
register_pytree_node(
    Jet,
    lambda each: ([each.rows], each.directions),
    lambda rows, meaning: Jet(next(iter(rows)), meaning),
)
