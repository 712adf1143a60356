"""SOAP, Shampoo and Muon of other libraries, on the same gradients: docs/mathematics.md has them.

Gradients are drawn, not taken from a model: so they are the same however far parameters have gone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfactk

STEPS, LR = 30, 0.01
F64 = torch.float64


def gradients(*shape: int) -> list[Tensor]:
    """Draw the gradients of some steps, which have a direction in common."""
    common = torch.randn(shape, dtype=F64)
    return [0.3 * common + torch.randn(shape, dtype=F64) for _ in range(STEPS)]


class Both:
    """One layer that kfactk trains, and a copy of its parameters for another library."""

    def __init__(self, d_out: int, d_in: int, **recipe: Any) -> None:
        self.layer = nn.Linear(d_in, d_out, dtype=F64)
        self.theirs = [nn.Parameter(p.detach().clone()) for p in self.layer.parameters()]
        self.start = [p.detach().clone() for p in self.theirs]
        given: dict[str, Any] = {"curvature": "gradient", "update": "sgd", "lr": LR} | recipe
        self.optimizer = kfactk.build(**given).bind(self.layer)

    def step(self, other: torch.optim.Optimizer, gradient: Tensor) -> float:
        """Take a step with both, the bias' gradient being a column; return how far they are."""
        for ours, theirs, each in zip(
            self.layer.parameters(), self.theirs, (gradient, gradient[:, 0]), strict=True
        ):
            ours.grad, theirs.grad = each.clone(), each.clone()
        self.optimizer.step()
        other.step()
        return max(
            float((ours - theirs).detach().norm() / (theirs - start).detach().norm().clamp(1e-300))
            for ours, theirs, start in zip(
                self.layer.parameters(), self.theirs, self.start, strict=True
            )
        )


@pytest.mark.parametrize(("every", "tolerance"), [(100, 1e-12), (5, 1e-5)])
def test_soap_is_that_of_pytorch_optimizer(every: int, tolerance: float) -> None:
    """Their first gradient makes a basis only; they refresh one step later, by QR in float32."""
    soap = pytest.importorskip("pytorch_optimizer").SOAP

    def basis_every(step: int) -> int:
        return 1 if step % every == 1 else step + 1

    both = Both(
        6,
        6,
        curvature={"name": "gradient", "counts": "next"},
        basis={"name": "soap", "eps": 1e-30},
        first_moment=0.9,
        basis_every=basis_every if every < STEPS else every,
    )
    theirs = soap(
        both.theirs,
        lr=LR,
        betas=(0.9, 0.95),
        shampoo_beta=0.95,
        weight_decay=0.0,
        precondition_frequency=every,
        eps=1e-30,
    )
    first, *more = gradients(6, 6)
    both.step(theirs, first)
    assert all(map(torch.equal, both.theirs, both.start))
    assert all(map(torch.equal, both.layer.parameters(), both.start))
    assert max(both.step(theirs, gradient) for gradient in more) < tolerance


def test_shampoo_is_that_of_pytorch_optimizer() -> None:
    """They sum L and R where we average: a learning rate of `1 / sqrt(t)` makes up for it."""
    shampoo = pytest.importorskip("pytorch_optimizer").Shampoo
    both = Both(
        6,
        6,
        curvature={"name": "gradient", "vectors": False},
        basis={"name": "shampoo", "eps": 0.0},
        factor_decay=1.0,
        basis_every=1,
    )
    both.theirs = both.theirs[:1]
    both.layer.bias.requires_grad_(False)
    theirs = shampoo(both.theirs, lr=LR, matrix_eps=1e-14)
    for t, gradient in enumerate(gradients(6, 6)):
        both.layer.weight.grad, both.theirs[0].grad = gradient.clone(), gradient.clone()
        both.optimizer.param_groups[0]["lr"] = LR / (t + 1) ** 0.5
        both.optimizer.step()
        theirs.step()
        moved = (both.theirs[0] - both.start[0]).detach().norm()
        far = (both.layer.weight - both.theirs[0]).detach().norm()
        assert float(far / moved) < 1e-11


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
