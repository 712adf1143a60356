"""Backward passes over a followed forward: what they reach, and what counts once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kfactk import CaptureError
from tests.kfactk.small import assert_equal, batch, bound, factors, train, values


class Refusal(torch.autograd.Function):
    """The identity, whose backward fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("no gradient on Sundays")


class Wall(torch.autograd.Function):
    """The identity, whose backward lets nothing through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


class Through(nn.Module):
    """A body, a function of its output, and a head."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.body, self.head, self.function = nn.Linear(4, 4), nn.Linear(4, 3), function
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.function.apply(self.body(x)))


def test_an_error_of_the_models_own_backward_reaches_the_user_as_it_is() -> None:
    model = Through(Refusal)
    optimizer = bound(model)
    with pytest.raises(RuntimeError, match="no gradient on Sundays") as raised:
        model(batch()[0])
    optimizer.close()
    assert not isinstance(raised.value, CaptureError)


def test_a_layer_that_no_gradient_reaches_is_left_alone() -> None:
    model = Through(Wall)
    optimizer = bound(model)
    before = values(model)
    train(optimizer, model, batch())
    assert_equal(values(model.body), before[:2])
    assert optimizer.layers["body"].factors == {}
    assert sorted(optimizer.layers["head"].factors) == ["A", "G"]


class Aside(nn.Module):
    """A layer beside the output that the likelihood sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(4)), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.scale, self.layer(x)


def test_layers_none_of_which_leads_to_the_output_are_an_error_when_they_train() -> None:
    model, (x, y) = Aside(), batch()
    optimizer = bound(model)
    logits, aside = model(x)
    (F.cross_entropy(logits, y) + aside.square().mean()).backward()
    before = values(model)
    with pytest.raises(CaptureError, match="layer 'layer' has a gradient but gave no sample"):
        optimizer.step()
    assert_equal(values(model), before)


class Gate(nn.Module):
    """Reads the output of a layer before and after an operation on it, in place or not."""

    def __init__(self, layer: nn.Module, change: str, *, inplace: bool) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 3)
        self.change, self.inplace = change, inplace

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        before = h.sigmoid()
        if not self.inplace:
            h = h.clone()
        if self.change == "relu":
            h = F.relu(h, inplace=True)
        elif self.change == "add":
            h += 0.3
        elif self.change == "slice":
            h[..., 1:3] *= 2.0
        elif self.change == "fill":
            h[..., :1] = before[..., 1:2]
        rows = (before * h.tanh()).flatten(1) if x.ndim > 1 else (before * h.tanh())[None]
        out: Tensor = self.head(rows[..., :4])
        return out


VIEWS = {
    "rank 3": (lambda: nn.Linear(4, 4), (6, 2, 4)),
    "rank 4": (lambda: nn.Linear(4, 4), (6, 2, 2, 4)),
    "rank 3, no bias": (lambda: nn.Linear(4, 4, bias=False), (6, 2, 4)),
    "rank 2": (lambda: nn.Linear(4, 4), (6, 4)),
    "transposed rank 3": (lambda: nn.Linear(4, 4), (2, 6, 4)),
    "convolution": (lambda: nn.Conv1d(2, 2, 1), (6, 2, 4)),
    "instance norm": (lambda: nn.InstanceNorm1d(2, affine=True), (6, 2, 4)),
}


@pytest.mark.parametrize("change", ["relu", "add", "slice", "fill"])
@pytest.mark.parametrize("kind", VIEWS)
def test_outputs_that_are_changed_in_place_count_as_if_they_were_not(
    kind: str, change: str
) -> None:
    """Some layers return views; an operation in place gives a view another node."""
    make, shape = VIEWS[kind]
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = Gate(make(), change, inplace=inplace).double()
        x = torch.randn(*shape, dtype=torch.float64)
        x = x.transpose(0, 1) if kind.startswith("transposed") else x
        optimizer = bound(model, curvature="all", fisher="exact", basis="ekfac")
        F.cross_entropy(model(x), torch.arange(6) % 3).backward()
        optimizer.step()
        found.append(
            factors(optimizer)
            + [v for view in optimizer.layers.values() for v in view.scale.values()]
        )
    assert any(bool(each.any()) for each in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_passes_leave_the_buffers_of_checkpointed_layers_alone(fisher: str) -> None:
    """As plain SGD leaves them: the user's own backward runs a checkpointed part again."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh())
            self.out = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(checkpoint(self.inner, x, use_reentrant=False))
            return out

    buffers = []
    for bind in (lambda model: torch.optim.SGD(model.parameters(), 0.0), None):
        torch.manual_seed(0)
        model = Part()
        optimizer = bound(model, fisher=fisher, lr=0.0) if bind is None else bind(model)
        x = torch.randn(12, 4)
        F.cross_entropy(model(x), torch.arange(12) % 3).backward()
        optimizer.step()
        buffers.append([buffer.clone() for buffer in model.buffers()])
    assert_equal(*buffers)
