from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Distribution, Poisson as Truth
from torch.nn import functional as F

import kfactk
from kfactk.testing import LikelihoodLaws
from kfactk.testing._support.strategies import Terms, terms


class TestLaws(LikelihoodLaws):
    stage: ClassVar[dict[str, Any]] = {"name": "poisson", "class_axis": 1, "weights": "w"}
    event_axis = 1
    weights = (0.0, 0.5, 1.0, 3.0)

    def distribution(self, row: Tensor) -> Distribution:
        return Truth(row.exp())

    def cases(self) -> st.SearchStrategy[Terms]:
        return terms(self.widths, scales=(1.0, 0.0))

    def batch(self, targets: Tensor, weights: Tensor) -> dict[str, Any]:
        return {"w": weights}


def test_it_is_the_curvature_of_torchs_loss():
    """Of means over all counts, by autograd's Hessian at the output."""
    torch.manual_seed(0)
    logits, counts = torch.randn(5, 3, dtype=torch.float64), torch.randint(4, (5, 3)).double()
    hessian = torch.autograd.functional.hessian(
        lambda f: F.poisson_nll_loss(f, counts, log_input=True), logits
    )
    expected = hessian.reshape(15, 15).diagonal().reshape(15, 1)
    likelihood = kfactk.build(likelihood={"name": "poisson", "divisor": "entries"}).likelihood
    view = likelihood.view(logits.requires_grad_())
    found = sum(column.square() for column in likelihood.root(view)) / 15
    torch.testing.assert_close(found.reshape(15, 1), expected)
