"""The dimension of the classes is found where only one can be, said, and asked for elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk

N = 5


def bound(model: nn.Module, **options: Any) -> kfactk.Optimizer:
    chosen = {"curvature": "kfac", "basis": "kfac", "fisher": "exact"}
    return kfactk.build(**{**chosen, "update": "sgd", "lr": 0.0, **options}).bind(model)


class Tokens(nn.Module):
    """A model of language: classes in the last dimension, or, with `images`, in the second."""

    def __init__(self, images: bool = False) -> None:
        super().__init__()
        self.images, self.table = images, nn.Embedding(7, 4)
        self.head: nn.Module = nn.Conv1d(4, 7, 1) if images else nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.table(tokens)
        return self.head(found.mT if self.images else found)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("length", [5, 7])
def test_the_axis_of_classes_is_found_and_said(images: bool, length: int):
    """With seven tokens each of seven classes, the last layer alone tells."""
    traces, axis = [], 1 if images else -1
    for likelihood in ("categorical", {"name": "categorical", "class_axis": axis}):
        torch.manual_seed(0)
        model = Tokens(images)
        optimizer = bound(model, curvature="all", basis="ekfac", likelihood=likelihood)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                optimizer.zero_grad()
                output = model(torch.randint(7, (N, length)))
                (output.logsumexp(axis).mean() - output.select(axis, 0).mean()).backward()
                optimizer.step()
        told = [str(each.message) for each in caught]
        assert [f"class_axis={axis}" in each for each in told] == [True] * (
            likelihood == "categorical"
        )
        traces.append(optimizer.layers["head"].factors["G"])
        optimizer.close()
    assert torch.equal(*traces)


def test_an_axis_of_classes_that_nothing_tells_is_asked_for():
    model = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)))
    optimizer = bound(model, likelihood="categorical")
    with pytest.raises(kfactk.CaptureError, match="class_axis=-1"):
        model(torch.randn(N, 4))
    optimizer.close()


class Spans(nn.Module):
    """Scores of the first and the last token: classes are positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens)).mT


class AlongTime(nn.Module):
    """Classes in dimension 1, and a linear layer along time."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        return self.head(x)


class Last(nn.Module):
    """Classes in the last dimension, behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Spans(), (torch.randint(7, (N, 5)),)),
        (AlongTime(), (torch.randn(N, 3, 6), torch.randint(3, (N, 4)))),
        (Last(), (torch.randn(N, 2, 3, 3),)),
    ],
)
def test_an_axis_of_classes_is_not_guessed(model: nn.Module, inputs: tuple[Tensor, ...]):
    optimizer = bound(model, curvature="all", basis="ekfac", likelihood="categorical")
    with pytest.raises(kfactk.CaptureError, match="class_axis=-1"):
        model(*inputs)
    optimizer.close()


class Shaped(nn.Module):
    """A trunk whose output no followed layer has made as it is.

    Args:
        shape: Its shape, without the examples.
        form: Makes what is returned of it.
    """

    def __init__(self, *shape: int, form: Callable[[Tensor], Any] = lambda z: z) -> None:
        super().__init__()
        self.trunk, self.form = nn.Linear(4, torch.Size(shape).numel()), form
        self.shape = shape

    def forward(self, x: Tensor, **more: Any) -> Any:
        return self.form(2 * self.trunk(x).unflatten(1, self.shape))


class Language(nn.Module):
    """A model of seven tokens whose head nobody follows.

    Args:
        tied: Whether the table of the embedding is the head.
        width: Number of outputs of the head otherwise.
        turned: Whether classes are in dimension 1.
    """

    def __init__(self, *, tied: bool = False, width: int = 7, turned: bool = False) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, width)
        self.tied, self.turned = tied, turned

    def forward(self, numbers: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(self.table(numbers.long())))
        found = hidden @ self.table.weight.T if self.tied else self.head(hidden)
        return found.mT if self.turned else found


def labels(*shape: int, classes: int) -> Tensor:
    """Labels of which one is the last class."""
    return torch.arange(torch.Size((N, *shape)).numel()).view(N, *shape) % classes


OBJECT = lambda z: SimpleNamespace(logits=z, loss=None)  # noqa: E731
FOUND: dict[str, tuple[nn.Module, dict[str, Any], Any, int]] = {
    "labels before": (Shaped(6, 3), {"labels": labels(6, classes=3)}, "categorical", -1),
    "labels behind": (Shaped(3, 6), {"labels": labels(6, classes=3)}, "categorical", 1),
    "labels of images": (Shaped(3, 2, 4), {"y": labels(2, 4, classes=3)}, "categorical", 1),
    "masked labels": (
        Shaped(3, 6),
        {"y": labels(6, classes=3).index_fill(1, torch.tensor([2]), 255)},
        {"name": "categorical", "ignore_index": 255},
        1,
    ),
    "named mask": (
        Shaped(2, 6),
        {"mask": torch.ones(N, 6)},
        {"name": "categorical", "weights": "mask"},
        1,
    ),
    "logits of an object": (Shaped(6, 3, form=OBJECT), {}, "categorical", -1),
}
ASKED: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "nothing": (Shaped(6, 3), {}),
    "labels of either": (Shaped(6, 6), {"labels": labels(6, classes=6)}),
    "more labels than classes": (Shaped(3, 6), {"tokens": labels(6, classes=4)}),
    "a mask": (Shaped(2, 6), {"mask": torch.ones(N, 6, dtype=torch.long)}),
    "a flag": (Shaped(3, 6), {"mask": torch.ones(N, 6, dtype=torch.bool)}),
    "labels that disagree": (
        Shaped(3, 6),
        {"one": labels(6, classes=3), "two": labels(3, classes=6)},
    ),
    "logits against labels": (Shaped(3, 6, form=OBJECT), {"y": labels(6, classes=3)}),
    "logits in four dimensions": (Shaped(3, 2, 4, form=OBJECT), {}),
    "logits of a mapping": (Shaped(6, 3, form=lambda z: {"logits": z}), {}),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_axis_that_alone_can_be_is_found(case: str):
    model, more, likelihood, axis = FOUND[case]
    optimizer = bound(model, likelihood=likelihood)
    with pytest.warns(kfactk.KfactkWarning, match=f"has its classes in dimension {axis}, as the"):
        output = model(torch.randn(N, 4), **more)
    output = getattr(output, "logits", output)
    (output.logsumexp(axis).mean() - output.select(axis, 0).mean()).backward()
    optimizer.step()
    optimizer.close()


@pytest.mark.parametrize("case", ASKED)
def test_an_axis_of_several_is_asked_for(case: str):
    model, more = ASKED[case]
    optimizer = bound(model, likelihood="categorical")
    with pytest.raises(kfactk.CaptureError, match="unknown which of them holds the classes"):
        model(torch.randn(N, 4), **more)
    optimizer.close()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_of_a_head_that_is_excluded_tells(tied: bool, turned: bool):
    model = Language(tied=tied, turned=turned)
    optimizer = bound(model, likelihood="categorical", exclude=["head"])
    axis = 1 if turned else -1
    with pytest.warns(kfactk.KfactkWarning, match=f"{axis}, as the vocabulary of the model tells"):
        output = model(torch.rand(N, 6).mul(7).floor())
    tokens = torch.arange(N * 6).view(N, 6) % 7
    F.cross_entropy(output if turned else output.mT, tokens).backward()
    optimizer.step()
    optimizer.close()


@pytest.mark.parametrize(("width", "length"), [(7, 7), (2, 7), (2, 6)])
def test_a_length_that_is_that_of_the_vocabulary_tells_nothing(width: int, length: int):
    """Seven tokens of seven classes; or scores of seven tokens, which no head of seven made."""
    model = Language(width=width, turned=True)
    optimizer = bound(model, likelihood="categorical", exclude=["head"])
    with pytest.raises(kfactk.CaptureError, match="unknown which of them holds the classes"):
        model(torch.rand(N, length).mul(7).floor())
    optimizer.close()


def test_entries_that_are_terms_of_their_own_have_no_axis():
    optimizer = bound(Shaped(6, 3), likelihood={"name": "gaussian", "divisor": "entries"})
    optimizer.close()
    model = Shaped(6, 3, form=lambda z: z.long())
    optimizer = bound(model, likelihood={"name": "gaussian", "divisor": "entries"})
    with pytest.raises(kfactk.CaptureError, match="is not floating point"):
        model(torch.randn(N, 4), labels=labels(6, classes=3))
    optimizer.close()
