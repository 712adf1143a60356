"""One error for an output that cannot be read, and its line works as it is pasted."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import kfactk

N, T, CLASSES, VALUES = 2, 7, 5, 3
Pair = namedtuple("Pair", ["scores", "sizes"])


@dataclasses.dataclass
class Output:
    """What an object with attributes looks like."""

    scores: Tensor
    sizes: Tensor
    loss: Tensor | None = None


class Two(nn.Module):
    """A trunk with classes and values at each of T positions.

    Args:
        form: Makes what is returned of the hidden state, the classes and the values.
    """

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.form = form
        self.trunk = nn.Linear(4, 6)
        self.pred, self.aux = nn.Linear(6, CLASSES), nn.Linear(6, VALUES)

    def forward(self, x: Tensor, **more: Tensor) -> Any:
        hidden = torch.tanh(self.trunk(x))
        return self.form(hidden, self.pred(hidden), self.aux(hidden))


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "mapping": lambda h, p, a: {"pred": p, "aux": a},
    "tuple": lambda h, p, a: (p, a),
    "list behind a loss": lambda h, p, a: [p.sum() + a.sum(), p, a],
    "named tuple": lambda h, p, a: Pair(p, a),
    "nested": lambda h, p, a: {"out": {"first": p, "rest": [a]}, "n": 3},
    "attributes": lambda h, p, a: SimpleNamespace(scores=p, sizes=a, name="x"),
    "dataclass": lambda h, p, a: Output(p, a),
    "hidden states": lambda h, p, a: {"hidden": h, "pred": p, "aux": a},
    "probabilities": lambda h, p, a: {"pred": p, "probabilities": p.softmax(-1), "aux": a},
    "key with a dot": lambda h, p, a: {"out.pred": p, "out.aux": a},
    "keys of a likelihood": lambda h, p, a: {"name": p, "likelihood": a},
    "images": lambda h, p, a: {"pred": p.permute(0, 2, 1).unflatten(2, (1, T)), "aux": a},
    "flat values": lambda h, p, a: {"value": a.mean((1, 2)), "pred": p, "one": a.sum(2)[:, :1]},
    "another number of rows": lambda h, p, a: {"pred": p, "aux": a.flatten(0, 1)},
}


def losses(output: Any) -> Tensor:
    """A loss of every part of an output."""
    parts = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
    parts = parts or [each for each in vars(output).values() if isinstance(each, Tensor)]
    return torch.stack([each.square().mean() for each in parts]).sum()


def trained(model: nn.Module, *, loss: Callable[[Any], Tensor] = losses, **options: Any) -> None:
    """Train a copy of a model for three steps."""
    model = copy.deepcopy(model)
    optimizer = kfactk.build(**{"curvature": "kfac", "lr": 0.001, **options}).bind(model)
    before = [each.clone() for each in model.parameters()]
    try:
        for _ in range(3):
            optimizer.zero_grad()
            loss(model(torch.randn(N, T, 4))).backward()
            optimizer.step()
    finally:
        optimizer.close()
    assert any(
        not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)
    )


def message(model: nn.Module, **options: Any) -> str:
    """The one error of a model."""
    with pytest.raises(kfactk.CaptureError) as error:
        trained(model, **options)
    return str(error.value)


def pasted(text: str) -> dict[str, Any]:
    """The arguments of the line in a message."""
    found = re.findall(r"[Tt]his line works(?: as it is)?: build\(\.\.\., (.*?\S)\)\.(?: |$)", text)
    assert len(found) == 1, text
    arguments: dict[str, Any] = eval(f"dict({found[0]})")
    return arguments


def pasted_trains(model: nn.Module, text: str, **options: Any) -> dict[str, Any]:
    """Check that a model trains with the line of a message, and return its arguments."""
    given = pasted(text)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*of your loss.*")  # it has squared errors alone
        trained(model, **{**options, **given})
    return given


@pytest.mark.parametrize("form", FORMS)
def test_the_line_trains_whatever_is_returned(form: str) -> None:
    torch.manual_seed(0)
    model = Two(FORMS[form])
    given = pasted_trains(model, message(model))
    parts = {"another number of rows": 1, "flat values": 3}
    assert len(given["likelihood"]) == parts.get(form, 2)
    assert ("exclude" in given) == (form == "another number of rows")


def test_the_line_has_a_likelihood_and_an_axis_for_each_part() -> None:
    text = message(Two(FORMS["mapping"]))
    assert pasted(text) == {
        "likelihood": {
            "pred": {"name": "categorical", "class_axis": -1},
            "aux": {"name": "gaussian", "class_axis": -1},
        }
    }
    for told in ("'pred' of shape [2, 7, 5] and 'aux' of shape [2, 7, 3]", "class_axis=1"):
        assert told in text
    assert text.count("build(") == 1


def test_parts_in_the_layout_of_images_have_its_axis() -> None:
    text = message(Two(FORMS["images"]))
    assert pasted(text)["likelihood"]["pred"] == {"name": "categorical", "class_axis": 1}


@pytest.mark.parametrize(
    ("likelihood", "expected"),
    [
        ({"pred": "categorical"}, {"pred": {"name": "categorical", "class_axis": -1}}),
        ({"prd": "categorical"}, {"pred": {"name": "categorical", "class_axis": -1}}),
        (
            {"pred": {"name": "categorical", "class_axis": 7}},
            {"pred": {"name": "categorical", "class_axis": -1}},
        ),
        (
            [kfactk.head("pred", {"name": "gaussian", "variance": 2.0}, weight=0.5)],
            [
                {
                    "output": "pred",
                    "likelihood": {"name": "gaussian", "variance": 2.0, "class_axis": -1},
                    "weight": 0.5,
                }
            ],
        ),
    ],
)
@pytest.mark.parametrize("exclude", [[], ["trunk"]])
def test_a_named_head_keeps_its_options_and_the_other_is_excluded(
    likelihood: Any, expected: Any, exclude: list[str]
) -> None:
    model = Two(FORMS["mapping"])
    options = {"likelihood": likelihood, "exclude": exclude}
    text = message(model, **options)
    assert pasted_trains(model, text, **options) == {
        "likelihood": expected,
        "exclude": [*exclude, "aux"],
    }
    assert "likelihood={'aux': {'name': 'gaussian', 'class_axis': -1}}" in text


def test_all_heads_are_told_of_at_once() -> None:
    model = Two(FORMS["mapping"])
    text = message(model, likelihood={"pred": "categorical", "aux": "gaussian"})
    assert "head 'pred'" in text
    assert "head 'aux'" in text
    assert "exclude" not in pasted_trains(model, text)


def test_a_head_without_samples_is_named_at_the_step() -> None:
    model = Two(FORMS["mapping"])
    named = {"likelihood": {"pred": {"name": "categorical", "class_axis": -1}}}
    assert "Or exclude=['trunk', 'aux']" in message(model, **named, exclude=["trunk"])
    text = message(model, **named)
    assert "layer 'aux' has a gradient but gave no sample" in text
    assert pasted_trains(model, text)["likelihood"] == {
        **named["likelihood"],
        "aux": {"name": "gaussian", "class_axis": -1},
    }
    trained(model, loss=lambda out: out["pred"].logsumexp(-1).mean(), **named)  # nobody trains it


def test_a_first_element_whose_axis_is_known_is_completed_at_the_step() -> None:
    model = Two(FORMS["tuple"])
    text = message(model, likelihood={"name": "categorical", "class_axis": -1})
    assert "layer 'aux' has a gradient but gave no sample" in text
    assert list(pasted_trains(model, text)["likelihood"]) == ["0", "1"]


@pytest.mark.parametrize(
    ("output", "keys"),
    [
        (lambda out: out["pred"], {"likelihood", "exclude"}),
        (lambda out: out["pred"].sum(), {"likelihood", "output"}),
        (lambda out: {"one": out["pred"], "two": out["aux"]}, {"likelihood"}),
    ],
    ids=["part", "number", "mapping"],
)
def test_a_function_of_the_user_is_kept_where_it_finds_something(
    output: Callable[[Any], Any], keys: set[str]
) -> None:
    model = Two(FORMS["mapping"])
    text = message(model, output=output)
    assert set(pasted_trains(model, text, output=output)) == keys


def test_what_else_is_in_the_way_is_told_too() -> None:
    model = Two(FORMS["mapping"])
    own = {"name": "categorical", "targets": "label"}
    text = message(model, likelihood=own)
    assert "targets='label' names an argument that this forward was not given" in text
    assert "With that mended, this line works" in text
    first = pasted(text)["likelihood"]["pred"]
    assert first == {**own, "class_axis": -1}


def test_a_flat_output_with_a_wrong_mask_has_its_own_message_alone() -> None:
    text = message(
        nn.Sequential(nn.Flatten(), nn.Linear(4 * T, 3)),
        likelihood={"name": "categorical", "weights": "mask"},
    )
    assert "names an argument" in text
    assert "this line" not in text


def test_a_function_that_cannot_be_written_gives_no_line() -> None:
    head = kfactk.head(lambda out: out["pred"], "categorical")
    text = message(Two(FORMS["mapping"]), likelihood=[head])
    assert "class_axis=-1" in text
    assert "this line" not in text
