"""Heads are read, their axis is said once, and nothing of an output is kept."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk

N, T, CLASSES = 4, 6, 3


class Tagger(nn.Module):
    """Tags and values of each of T positions.

    Args:
        form: Makes what is returned of tags and values.
    """

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.form, self.trunk = form, nn.Linear(2, 5)
        self.tags, self.values = nn.Linear(5, CLASSES), nn.Linear(5, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        hidden = torch.tanh(self.trunk(x))
        return self.form(2 * self.tags(hidden), self.values(hidden))


def labels() -> Tensor:
    return torch.arange(N * T).view(N, T) % CLASSES


def bound(model: nn.Module, **options: Any) -> kfactk.Optimizer:
    return kfactk.build(**{"curvature": "kfac", "lr": 0.01, **options}).bind(model)


def test_an_axis_is_said_once_and_kept_for_forwards_that_do_not_tell() -> None:
    model = Tagger(lambda tags, values: tags)
    optimizer = bound(model, exclude=["values"], factor_every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for known in (labels(), None, labels()):
            optimizer.zero_grad()
            output = model(torch.randn(N, T, 2), known)
            F.cross_entropy(output.mT, labels()).backward()
            optimizer.step()
    told = [str(each.message) for each in caught if "has its classes" in str(each.message)]
    assert len(told) == 1
    assert "dimension -1, as the shape of 'labels' tells" in told[0]
    optimizer.close()


def test_labels_given_to_observe_tell_the_axis() -> None:
    model = Tagger(lambda tags, values: tags.mT)
    optimizer = bound(model, exclude=["values"], observe="manual")
    output = model(torch.randn(N, T, 2))
    with pytest.warns(kfactk.KfactkWarning, match="dimension 1, as the shape of 'y' tells"):
        optimizer.observe(y=labels())
    F.cross_entropy(output, labels()).backward()
    optimizer.step()
    optimizer.close()


def test_labels_tell_which_part_is_that_of_the_recipe() -> None:
    model = Tagger(lambda tags, values: {"values": values, "tags": tags})
    optimizer = bound(model)
    words = (
        "likelihood={'values': {'name': 'gaussian', 'class_axis': -1}, "
        "'tags': {'name': 'categorical', 'class_axis': -1}}"
    )
    with pytest.raises(kfactk.CaptureError) as error:
        model(torch.randn(N, T, 2), labels())
    assert words in str(error.value)
    optimizer.close()


def test_an_axis_is_not_said_where_another_head_is_refused() -> None:
    model = Tagger(lambda tags, values: {"tags": tags, "values": 2 * values})
    heads = {"tags": "categorical", "values": "gaussian"}
    optimizer = bound(model, likelihood=heads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(kfactk.CaptureError) as error:
            model(torch.randn(N, T, 2), labels())
    assert "head 'values'" in str(error.value)
    assert "head 'tags'" not in str(error.value)
    assert "'tags': {'name': 'categorical', 'class_axis': -1}" in str(error.value)
    optimizer.close()


def test_parts_that_no_head_reads_are_those_of_the_last_output() -> None:
    more = SimpleNamespace(there=True)
    model = Tagger(lambda tags, values: {"tags": tags} | ({"values": values} if more.there else {}))
    optimizer = bound(model, likelihood={"tags": {"name": "categorical", "class_axis": -1}})
    for there in (True, False, True):
        more.there = there
        output = model(torch.randn(N, T, 2))
        others = optimizer._fisher_pass.reader.others
        assert list(others.parts) == (["values"] if there else [])
    output["tags"].logsumexp(-1).mean().backward()
    optimizer.step()
    optimizer.close()


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_nothing_of_an_output_is_kept(fisher: str) -> None:
    model = Tagger(lambda tags, values: {"tags": tags, "values": values})
    heads = {"tags": {"name": "categorical", "class_axis": -1}}
    optimizer = bound(model, likelihood=heads, fisher=fisher, exclude=["values"])
    output = model(torch.randn(N, T, 2))
    seen = weakref.ref(output["values"])
    output["tags"].logsumexp(-1).mean().backward()
    optimizer.step()
    del output
    gc.collect()
    assert seen() is None
    optimizer.close()


def test_a_refused_forward_leaves_the_optimizer_usable() -> None:
    whole = SimpleNamespace(value=True)
    form = lambda tags, values: {"a": tags, "b": values} if whole.value else tags  # noqa: E731
    model = Tagger(form)
    likelihood = {"name": "categorical", "class_axis": -1}
    optimizer = bound(model, likelihood=likelihood, exclude=["values"])
    with pytest.raises(kfactk.CaptureError, match="no logits were found"):
        model(torch.randn(N, T, 2))
    whole.value = False
    before = model.tags.weight.clone()
    F.cross_entropy(model(torch.randn(N, T, 2)).mT, labels()).backward()
    optimizer.step()
    assert not torch.equal(before, model.tags.weight)
    optimizer.close()
