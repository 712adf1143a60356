"""The block-tridiagonal inverse of K-FAC: a layer knows the layer after it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import (
    CaptureError,
    CombinationError,
    DecompositionError,
    Link,
    LinkedLayer,
    OptionError,
    Preparation,
    Prepared,
    Samples,
    Statistic,
    Tensors,
    hookimpl,
    linalg,
)
from kfactk.options import as_tuple
from kfactk.samples import working_dtype

SIDES = ("A", "G")


def _check_names(stage: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is None:
        return
    good = isinstance(value, tuple) and all(isinstance(each, str) and each for each in value)
    if not good or len(value) < 2 or len(set(value)) < len(value):
        raise OptionError(
            f"layers is {value!r}; it must be a list of at least two names of layers, each once, "
            "in the order of the forward, such as ['encoder', 'decoder']."
        )


@attrs.frozen
class BlockTridiagonal(Link):
    """Invert a Fisher matrix whose inverse couples each layer with its neighbours.

    With layers 1, ..., L in the order of the forward, a_l the input and g_l the output gradient of
    layer l,

        F_lk = A_lk kron G_lk,    A_lk = E[a_l a_k^T],    G_lk = E[g_l g_k^T]

    for k = l and k = l + 1. The matrix of which these are blocks, and whose inverse is
    block-tridiagonal, has the inverse

        P = Xi^T Lambda Xi

    Xi has I on its diagonal and -Psi_l beside it, at (l, l + 1). Lambda is block-diagonal, with

        Psi_l = F_l,l+1 F_l+1,l+1^-1
              = (A_l,l+1 A_l+1,l+1^-1) kron (G_l,l+1 G_l+1,l+1^-1)
        Lambda_l^-1 = A_ll kron G_ll - Psi_l F_l+1,l+1 Psi_l^T = A_ll kron G_ll - C_l kron D_l
        Lambda_L^-1 = A_LL kron G_LL

    The paper numbers a by the layer that made it: its Psi^A_{l-1,l} is that of a_l here. Lambda_l
    takes two eigendecompositions, one a side: with A_ll = R R^T and R^-1 C R^-T = E S E^T

        K = R^-T E,    Lambda_l = (K_A kron K_G) (I - S_A kron S_G)^-1 (K_A kron K_G)^T

    A_ll and G_ll are damped first as in the basis `kfac`, everywhere in these formulas. Since
    damping makes the diagonal blocks larger alone, S_A and S_G stay below 1. Where layers were
    measured on different batches they may not; such a pair is left apart, and counted.

    It solves for its layers by itself, from A and G: what the basis made of these is not used, but
    until the link is measured. Damping is that of the last refresh.

    It joins the layers whose curvature gives the rows of A and G: linear layers, and convolutions
    with `spatial="reduce"`. A pair with different numbers of rows an example is left apart. Layers
    in between that it does not join, such as norms, keep their block.

    Args:
        layers: Names of the layers in the order of the forward; `None` for all that it can join,
            in the model's order. The forward must then run them in this order.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> import kfactk
        >>> kfactk.build(basis="kfac", link="block_tridiagonal")
        kfactk.build(basis='kfac', link='block_tridiagonal')

    References:
        Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature", arXiv:1503.05671, section 4.3 and appendix B.
    """

    requires: ClassVar[frozenset[str]] = frozenset(SIDES)
    solves: ClassVar[bool] = True
    damped_at: ClassVar[str] = "refresh"

    layers: Sequence[str] | None = attrs.field(
        default=None, converter=as_tuple, validator=_check_names
    )

    def order(self, layers: Sequence[LinkedLayer]) -> Sequence[LinkedLayer]:
        """Return the chain; nothing where there would be one layer, which has no neighbour."""
        known = {layer.name: layer for layer in layers}
        able = {name: layer for name, layer in known.items() if not _obstacle(layer)}
        if self.layers is None:
            return list(able.values()) if len(able) > 1 else []
        if unknown := [name for name in self.layers if name not in able]:
            layer = known.get(unknown[0])
            why = "which no block preconditions" if layer is None else _obstacle(layer)
            raise CombinationError(
                f"the link joins the layers {list(self.layers)}, and there is {unknown[0]!r}, "
                f"{why}. It can join {list(able)}. Give layers=[...] of these, or leave it out."
            )
        return [able[name] for name in self.layers]

    def rows(self, layer: LinkedLayer, samples: Samples) -> Tensors:
        """Return the rows a, `[N, T, d_in]`, and g, `[N, T, d_out]`, that A and G are made of.

        The name of a tells whether the pass is the first one over the forward for this layer.
        """
        inputs, gradients = layer.factor_rows(samples)
        return {"first" if samples.first else "later": inputs, "gradients": gradients}

    def statistics(
        self,
        layers: Sequence[LinkedLayer],
        rows: Mapping[str, Tensors],
        num_terms: Tensor | float,
    ) -> dict[str, Statistic]:
        """Return the sums of `a_l a_k^T`, by examples, and of `g_l g_k^T`, by likelihood terms."""
        found, home = {}, layers[0].layer.anchor.device
        for number, (layer, after) in enumerate(_pairs(layers)):
            one, other = rows.get(layer.name, {}), rows.get(after.name, {})
            both, new = bool(one and other), "first" in one or "first" in other
            alike = both and one["gradients"].shape[1] == other["gradients"].shape[1]
            a = _cross(_inputs(one), _inputs(other)) if alike and new else _blank(layer, after, -1)
            g = _cross(one["gradients"], other["gradients"]) if alike else _blank(layer, after, -2)
            examples = float(len(one["gradients"])) if both and new else 0.0
            found[f"A.{number}"] = Statistic(a.to(home), examples)
            found[f"G.{number}"] = Statistic(g.to(home), num_terms)
        return found

    def remark(
        self,
        layers: Sequence[LinkedLayer],
        rows: Mapping[str, Tensors],
        places: Mapping[str, Sequence[int]],
    ) -> str | None:
        """Return where the chain is cut, and whether its named order is not the forward's.

        It is cut where numbers of rows differ.

        Raises:
            CaptureError: The layers ran in another order, and the recipe names none.
        """
        ran = [layer.name for layer in layers if places.get(layer.name)]
        order = sorted(ran, key=lambda name: min(places[name]))
        if self.layers is None and order != ran:
            raise CaptureError(
                f"a link of neighbours took the layers in the model's order, {ran}, and the "
                f"forward ran them in the order {order}. Give link={{'name': 'block_tridiagonal', "
                f"'layers': {order}}}, with all layers of the chain in their order."
            )
        told = []
        if order != ran:
            told.append(
                f"the block-tridiagonal link joins the layers in the order {ran} that its recipe "
                f"names, and the forward ran them in the order {order}, so that layers are paired "
                f"which are no neighbours. If no branches are meant, give 'layers': {order}"
            )
        counts = {name: each["gradients"].shape[1] for name, each in rows.items()}
        cut = [
            f"{one.name!r} ({counts[one.name]}) and {other.name!r} ({counts[other.name]})"
            for one, other in _pairs(layers)
            if one.name in counts
            and other.name in counts
            and counts[one.name] != counts[other.name]
        ]
        if cut:
            told.append(
                "the block-tridiagonal link pairs the rows of neighbours, and leaves apart layers "
                f"with different numbers of rows an example: {'; '.join(cut)}"
            )
        return ". Besides, ".join(told) or None

    def prepare(self, layers: Sequence[LinkedLayer], statistics: Tensors) -> Prepared:
        """Return Psi, K and `(1 - S_A kron S_G)^-1` of each layer, in the precision of A.

        Raises:
            DecompositionError: A matrix cannot be decomposed.
        """
        if len(layers) < 2:
            return Prepared()
        home = layers[0].layer.anchor.device
        chain = [_Damped.of(layer, home) for layer in layers]
        tensors, failures = _alone(chain[-1], len(chain) - 1), []
        for number, (one, after) in enumerate(itertools.pairwise(chain)):
            crosses = {side: statistics.get(f"{side}.{number}") for side in SIDES}
            made = _conditional(one, after, crosses, number)
            if made is None:
                failures.append(
                    f"the link leaves layer {one.name!r} apart from {after.name!r}: their "
                    "statistics, of different batches, make no Fisher matrix together"
                )
                made = _conditional(one, after, dict.fromkeys(SIDES), number)
                assert made is not None
            tensors |= made
        return Prepared({name: tensors[name] for name in sorted(tensors)}, failures)

    def preparation(self, layers: Sequence[LinkedLayer]) -> Preparation:
        """Return the shapes of Psi, K and `(1 - S_A kron S_G)^-1`, and what they take.

        For a pair of layers, and a side of n numbers here and m there, the canonical correlations
        take `3 n^2 m + m^2 n` FLOPs besides eigenvectors, Psi takes `2 m^2 n`, and K `n^3`.
        """
        if len(layers) < 2:
            return Preparation()
        tensors: dict[str, tuple[int, ...]] = {}
        sides = [dict(zip(SIDES, reversed(layer.shape), strict=True)) for layer in layers]
        products, solves, eigh, pairs = 0.0, 0.0, list[int](), [0]
        for number, here in enumerate(sides):
            tensors[f"weights.{number}"] = here["G"], here["A"]
            tensors |= {f"root.{side}.{number}": (n, n) for side, n in here.items()}
            solves += sum(n**3 for n in here.values())
            if number + 1 == len(sides):
                continue
            eigh += here.values()
            there = sides[number + 1]
            for side, n in here.items():
                m = there[side]
                tensors[f"psi.{side}.{number}"] = n, m
                products += 2 * n * n * m
                solves += n * n * m + 3 * m * m * n
            of_pair = sum(n * n + n * there[side] for side, n in here.items())
            longest = max(4 * n * n + 2 * n * there[side] for side, n in here.items())
            pairs.append(of_pair + longest + 2 * math.prod(here.values()))
        triangles = [n for here in sides for n in here.values()]
        workspace = 8 * (sum(n * n for n in triangles) + max(pairs))
        return Preparation(tensors, eigh, triangles, products, True, workspace, triangular=solves)

    def correct(
        self,
        layers: Sequence[LinkedLayer],
        gradients: Tensors,
        preconditioned: Tensors,
        statistics: Tensors,
    ) -> dict[str, Tensor]:
        """Return `P g`, or what the blocks made of g where nothing is prepared."""
        if "weights.0" not in statistics:
            return dict(preconditioned)
        like = next(iter(gradients.values()))
        parts = {name: tensor.to(like.dtype) for name, tensor in statistics.items()}
        zero = torch.zeros((), dtype=like.dtype, device=parts["weights.0"].device)
        given = [gradients.get(each.name, zero.expand(each.shape)).to(zero) for each in layers]
        last, solved = len(layers) - 1, []
        for number, v in enumerate(given):
            if number < last:
                v = v - _psi(parts, "G", number) @ given[number + 1] @ _psi(parts, "A", number).mT
            left, right = parts[f"root.G.{number}"], parts[f"root.A.{number}"]
            v = left @ (parts[f"weights.{number}"] * (left.mT @ v @ right)) @ right.mT
            solved.append(v)
        found = {}
        for number, layer in enumerate(layers):
            v = solved[number]
            if number:
                before = number - 1
                v = v - _psi(parts, "G", before).mT @ solved[before] @ _psi(parts, "A", before)
            if layer.name in gradients:
                found[layer.name] = v.to(gradients[layer.name])
        return found


@attrs.frozen(eq=False)
class _Damped:
    """A layer's damped factors, balanced to one size, by their Cholesky factors.

    Args:
        name: The layer's name.
        dtype: Precision of its matrices.
        lower: R with `R R^T` the damped factor, in double precision.
        factors: What each matrix was multiplied by.
    """

    name: str
    dtype: torch.dtype
    lower: Tensors
    factors: Tensors

    @classmethod
    def of(cls, layer: LinkedLayer, device: torch.device) -> _Damped:
        """Return those of a layer, on a device.

        Raises:
            DecompositionError: A matrix cannot be decomposed.
        """
        matrices = {side: layer.matrices[side].to(device) for side in SIDES}
        means = {side: linalg.mean_diagonal(matrix) for side, matrix in matrices.items()}
        lower, factors = {}, {}
        for side, (factor, least) in linalg.balanced_sides(means["A"], means["G"]).items():
            factors[side] = factor.double()
            shift = least.clamp(min=layer.damping**0.5).double()
            try:
                lower[side] = linalg.cholesky(matrices[side].double() * factors[side], shift)
            except DecompositionError as error:
                raise DecompositionError(f"{side} of layer {layer.name!r}: {error}") from error
        return cls(layer.name, matrices["A"].dtype, lower, factors)

    def roots(self, side: str) -> Tensor:
        """Return K with `K K^T` the inverse of the damped factor."""
        lower = self.lower[side]
        inverse: Tensor = torch.linalg.solve_triangular(
            lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False
        )
        return inverse.mT


@attrs.frozen(eq=False)
class _Side:
    """What one side of a pair of layers gives, of balanced factors.

    What balances A is the inverse of what balances G, so that Kronecker products are free of it.

    Args:
        psi: `A_lk A_kk^-1`, `[n_l, n_k]`.
        root: K, `[n_l, n_l]`.
        shares: S, `[n_l]`: the squares of the canonical correlations of the two layers.
    """

    psi: Tensor
    root: Tensor
    shares: Tensor

    @classmethod
    def of(cls, one: _Damped, after: _Damped, side: str, cross: Tensor | None) -> _Side:
        """Return that of a cross factor; `None` for zeros."""
        lower, lower_after = one.lower[side], after.lower[side]
        if cross is None:
            cross = lower.new_zeros(len(lower), len(lower_after))
        cross = cross.double() * (one.factors[side] * after.factors[side]).sqrt()
        half = torch.linalg.solve_triangular(lower, cross, upper=False)
        whitened = torch.linalg.solve_triangular(lower_after, half.mT, upper=False).mT
        shares, vectors = linalg.eigh(whitened @ whitened.mT)
        psi = torch.cholesky_solve(cross.mT, lower_after).mT
        return cls(psi, torch.linalg.solve_triangular(lower.mT, vectors, upper=True), shares)


def _conditional(
    one: _Damped, after: _Damped, crosses: Mapping[str, Tensor | None], number: int
) -> dict[str, Tensor] | None:
    """Return the tensors of a layer that knows the next one.

    Returns:
        `None` where its conditional covariance is not positive definite.
    """
    sides = {side: _Side.of(one, after, side, crosses[side]) for side in SIDES}
    shares = torch.outer(sides["G"].shares, sides["A"].shares)
    if not bool(shares.max() < 1 - max(shares.shape) * torch.finfo(shares.dtype).eps):
        return None
    found = {f"psi.{side}.{number}": each.psi for side, each in sides.items()}
    found |= {f"root.{side}.{number}": each.root for side, each in sides.items()}
    found[f"weights.{number}"] = 1 / (1 - shares)
    return {name: tensor.to(one.dtype) for name, tensor in found.items()}


def _alone(last: _Damped, number: int) -> dict[str, Tensor]:
    """Return the tensors of the last layer, which has none after it."""
    found = {f"root.{side}.{number}": last.roots(side) for side in SIDES}
    sizes = [len(last.lower[side]) for side in reversed(SIDES)]
    found[f"weights.{number}"] = last.lower["A"].new_ones(*sizes)
    return {name: tensor.to(last.dtype) for name, tensor in found.items()}


def _obstacle(layer: LinkedLayer) -> str:
    """Return why a layer cannot be joined; empty where its curvature gives rows of A and G."""
    if len(layer.layer.sites) > 1:
        return "whose parameters several modules share"
    if missing := sorted(set(SIDES) - set(layer.matrices)):  # their names alone, unmeasured
        return f"which has no whole matrix {' and '.join(missing)}"
    return "" if layer.has_rows else "whose curvature has no rows to pair"


def _pairs(layers: Sequence[LinkedLayer]) -> list[tuple[LinkedLayer, LinkedLayer]]:
    return list(itertools.pairwise(layers))


def _inputs(rows: Tensors) -> Tensor:
    return rows["first"] if "first" in rows else rows["later"]


def _cross(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of `r s^T` over rows `[N, T, d]` of two layers."""
    return one.flatten(0, 1).mT @ other.flatten(0, 1).to(one)


def _blank(one: LinkedLayer, other: LinkedLayer, dim: int) -> Tensor:
    """Return zeros for the cross factor of two layers, of inputs (-1) or outputs (-2)."""
    anchor = one.layer.anchor
    return torch.zeros(
        one.shape[dim], other.shape[dim], dtype=working_dtype(anchor.dtype), device=anchor.device
    )


def _psi(parts: Tensors, side: str, number: int) -> Tensor:
    return parts[f"psi.{side}.{number}"]


@hookimpl
def kfactk_links() -> dict[str, type[BlockTridiagonal]]:
    """Register the link `block_tridiagonal`."""
    return {"block_tridiagonal": BlockTridiagonal}
