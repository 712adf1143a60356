"""Curvature of any parameter, as statistics of its mini-batch gradient."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from kfactk import GradientCurvature, Layer, Statistic, Tensors, hookimpl
from kfactk.options import as_tuple, choice, flag, refusal
from kfactk.sides import is_diagonal, names_of
from kfactk_stages.curvature._coverage import PRECISIONS
from kfactk_stages.curvature._on_demand import OnDemand
from kfactk_stages.curvature._wide import WideSides

KRONECKER = {"L": "G", "R": "A"}
"""The Kronecker factor that each second moment makes."""


def _patterns(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(each, str) and each for each in value):
        raise refusal(instance, attribute, value, "patterns of names of parameters, in a list")


@attrs.frozen(kw_only=True)
class Gradient(WideSides, GradientCurvature):
    """Second moments of the rows and columns of the mini-batch gradient V, `[..., d_out, d_in]`.

        L = E[V V^T],    R = E[V^T V]

    V is what is in `.grad` before `step()`: the user's own gradient, whatever loss and model it is
    of. E is the running mean over steps. Each parameter of a module is a block of its own. A tensor
    of several dimensions is a matrix: its first dimension against all others, merged. Parameters of
    one dimension, `[n]`, are `[n, 1]`, and their L is a diagonal.

    For bases of K-FAC there are also A and G, with `A kron G = R kron L / tr L`, the Kronecker
    product that has the trace of `E[vec(V) vec(V)^T]`.

    A side of more than `max_side` is not kept whole. In place of L there is, as `wide` says,

        diagonal:  l = diag(L)
        blocks:    L0, L1, ...    L_ij within a block of at most `max_side` rows
        identity:  l              the mean of the diagonal, everywhere

    and likewise r, or R0, R1, ... for R. A block of L is summed over all columns of V, whatever
    stands for R. So L is one block-diagonal matrix: not one matrix for each tile of V.

    Args:
        dims: "merge": a tensor of three or more dimensions is one matrix, as above. "batch": its
            last two dimensions are matrices, each a group with L and R of its own, as for stacked
            experts `[experts, in, out]`.
        squares: Shell-style patterns of the names of parameters, such as "*.qkv.weight", that hold
            several square matrices side by side, as those of attention's queries, keys and values.
            Each is a group with L and R of its own. A parameter whose longer side is no multiple of
            the shorter one stays whole, and so does one of another number of dimensions than two.
        vectors: Whether to take parameters of fewer than two dimensions. Otherwise they go to the
            update rule.
        max_side: Longest side of L and R that is kept whole; `None` for no limit; "auto" as for
            `kfac`. The L of a vector is a diagonal however long it is.
        wide: What stands for a longer side: "diagonal", "blocks" or "identity"; `None` for
            "diagonal", of which `bind` warns. Coordinates of a diagonal are not rotated.
        counts: "now": a gradient counts in its own step, as in Shampoo. "next": from the next step
            on, as in SOAP, so that no gradient is measured in a basis that it has made. The first
            step then makes a basis only, and moves nothing.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> layer = Layer("fc", nn.Linear(2, 1), ("weight",))
        >>> found = Gradient().factors_of_gradient(layer, torch.tensor([[3.0, 4.0]]))
        >>> found["L"].total, found["R"].total
        (tensor([[25.]]), tensor([[ 9., 12.],
                [12., 16.]]))

    References:
        Gupta, Koren & Singer 2018, "Shampoo: Preconditioned Stochastic Tensor Optimization",
        arXiv:1802.09568.
        Morwani et al. 2024, "A New Perspective on Shampoo's Preconditioner", arXiv:2406.17748, on
        the product of both.
        Anil et al. 2020, "Scalable Second Order Optimization for Deep Learning", arXiv:2002.09018,
        which divides V into tiles with an L and an R each; of it we have read summaries.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"L", "R", "A", "G"})
    default_basis: ClassVar[str | Mapping[str, Any] | None] = "soap"
    only_measured: ClassVar[tuple[str, ...]] = ("max_side", "wide", "counts")

    dims: str = attrs.field(default="merge", validator=choice("merge", "batch"))
    squares: tuple[str, ...] = attrs.field(default=(), converter=as_tuple, validator=_patterns)
    vectors: bool = attrs.field(default=True, validator=flag)
    counts: str = attrs.field(default="now", validator=choice("now", "next"))

    @property
    def counts_next(self) -> bool:
        """Whether a gradient counts from the next step on."""
        return self.counts == "next"

    def unsupported(self, module: nn.Module) -> str | None:
        """Return why no parameter of this module can be taken, or `None` when some can."""
        parameters = [p for p in module._parameters.values() if p is not None]
        if any(isinstance(each, UninitializedParameter) for each in parameters):
            return f"{type(module).__name__} is not initialised yet; run one forward before binding"
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            return "its gradient is sparse (sparse=True), and statistics need a dense one"
        if any(self._takes(each) for each in parameters):
            return None
        if not self.vectors and any(each.dtype in PRECISIONS for each in parameters):
            return "it has fewer than two dimensions (vectors=False)"
        return "it holds no real floating-point numbers"

    def parts(self, module: nn.Module) -> dict[str, tuple[str, ...]]:
        """Return a part for each parameter that can be taken; that of the weight is ""."""
        own = module._parameters.items()
        taken = [name for name, each in own if each is not None and self._takes(each)]
        return {"" if name == "weight" else name: (name,) for name in taken}

    def _takes(self, parameter: nn.Parameter) -> bool:
        wide = parameter.ndim > 1 or self.vectors
        return parameter.dtype in PRECISIONS and parameter.numel() > 0 and wide

    def matrix(self, layer: Layer, tensors: Tensors) -> Tensor:
        """Return the parameter as `[..., d_out, d_in]`."""
        tensor = tensors[layer.parameters[0]]
        if tensor.ndim < 2:
            return tensor.reshape(-1, 1)
        if self._side_by_side(layer):
            return _squares(tensor)
        if tensor.ndim > 2 and self.dims == "merge":
            return tensor.flatten(1)
        return tensor.flatten(0, -3) if tensor.ndim > 3 else tensor

    def tensors(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        """Return the inverse of `matrix`."""
        name = layer.parameters[0]
        shape = layer.tensors()[name].shape
        if self._side_by_side(layer) and shape[0] < shape[1]:
            return {name: matrix.movedim(0, 1).reshape(shape)}
        return {name: matrix.reshape(shape)}

    def _side_by_side(self, layer: Layer) -> bool:
        """Return whether the parameter holds several square matrices, by its name and shape."""
        name = layer.parameters[0]
        shape, full = layer.tensors()[name].shape, f"{layer.path}.{name}"
        if len(shape) != 2 or not 1 < min(shape) < max(shape) or max(shape) % min(shape):
            return False
        return any(fnmatch.fnmatchcase(full, pattern) for pattern in self.squares)

    def sides(self, layer: Layer) -> tuple[int, int]:
        """Return d_out and d_in of the layer's matrix."""
        held = {name: torch.empty(p.shape, device="meta") for name, p in layer.tensors().items()}
        d_out, d_in = self.matrix(layer, held).shape[-2:]
        return d_out, d_in

    def stand_ins(self, layer: Layer) -> Mapping[str, tuple[str, ...]]:
        """Return what stands for the sides of a layer that are wide.

        The L of a vector is a column in any case. The G that is made of it has a diagonal where it
        is too wide to be a matrix.
        """
        d_out, d_in = self.sides(layer)
        if _is_vector(layer):
            return {"G": ("g",)} if self.is_wide(d_out, d_out) else {}
        found = {}
        for side, n, other in (("L", d_out, d_in), ("R", d_in, d_out)):
            if self.is_wide(n, other):
                found[side] = tuple(self.parts_of(side, n, other))
                found[KRONECKER[side]] = tuple(map(_of_kronecker, found[side]))
        return found

    def factors_of_gradient(
        self, layer: Layer, gradient: Tensor, names: Collection[str] | None = None
    ) -> dict[str, Statistic]:
        """Return L and R, square, or what stands for them; the L of a vector, `[n]`, as `[n, 1]`.

        L and R are `[..., d_out, d_out]` and `[..., d_in, d_in]`.
        """
        d_out, d_in = gradient.shape[-2:]
        wanted = ("L", "R") if names is None else names
        found = dict[str, Statistic]()
        if "L" in wanted and _is_vector(layer):
            found["L"] = Statistic(gradient.square().sum(-1, keepdim=True), 1.0)
        elif "L" in wanted:
            found |= self.moment("L", d_out, d_in, [gradient.mT.unsqueeze(-3)], 1.0)
        if "R" in wanted:
            found |= self.moment("R", d_in, d_out, [gradient.unsqueeze(-3)], 1.0)
        return found

    def assemble(self, layer: Layer, factors: Tensors) -> Tensors:
        """Return L and R, and A and G where they are asked for, or what stands for them.

        The column of a vector makes a matrix in G. A and G need all blocks of a side.
        """
        makers = self.makers(layer, factors)
        d_out, d_in = self.sides(layer)
        for side, n, other in (("L", d_out, d_in), ("R", d_in, d_out)):
            own = {name: makers[name] for name in names_of(side, factors)}
            if _is_vector(layer) and own:
                wide = side == "L" and self.is_wide(n, n)
                name = "g" if wide else KRONECKER[side]
                makers[name] = partial(_of_vector, own[side], wide=wide)
            elif own.keys() == self.parts_of(side, n, other).keys():
                makers |= {_of_kronecker(name): partial(_normalised, name, own) for name in own}
        return OnDemand(makers)


def _is_vector(layer: Layer) -> bool:
    return layer.tensors()[layer.parameters[0]].ndim < 2


def _of_kronecker(name: str) -> str:
    """Return the name of the Kronecker factor, or its stand-in, that a second moment makes."""
    return name.translate(str.maketrans("LlRr", "GgAa"))


def _normalised(name: str, makers: Mapping[str, Callable[[], Tensor]]) -> Tensor:
    """Return a moment, or what stands for it, over the root of the trace of its whole side."""
    traces = []
    for each, make in makers.items():
        matrix = make()
        diagonal = matrix if is_diagonal(each) else matrix.diagonal(dim1=-2, dim2=-1)
        traces.append(diagonal.sum(-1))
    root, matrix = _root_of(sum(traces[1:], traces[0])), makers[name]()
    return matrix / (root[..., None] if is_diagonal(name) else root[..., None, None])


def _of_vector(make: Callable[[], Tensor], *, wide: bool) -> Tensor:
    """Return the moment of a vector over the root of its trace: a matrix, or its diagonal."""
    diagonal = make().squeeze(-1)
    diagonal = diagonal / _root_of(diagonal.sum(-1))[..., None]
    return diagonal if wide else torch.diag_embed(diagonal)


def _root_of(trace: Tensor) -> Tensor:
    return torch.where(trace > 0, trace, math.inf).sqrt()


def _squares(tensor: Tensor) -> Tensor:
    """Return the square matrices of `[n k, n]` or `[n, n k]`, `[k, n, n]`."""
    n = min(tensor.shape)
    if tensor.shape[0] > n:
        return tensor.reshape(-1, n, n)
    return tensor.reshape(n, -1, n).movedim(1, 0)


@hookimpl
def kfactk_curvatures() -> dict[str, type[Gradient]]:
    """Provide `gradient`."""
    return {"gradient": Gradient}
