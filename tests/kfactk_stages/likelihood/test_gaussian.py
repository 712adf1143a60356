import math
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Distribution, Normal as Truth

from kfactk import OptionError
from kfactk.testing import LikelihoodLaws
from kfactk.testing._support.strategies import Terms, terms
from kfactk_stages.likelihood.gaussian import Gaussian

F64 = torch.float64


class TestLaws(LikelihoodLaws):
    stage: ClassVar[dict[str, Any]] = {"name": "gaussian", "class_axis": 1, "weights": "w"}
    event_axis = 1
    weights = (0.0, 0.5, 1.0, 3.0)

    def distribution(self, row: Tensor) -> Distribution:
        return Truth(row, math.sqrt(self.stage.get("variance", 1.0)))

    def cases(self) -> st.SearchStrategy[Terms]:
        return terms(self.widths, scales=(1.0, 0.0, 10.0))

    def batch(self, targets: Tensor, weights: Tensor) -> dict[str, Any]:
        return {"w": weights}


class TestLawsWithMissingLabels(TestLaws):
    stage: ClassVar[dict[str, Any]] = {
        "name": "gaussian",
        "class_axis": -1,
        "targets": "y",
        "variance": 3.7,
    }
    event_axis = -1
    widths = (1, 2, 3)
    weights = (0.0, 1.0)

    def batch(self, targets: Tensor, weights: Tensor) -> dict[str, Any]:
        return {"y": torch.where(weights.bool().unsqueeze(-1), targets, math.nan)}


class TestLawsOfASmallVariance(TestLaws):
    stage: ClassVar[dict[str, Any]] = {
        "name": "gaussian",
        "class_axis": 1,
        "weights": "w",
        "variance": 1e-3,
    }
    widths = (1, 2)


def means(seed: int, *shape: int) -> Tensor:
    return torch.randn(
        *shape, dtype=F64, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()


@pytest.mark.parametrize("c", [1, 3])
def test_variance_of_half_the_width_gives_mse_loss(c: int) -> None:
    likelihood = Gaussian(variance=c / 2)
    f, y = means(0, 6, c), means(1, 6, c).detach()
    (ours,) = torch.autograd.grad(likelihood.nll(likelihood.view(f), y.unsqueeze(1)).mean(), f)
    (theirs,) = torch.autograd.grad(torch.nn.functional.mse_loss(f, y), f)
    torch.testing.assert_close(ours, theirs)


def test_draws_have_mean_and_variance() -> None:
    """40000 draws of 3 numbers: each bound is off with probability below 1e-4."""
    f = torch.tensor([2.0, 0.0, -100.0])
    draws = Gaussian(variance=4.0).sample(
        f.expand(200, 200, 3).contiguous().requires_grad_(), torch.Generator().manual_seed(3)
    )
    assert draws.shape == (200, 200, 3)
    noise = (draws - f).double().flatten(0, 1)
    assert float(noise.mean(0).abs().max()) < 4.3 * 2 / 200
    assert float((noise.var(0) / 4 - 1).abs().max()) < 4.3 * math.sqrt(2) / 200
    assert float((torch.corrcoef(noise.T) - torch.eye(3)).abs().max()) < 4.3 / 200


@pytest.mark.parametrize("variance", [0, -1.0, float("inf"), float("nan"), "1", True, None])
def test_variance_is_checked(variance: object) -> None:
    with pytest.raises(OptionError, match=r"variance=.* a finite number greater than 0"):
        Gaussian(variance=variance)
