"""SOAP, Shampoo and Muon of other libraries, on the same gradients: docs/mathematics.md has them.

Gradients are drawn, not taken from a model: so they are the same however far parameters have gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfactk
from tests.deviations import deviation
from tests.peers.comparing import FAR

STEPS, LR = 30, 0.01
F64 = torch.float64


def gradients(*shape: int) -> list[Tensor]:
    """Draw the gradients of some steps, which have a direction in common."""
    common = torch.randn(shape, dtype=F64)
    return [0.3 * common + torch.randn(shape, dtype=F64) for _ in range(STEPS)]


class Both:
    """One layer that kfactk trains, and a copy of its parameters for another library."""

    def __init__(self, layer: nn.Module, **recipe: Any) -> None:
        self.layer = layer.double()
        self.theirs = [nn.Parameter(p.detach().clone()) for p in self.layer.parameters()]
        self.start = [p.detach().clone() for p in self.theirs]
        given: dict[str, Any] = {"curvature": "gradient", "update": "sgd", "lr": LR} | recipe
        self.optimizer = kfactk.build(**given).bind(self.layer)

    def step(self, other: torch.optim.Optimizer, gradient: Tensor) -> float:
        """Take a step with both, the bias' gradient being a column; return how far they are."""
        column = gradient.flatten(1)[:, -1]
        for ours, theirs, each in zip(
            self.layer.parameters(), self.theirs, (gradient, column), strict=True
        ):
            ours.grad, theirs.grad = each.clone(), each.reshape(theirs.shape).clone()
        self.optimizer.step()
        other.step()
        return max(deviation(ours, theirs) for ours, theirs in zip(*self.moved(), strict=True))

    def moved(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return how far each parameter has come, ours and theirs."""
        sides = self.layer.parameters(), self.theirs
        return tuple(
            [p.detach().reshape(s.shape) - s for p, s in zip(side, self.start, strict=True)]
            for side in sides
        )


def matrix(d_out: int, d_in: int) -> nn.Module:
    """Return a layer whose weight is `[d_out, d_in]`."""
    return nn.Linear(d_in, d_out)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "square": (lambda: matrix(6, 6), (6, 6)),
    "tall": (lambda: matrix(6, 5), (6, 5)),
    "wide": (lambda: matrix(5, 6), (5, 6)),
    "kernel": (lambda: nn.Conv2d(3, 12, 2), (12, 3, 2, 2)),
}
"""Layers with the shape of their weight: the first gradient leaves no null space of two directions.

The kernel is 12 x 12 where all but its first dimension are merged.
"""


def of_soap(layer: nn.Module, every: int) -> tuple[Both, torch.optim.Optimizer]:
    """Return SOAP of both, whose first gradient makes a basis only."""
    soap = pytest.importorskip("pytorch_optimizer").SOAP

    def basis_every(step: int) -> int:
        return 1 if step % every == 1 else step + 1

    both = Both(
        layer,
        curvature={"name": "gradient", "counts": "next"},
        basis={"name": "soap", "eps": 1e-30},
        first_moment=0.9,
        basis_every=basis_every if every < STEPS else every,
    )
    weight, bias = both.theirs
    theirs = soap(
        [{"params": [weight], "merge_dims": True}, {"params": [bias]}],  # it cannot merge a vector
        lr=LR,
        betas=(0.9, 0.95),
        shampoo_beta=0.95,
        weight_decay=0.0,
        precondition_frequency=every,
        max_precondition_dim=12,
        eps=1e-30,
    )
    return both, theirs


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("every", "tolerance"), [(100, 1e-11), (5, 1e-5)])
def test_soap_is_that_of_pytorch_optimizer(every: int, tolerance: float, name: str) -> None:
    """Their first gradient makes a basis only; they refresh one step later, by QR in float32.

    They merge dimensions up to the longest side that they allow, here the 12 of a kernel's sides.
    """
    make, shape = LAYERS[name]
    both, theirs = of_soap(make(), every)
    first, *more = gradients(*shape)
    both.step(theirs, first)
    assert all(map(torch.equal, both.theirs, both.start))
    assert all(map(torch.equal, both.layer.parameters(), both.start))
    assert max(both.step(theirs, gradient) for gradient in more) < tolerance


def test_soap_shares_a_scale_in_a_null_space_and_that_of_pytorch_optimizer_does_not() -> None:
    """Of 8 x 5 the first gradient leaves three directions, which eigh chooses at will.

    In all others both are the same.
    """
    both, theirs = of_soap(matrix(8, 5), 100)
    first, *more = gradients(8, 5)
    for gradient in (first, *more):
        both.step(theirs, gradient)
    seen = torch.linalg.svd(first, full_matrices=False).U.mT
    (ours, *_), (other, *_) = both.moved()
    assert deviation(seen @ ours, seen @ other) < 1e-11
    rest = torch.eye(8, dtype=F64) - seen.mT @ seen
    assert deviation(rest @ ours, rest @ other) > 1e-3


def of_shampoo(layer: nn.Module, *shapes: tuple[int, ...]) -> tuple[Both, torch.optim.Optimizer]:
    """Return Shampoo of both, theirs on parameters of these shapes."""
    shampoo = pytest.importorskip("pytorch_optimizer").Shampoo
    both = Both(layer, basis={"name": "shampoo", "eps": 0.0}, factor_decay=1.0, basis_every=1)
    both.theirs = [
        nn.Parameter(p.detach().reshape(s)) for p, s in zip(both.theirs, shapes, strict=True)
    ]
    both.start = [p.detach().clone() for p in both.theirs]
    groups = [
        {"params": [p], "matrix_eps": 1e-14 if p.numel() > 1 else 0.0}  # of a sum that lacks rank
        for p in both.theirs
    ]
    return both, shampoo(groups, lr=LR)


@pytest.mark.parametrize(
    ("make", "shape", "merged"),
    [
        (lambda: matrix(6, 6), (6, 6), (6, 6)),
        (lambda: matrix(8, 5), (8, 5), (8, 5)),
        (lambda: matrix(5, 8), (5, 8), (5, 8)),
        (lambda: matrix(1, 6), (1, 6), (1, 6)),
        (lambda: nn.Conv2d(2, 6, 2), (6, 2, 2, 2), (6, 8)),
    ],
    ids=["square", "tall", "wide", "row", "kernel"],
)
def test_shampoo_is_that_of_pytorch_optimizer(
    make: Callable[[], nn.Module], shape: tuple[int, ...], merged: tuple[int, int]
) -> None:
    """They sum L and R where we average: a learning rate of `1 / sqrt(t)` makes up for it.

    They take a matrix for each of the four dimensions of a kernel, and we take one for its rows and
    one for all others: so theirs is given the kernel as the matrix that we see. Of a bias `[n]`
    theirs has the whole matrix `g g^T` to the power -1/2, and ours its diagonal and its trace, each
    to -1/4: with one number both are `g / sqrt(sum g^2)`, with more they differ.
    """
    both, theirs = of_shampoo(make(), merged, shape[:1])
    for t, gradient in enumerate(gradients(*shape)):
        both.optimizer.param_groups[0]["lr"] = LR / (t + 1) ** 0.5
        both.step(theirs, gradient)
        weight, bias = (deviation(*each) for each in zip(*both.moved(), strict=True))
        assert weight < 1e-10
        if shape[0] == 1:
            assert bias < 1e-10
    if shape[0] > 1:
        assert bias > FAR


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
@pytest.mark.parametrize(
    ("scale", "theirs"),
    [
        ("original", "original"),
        ("match_rms", "match_rms_adamw"),
        ("spectral", "spectral_unclamped"),
    ],
)
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_that_of_torch(
    shape: tuple[int, int], scale: str, theirs: str, nesterov: bool
) -> None:
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=F64)
    weight = nn.Parameter(layer.weight.detach().clone())
    optimizer = kfactk.build(
        curvature="gradient",
        basis={"name": "muon", "scale": scale},
        update="sgd",
        lr=LR,
        weight_decay=0.1,
        first_moment={"decay": 0.95, "corrected": False, "nesterov": nesterov},
    ).bind(layer)
    other = torch.optim.Muon(
        [weight], lr=LR, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=theirs
    )
    for gradient in gradients(*shape):
        layer.weight.grad, weight.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        other.step()
        torch.testing.assert_close(layer.weight, weight, rtol=1e-12, atol=1e-12)


def test_the_rest_of_the_preset_transformer_is_adam() -> None:
    """Rows that only the first batch has, and such that it lacks, too."""
    layer = nn.Embedding(9, 5, dtype=F64)
    model = nn.ModuleDict({"table": layer, "blocks": nn.ModuleList([nn.Sequential(nn.Identity())])})
    weight = nn.Parameter(layer.weight.detach().clone())
    muon, adam = kfactk.preset("transformer").curvature
    rest = kfactk.block(adam.curvature, basis={"name": "soap", "eps": 1e-30})
    recipe = kfactk.preset("transformer", curvature=[muon, rest], first_moment=0.9)
    optimizer = recipe.bind(model)
    other = torch.optim.Adam([weight], lr=recipe.lr, betas=(0.9, 0.95), eps=1e-30)
    for t, gradient in enumerate(gradients(9, 5)):
        gradient[torch.arange(9) % 3 == t % 3] = 0
        layer.weight.grad, weight.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        other.step()
        torch.testing.assert_close(layer.weight, weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_side", [None, 6], ids=["both sides turned", "one side turned"])
def test_soap_divides_by_every_gradient_that_its_first_moment_holds(max_side: int | None) -> None:
    """Written out: one basis, of the first gradient, which makes a step of the size of Adam's."""
    d_out, d_in, decay = 8, 5, 0.9
    layer = nn.Linear(d_in, d_out, bias=False, dtype=F64)
    optimizer = kfactk.build(
        curvature={"name": "gradient", "max_side": max_side}
        | ({} if max_side is None else {"wide": "diagonal"}),
        basis={"name": "soap", "eps": 0.0},
        update="sgd",
        lr=LR,
        first_moment=decay,
        basis_every=100,
    ).bind(layer)
    first, *more = gradients(d_out, d_in)
    right = torch.linalg.eigh(first.mT @ first).eigenvectors
    values, left = torch.linalg.eigh(first @ first.mT)
    null = values < values.max() * 1e-10
    if max_side is not None:
        left, null = torch.eye(d_out, dtype=F64), torch.zeros(d_out, dtype=torch.bool)
    weight, m, s = layer.weight.detach().clone(), torch.zeros_like(first), torch.zeros_like(first)
    for t, gradient in enumerate([first, *more], start=1):
        layer.weight.grad = gradient.clone()
        optimizer.step()
        turned = left.mT @ gradient @ right
        square = turned.square()
        square[null] = square[null].mean(0, keepdim=True)
        m, s = decay * m + (1 - decay) * turned, 0.95 * s + 0.05 * square
        step = (m / (1 - decay**t)) / (s / (1 - 0.95**t)).sqrt()
        if t == 1 and max_side is None:
            step = turned / turned.square().mean().sqrt()
        assert step[~null].abs().max() < 8  # and not hundreds, as for a gradient left out of s
        weight -= LR * left @ step @ right.mT
        torch.testing.assert_close(layer.weight, weight, rtol=1e-9, atol=1e-9)
