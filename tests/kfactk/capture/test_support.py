"""Which models can be followed, and where the likelihood's parameters are in their output."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kfactk import CaptureError, CombinationError, OptionError
from kfactk.capture.support import is_distributed, model_output, supported_model
from tests.kfactk.small import batch, net

LOGITS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        SimpleNamespace(logits=LOGITS),
        {"loss": torch.zeros(()), "logits": LOGITS},
        (LOGITS, "extra"),
        [LOGITS],
    ],
    ids=["tensor", "attribute", "mapping", "tuple", "list"],
)
def test_logits_are_found_in_every_common_form(output: Any) -> None:
    assert model_output(output) is LOGITS


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (3.0, "float"),
        ((), "tuple"),
        ((3.0, LOGITS), "tuple"),
        ({"kind": LOGITS, "size": LOGITS}, "dict with tensors at 'kind', 'size'"),
        ({"prediction": LOGITS}, r"dict with tensors at 'prediction'"),
        (SimpleNamespace(logits="text"), "SimpleNamespace"),
    ],
)
def test_output_without_logits_is_refused_with_the_remedy(output: Any, told: str) -> None:
    with pytest.raises(CaptureError, match=rf"the model returned {told}.*build\(\.\.\., output="):
        model_output(output)


def test_a_model_is_followed_itself() -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    assert supported_model(model) is model
    assert supported_model(compiled) is compiled
    assert not is_distributed(model[0].weight)


def test_models_whose_layers_no_hook_sees_are_refused() -> None:
    with pytest.raises(CombinationError, match="DistributedDataParallel"):
        supported_model(nn.DataParallel(net()))
    with pytest.raises(CombinationError, match="DistributedDataParallel"):
        supported_model(nn.Sequential(nn.DataParallel(net())))
    with pytest.raises(OptionError, match=r"wants the model.*was given generator"):
        supported_model(net().parameters())  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_model_is_refused() -> None:
    with pytest.raises(CombinationError, match="scripted or traced"):
        supported_model(torch.jit.trace(net(), batch()[0]))
