"""Write `docs/errors.md`: every message that kfactk raises or warns with, read from the source.

    python docs/error_pages.py

A message stands under the class of its error and the module that raises it. `<name>` stands for a
value that is filled in, `…` for a computed one. Where what is filled in is itself text of the
source, the alternatives follow the message.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"
PACKAGES = {"kfactk": ROOT / "kfactk", "kfactk_stages": ROOT / "plugins" / "kfactk_stages"}
LEAST_WORDS = 3
"""A text that is filled in is shown from this many constant words on."""
DEPTH = 8
"""How many names and calls are followed to a text."""
HEAD = """\
# Every message

Each message says what happened and what to do next. Search for a part of yours that does not
change: `<name>` stands for a value that is filled in, `…` for a computed one. Where several texts
can be filled in, they follow the message. [Troubleshooting](troubleshooting.md) has the background,
and trouble without a message.

This page is generated from the source by `python docs/error_pages.py`.
"""
REASONS = """\
## Reasons in the coverage

`print(recipe.coverage(model))` shows these reasons for a layer that is not preconditioned. Such a
layer trains with its plain gradient. To precondition it, change the module as the reason says, or
name another curvature.
"""


@attrs.frozen
class Message:
    """One message.

    Args:
        kind: Class of the error or warning.
        module: Dotted name of the module that holds its text.
        text: On one line, with placeholders.
        parts: Texts that can be filled in, with placeholders.
    """

    kind: str
    module: str
    text: str
    parts: tuple[str, ...] = ()


@attrs.frozen(eq=False)
class Place:
    """An expression, its module, and the functions around it, outermost first."""

    node: ast.AST
    module: Module
    functions: tuple[ast.FunctionDef, ...] = ()

    def at(self, node: ast.AST) -> Place:
        """Return another expression at the same place."""
        return attrs.evolve(self, node=node)

    def sees(self, other: Place) -> bool:
        """Return whether a variable bound at another place has its value here."""
        return other.functions == self.functions[: len(other.functions)]


class Module:
    """One module, with an index of its calls, its functions and what is assigned in it.

    Args:
        name: Its dotted name.
        source: Its text.
    """

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.functions: dict[str, Place] = {}
        self.results: dict[ast.AST, list[Place]] = {}
        self.calls: dict[str, list[Place]] = {}
        self.imported: dict[str, str] = {}
        self.bound: dict[str, list[Place]] = {}
        self._read(ast.parse(source), ())

    def _read(self, node: ast.AST, functions: tuple[ast.FunctionDef, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            self._note(Place(child, self, functions), child)
            inner = isinstance(child, ast.FunctionDef)
            self._read(child, (*functions, child) if inner else functions)

    def _note(self, place: Place, node: ast.AST) -> None:
        match node:
            case ast.FunctionDef():
                self.functions[node.name] = place
            case ast.ImportFrom():
                names = (alias.asname or alias.name for alias in node.names)
                self.imported |= dict.fromkeys(names, node.module or "")
            case ast.Return(value=ast.AST()) | ast.Yield(value=ast.AST()) | ast.YieldFrom():
                self.results.setdefault(place.functions[-1], []).append(place.at(node.value))
            case ast.Assign():
                for target in node.targets:
                    self._bind(place, target, node.value)
            case ast.AugAssign() | ast.NamedExpr() | ast.AnnAssign(value=ast.AST()):
                self._bind(place, node.target, node.value)
            case ast.For() | ast.comprehension():
                self._bind(place, node.target, node.iter)
            case ast.Call():
                self.calls.setdefault(_last(node.func), []).append(place)
                if _last(node.func) in ("append", "extend") and isinstance(
                    node.func, ast.Attribute
                ):
                    self._bind(place, node.func.value, node.args[0])

    def _bind(self, place: Place, target: ast.AST, value: ast.AST | None) -> None:
        for each in target.elts if isinstance(target, ast.Tuple) else [target]:
            if value is not None and _last(each):
                self.bound.setdefault(_key(each), []).append(place.at(value))


class Program:
    """All modules, and the texts that their expressions can be.

    Args:
        sources: Text of each module, by dotted name.
    """

    def __init__(self, sources: dict[str, str]) -> None:
        self.modules = {name: Module(name, source) for name, source in sources.items()}

    def texts(self, place: Place, depth: int = 0) -> Iterator[Place]:
        """Yield the strings and f-strings that an expression can be, or can be joined of."""
        if isinstance(place.node, ast.JoinedStr) or _is_text(place.node):
            yield place
        elif depth < DEPTH:
            for source in self._sources(place):
                yield from self.texts(source, depth + 1)

    def _sources(self, place: Place) -> Iterable[Place]:
        """Return the expressions that an expression takes its value from."""
        match place.node:
            case ast.IfExp(body=one, orelse=other) | ast.BinOp(left=one, right=other):
                return map(place.at, (one, other))
            case ast.BoolOp(values=several) | ast.Dict(values=several):
                return map(place.at, several)
            case ast.List(elts=several) | ast.Tuple(elts=several) | ast.Set(elts=several):
                return map(place.at, several)
            case ast.Starred(value=one) | ast.NamedExpr(value=one) | ast.Subscript(value=one):
                return [place.at(one)]
            case ast.ListComp(elt=one) | ast.GeneratorExp(elt=one):
                return [place.at(one)]
            case ast.Name(id=name):
                return self._values(place, name)
            case ast.Attribute():
                return place.module.bound.get(_key(place.node), ())
            case ast.Call(func=function, args=arguments):
                return self._called(place, function, arguments)
        return ()

    def _called(
        self, place: Place, function: ast.AST, arguments: Sequence[ast.AST]
    ) -> Iterable[Place]:
        name = _last(function)
        module = self.modules.get(place.module.imported.get(name, ""), place.module)
        if name in module.functions:
            return module.results.get(module.functions[name].node, ())
        owners = [each for each in self.modules.values() if name in each.functions]
        if isinstance(function, ast.Attribute) and len(owners) == 1:  # a method
            return owners[0].results.get(owners[0].functions[name].node, ())
        if name in ("items", "values", "get") and isinstance(function, ast.Attribute):
            return [place.at(function.value)]
        if name in ("join", "filter", "next", "sorted", "list", "str"):
            return map(place.at, arguments)
        return ()

    def _values(self, place: Place, name: str) -> Iterable[Place]:
        """Return what a variable is bound to: in sight, in an imported module, or by callers."""
        seen = [each for each in place.module.bound.get(name, ()) if place.sees(each)]
        if not seen and name in place.module.imported:
            source = self.modules.get(place.module.imported[name])
            seen = [each for each in source.bound.get(name, ()) if source] if source else []
        return seen or self._given(place, name)

    def _given(self, place: Place, name: str) -> Iterator[Place]:
        """Yield what callers give for a parameter of the function around a place."""
        function = place.functions[-1] if place.functions else None
        if function is None:
            return
        parameters = [each.arg for each in (*function.args.args, *function.args.kwonlyargs)]
        if name not in parameters:
            return
        index = parameters.index(name) - (parameters[0] in ("self", "cls"))
        for module in self.modules.values():
            if module is place.module or module.imported.get(function.name) == place.module.name:
                for call in module.calls.get(function.name, ()):
                    assert isinstance(call.node, ast.Call)
                    given = {each.arg: each.value for each in call.node.keywords}
                    value = given.get(name, next(iter(call.node.args[index : index + 1]), None))
                    if value is not None:
                        yield call.at(value)

    def messages(self, kinds: set[str]) -> Iterator[Message]:
        """Yield what the error classes of these names are made with, and what is warned."""
        for module in self.modules.values():
            for call in itertools.chain(*module.calls.values()):
                assert isinstance(call.node, ast.Call)
                for kind in self._kinds(call, call.node, kinds) if call.node.args else ():
                    for text in self.texts(call.at(call.node.args[0])):
                        if words(self.template(text)):
                            shown = self.template(text), self.parts(text)
                            yield Message(kind, text.module.name, *shown)

    def _kinds(self, place: Place, call: ast.Call, kinds: set[str]) -> set[str]:
        """Return the classes of error or warning that a call makes."""
        names = {_last(call.func)}
        if names <= {"warn", "_warn"}:
            return {_last(call.args[1])} & kinds if len(call.args) > 1 else {"KfactkWarning"}
        if isinstance(call.func, ast.Name) and not names & kinds:
            bound = [each for each in place.module.bound.get(call.func.id, ()) if place.sees(each)]
            names = {_last(source.node) for each in bound for source in self._sources(each)}
        return names & kinds

    def parts(self, text: Place) -> tuple[str, ...]:
        """Return the texts that can be filled into a message."""
        found: dict[str, None] = {}
        for fill in ast.walk(text.node):
            if isinstance(fill, ast.FormattedValue) and not self._constant(text.at(fill.value)):
                found |= dict.fromkeys(map(self.template, self.texts(text.at(fill.value))))
        return tuple(part for part in found if words(part) >= LEAST_WORDS)

    def template(self, text: Place) -> str:
        """Return a string or f-string on one line, with placeholders."""
        pieces = text.node.values if isinstance(text.node, ast.JoinedStr) else [text.node]
        found = ""
        for piece in pieces:
            if isinstance(piece, ast.FormattedValue):
                value = text.at(piece.value)
                found += self._constant(value) or _placeholder(piece.value)
            else:
                found += str(getattr(piece, "value", ""))
        return re.sub("…+", "…", " ".join(found.split()))

    def _constant(self, place: Place) -> str:
        """Return the text of a variable that always has the same one, else ""."""
        if not isinstance(place.node, ast.Name) or place.node.id.startswith("__"):
            return ""
        values = [value.node for value in self._values(place, place.node.id)]
        text = values[0] if len(values) == 1 else None
        return str(text.value) if isinstance(text, ast.Constant) and _is_text(text) else ""

    def reasons(self) -> Iterator[Message]:
        """Yield the reasons for which curvatures leave a module alone."""
        for module in self.modules.values():
            if "unsupported" in module.functions and module.name.startswith("kfactk_stages"):
                for result in module.results.get(module.functions["unsupported"].node, ()):
                    for text in self.texts(result):
                        yield Message("", text.module.name, self.template(text))


def _placeholder(value: ast.AST) -> str:
    """Return a placeholder for a value that is filled in.

    Example:
        >>> code = "self._name", "type(value).__name__", "len(names)"
        >>> [_placeholder(ast.parse(each, mode="eval").body) for each in code]
        ['<name>', '<type>', '…']
    """
    name = _last(value)
    if name in ("__name__", "__qualname__"):
        return "<type>"
    return f"<{name.strip('_')}>" if name else "…"


def words(text: str) -> int:
    """Return how many words of a template are constant.

    Example:
        >>> words("layer <name> has … rows")
        3
    """
    constant = re.sub(r"<\w+>|…", " ", text)
    return sum(any(letter.isalpha() for letter in word) for word in constant.split())


def _last(node: ast.AST) -> str:
    """Return the last part of a dotted name, "" for other expressions."""
    return str(getattr(node, "attr", getattr(node, "id", "")))


def _key(node: ast.AST) -> str:
    """Return under which key what is bound to a name or an attribute is kept."""
    return f".{node.attr}" if isinstance(node, ast.Attribute) else _last(node)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@functools.cache
def program() -> Program:
    """Return the modules of both packages."""
    sources = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            sources[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return Program(sources)


def error_classes() -> dict[str, str]:
    """Return the documentation of each class of error, the root last."""
    from kfactk import errors

    kinds = {
        name: inspect.getdoc(value) or ""
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    return dict(sorted(kinds.items(), key=lambda item: (item[0] == "KfactkError", item[0])))


@functools.cache
def all_messages() -> tuple[Message, ...]:
    """Return every message once."""
    return tuple(dict.fromkeys(program().messages(set(error_classes()))))


def page() -> str:
    """Return the text of the page."""
    kinds, found, lines = error_classes(), all_messages(), [HEAD]
    for kind, doc in kinds.items():
        lines += [f"## `{kind}`\n", f"{doc}\n"]
        lines += _by_module([message for message in found if message.kind == kind])
    lines += [REASONS, *_by_module(list(dict.fromkeys(program().reasons())))]
    return "\n".join(lines).rstrip() + "\n"


def _by_module(messages: list[Message]) -> Iterator[str]:
    """Yield lines of the page: for each module a heading and fences."""
    for module in dict.fromkeys(message.module for message in messages):
        mine = [message for message in messages if message.module == module]
        yield f"### {module}\n"
        if plain := [message.text for message in mine if not message.parts]:
            yield _fence(plain)
        for message in (each for each in mine if each.parts):
            yield f"{_fence([message.text])}\nFilled in:\n\n{_fence(message.parts)}"


def _fence(lines: Iterable[str]) -> str:
    return "\n".join(["```message", *lines, "```\n"])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(), encoding="utf-8")
