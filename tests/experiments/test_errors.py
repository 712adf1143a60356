import math
from pathlib import Path

import pytest

from experiments.errors import (
    ExperimentError,
    check_options,
    from_system,
    named,
    near_names,
    printable,
    system_reason,
)


def test_errors_are_one_printable_line_without_credentials():
    error = str(ExperimentError("a\nb  c\x1b[2J\udcff http://me:hunter2@host/ é"))
    assert error == "a b c\\x1b[2J\\udcff http://***@host/ é"


@pytest.mark.parametrize("text", ["plain", "é 漢 ±", ""])
def test_printable_text_stays(text: str):
    assert printable(text) == text


def test_errors_of_the_system_name_the_file():
    error = from_system(OSError(28, "No space left on device", "/a/b"))
    assert str(error).startswith("/a/b: No space left on device.")
    assert "--resume" in str(error)
    assert "odd" in str(from_system(OSError("odd")))


def test_reasons_are_short_and_never_empty():
    assert system_reason(OSError(2, "not there")) == "not there"
    assert system_reason(RuntimeError("first\nsecond")) == "first"
    assert system_reason(ValueError()) == "ValueError"
    assert len(system_reason(ValueError("x" * 1000))) == 300


def test_near_names_are_suggested():
    assert near_names("sdg", ["sgd", "adam"]) == " Did you mean 'sgd'?"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sdg", "kind: there is no 'sdg'. Did you mean 'sgd'? Give one of sgd"),
        ("math:sqrtt", "kind: math:sqrtt cannot be imported (module 'math' has no"),
        ("no_such_module:x", "kind: no_such_module:x cannot be imported (No module named"),
        (":x", "kind: :x cannot be imported"),
        (".:x", "kind: .:x cannot be imported"),
        ("math:pi", "kind: math:pi is no class and no function"),
    ],
)
def test_names_that_lead_nowhere_are_one_line(name: str, words: str):
    with pytest.raises(ExperimentError) as told:
        named("kind", name, {"sgd": 1}, trusted=True)
    assert str(told.value).startswith(words)


def test_names_are_entries_or_import_paths():
    assert named("kind", "sgd", {"sgd": 1}, trusted=False) == 1
    assert named("kind", "math:sqrt", {}, trusted=True) is math.sqrt
    assert named("kind", "pathlib:Path.cwd", {}, trusted=True)() == Path.cwd()
    with pytest.raises(ExperimentError, match=r"kind: to import math:sqrt .*add --trust-config"):
        named("kind", "math:sqrt", {}, trusted=False)


def test_modules_that_fail_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "failing_module_of_tests.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ExperimentError, match=r"cannot be imported \(division by zero\)"):
        named("kind", "failing_module_of_tests:x", {}, trusted=True)


def test_options_are_checked_by_name():
    def function(model, lr=0.1, *, nesterov=False): ...

    check_options(function, ["lr", "nesterov"], given=["model"])
    check_options(lambda x, **options: x, ["anything"])
    for name, words in (("nestrov", "'nesterov'"), ("model", "Options: lr, nesterov")):
        with pytest.raises(ExperimentError, match=words):
            check_options(function, [name], given=["model"])
