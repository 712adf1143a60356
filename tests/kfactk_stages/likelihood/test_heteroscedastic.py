from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Distribution, Normal

import kfactk
from kfactk.testing import LikelihoodLaws
from kfactk.testing._support.strategies import Terms, terms
from kfactk_stages.likelihood.heteroscedastic import Heteroscedastic


class TestLaws(LikelihoodLaws):
    stage: ClassVar[dict[str, Any]] = {"name": "heteroscedastic", "class_axis": -1, "weights": "w"}
    event_axis = -1
    widths = (2, 4)
    weights = (0.0, 0.5, 1.0, 3.0)

    def distribution(self, row: Tensor) -> Distribution:
        mean, log_variance = row.chunk(2, -1)
        return Normal(mean, (0.5 * log_variance).exp())

    def cases(self) -> st.SearchStrategy[Terms]:
        return terms(self.widths, scales=(1.0, 0.0))

    def batch(self, targets: Tensor, weights: Tensor) -> dict[str, Any]:
        return {"w": weights}


def test_missing_labels_do_not_count():
    likelihood = Heteroscedastic(targets="y")
    view = likelihood.view(torch.zeros(3, 4, requires_grad=True))
    labels = torch.zeros(3, 2)
    labels[1] = float("nan")
    assert likelihood.term_weights(view, {"y": labels}).flatten().tolist() == [1, 0, 1]


def test_odd_outputs_are_refused():
    with pytest.raises(kfactk.CaptureError, match="an even number"):
        Heteroscedastic().view(torch.zeros(3, 3, requires_grad=True))
