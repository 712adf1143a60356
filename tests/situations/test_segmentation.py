"""A segmentation network with an auxiliary head, as torchvision's: two outputs of pixels.

The loss is that of the output plus 0.4 times that of the auxiliary head, each a mean over labelled
pixels. Truth is dense: per-example autograd of each layer's own parameters, in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from tests.situations.by_hand import bound, draw, root

EXAMPLES, CLASSES, SIDE, MASKED = 3, 3, 4, 255
AUXILIARY = 0.4
WEIGHTS = {"out": 1.0, "aux": AUXILIARY}
LAYERS = ["stem", "body", "classifier", "aux_classifier"]


class Segmentation(nn.Module):
    """Classes of pixels, from deep features and, to help them, from shallow ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.body = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.classifier, self.aux_classifier = nn.Conv2d(4, CLASSES, 1), nn.Conv2d(3, CLASSES, 1)
        self.double()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        shallow = self.stem(images).tanh()
        coarse = self.classifier(self.body(shallow).tanh())
        out = F.interpolate(coarse, size=images.shape[-2:], mode="bilinear", align_corners=False)
        return {"out": out, "aux": self.aux_classifier(shallow)}


def scenes(masked: bool) -> tuple[Tensor, Tensor]:
    """Return images and the classes of their pixels, of which some are unknown."""
    labels = torch.arange(EXAMPLES * SIDE * SIDE).view(EXAMPLES, SIDE, SIDE) % CLASSES
    if masked:
        labels[0, 1], labels[1, :, 2:] = MASKED, MASKED
    return draw(EXAMPLES, 2, SIDE, SIDE), labels


def loss_of(found: dict[str, Tensor], labels: Tensor) -> Tensor:
    losses = {
        name: F.cross_entropy(each, labels, ignore_index=MASKED) for name, each in found.items()
    }
    return losses["out"] + AUXILIARY * losses["aux"]


def columns(found: dict[str, Tensor], labels: Tensor, n: int) -> list[Tensor]:
    """Return numbers of example n whose gradients' outer products sum to N times its part of F."""
    numbers = []
    for name, output in found.items():
        share = WEIGHTS[name] * EXAMPLES / int((labels != MASKED).sum())
        for row, column in (labels[n] != MASKED).nonzero().tolist():
            z = output[n, :, row, column]
            p = z.detach().softmax(0)
            square_root = root(torch.diag(p) - torch.outer(p, p))
            numbers += [share**0.5 * (z * each).sum() for each in square_root.T]
    return numbers


def of_the_loss(found: dict[str, Tensor], labels: Tensor, n: int) -> list[Tensor]:
    """Return the part of example n in N times the loss."""
    known, total = int((labels != MASKED).sum()), torch.zeros((), dtype=torch.float64)
    for name, output in found.items():
        own = F.cross_entropy(
            output[n][None], labels[n][None], ignore_index=MASKED, reduction="sum"
        )
        total = total + WEIGHTS[name] * EXAMPLES / known * own
    return [total]


def by_hand(
    model: Segmentation, fisher: str, images: Tensor, labels: Tensor
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return A, G and the dense Fisher matrix of each layer."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0].detach(), out)})
        )
        for name in LAYERS
    ]
    numbers = columns if fisher == "exact" else of_the_loss
    sides: dict[str, list[list[Tensor]]] = {name: [[], [], []] for name in LAYERS}
    for n in range(EXAMPLES):
        found = model(images[[n]], labels[[n]])
        padded = {
            name: torch.cat([torch.zeros_like(each)] * n + [each]) for name, each in found.items()
        }
        losses = numbers(padded, labels, n)
        for name, lists in sides.items():
            layer, (inputs, output) = model.get_submodule(name), seen[name]
            rows = F.unfold(inputs, layer.kernel_size, 1, layer.padding, layer.stride)[0].T
            lists[0].append(torch.cat([rows, torch.ones(len(rows), 1).double()], 1))
            for loss in losses:
                at = [output, layer.weight, layer.bias]
                gradients = torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)
                if gradients[0] is None:
                    continue
                lists[1].append(gradients[0][0].flatten(1).T / len(rows) ** 0.5)
                own = torch.cat([gradients[1].flatten(1), gradients[2][:, None]], 1)
                lists[2].append(own.flatten()[None])
    for handle in handles:
        handle.remove()
    made = {name: [torch.cat(each) for each in lists] for name, lists in sides.items()}
    return {name: tuple(each.T @ each / EXAMPLES for each in made[name]) for name in made}  # type: ignore[misc]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.filterwarnings("error::kfactk.KfactkWarning")
def test_an_auxiliary_head_counts_by_its_weight(fisher: str, masked: bool) -> None:
    """Factors, and F in their eigenbasis, are those of the weighted sum of both losses."""
    model, (images, labels) = Segmentation(), scenes(masked)
    pixels = {"name": "categorical", "class_axis": 1}
    if masked:
        pixels |= {"targets": "labels", "ignore_index": MASKED}
    heads = [kfactk.head("out", pixels), kfactk.head("aux", pixels, weight=AUXILIARY)]
    optimizer = bound(model, curvature="conv_kfac", likelihood=heads, fisher=fisher, lr=0.0)
    loss_of(model(images, labels), labels).backward()
    optimizer.step()
    for name, (a, g, dense) in by_hand(model, fisher, images, labels).items():
        view = optimizer.layers[name]
        for side, expected in (("A", a), ("G", g)):
            torch.testing.assert_close(view.factors[side], expected, rtol=1e-12, atol=1e-14)
        left, right = (torch.linalg.eigh(view.factors[side])[1] for side in ("G", "A"))
        basis = torch.kron(left, right)
        scale = (basis.T @ dense @ basis).diagonal().view(len(g), len(a))
        v = draw(len(g), len(a), seed=7)
        weight = v[:, :-1].reshape(model.get_parameter(f"{name}.weight").shape)
        product = view.fisher_product({"weight": weight, "bias": v[:, -1]})
        joined = torch.cat([product["weight"].flatten(1), product["bias"][:, None]], 1)
        found = left.T @ joined @ right
        torch.testing.assert_close(found, scale * (left.T @ v @ right), rtol=1e-9, atol=1e-12)
