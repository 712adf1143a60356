"""Two-level preconditioning: a coarse correction with one number for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from kfactk import Link, LinkedLayer, Samples, Statistic, Tensors, hookimpl, linalg
from kfactk.samples import working_dtype


@attrs.frozen
class TwoLevel(Link):
    """Add the inverse of the Fisher matrix of all layers, seen through one number for each layer.

        P = P_1 + Z (Z^T F Z + Z^T tau Z)^-1 Z^T

    P_1 is what the blocks make of the gradient: block-diagonal, and damped. Column l of Z is 1 at
    the parameters of layer l and 0 elsewhere, divided by the root of their number p_l: P does not
    depend on the lengths of columns. tau is the damping of each layer. F is the whole Fisher
    matrix, with what is between layers. Of it nothing but E = Z^T F Z is needed, and that is exact:

        E_lk = (1/M) sum_n c_nl c_nk,    c_nl = z_l^T vec(D_n,l)

    c_nl is the sum of the entries of an example's gradient, over the root of p_l. E is symmetric
    positive semi-definite, so P is positive definite. A single layer has nothing to share: P = P_1.

    Example:
        >>> import kfactk
        >>> kfactk.build(link="two_level")
        kfactk.build(link='two_level')

    References:
        Tselepidis, Kohler & Orvieto 2020, "Two-Level K-FAC Preconditioning for Deep Learning",
        arXiv:2011.00573.
        Koroko et al. 2023, "Analysis and Comparison of Two-Level KFAC Methods for Training Deep
        Neural Networks", arXiv:2303.18083, who found no gain from it.
        Nicolaides 1987, "Deflation of Conjugate Gradients with Applications to Boundary Value
        Problems": columns that are constant on each part.
    """

    def rows(self, layer: LinkedLayer, samples: Samples) -> Tensors:
        """Return c_n of the layer, `[N]`."""
        left = None
        if samples.d_out > 1:
            left = torch.ones(
                *layer.shape[:-1], 1, dtype=samples.dtype, device=samples.device
            )  # [..., d_out, 1]
        numbers = (samples.positions + 1) * (samples.d_in + samples.d_out)
        found = []
        for rows in samples.chunks(numbers):
            sums = samples.per_example_gradients(rows, left).sum((-1, -2))  # [..., n]
            found.append(sums.flatten(0, -2).sum(0) if sums.ndim > 1 else sums)
        empty = torch.zeros(0, dtype=samples.dtype, device=samples.device)
        return {"sums": torch.cat(found or [empty]) / _root(layer)}

    def statistics(
        self,
        layers: Sequence[LinkedLayer],
        rows: Mapping[str, Tensors],
        num_terms: Tensor | float,
    ) -> dict[str, Statistic]:
        """Return E, `[L, L]`: its sum over examples, counted by likelihood terms."""
        anchor = layers[0].layer.anchor
        known = {name: each["sums"] for name, each in rows.items()}
        like = next(iter(known.values()), None)
        if like is None:
            like = torch.zeros(0, dtype=working_dtype(anchor.dtype), device=anchor.device)
        blank = torch.zeros_like(like)
        columns = [known.get(layer.name, blank).to(like) for layer in layers]
        stacked = torch.stack(columns, 1).double()  # so that E stays positive semi-definite
        return {"coarse": Statistic(stacked.T @ stacked, num_terms, symmetric=True)}

    def correct(
        self,
        layers: Sequence[LinkedLayer],
        gradients: Tensors,
        preconditioned: Tensors,
        statistics: Tensors,
    ) -> dict[str, Tensor]:
        """Return `P g`, in which E is inverted in double precision."""
        if len(layers) < 2:
            return dict(preconditioned)
        coarse = statistics["coarse"].double()
        zero = coarse.new_zeros(())
        sums = [
            gradients[layer.name].sum(dtype=zero.dtype).to(zero.device) / _root(layer)
            if layer.name in gradients
            else zero
            for layer in layers
        ]
        taus = torch.stack([coarse.new_full((), layer.damping) for layer in layers])
        shift = torch.maximum(taus, 10 * linalg.jitter(coarse))
        factor, _ = torch.linalg.cholesky_ex(coarse + torch.diag(shift))  # waits for no device
        found = torch.cholesky_solve(torch.stack(sums).unsqueeze(1), factor).squeeze(1)
        return {
            layer.name: preconditioned[layer.name]
            + (share / _root(layer)).to(preconditioned[layer.name])
            for layer, share in zip(layers, found, strict=True)
            if layer.name in preconditioned
        }


def _root(layer: LinkedLayer) -> float:
    """Return the root of the number of a layer's parameters."""
    return math.sqrt(math.prod(layer.shape))


@hookimpl
def kfactk_links() -> dict[str, type[TwoLevel]]:
    """Register the link `two_level`."""
    return {"two_level": TwoLevel}
