"""Option values read back from JSON unchanged; values without a JSON form are refused."""

import enum
import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from kfactk import OptionError
from kfactk.registry.serialization import callable_path, explain, from_json, import_path, to_json

HERE = __name__


def schedule(step: int) -> float:
    return 1.0 / (1 + step)


class Outer:
    class Inner:
        pass

    @staticmethod
    def still(step: int) -> float:
        return 0.5

    @classmethod
    def made(cls) -> "Outer":
        return cls()

    def method(self) -> None:
        pass


class Level(enum.IntEnum):
    LOW = 1


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
functions = st.sampled_from(
    [
        schedule,
        Outer,
        Outer.Inner,
        Outer.still,
        math.sqrt,
        torch.optim.Adagrad,
        torch.nn.functional.relu,
        len,
    ]
)
torch_things = st.sampled_from(
    [torch.float64, torch.bfloat16, torch.device("cpu"), torch.device("cuda", 1)]
)
keys = st.text().filter(lambda key: key not in {"callable", "dtype", "device", "float"})
values = st.recursive(
    plain | functions | torch_things,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@given(value=values)
def test_from_json_inverts_to_json_through_strict_json(value: Any) -> None:
    text = json.dumps(to_json(value), allow_nan=False)
    back = from_json(json.loads(text))
    assert back == value
    assert type(back) is type(value)


@given(value=values)
def test_from_json_keeps_python_values(value: Any) -> None:
    assert from_json(value) == value


@given(text=st.text() | st.sampled_from(["math:sqrt", "torch.float64", "inf", "callable"]))
def test_to_json_keeps_strings(text: str) -> None:
    assert to_json(text) == text
    assert from_json(text) == text


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ((1, (2.0, "x")), [1, [2.0, "x"]]),
        (frozenset({"b", "a"}), ["a", "b"]),
        (Path("runs") / "a", "runs/a"),
        (math.inf, {"float": "inf"}),
        (-math.inf, {"float": "-inf"}),
        (Level.LOW, 1),
        (schedule, {"callable": f"{HERE}:schedule"}),
        (torch.float64, {"dtype": "float64"}),
    ],
)
def test_to_json_gives_tagged_forms(value: Any, form: Any) -> None:
    assert to_json(value) == form
    assert json.dumps(to_json(value), allow_nan=False)


def test_callable_path_prefers_the_public_name() -> None:
    assert torch.optim.Adagrad.__module__ == "torch.optim.adagrad"
    assert callable_path(torch.optim.Adagrad) == "torch.optim:Adagrad"
    assert callable_path(torch.optim.lr_scheduler.StepLR) == "torch.optim.lr_scheduler:StepLR"


@pytest.mark.parametrize(
    "function",
    [
        schedule,
        Outer,
        Outer.Inner,
        Outer.still,
        Outer.made,
        math.sqrt,
        len,
        torch.nn.functional.relu,
    ],
)
def test_import_path_inverts_callable_path(function: Any) -> None:
    assert import_path(callable_path(function)) == function


def _local() -> Any:
    def inner(step: int) -> float:
        return 0.0

    return inner


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda step: 0.1, "it is a lambda"),
        (_local(), "inside a function"),
        (functools.partial(schedule, 3), "functools.partial"),
        (Outer().method, "bound to an object"),
        (Outer(), "not a function or class"),
        (3, "not a function or class"),
    ],
)
def test_callable_path_refuses_objects_without_a_path(function: Any, why: str) -> None:
    with pytest.raises(OptionError, match=why) as caught:
        callable_path(function)
    assert "top level of an importable module" in str(caught.value)


def test_callable_path_refuses_a_replaced_function(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = schedule
    monkeypatch.setattr(sys.modules[HERE], "schedule", _local())
    with pytest.raises(OptionError, match="leads elsewhere"):
        callable_path(stale)


@pytest.mark.parametrize(
    "value",
    [
        lambda step: 1.0,
        torch.ones(2),
        object(),
        math.nan,
        {1: 2},
        {"callable": "x"},
        [[torch.ones(1)]],
    ],
)
def test_to_json_names_the_option_without_a_json_form(value: Any) -> None:
    with pytest.raises(OptionError, match="option 'rate' of clip 'mine'"):
        to_json(value, "option 'rate' of clip 'mine'")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("torch.optim.Adagrad", "colon"),
        ("a b:c", "colon"),
        (":x", "colon"),
        ("math:", "colon"),
        ("no_such_package.part:x", "No module named 'no_such_package'"),
        ("torch.optim:Adagradd", "Did you mean 'Adagrad'"),
        ("__main__:no_such_thing", "in the script that wrote the path"),
    ],
)
def test_import_path_refuses_wrong_paths(path: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        import_path(path)
    assert path in str(caught.value)


def test_import_path_chains_the_error_of_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module_that_exits.py").write_text("raise SystemExit('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OptionError, match="SystemExit: no licence") as caught:
        import_path("module_that_exits:x")
    assert isinstance(caught.value.__cause__, SystemExit)


@pytest.mark.parametrize(
    "form",
    [
        {"dtype": "float65"},
        {"dtype": "nn"},
        {"device": "toaster"},
        {"float": "one"},
        {"callable": "math:sqr"},
    ],
)
def test_from_json_refuses_malformed_tags(form: dict[str, str]) -> None:
    with pytest.raises(OptionError):
        from_json([form])


def test_explain_gives_one_line() -> None:
    assert explain(ValueError("a\n  b")) == "ValueError: a b"
    assert explain(RuntimeError()) == "RuntimeError"
