"""Read a stage's factory: its options, its documentation, and whether it makes a stage."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
import weakref
from collections.abc import Callable
from typing import Any

import attrs

from kfactk import stages
from kfactk.errors import OptionError
from kfactk.registry.serialization import to_json

REQUIRED: Any = attrs.NOTHING
"""Default of an option that has none."""


class _Computed:
    def __repr__(self) -> str:
        return "<computed from the other options>"


COMPUTED: Any = _Computed()
"""Default of an option whose default depends on the others."""

PROTOCOLS: dict[str, type[Any]] = {
    "curvature": stages.Curvature,
    "basis": stages.Basis,
    "fisher": stages.Fisher,
    "likelihood": stages.Likelihood,
    "link": stages.Link,
    "clip": stages.Clip,
    "update": stages.Update,
    "controller": stages.Controller,
    "pace": stages.Pace,
    "placement": stages.Placement,
    "tracker": stages.Tracker,
}
"""Stage family to the base class or protocol of its stages."""
BASE_CLASSES = {"curvature": stages.Curvature, "basis": stages.Basis, "link": stages.Link}
"""Families whose stages derive from their base class. Any object may implement a protocol."""


@attrs.frozen
class OptionInfo:
    """One option of a stage.

    Args:
        name: The keyword argument.
        default: Its default, or `REQUIRED`, or `COMPUTED`.
        annotation: Its type, as text.
        doc: What its docstring says.
        attribute: Where the made stage keeps the value.
    """

    name: str
    default: Any
    annotation: str = ""
    doc: str = ""
    attribute: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-safe mapping; a default that JSON cannot hold is its `repr`."""
        required = self.default is REQUIRED
        try:
            default = None if required else to_json(self.default)
        except OptionError:
            default = repr(self.default)
        return {
            "name": self.name,
            "required": required,
            "default": default,
            "annotation": self.annotation,
            "doc": self.doc,
        }


@attrs.frozen
class StageInfo:
    """One stage as listed.

    Args:
        family: Its family, such as "basis".
        name: Its name within the family.
        options: Its options; empty for a blocked one, which is not imported.
        plugin: The plugin that provides it, by entry-point name.
        distribution: The distribution the plugin came with; `None` for one registered in this
            process.
        version: Version of that distribution.
        paper: First work its References name, or "".
        summary: First line of its documentation, or "".
        conflict: Whether another plugin claims the same name, so that it cannot be used by name.
        blocked: What blocks it, or "".
    """

    family: str
    name: str
    options: tuple[OptionInfo, ...]
    plugin: str
    distribution: str | None
    version: str | None
    paper: str
    summary: str
    conflict: bool = False
    blocked: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe nested mappings."""
        return attrs.asdict(self, recurse=False) | {
            "options": [option.to_dict() for option in self.options]
        }


@attrs.frozen
class Options:
    """The options a factory takes.

    Args:
        known: The options it names.
        open: Whether it takes others too (`**kwargs`, or a signature that cannot be read).
    """

    known: tuple[OptionInfo, ...]
    open: bool

    def names(self) -> list[str]:
        """Return the names of the known options."""
        return [option.name for option in self.known]


def options_of(factory: Callable[..., Any]) -> Options:
    """Return the options of a stage's factory.

    They are the fields of an attrs class or dataclass, or the arguments of any other callable.

    Example:
        >>> def constant(value: float, scale: float = 2.0): ...
        >>> [(o.name, o.annotation, o.default) for o in options_of(constant).known]
        [('value', 'float', NOTHING), ('scale', 'float', 2.0)]
    """
    try:
        found = _READ.get(factory)
    except TypeError:  # without a hash, or without weak references
        return _read(factory)
    if found is None:
        found = _READ[factory] = _read(factory)
    return found


_READ: weakref.WeakKeyDictionary[Callable[..., Any], Options] = weakref.WeakKeyDictionary()
"""Options of the factories that were read: an optimizer asks for them in each step."""


def _read(factory: Callable[..., Any]) -> Options:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return Options((), open=True)
    docs = _argument_docs(documentation(factory))
    fields = _fields(factory)
    known = []
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            annotation = (
                ""
                if parameter.annotation is parameter.empty
                else inspect.formatannotation(parameter.annotation)
            )
            default = REQUIRED if parameter.default is parameter.empty else parameter.default
            plain = OptionInfo(
                parameter.name,
                default,
                annotation.strip("'"),
                docs.get(parameter.name, ""),
                parameter.name,
            )
            better = dict(fields.get(parameter.name, {}))
            if not _computed(parameter.default):
                better.pop("default", None)
            known.append(attrs.evolve(plain, **better))
    return Options(
        tuple(known), open=any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    )


def documentation(factory: Callable[..., Any]) -> str:
    """Return the docstring of a factory, cleaned; for a partial, that of what it calls."""
    return inspect.cleandoc(getattr(_unbound(factory), "__doc__", None) or "")


def summary(doc: str) -> str:
    """Return the first line of a docstring."""
    return doc.partition("\n")[0].strip()


def paper(doc: str) -> str:
    """Return the first work that the References section of a docstring names, or "".

    Example:
        >>> lines = "One line.", "", "References:", "    George et al. 2018, arXiv:1806.03884."
        >>> paper(chr(10).join(lines))
        'George et al. 2018, arXiv:1806.03884'
    """
    entries = [""]
    for line in _section(doc, "References"):
        text = re.sub(r"^\s*(?:[-*]|\[\w+\])\s+", "", line).strip()
        entries[-1] = f"{entries[-1]} {text}".strip()
        if not text or text.endswith((".", ";")):
            entries.append("")
    works = (
        entry.rstrip(".;")
        for entry in entries
        if re.search(r"arxiv|doi|et al\.|\b(?:19|20)\d\d\b", entry, re.IGNORECASE)
    )
    return next(works, "")


def missing_members(family: str, stage: object) -> list[str]:
    """Return the members that a stage of the family must define and an object does not.

    Members of a base class that have a default are not among them.

    Example:
        >>> missing_members("clip", object()), missing_members("basis", object())
        (['clip'], ['requires', 'decompose', 'operator'])
    """
    absent = object()
    missing = []
    for name, stub in _demanded(PROTOCOLS[family]).items():
        found = inspect.getattr_static(stage, name, absent)
        if found is stub or (found is absent and not hasattr(stage, name)):
            missing.append(name)
    return missing


def undefined_members(factory: Callable[..., Any]) -> list[str]:
    """Return the abstract members that a class leaves undefined, so that it makes no object."""
    factory = _unbound(factory)
    abstract: frozenset[str] = getattr(factory, "__abstractmethods__", frozenset())
    return sorted(abstract) if inspect.isabstract(factory) else []


def unfit_factory(family: str, factory: Callable[..., Any]) -> str:
    """Return why a class or function cannot make a stage of the family, or "".

    Nothing is called. A function is judged by the class that it says it returns.
    """
    made: Any = _unbound(factory)
    if not inspect.isclass(made):
        try:
            made = typing.get_type_hints(made).get("return")
        except (NameError, TypeError, AttributeError):
            made = None
        if not inspect.isclass(made):
            return f"does not say that it returns a {family}"
    base = BASE_CLASSES.get(family)
    if base is not None:
        return "" if issubclass(made, base) else f"does not derive from kfactk.{base.__name__}"
    methods = (
        name
        for name, member in _demanded(PROTOCOLS[family]).items()
        if inspect.isfunction(member) and not callable(getattr(made, name, None))
    )
    missing = ", ".join(methods)
    return f"has no {missing}" if missing else ""


def _demanded(protocol: type[Any]) -> dict[str, object]:
    """Return the members that a stage must define: of a base class those without a default."""
    annotated = dict.fromkeys(inspect.get_annotations(protocol), object())
    members = {
        name: member
        for name, member in (annotated | dict(vars(protocol))).items()
        if not name.startswith("_")
    }
    if protocol not in BASE_CLASSES.values():
        return members
    return {
        name: member
        for name, member in members.items()
        if name in protocol.__abstractmethods__ or name not in vars(protocol)
    }


def _unbound(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a partial, however nested, calls in the end."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    return factory


def _computed(default: Any) -> bool:
    """Return whether a signature's default only stands for one that the class computes."""
    return default is attrs.NOTHING or type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS"


def _fields(factory: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    """Return what attrs and dataclasses know better than the signature.

    That is computed defaults, types, and where a value is kept.
    """
    found: dict[str, dict[str, Any]] = {}
    factory = _unbound(factory)
    if inspect.isclass(factory) and attrs.has(factory):
        for field in attrs.fields(factory):
            better = found[field.alias or field.name] = {
                "attribute": field.name,
                "annotation": _type_text(field.type),
            }
            if isinstance(field.default, attrs.Factory):  # type: ignore[arg-type]
                better["default"] = (
                    COMPUTED if field.default.takes_self else field.default.factory()
                )
    elif inspect.isclass(factory) and dataclasses.is_dataclass(factory):
        for entry in dataclasses.fields(factory):
            if entry.default_factory is not dataclasses.MISSING:
                found[entry.name] = {"default": entry.default_factory()}
    return found


def _type_text(annotation: Any) -> str:
    if annotation is None:
        return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _section(doc: str, title: str) -> list[str]:
    lines = doc.splitlines()
    if f"{title}:" not in lines:
        return []
    body = lines[lines.index(f"{title}:") + 1 :]
    end = next(
        (n for n, line in enumerate(body) if line.strip() and not line.startswith(" ")), len(body)
    )
    return inspect.cleandoc("\n" + "\n".join(body[:end])).splitlines()


def _argument_docs(doc: str) -> dict[str, str]:
    docs: dict[str, str] = {}
    name = ""
    for line in _section(doc, "Args"):
        head = re.match(r"\*{0,2}(\w+)(?: \(.*?\))?:\s*(.*)", line)
        if head:
            name = head[1]
            docs[name] = head[2]
        elif name and line.strip():
            docs[name] = f"{docs[name]} {line.strip()}".strip()
    return docs
