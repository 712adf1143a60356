"""Saved states of a block: what fits it is taken, and what lacks a form is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kfactk import RunningMean, StateError
from kfactk.preconditioner import saved_block
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.state import BlockState
from kfactk.stages import Basis
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.curvature.conv_kfac import ConvKfac
from tests.kfactk.preconditioner.test_block import F64, layer


def saved(basis: Basis) -> tuple[Block, BlockState]:
    """Return a block, and the state of a decomposed one."""
    block = Block(layer(nn.Linear(4, 3)), ConvKfac(), basis)
    rows = torch.randn(9, 5, dtype=F64), torch.randn(9, 3, dtype=F64)
    for name, each in zip("AG", rows, strict=True):
        block.state.factors[name] = RunningMean(each.T @ each / 9, 1.0)
    block.adopt(block.decompose(0.1))
    if basis.moments_from:
        block.state.moments["scale"] = RunningMean(torch.rand(3, 5, dtype=F64), 1.0)
    block.state.ready = True
    return block, BlockState.from_flat(block.flat(), torch.device("cpu"))


def fitted(block: Block, state: BlockState) -> BlockState:
    return saved_block.fitted(block, state, frozenset("AG"), holds=True)


@pytest.mark.parametrize("basis", [KfacInverse(), Ekfac()])
def test_a_saved_state_with_all_its_forms_fits(basis: Basis) -> None:
    block, state = saved(basis)
    assert fitted(block, state) is state


CHANGES: dict[str, tuple[Basis, str, str, Any]] = {
    r"factor\.A of layer 'mine' is not symmetric": (KfacInverse(), "factor", "A", lambda t: -t),
    r"factor\.G of layer 'mine' has the dtype torch.float16": (
        KfacInverse(),
        "factor",
        "G",
        lambda t: t.half(),
    ),
    r"basis\.A\.cholesky of layer 'mine' is not lower": (
        KfacInverse(),
        "A",
        "cholesky",
        lambda t: t.mT,
    ),
    r"does not fit .*basis\.G\.cholesky of layer 'mine' has the shape \(2, 2\)": (
        KfacInverse(),
        "G",
        "cholesky",
        lambda t: t[:2, :2],
    ),
    r"basis\.A\.eigenvectors of layer 'mine' has no orthonormal": (
        Ekfac(),
        "A",
        "eigenvectors",
        lambda t: 2 * t,
    ),
    r"basis\.G\.eigenvalues of layer 'mine' holds negative": (
        Ekfac(),
        "G",
        "eigenvalues",
        lambda t: t - 1e9,
    ),
    r"basis\.G\.eigenvalues of layer 'mine' has the shape \(1,\), where it must be \(3,\)": (
        Ekfac(),
        "G",
        "eigenvalues",
        lambda t: t[:1],
    ),
    r"the decomposition of layer 'mine' have several dtypes": (
        Ekfac(),
        "G",
        "eigenvalues",
        lambda t: t.float(),
    ),
    r"moment\.scale of layer 'mine' has the shape \(5, 3\), where it must be \(3, 5\)": (
        Ekfac(),
        "moment",
        "scale",
        lambda t: t.mT,
    ),
    r"moment\.scale of layer 'mine' holds negative": (Ekfac(), "moment", "scale", lambda t: t - 2),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_saved_state_without_one_of_its_forms_is_refused(message: str) -> None:
    basis, kind, name, change = CHANGES[message]
    block, state = saved(basis)
    if kind in ("factor", "moment"):
        mean = (state.factors if kind == "factor" else state.moments)[name]
        assert mean.value is not None
        mean.value = change(mean.value)
    else:
        state.decomposition[kind][name] = change(state.decomposition[kind][name])
    with pytest.raises(StateError, match=message):
        fitted(block, state)
