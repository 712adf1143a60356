"""Recurrent loops outside and inside the bound model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CaptureError, Optimizer

X = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(4, 5, 2)
Y = torch.arange(20).reshape(4, 5) % 3


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out = nn.Linear(6, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(self.hidden(torch.cat([x, state], -1)))
        return self.out(state), state


class Unrolled(nn.Module):
    """Holds the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = torch.zeros(4, 4, dtype=torch.float64), []
        for t in range(x.shape[1]):
            output, state = self.cell(x[:, t], state)
            outputs.append(output)
        return torch.stack(outputs, 1)


def bound(model: nn.Module) -> Optimizer:
    likelihood = {"name": "categorical", "class_axis": -1}
    options = {"fisher": "exact", "basis": "kfac", "lr": 0.0, "factor_decay": 0.0}
    return kfactk.build(curvature="kfac", likelihood=likelihood, **options).bind(model)


def test_a_loop_outside_the_bound_model_is_refused() -> None:
    cell = Cell()
    optimizer = bound(cell)
    _, state = cell(X[:, 0], torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(CaptureError, match=r"'hidden'.*bind a module that holds the loop"):
        cell(X[:, 1], state)
    optimizer.close()


def test_a_state_that_is_detached_is_an_input() -> None:
    """Truncated to one step, each call is a forward of its own."""
    cell = Cell()
    optimizer = bound(cell)
    state, inputs = torch.zeros(4, 4, dtype=torch.float64), []
    for t in range(3):
        inputs.append(torch.cat([X[:, t], state, torch.ones(4, 1, dtype=torch.float64)], -1))
        output, state = cell(X[:, t], state)
        state = state.detach()
        F.cross_entropy(output, Y[:, t]).backward()
    optimizer.step()
    rows = torch.cat(inputs)
    torch.testing.assert_close(optimizer.layers["hidden"].factors["A"], rows.mT @ rows / len(rows))


def test_a_loop_inside_the_bound_model_counts_every_call() -> None:
    """A of the cell sums its inputs over time, by hand."""
    model = Unrolled()
    optimizer = bound(model)
    F.cross_entropy(model(X).flatten(0, 1), Y.flatten()).backward()
    optimizer.step()
    state, total = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(7, 7, dtype=torch.float64)
    with torch.no_grad():
        for t in range(5):
            rows = torch.cat([X[:, t], state, torch.ones(4, 1, dtype=torch.float64)], -1)
            total += rows.mT @ rows
            _, state = model.cell(X[:, t], state)
    torch.testing.assert_close(optimizer.layers["cell.hidden"].factors["A"], total / 4)
