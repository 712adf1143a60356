"""What kfactk says when something is wrong, read from its source: every message, and every phrase that goes into one."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import attrs

from kfactk import errors

ERRORS = {name for name in vars(errors) if name.endswith(("Error", "Warning"))}
HELP = {"help", "description", "prog"}
"""Keyword arguments of the command line's parser: no messages."""
FEWEST_WORDS = 4
"""A string outside of an error is a phrase of a message when it has this many words."""


@attrs.frozen
class Message:
    """A message with `…` for what is filled in.

    Args:
        text: On one line.
        kind: Class of the error, "" when it cannot be read off the place.
        where: File and line.
    """

    text: str
    kind: str
    where: str


def messages(path: Path, *, phrases: bool = True, least: int = FEWEST_WORDS) -> Iterator[Message]:
    """The messages of one file; with `phrases` also the strings of at least so many words that stand outside of an error's call."""
    for message in _messages(ast.parse(path.read_text()), path.name, kind=""):
        if message.kind or (phrases and words(message.text) >= least):
            yield message


def template(node: ast.AST) -> str | None:
    """A string or f-string as one line, `…` for what is filled in; `None` for anything else."""
    match node:
        case ast.Constant(value=str(text)):
            parts = [text]
        case ast.JoinedStr(values=values):
            parts = [
                str(value.value) if isinstance(value, ast.Constant) else "…" for value in values
            ]
        case _:
            return None
    return re.sub("…+", "…", " ".join("".join(parts).split()))


def words(text: str) -> int:
    """How many words of a template are always the same."""
    return sum(any(c.isalpha() for c in word) for word in text.replace("…", " ").split())


def _messages(node: ast.AST, file: str, kind: str) -> Iterator[Message]:
    """`kind` is not empty where `node` is the first argument of an error."""
    text = template(node)
    if text is not None:
        if words(text):
            yield Message(text, kind, f"{file}:{getattr(node, 'lineno', 0)}")
        fills = (
            [value.value for value in node.values if isinstance(value, ast.FormattedValue)]
            if isinstance(node, ast.JoinedStr)
            else []
        )
        for fill in fills:
            yield from _messages(fill, file, kind="")
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue  # a docstring
        if isinstance(child, ast.keyword) and child.arg in HELP:
            continue
        yield from _messages(child, file, kind=_kind(node) if child in _told(node) else "")


def _kind(call: ast.AST) -> str:
    """The class of error that a call makes, "" for other calls."""
    if not isinstance(call, ast.Call):
        return ""
    name = ast.unparse(call.func).split(".")[-1]
    if name == "warn":
        return ast.unparse(call.args[1]).split(".")[-1] if len(call.args) > 1 else "KfactkWarning"
    return name if name in ERRORS else ""


def _told(node: ast.AST) -> list[ast.AST]:
    return list(node.args[:1]) if isinstance(node, ast.Call) and _kind(node) else []
