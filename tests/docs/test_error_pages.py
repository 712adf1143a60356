"""docs/errors.md is what the generator writes, and every message names a next step."""

import re

import pytest

from docs.error_pages import PAGE, Message, Program, all_messages, error_classes, page

# One worker, so that sources are read once.
pytestmark = pytest.mark.xdist_group("error pages")

IMPERATIVES = """
add ask begin bind build call change check choose correct create define derive divide drop end fill
fix freeze give have install keep leave let load look lower make mark measure move name override
pass pick put raise refill register remove rename replace report restart return run save say see
set shard shut start take try turn uninstall unregister use wait wrap write
"""
NEXT_STEP = re.compile(
    rf"\bmust\b|(^|[.:;?(,…>] |\bor |\band |\belse |\bthen )({'|'.join(IMPERATIVES.split())})\b",
    re.IGNORECASE,
)
NESTED = re.compile(r"<(error|fault)>$")
"""The end of a message that goes on with another error, which names the next step."""
SOURCE = """
from kfactk.errors import OptionError
LIMIT = "at most"

def check(name, value, where):
    reason = "it is far too large" if value else _reason(value)
    size = len(value)
    raise OptionError(
        f"{name!r} cannot work {where}: {reason}. Give {LIMIT} "
        f"{size} or {len(name)}."
    )

def _reason(value):
    return f"{value._key} is not what was asked for"

def caller(value):
    check(value, value, where="in the second of two places")
"""


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run: python docs/error_pages.py"


@pytest.mark.parametrize("kind", error_classes())
def test_every_class_of_error_has_a_section(kind: str) -> None:
    assert f"\n## `{kind}`\n" in PAGE.read_text()
    assert any(message.kind == kind for message in all_messages())


def test_every_message_names_a_next_step() -> None:
    """In the imperative at the beginning of a clause, or by what a value must be."""
    without = [
        f"{message.module}: {message.text}"
        for message in all_messages()
        if not NESTED.search(message.text)
        and not any(map(NEXT_STEP.search, (message.text, *message.parts)))
    ]
    assert not without, "say in the message what to do next:\n" + "\n".join(without)


def test_messages_are_found_with_what_is_filled_in() -> None:
    assert list(Program({"kfactk.a": SOURCE}).messages({"OptionError"})) == [
        Message(
            "OptionError",
            "kfactk.a",
            "<name> cannot work in the second of two places: <reason>. Give at most <size> or ….",
            ("it is far too large", "<key> is not what was asked for"),
        )
    ]
