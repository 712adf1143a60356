import torch

from kfactk.testing import FisherLaws
from kfactk_stages.fisher.empirical import Empirical
from kfactk_stages.likelihood.categorical import Categorical


class TestLaws(FisherLaws):
    """Laws of losses are skipped: it has none.

    `tests/kfactk/capture/test_fisher_pass.py` tests what it measures.
    """

    stage = "empirical"


def test_empirical_adds_no_pass_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    state, before = generator.get_state(), torch.get_rng_state()
    assert not Empirical.own_pass
    assert (
        list(
            Empirical().losses(
                torch.zeros(2, 1, 3, requires_grad=True), Categorical(), None, generator
            )
        )
        == []
    )
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), before)
    assert Empirical().seed == 0
    assert Empirical() == Empirical()
