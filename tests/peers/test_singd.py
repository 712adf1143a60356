"""INGD of the package singd, on the same batches and from the same roots.

Its roots start at the identity, and ours at exact ones: so theirs are set to ours after the first
step. Our curvature is the empirical Fisher, as theirs is. No step here is so long that ours would
be shortened. Their blocks along the diagonal multiply by K where the formula has its transpose:
they are not compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfactk
from kfactk.optim.optimizer import Optimizer
from tests.deviations import deviation
from tests.peers.comparing import TOLERANCE

DAMPING, LR, STEP, STEPS = 0.03, 0.05, 0.1, 30
F64 = torch.float64


class Linears(nn.Sequential):
    """A perceptron."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))

    def batch(self, seed: int) -> Tensor:
        return torch.randn(16, 7, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Convolution(nn.Sequential):
    """A convolution with a bias in front of a linear layer."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(80, 4))

    def batch(self, seed: int) -> Tensor:
        return torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=F64)


def ours(model: nn.Module, structure: str, momentum: float) -> Optimizer:
    basis = {
        "name": "singd",
        "variant": "ingd",
        "structure": structure,
        "step": STEP,
        "momentum": momentum,
        "limit": 0.99,
    }
    recipe = kfactk.build(
        curvature="conv_kfac",
        basis=basis,
        fisher="empirical",
        update="sgd",
        lr=LR,
        damping=DAMPING,
        factor_every=1,
        basis_every=1,
        factor_decay=0.0,
    )
    return recipe.bind(model)


def trained(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(model.batch(seed)), torch.arange(16) % 4)
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize("kind", [Linears, Convolution])
def test_ingd_is_that_of_singd(kind: Any, structure: str, momentum: float) -> None:
    singd = pytest.importorskip("singd.optim.optimizer").SINGD
    torch.manual_seed(0)
    model, other = kind().double(), kind().double()
    optimizer = ours(model, structure, momentum)
    trained(model, optimizer, 0)
    other.load_state_dict(model.state_dict())
    theirs = singd(
        other,
        lr=LR,
        momentum=0.0,
        damping=DAMPING,
        alpha1=momentum,
        T=1,
        lr_cov=STEP,
        structures=(structure, structure),
    )
    for name, view in optimizer.layers.items():
        for kept, side in ((theirs.Ks, "A"), (theirs.Cs, "G")):
            kept[name] = type(kept[name]).from_dense(dense(view, side))
    for seed in range(1, STEPS):
        trained(model, optimizer, seed)
        trained(other, theirs, seed)
    for name, view in optimizer.layers.items():
        for kept, side in ((theirs.Ks, "A"), (theirs.Cs, "G")):
            assert deviation(dense(view, side), kept[name].to_dense()) < TOLERANCE
    for mine, another in zip(model.parameters(), other.parameters(), strict=True):
        assert deviation(mine.detach(), another.detach()) < TOLERANCE


def dense(view: Any, side: str) -> Tensor:
    """Return a root `[n, n]`, however it is stored."""
    root: Tensor = view.decomposition[side]["root"]
    return torch.diag(root) if root.ndim == 1 else root
