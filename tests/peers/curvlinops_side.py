"""What curvlinops makes of a problem."""

from __future__ import annotations

from typing import Any

import torch
from curvlinops import KFACLinearOperator
from torch import Tensor, nn

from tests.peers.problems import F64, Problem

FISHERS = {"exact": "type-2", "empirical": "empirical", "mc": "mc"}
APPROXIMATIONS = {"sud": "expand", "reduce": "reduce"}
"""Our words for what curvlinops has, and its own."""


def operator(
    kind: Any, case: Problem, parameters: list[nn.Parameter] | None = None, **options: Any
) -> Any:
    """Return a linear operator over some parameters, by default those of layers with a matrix."""
    return kind(
        case.model,
        case.loss,
        list(case.parameters().values()) if parameters is None else parameters,
        [(case.inputs, case.targets)],
        check_deterministic=False,
        **options,
    )


def kronecker(
    case: Problem,
    kind: type[KFACLinearOperator] = KFACLinearOperator,
    fisher: str = "exact",
    spatial: str = "sud",
    **options: Any,
) -> KFACLinearOperator:
    """Return its K-FAC or EKFAC, weight and bias in one matrix unless `options` say otherwise."""
    options = {"separate_weight_and_bias": False} | options
    return operator(
        kind,
        case,
        fisher_type=FISHERS[fisher],
        kfac_approx=APPROXIMATIONS[spatial],
        **options,
    )


def dense(linear: Any) -> Tensor:
    """Return the matrix of a linear operator."""
    return linear @ torch.eye(linear.shape[1], dtype=F64)


def labels_of(peer: KFACLinearOperator, seed: int) -> Any:
    """Return a function that draws the labels which curvlinops draws with this seed."""
    peer._generator = torch.Generator().manual_seed(seed)

    def draw(output: Tensor) -> Tensor:
        labels = peer.draw_label(output.flatten(1))
        return labels.unsqueeze(1) if labels.ndim == 1 else labels.reshape(output.shape)

    return draw
