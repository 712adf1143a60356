"""Inspection reads the options, documentation and missing members of stages."""

import dataclasses
import functools
import json
from typing import Any, ClassVar

import attrs
import pytest

from kfactk import Basis, Clip, Curvature, Tracker
from kfactk.registry.hookspecs import STAGE_HOOKS
from kfactk.registry.inspection import (
    COMPUTED,
    PROTOCOLS,
    REQUIRED,
    OptionInfo,
    StageInfo,
    documentation,
    missing_members,
    options_of,
    paper,
    summary,
    undefined_members,
)


@attrs.frozen
class Attrs:
    """One line,
    and another.

    Args:
        rate: How fast,
            in steps.
        _hidden: Not this way.
        hidden (int): Kept apart.

    Raises:
        OptionError: Never.

    References:
        - Ahead of its time.
        - Kingma & Ba 2015, arXiv:1412.6980,
          algorithm 1.
        - Later et al. 2020.
    """

    rate: float
    _hidden: int = 3
    names: list[str] = attrs.field(factory=list)
    total: float = attrs.Factory(lambda self: self.rate * 2, takes_self=True)
    internal: int = attrs.field(default=0, init=False)


@dataclasses.dataclass
class Data:
    rate: float = 1.0
    names: list[str] = dataclasses.field(default_factory=list)


class Plain:
    def __init__(self, rate: float, *, mode: str = "a") -> None: ...


def test_options_of_reads_an_attrs_class() -> None:
    options = options_of(Attrs)
    assert options.known == (
        OptionInfo("rate", REQUIRED, "float", "How fast, in steps.", "rate"),
        OptionInfo("hidden", 3, "int", "Kept apart.", "_hidden"),
        OptionInfo("names", [], "list[str]", "", "names"),
        OptionInfo("total", COMPUTED, "float", "", "total"),
    )
    assert not options.open


def test_options_of_reads_a_dataclass_and_a_plain_class() -> None:
    assert [(o.name, o.default) for o in options_of(Data).known] == [("rate", 1.0), ("names", [])]
    assert [(o.name, o.default, o.annotation) for o in options_of(Plain).known] == [
        ("rate", REQUIRED, "float"),
        ("mode", "a", "str"),
    ]


def test_options_of_reads_functions_and_partials() -> None:
    def make(a: int, /, b: "str", *rest: int, c: float = 1.0, **more: Any) -> None: ...

    options = options_of(make)
    assert [(o.name, o.annotation) for o in options.known] == [("b", "str"), ("c", "float")]
    assert options.open
    assert [(o.name, o.default) for o in options_of(functools.partial(Plain, rate=2.0)).known] == [
        ("rate", 2.0),
        ("mode", "a"),
    ]


def test_options_of_a_partial_keeps_computed_defaults() -> None:
    bound = functools.partial(Attrs, rate=1.0, names=["a"])
    assert [(o.name, o.default) for o in options_of(bound).known] == [
        ("rate", 1.0),
        ("hidden", 3),
        ("names", ["a"]),
        ("total", COMPUTED),
    ]
    assert [o.default for o in options_of(functools.partial(Data, rate=2.0)).known] == [2.0, []]


def test_options_of_an_unreadable_signature_are_open() -> None:
    assert options_of(type) == options_of(iter)
    assert options_of(iter).open


def test_documentation_gives_summary_paper_and_options() -> None:
    doc = documentation(functools.partial(functools.partial(Attrs, rate=1.0)))
    assert summary(doc) == "One line,"
    assert paper(doc) == "Kingma & Ba 2015, arXiv:1412.6980, algorithm 1"


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        ("    https://example.org: the manual.", ""),
        ("    [1] Some One, 2019, A title.", "Some One, 2019, A title"),
        ("    See doi:10.1000/182", "See doi:10.1000/182"),
        ("    First et al., A thing; Second 2001.", "First et al., A thing; Second 2001"),
        ("    First 1999, A;\n    Second 2001, B.", "First 1999, A"),
        ("", ""),
    ],
)
def test_paper_is_the_first_work_of_the_references(references: str, expected: str) -> None:
    assert (
        paper(f"Line.\n\nReferences:\n{references}\n\nNotes:\n    Wrong et al. 2022.") == expected
    )


def test_documentation_may_be_missing() -> None:
    assert (documentation(Plain), paper(""), summary("")) == ("", "", "")


def test_protocols_have_members_for_every_family() -> None:
    assert PROTOCOLS.keys() == STAGE_HOOKS.keys()
    assert all(missing_members(family, object()) for family in PROTOCOLS)


def test_missing_members_names_what_a_stage_lacks() -> None:
    class Half:
        requires: ClassVar[frozenset[str]] = frozenset()

        @property
        def moments_from(self) -> str | None:
            raise RuntimeError("must not be run")

        def decompose(self) -> None: ...

    assert missing_members("basis", Half()) == ["operator"]
    assert missing_members("curvature", object()) == [
        "provides",
        "unsupported",
        "matrix",
        "tensors",
        "blank",
        "samples",
        "gradient_factors",
    ]


def test_missing_members_counts_those_inherited_from_the_protocol() -> None:
    class Stub(Clip):
        pass

    class StubProperty(Tracker):
        def start(self, recipe: Any) -> None: ...
        def record(self, step: int, metrics: Any) -> None: ...
        def flush(self) -> None: ...
        def close(self) -> None: ...

    assert missing_members("clip", Stub()) == ["clip"]
    assert missing_members("tracker", StubProperty()) == ["every"]


def test_missing_members_leaves_out_those_of_a_base_class() -> None:
    class Enough(Basis):
        requires = frozenset({"A"})
        decompose = operator = lambda self, *given: {}

    class Nameless(Curvature):
        unsupported = matrix = tensors = blank = samples = gradient_factors = lambda self: None

    assert missing_members("basis", Enough()) == []
    assert undefined_members(Nameless) == ["provides"]


def test_undefined_members_names_abstract_ones() -> None:
    class Half(Basis):
        requires = frozenset({"A"})

    assert undefined_members(Half) == ["decompose", "operator"]
    assert undefined_members(functools.partial(functools.partial(Half))) == [
        "decompose",
        "operator",
    ]
    assert undefined_members(Attrs) == undefined_members(print) == []


def test_missing_members_accepts_what_a_proxy_forwards() -> None:
    class Proxy:
        def __getattr__(self, name: str) -> Any:
            if name == "clip":
                return lambda pairs, dot: None
            raise AttributeError(name)

    assert missing_members("clip", Proxy()) == []
    assert missing_members("update", Proxy()) == ["make"]


def test_infos_are_json_safe() -> None:
    options = (
        OptionInfo("a", REQUIRED),
        OptionInfo("b", (1, 2)),
        OptionInfo("c", lambda: 0),
        OptionInfo("d", len),
    )
    info = StageInfo("clip", "x", options, "p", None, None, "", "")
    written = json.loads(json.dumps(info.to_dict()))
    assert written["family"] == "clip"
    a, b, c, d = written["options"]
    assert (a["required"], a["default"]) == (True, None)
    assert (b["required"], b["default"]) == (False, [1, 2])
    assert "lambda" in c["default"]
    assert d["default"] == {"callable": "builtins:len"}
