"""FirstMoment: what is preconditioned, against the recursions written out."""

import pytest
import torch

from kfactk import OptionError, RunningMean
from kfactk.preconditioner.first_moment import FirstMoment, as_first_moment

F64 = torch.float64


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decay", [0.5, 0.95])
def test_it_is_the_recursion_of_adam_or_muon(decay, corrected, nesterov):
    moment, mean = FirstMoment(decay, corrected, nesterov), RunningMean()
    m = torch.zeros(3, dtype=F64)
    for t in range(1, 8):
        g = torch.randn(3, dtype=F64)
        m = decay * m + (1 - decay) * g
        expected = m / (1 - decay**t) if corrected else m
        expected = decay * expected + (1 - decay) * g if nesterov else expected
        mean.update(g, decay)
        torch.testing.assert_close(moment.of(mean, g), expected)


def test_a_number_is_the_decay_of_a_corrected_mean():
    assert as_first_moment(0.9) == FirstMoment(0.9, corrected=True, nesterov=False)
    assert as_first_moment(0.9).written() == 0.9


def test_options_are_written_as_they_are_given():
    given = {"decay": 0.95, "corrected": False, "nesterov": True}
    assert as_first_moment(given).written() == given
    assert as_first_moment(as_first_moment(given)) == as_first_moment(given)


@pytest.mark.parametrize("decay", [1.0, -0.1, "0.9", None, True])
def test_a_decay_outside_of_its_interval_is_refused(decay):
    with pytest.raises(OptionError, match="decay="):
        as_first_moment(decay)


def test_an_unknown_option_is_refused_with_the_near_name():
    with pytest.raises(OptionError, match=r"no option 'nestrov'. Did you mean 'nesterov'"):
        as_first_moment({"decay": 0.9, "nestrov": True})


@pytest.mark.parametrize("option", [{"nesterov": True}, {"corrected": False}])
def test_options_of_no_average_are_refused(option):
    [(name, value)] = option.items()
    with pytest.raises(OptionError, match=f"has {name}, and a decay of 0, .*'{name}': {value}}}"):
        as_first_moment(option)
    assert as_first_moment({**option, "decay": 0.5}).decay == 0.5


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_gradient_of_another_precision_joins_the_mean_in_its_own(nesterov: bool) -> None:
    """A model may be moved to another precision; the mean stays as it is."""
    moment, mean = FirstMoment(0.5, nesterov=nesterov), RunningMean()
    mean.update(torch.tensor([4.0]), 0.5)
    mean.update(torch.tensor([1.0], dtype=torch.float64), 0.5)
    found = moment.of(mean, torch.tensor([1.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([1.5 if nesterov else 2.0]))
