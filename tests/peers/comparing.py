"""How results are compared, and dense matrices put into the form of ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version

import torch
from torch import Tensor, nn

from kfactk.optim.views import BlockView
from tests.deviations import deviation
from tests.peers.problems import Problem

TOLERANCE = 1e-10
"""Of norms of differences, relative to the norm of what they are compared with."""
FAR = 0.1
"""A relative deviation that no rounding explains."""
COMPARED = {
    "curvlinops-for-pytorch": "3.0.1",
    "nngeometry": "0.4",
    "backpack-for-pytorch": "1.7.1",
}
"""The versions in which a peer was found to be wrong; others may have changed."""


def compared(peer: str) -> bool:
    """Return whether a peer is installed in the version that the documentation tells of."""
    return version(peer) == COMPARED[peer]


def differs(peer: str, found: Tensor, truth: Tensor) -> None:
    """Check that a peer of the version compared is away from the truth."""
    if compared(peer):
        assert deviation(found, truth) > FAR, f"{peer} is right here: change docs/mathematics.md"


def agree(ours: Mapping[str, Tensor], theirs: Iterable[Tensor]) -> None:
    """Compare tensors one by one."""
    for (name, mine), other in zip(ours.items(), theirs, strict=True):
        assert deviation(mine, other) < TOLERANCE, name


def joined(module: nn.Module, tensors: Iterable[Tensor]) -> Tensor:
    """Return weight and bias, with leading dimensions, as matrices `[..., d_out, d_in]`."""
    weight, *bias = tensors
    lead = weight.ndim - module.weight.ndim
    return torch.cat([weight.flatten(lead + 1), *(each.unsqueeze(-1) for each in bias)], -1)


def blocks(case: Problem, dense: Tensor) -> dict[str, Tensor]:
    """Cut the blocks of layers out of a matrix over all their parameters.

    Rows and columns of a block are the entries of the layer's matrix, row by row.
    """
    found, start = {}, 0
    for name, module in case.layers().items():
        parameters = list(module.parameters())
        end = start + sum(p.numel() for p in parameters)
        split = torch.arange(start, end).split([p.numel() for p in parameters])
        at = joined(
            module, (i.reshape(p.shape) for i, p in zip(split, parameters, strict=True))
        ).flatten()
        found[name], start = dense[at[:, None], at], end
    return found


def eigenvectors(view: BlockView) -> tuple[Tensor, Tensor]:
    """Return `U_G` and `U_A` of a block with basis `ekfac`."""
    made = view.decomposition
    return made["G"]["eigenvectors"], made["A"]["eigenvectors"]


def diagonal(view: BlockView, block: Tensor) -> Tensor:
    """Return the diagonal of a dense block in the basis of a view, in the shape of its scale."""
    basis = torch.kron(*eigenvectors(view))
    return (basis.T @ block @ basis).diagonal().reshape(view.scale["scale"].shape)
