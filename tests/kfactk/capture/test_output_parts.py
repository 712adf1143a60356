"""The tensors in what a model returned, and which of them a likelihood may be of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

from kfactk.capture.heads import at_path
from kfactk.capture.output_parts import last_parts, output_parts, output_tensors
from kfactk.jets import jet


@attrs.frozen
class Slots:
    """An object without a dictionary of attributes."""

    mean: Tensor
    _scale: Tensor


def leaf() -> Tensor:
    return torch.ones(2, requires_grad=True)


def test_tensors_are_found_once_also_in_circles_of_objects() -> None:
    z = leaf() * 2
    inner = SimpleNamespace(z=z + 1)
    inner.other = SimpleNamespace(z=z + 2)  # an object in an object is left alone
    output: dict[str, Any] = {"z": z, "again": z, "plain": torch.ones(2), "deep": inner}
    output |= {"itself": output, "leaf": leaf(), "count": 3}
    found = output_tensors(output)
    assert list(found) == ["z", "deep.z"]
    assert all(at_path(output, path) is tensor for path, tensor in found.items())


@pytest.mark.parametrize(
    ("form", "paths"),
    [
        (lambda z: z, [""]),
        (lambda z: SimpleNamespace(a=[z], b=None, _c=z * 2), ["a.0"]),
        (lambda z: Slots(z, z * 2), ["mean"]),
        (lambda z: torch.distributions.Normal(z, z.exp()), ["loc", "scale"]),
        (lambda z: {1: z, "1": z * 2}, ["1"]),
        (lambda z: nn.ParameterList([z.detach()]), []),
        (lambda z: jet(z.unsqueeze(0)), []),
        (lambda z: lambda: z, []),
        (lambda z: None, []),
    ],
)
def test_the_paths_of_tensors(form: Any, paths: list[str]) -> None:
    output = form(leaf() * 2)
    found = output_tensors(output)
    assert list(found) == paths
    assert all(at_path(output, path) is tensor for path, tensor in found.items())


def test_hidden_states_and_losses_are_no_last_parts() -> None:
    trunk, one, two = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(4, 2)
    hidden = trunk(torch.ones(6, 3))
    first, second = one(hidden), two(hidden)
    mean, scale = trunk(torch.ones(6, 3)).chunk(2, 1)
    output = {
        "hidden": hidden,
        "first": first,
        "softmax": first.softmax(1),
        "second": second,
        "both": torch.cat([first, second], 1),
        "loss": second.sum(),
    }
    assert [part.path for part in last_parts(output_parts(output, []))] == ["both"]
    del output["both"]
    assert [part.path for part in last_parts(output_parts(output, []))] == ["first", "second"]
    halves = output_parts({"mean": mean, "scale": scale}, [])
    assert [part.path for part in last_parts(halves)] == ["mean", "scale"]
    assert halves[0].told == "'mean' of shape [6, 2]"
