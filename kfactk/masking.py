"""Mask what should stay secret, in text that people and files get to see.

Credentials come in addresses of stores, as in `postgresql://user:password@host/db`. They may leave
the process only for the store itself and in `Recipe.to_dict`, which must be able to load again.
Everything else that shows an address masks it: errors, warnings, `repr`, recorded parameters,
reports.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
SECRET = (
    r"password|passwd|passphrase|pwd|secret|token|api[_-]?key|access[_-]?key(?:[_-]?id)?"
    r"|private[_-]?key|credentials?|authorization|signature|sig"
)
_USER = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)"
    r"(?:[^\s/?#@'\"]*:(?!\d+/)[^\s'\"]*|[^\s/?#'\"]*)@",  # user:password, or a token alone
    re.IGNORECASE,
)
_FIELD = re.compile(rf"(?P<name>[?&;][\w.%-]*(?:{SECRET})=)[^\s&;#'\"]*", re.IGNORECASE)
_NAME = re.compile(rf"(?:.*[_.-])?(?:{SECRET})", re.IGNORECASE)


def mask(text: str) -> str:
    """Return text with `***` for the credentials in its addresses.

    User, password and token before the host are masked, and fields such as `?password=`.

    Example:
        >>> mask("cannot reach http://me:token@host:5000/a, nor sqlite:///runs/mlflow.db")
        'cannot reach http://***@host:5000/a, nor sqlite:///runs/mlflow.db'
        >>> mask("postgresql://host/db?user=me&password=hunter2&sslmode=require")
        'postgresql://host/db?user=me&password=***&sslmode=require'
    """
    return _FIELD.sub(rf"\g<name>{MASK}", _USER.sub(rf"\g<scheme>{MASK}@", text))


def mask_settings(value: Any, name: str = "") -> Any:
    """Return nested settings with masked text; text under a name such as `token` is masked whole.

    Args:
        value: Mappings, sequences and plain values.
        name: The name of the setting.

    Example:
        >>> mask_settings({"uri": "http://me:token@host", "api_key": "abc", "lr": 0.1})
        {'uri': 'http://***@host', 'api_key': '***', 'lr': 0.1}
    """
    if isinstance(value, Mapping):
        return {key: mask_settings(inner, str(key)) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)([mask_settings(inner, name) for inner in value])
    if isinstance(value, str):
        return MASK if value and _NAME.fullmatch(name) else mask(value)
    return value
