import pytest

from experiments.errors import ExperimentError, from_system, near_names, printable, system_reason


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
