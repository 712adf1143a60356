from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical as Truth, Distribution

from kfactk import CaptureError, OptionError
from kfactk.testing import LikelihoodLaws
from kfactk.testing._support.strategies import Terms, terms
from kfactk_stages.likelihood.categorical import Categorical

F64 = torch.float64


class TestLaws(LikelihoodLaws):
    stage: ClassVar[dict[str, Any]] = {"name": "categorical", "class_axis": 1, "weights": "w"}
    event_axis = 1
    widths = (2, 3, 4, 5)
    weights = (0.0, 0.5, 1.0, 3.0)

    def distribution(self, row: Tensor) -> Distribution:
        return Truth(logits=row)

    def cases(self) -> st.SearchStrategy[Terms]:
        return terms(self.widths, scales=(1.0, 0.0, 10.0))

    def batch(self, targets: Tensor, weights: Tensor) -> dict[str, Any]:
        return {"w": weights}


class TestLawsWithMissingLabels(TestLaws):
    stage: ClassVar[dict[str, Any]] = {"name": "categorical", "class_axis": -1, "targets": "y"}
    event_axis = -1
    widths = (2, 3)
    weights = (0.0, 1.0)

    def batch(self, targets: Tensor, weights: Tensor) -> dict[str, Any]:
        return {"y": torch.where(weights.bool(), targets, -100)}


def logits(seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = F64) -> Tensor:
    return (
        (scale * torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)))
        .to(dtype)
        .requires_grad_()
    )


def outer_products(likelihood: Categorical, view: Tensor) -> Tensor:
    return sum(column.unsqueeze(-1) * column.unsqueeze(-2) for column in likelihood.root(view))


@pytest.mark.parametrize("c", [2, 5])
def test_root_has_one_column_less_than_classes(c: int) -> None:
    assert len(list(Categorical().root(logits(0, 2, 3, c)))) == c - 1


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_root_of_classes_of_probability_zero_and_one(dtype: torch.dtype) -> None:
    inf = float("inf")
    rows = [
        [0.0, -inf, 1.0, -inf],
        [-inf, -inf, -inf, 3.0],
        [5.0, -inf, -inf, -inf],
        [0.0, 1e4, -1e4, 1e4],
        [-200, 0, -300, -150],
    ]
    view = torch.tensor([rows], dtype=dtype)
    p = view.softmax(-1)
    expected = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    torch.testing.assert_close(outer_products(Categorical(), view), expected)


def test_draws_avoid_classes_of_vanishing_probability() -> None:
    view = torch.full((64, 1, 4000), -float("inf"))
    view[..., 17] = 0
    generator = torch.Generator().manual_seed(0)
    assert bool((Categorical().sample(view, generator) == 17).all())
    view = torch.full((512, 1, 20000), -60.0)
    view[..., 3] = 0
    assert bool((Categorical().sample(view, generator) == 3).all())


def test_zero_noise_does_not_decide_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        self.fill_(1.0)
        self[..., 1] = 0.0
        return self

    monkeypatch.setattr(Tensor, "exponential_", zeros)
    for hopeless in (-60.0, -float("inf")):
        view = torch.tensor([[[0.0, hopeless]]])
        assert Categorical().sample(view, torch.Generator()).item() == 0


def test_draws_survive_nan() -> None:
    view = logits(0, 50, 3, 4)
    bad = view.detach().clone()
    bad[0] = float("nan")
    first = Categorical().sample(view, torch.Generator().manual_seed(1))
    assert first.dtype == torch.long
    assert torch.equal(Categorical().sample(bad, torch.Generator().manual_seed(1))[1:], first[1:])


def test_ignored_labels_have_no_loss() -> None:
    likelihood = Categorical(ignore_index=-1)
    view = likelihood.view(logits(0, 3, 4))
    losses = likelihood.nll(view, torch.tensor([[2], [-1], [0]]))
    assert losses[1].item() == 0
    assert torch.autograd.grad(losses.sum(), view)[0][1].abs().max() == 0


@pytest.mark.parametrize("ignored", [0, 3])
def test_ignore_index_that_is_a_class_can_be_drawn(ignored: int) -> None:
    likelihood = Categorical(ignore_index=ignored)
    view = likelihood.view(logits(0, 3, 4))
    targets = torch.full((3, 1), ignored)
    torch.testing.assert_close(likelihood.nll(view, targets), -Truth(logits=view).log_prob(targets))


@pytest.mark.parametrize("ignored", [-100, 0, 255])
def test_ignore_index_masks_terms(ignored: int) -> None:
    likelihood = Categorical(class_axis=1, targets="y", ignore_index=ignored)
    view = likelihood.view(logits(0, 2, 4, 3))
    assert likelihood.term_weights(
        view, {"y": torch.tensor([[1, ignored, 2], [ignored, 3, 1]])}
    ).tolist() == [[1, 0, 1], [0, 1, 1]]


def test_single_classes_are_refused_with_the_remedy() -> None:
    remedy = 'likelihood="gaussian" for regression or likelihood="bernoulli" for binary'
    with pytest.raises(CaptureError, match=rf"shape \[5, 1\]\) has a single class.*{remedy}"):
        Categorical().view(logits(0, 5, 1))
    with pytest.raises(CaptureError, match=rf"shape \[2, 1, 3\]\) has a single class.*{remedy}"):
        Categorical(class_axis=1).view(logits(0, 2, 1, 3))
    with pytest.raises(CaptureError, match=rf"shape \[5\].*{remedy}"):
        Categorical().view(logits(0, 5))
    with pytest.raises(OptionError, match=r"ignore_index=1\.5 .* a whole number, the label"):
        Categorical(ignore_index=1.5)
