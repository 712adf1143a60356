"""Figures held back."""

from __future__ import annotations

import math
import os

import pytest
import torch

from kfactk import KfactkError
from kfactk_stages.tracker._buffer import Buffer, flattened


def test_metrics_come_back_as_numbers_in_order() -> None:
    buffer = Buffer()
    buffer.add(
        0,
        {
            "loss": torch.tensor(0.5),
            "lr": 0.1,
            "skipped": torch.tensor(2),
            "double": torch.tensor(1e-200, dtype=torch.float64),
        },
    )
    buffer.add(10, {"lr": 0.2})
    buffer.add(20, {"skipped": torch.tensor([3]), "loss": torch.tensor(math.inf), "flag": True})
    assert len(buffer) == 3
    rows = buffer.take()
    assert [row.step for row in rows] == [0, 10, 20]
    assert [list(row.metrics.items()) for row in rows] == [
        [("loss", 0.5), ("lr", 0.1), ("skipped", 2), ("double", 1e-200)],
        [("lr", 0.2)],
        [("skipped", 3), ("loss", math.inf), ("flag", True)],
    ]
    assert len(buffer) == 0
    assert buffer.take() == []


def test_values_are_copied_when_added() -> None:
    buffer, figure = Buffer(), torch.tensor(1.0)
    buffer.add(0, {"x": figure})
    figure.add_(1)
    buffer.add(1, {"x": figure})
    assert [row.metrics["x"] for row in buffer.take()] == [1.0, 2.0]


def test_nothing_is_read_before_take() -> None:
    buffer = Buffer()
    buffer.add(
        0, {"x": torch.ones((), device="meta", requires_grad=True)}
    )  # a meta tensor has no value that could be read
    with pytest.raises((RuntimeError, NotImplementedError)):
        buffer.take()


@pytest.mark.parametrize("figure", [torch.ones(2), torch.ones(0), "0.5", None])
def test_other_values_are_refused_by_name(figure: object) -> None:
    buffer = Buffer()
    with pytest.raises(KfactkError, match=r"'odd' of step 4"):
        buffer.add(4, {"fine": 1.0, "odd": figure})
    assert len(buffer) == 0


def test_flattened() -> None:
    assert flattened({}) == {}
    recipe = {
        "clip": {"name": "kl", "limit": 0.01},
        "groups": [{"lr": 1}, {}],
        "tracker": None,
        "betas": (0.9, 0.99),
    }
    assert flattened(recipe) == {
        "clip.name": "kl",
        "clip.limit": 0.01,
        "groups.0.lr": 1,
        "groups.1": {},
        "tracker": None,
        "betas.0": 0.9,
        "betas.1": 0.99,
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_steps_stay_with_the_process_that_added_them() -> None:
    buffer = Buffer()
    buffer.add(0, {"loss": 1.0})
    if (child := os.fork()) == 0:
        empty = len(buffer) == 0 and buffer.take() == []
        buffer.add(1, {"loss": 0.5})
        os._exit(0 if empty and [row.step for row in buffer.take()] == [1] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert [row.step for row in buffer.take()] == [0]
