"""Extension of griffe, which reads sources for the reference: our attrs classes and sections."""

from __future__ import annotations

import importlib
import re
from typing import Any

import attrs
import griffe


class Docstrings(griffe.Extension):
    """Give attrs classes their options with types and defaults, and show doctests as code.

    Our docstrings have a section `Example:`; griffe expects `Examples:`.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change one module, class, function or attribute, before griffe shows it."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
        found = _imported(obj) if obj.is_class else None
        if found is not None and attrs.has(found):
            fields = [field for field in attrs.fields(found) if field.init]
            initialiser = griffe.Function(
                "__init__", parameters=griffe.Parameters(*map(_parameter, fields))
            )
            obj.set_member("__init__", initialiser)


def _imported(obj: griffe.Object) -> type[Any] | None:
    """Return the class; `None` for one inside a function, or of a package that is not installed."""
    try:
        found = getattr(importlib.import_module(obj.module.path), obj.name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) else None


def _parameter(field: attrs.Attribute[Any]) -> griffe.Parameter:
    kind = (
        griffe.ParameterKind.keyword_only
        if field.kw_only
        else griffe.ParameterKind.positional_or_keyword
    )
    default = (
        None
        if field.default is attrs.NOTHING
        else "..."
        if isinstance(field.default, attrs.Factory)
        else repr(field.default)
    )
    annotation = (
        field.type if isinstance(field.type, str) or field.type is None else field.type.__name__
    )
    return griffe.Parameter(field.alias, annotation=annotation, kind=kind, default=default)
