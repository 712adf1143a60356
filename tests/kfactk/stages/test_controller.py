"""Controllers: the protocol, and the stages that have its members."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfactk.stages import QuadraticModel
from tests.kfactk.stages.members import check


def pair(values: Tensor) -> tuple[float, float]:
    one, other = values.tolist()
    return one, other


def square(values: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    one, other = values
    return pair(one), pair(other)


def test_our_controllers_take_the_arguments_of_the_protocol() -> None:
    check("controller")


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_quadratic_model_is_that_of_a_dense_matrix(damping: float) -> None:
    torch.manual_seed(0)
    root, gradient = torch.randn(5, 5).double(), torch.randn(5).double()
    fisher, directions = root @ root.mT, torch.randn(5, 2).double()
    model = QuadraticModel(
        slopes=pair(directions.mT @ gradient),
        curvature=square(directions.mT @ fisher @ directions),
        squares=square(directions.mT @ directions),
    )
    damped = fisher + damping * torch.eye(5).double()
    step = directions @ torch.tensor([0.5, -2.0]).double()
    expected = gradient @ step + step @ damped @ step / 2
    assert model.change((0.5, -2.0), damping) == pytest.approx(expected.item(), rel=1e-12)
    wanted = directions.mT @ damped @ directions
    torch.testing.assert_close(torch.tensor(model.damped(damping), dtype=torch.float64), wanted)
