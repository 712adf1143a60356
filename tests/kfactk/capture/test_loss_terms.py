"""`empirical` with `terms`: any loss, of which the number of terms is known."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk

N = 6


class Detector(nn.Module):
    """Returns its losses, as torchvision's models of detection do."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.boxes, self.classes = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(5, 3)

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        hidden = torch.tanh(self.trunk(images))
        boxes = torch.stack([each["box"] for each in targets])
        labels = torch.stack([each["label"] for each in targets])
        return {
            "boxes": F.smooth_l1_loss(self.boxes(hidden), boxes),
            "classes": F.cross_entropy(self.classes(hidden), labels),
        }


def batch() -> tuple[Tensor, list[dict[str, Tensor]]]:
    torch.manual_seed(1)
    images = torch.randn(N, 4, dtype=torch.float64)
    boxes = torch.randn(N, 4, dtype=torch.float64)
    return images, [{"box": box, "label": torch.tensor(i % 3)} for i, box in enumerate(boxes)]


def made(model: nn.Module, **options: Any) -> kfactk.Optimizer:
    chosen = {"curvature": "kfac", "basis": "kfac", "update": "sgd", "lr": 0.0}
    return kfactk.build(**{**chosen, **options}).bind(model)


@pytest.fixture
def model() -> Detector:
    torch.manual_seed(0)
    return Detector().double()


@pytest.mark.parametrize("terms", ["images", "targets", N, float(N)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_factors_are_those_of_the_loss_itself(model: Detector, terms: Any, reduction: str):
    images, targets = batch()
    times = 1 if reduction == "mean" else N
    seen: dict[str, Tensor] = {}
    names = ("trunk", "boxes", "classes")
    handles = [
        getattr(model, name).register_forward_hook(lambda m, a, out, n=name: seen.update({n: out}))
        for name in names
    ]
    loss = sum(model(images, targets).values())
    gradients = torch.autograd.grad(loss, [seen[name] for name in names])
    for handle in handles:
        handle.remove()
    optimizer = made(model, fisher={"name": "empirical", "terms": terms}, reduction=reduction)
    (times * sum(model(images, targets).values())).backward()
    optimizer.step()
    for name, gradient in zip(names, gradients, strict=True):
        expected = N * gradient.T @ gradient  # (1/N) sum_n (N g_n)(N g_n)^T
        torch.testing.assert_close(
            optimizer.layers[name].factors["G"], expected, rtol=1e-12, atol=0
        )


def test_a_number_may_come_with_the_batch(model: Detector):
    """As a loss that is a mean over the objects of all images wants it."""
    images, targets = batch()
    fisher = {"name": "empirical", "terms": "objects"}
    traces = []
    for objects in (12, torch.tensor(12)):
        optimizer = made(model, fisher=fisher, observe="manual")
        losses = model(images, targets)
        optimizer.observe(objects=objects)
        sum(losses.values()).backward()
        optimizer.step()
        traces.append(float(optimizer.layers["trunk"].factors["G"].trace()))
        optimizer.close()
    assert traces[0] == traces[1]
    optimizer = made(model, fisher={"name": "empirical", "terms": "images"})
    sum(model(images, targets).values()).backward()
    optimizer.step()
    half = float(optimizer.layers["trunk"].factors["G"].trace())
    assert traces[0] == pytest.approx(12 / N * half)  # (1/M) sum (M g)^2


def test_a_contrastive_loss_on_embeddings_trains_in_silence(recwarn):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    fisher = {"name": "empirical", "terms": "input"}
    optimizer = made(model, fisher=fisher, update="adam", lr=0.01, damping=0.1)
    x, found = torch.randn(16, 4), []
    for _ in range(30):
        optimizer.zero_grad()
        one, other = model(x), model(x + 0.1 * torch.randn_like(x))
        scores = F.normalize(one) @ F.normalize(other).T / 0.2
        loss = F.cross_entropy(scores, torch.arange(16))
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.8 * found[0]
    assert not [w for w in recwarn if issubclass(w.category, kfactk.KfactkWarning)]


def test_a_weight_read_by_a_function_is_still_refused():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"one": self.a(x).square().mean(), "two": (x @ self.a.weight).mean()}

    model = Twice()
    optimizer = made(model, fisher={"name": "empirical", "terms": "x"})
    with pytest.raises(kfactk.CaptureError, match="exclude="):
        model(torch.randn(N, 4))
    optimizer.close()


WRONG = {"scale": object(), "graph": {"x": torch.ones(N)}, "pair": (torch.ones(N), torch.ones(2))}


@pytest.mark.parametrize(
    ("terms", "words"),
    [("target", "Did you mean 'targets'"), *((name, "no number of terms") for name in WRONG)],
)
def test_terms_that_cannot_be_counted_are_refused(model: Detector, terms: str, words: str):
    images, targets = batch()
    optimizer = made(model, fisher={"name": "empirical", "terms": terms}, observe="manual")
    model(images, targets)
    with pytest.raises(kfactk.CaptureError, match=words):
        optimizer.observe(**WRONG)
    optimizer.close()


@pytest.mark.parametrize("terms", [0, -1, "", True, float("nan"), [3]])
def test_terms_that_cannot_be_are_refused(terms: Any):
    with pytest.raises(kfactk.OptionError, match="terms"):
        kfactk.build(fisher={"name": "empirical", "terms": terms})


def test_an_output_without_gradients_is_told(model: Detector):
    optimizer = made(
        model, fisher={"name": "empirical", "terms": 3}, output=lambda out: out["boxes"].detach()
    )
    with pytest.raises(kfactk.CaptureError, match="needs gradients"):
        model(*batch())
    optimizer.close()
