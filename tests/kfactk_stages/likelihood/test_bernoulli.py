from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli as Truth, Distribution

from kfactk import OptionError
from kfactk.testing import LikelihoodLaws
from kfactk.testing._support.strategies import Terms, terms
from kfactk_stages.likelihood.bernoulli import Bernoulli

F64 = torch.float64


class TestLaws(LikelihoodLaws):
    stage: ClassVar[dict[str, Any]] = {"name": "bernoulli", "class_axis": 1, "weights": "w"}
    event_axis = 1
    weights = (0.0, 0.5, 1.0, 3.0)

    def distribution(self, row: Tensor) -> Distribution:
        return Truth(logits=row)

    def cases(self) -> st.SearchStrategy[Terms]:
        return terms(self.widths, scales=(1.0, 0.0, 10.0))

    def batch(self, targets: Tensor, weights: Tensor) -> dict[str, Any]:
        return {"w": weights}


class TestLawsWithMissingLabels(TestLaws):
    stage: ClassVar[dict[str, Any]] = {"name": "bernoulli", "class_axis": -1, "targets": "y"}
    event_axis = -1
    widths = (1, 2, 3)
    weights = (0.0, 1.0)

    def batch(self, targets: Tensor, weights: Tensor) -> dict[str, Any]:
        return {"y": torch.where(weights.bool().unsqueeze(-1), targets, -100)}


def logits(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return (
        scale * torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
    ).requires_grad_()


def test_root_of_labels_of_probability_zero_and_one() -> None:
    view = torch.tensor([[[float("inf")], [-float("inf")], [60.0]]])
    [column] = Bernoulli().root(view)
    assert column[0, :2].flatten().tolist() == [0, 0]
    torch.testing.assert_close(column[0, 2], torch.exp(torch.tensor([-30.0])))


def test_draws_of_labels_of_probability_zero_and_one_and_nan() -> None:
    view = torch.tensor([[[float("inf"), -float("inf"), float("nan")]]]).expand(500, 1, 3)
    draws = Bernoulli().sample(view, torch.Generator().manual_seed(0))
    assert bool((draws[..., 0] == 1).all())
    assert bool((draws[..., 1] == 0).all())


def test_ignore_index_may_be_any_number() -> None:
    likelihood = Bernoulli(class_axis=1, targets="y", ignore_index=0.5)
    view = likelihood.view(logits(0, 1, 1, 3))
    assert likelihood.term_weights(view, {"y": torch.tensor([[1, 0.5, 0]])}).tolist() == [[1, 0, 1]]
    with pytest.raises(OptionError, match=r"ignore_index='none' .* a finite number, the label"):
        Bernoulli(ignore_index="none")
