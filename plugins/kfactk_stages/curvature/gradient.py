"""Curvature of any parameter, as statistics of its mini-batch gradient."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from kfactk import CombinationError, GradientCurvature, Layer, Statistic, Tensors, hookimpl
from kfactk.options import as_tuple, choice, flag, longest_side, refusal
from kfactk.sides import AUTO, longest_whole
from kfactk_stages.curvature._coverage import PRECISIONS
from kfactk_stages.curvature._on_demand import OnDemand


def _patterns(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(each, str) and each for each in value):
        raise refusal(instance, attribute, value, "patterns of names of parameters, in a list")


@attrs.frozen(kw_only=True)
class Gradient(GradientCurvature):
    """Second moments of the rows and columns of the mini-batch gradient V, `[..., d_out, d_in]`.

        L = E[V V^T],    R = E[V^T V]

    V is what is in `.grad` before `step()`: the user's own gradient, whatever loss and model it is
    of. E is the running mean over steps. Each parameter of a module is a block of its own. A tensor
    of several dimensions is a matrix: its first dimension against all others, merged. Parameters of
    one dimension, `[n]`, are `[n, 1]`, and their L is a diagonal.

    For bases of K-FAC there are also A and G, with `A kron G = R kron L / tr L`, the Kronecker
    product that has the trace of `E[vec(V) vec(V)^T]`.

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
        max_side: Largest side of L and R. A larger side has a diagonal, and its coordinates are
            not rotated; `None` for no bound; "auto" as for `kfac`.
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
    """

    provides: ClassVar[frozenset[str]] = frozenset({"L", "R", "A", "G"})
    default_basis: ClassVar[str | Mapping[str, Any] | None] = "soap"
    only_measured: ClassVar[tuple[str, ...]] = ("max_side", "counts")

    dims: str = attrs.field(default="merge", validator=choice("merge", "batch"))
    squares: tuple[str, ...] = attrs.field(default=(), converter=as_tuple, validator=_patterns)
    vectors: bool = attrs.field(default=True, validator=flag)
    max_side: int | str | None = attrs.field(default=AUTO, validator=longest_side())
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

    def factors_of_gradient(
        self, layer: Layer, gradient: Tensor, names: Collection[str] | None = None
    ) -> dict[str, Statistic]:
        """Return L and R, square: `[..., d_out, d_out]` and `[..., d_in, d_in]`, or columns."""
        vector = layer.tensors()[layer.parameters[0]].ndim < 2
        sides = {"L": gradient, "R": gradient.mT}
        return {
            name: self._moment(side, diagonal=vector)
            for name, side in sides.items()
            if names is None or name in names
        }

    def _moment(self, rows: Tensor, *, diagonal: bool) -> Statistic:
        """Return `V V^T` of the rows of V, or its diagonal as a column."""
        most = longest_whole(rows.shape[-1], self.max_side)
        if diagonal or (most is not None and rows.shape[-2] > most):
            return Statistic(rows.square().sum(-1, keepdim=True), 1.0)
        return Statistic(rows @ rows.mT, 1.0, symmetric=True)

    def assemble(self, layer: Layer, factors: Tensors) -> Tensors:
        """Return L and R, and A and G where they are asked for.

        A column that stands for a diagonal makes a matrix in A and G.
        """
        makers = {
            name: partial(factors.__getitem__, name) for name in ("L", "R") if name in factors
        }
        more = {"G": "L", "A": "R"}
        makers |= {
            new: partial(self._normalised, layer, factors[old])
            for new, old in more.items()
            if old in factors
        }
        return OnDemand(makers)

    def _normalised(self, layer: Layer, moment: Tensor) -> Tensor:
        """Return a moment over the root of its trace.

        Raises:
            CombinationError: It is too wide to be a matrix.
        """
        side = moment.shape[-2]
        d_out, d_in = self.matrix(layer, layer.tensors()).shape[-2:]
        other = d_in if side == d_out else d_out
        most = longest_whole(side if other == 1 else other, self.max_side)  # a vector has one side
        if most is not None and side > most:
            raise CombinationError(
                f"layer {layer.name!r} has a side of {side}, more than max_side={most}, "
                "and its basis needs a matrix of this size. Use basis='soap' or 'shampoo', which "
                f"take a diagonal there, exclude=[{layer.path!r}], or raise max_side."
            )
        return _over_root_of_trace(moment)


def _squares(tensor: Tensor) -> Tensor:
    """Return the square matrices of `[n k, n]` or `[n, n k]`, `[k, n, n]`."""
    n = min(tensor.shape)
    if tensor.shape[0] > n:
        return tensor.reshape(-1, n, n)
    return tensor.reshape(n, -1, n).movedim(1, 0)


def _over_root_of_trace(moment: Tensor) -> Tensor:
    if moment.shape[-1] != moment.shape[-2]:
        moment = torch.diag_embed(moment.squeeze(-1))
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return moment / torch.where(trace > 0, trace, math.inf).sqrt()


@hookimpl
def kfactk_curvatures() -> dict[str, type[Gradient]]:
    """Provide `gradient`."""
    return {"gradient": Gradient}
