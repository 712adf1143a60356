"""Fences that the site renders: formulas as MathML, messages, and tables of laws from the code.

Browsers show MathML without a script.
"""

from __future__ import annotations

import html
import re
from typing import Any
from xml.etree import ElementTree

import latex2mathml.converter
from pymdownx.superfences import SuperFencesException

from kfactk import testing

TAG = re.compile(r"\\tag\{(\w+)\}")


def math(source: str, *_: Any, **__: Any) -> str:
    r"""Render a formula in LaTeX; it may be `aligned`, and have an equation number in `\tag{}`.

    Raises:
        SuperFencesException: The converter does not understand a part of it.

    Example:
        >>> math(r"\tau > 0 \tag{3}").endswith("</math><span>(3)</span></div>")
        True
    """
    numbers = TAG.findall(source)
    plain = (
        TAG.sub("", source)
        .replace(r"\begin{aligned}", r"\begin{array}{rl}")
        .replace(r"\end{aligned}", r"\end{array}")
    )
    found = latex2mathml.converter.convert(plain.strip(), display="block").replace(
        "<mtable>", '<mtable displaystyle="true">'
    )
    odd = re.findall(r"<m\w>(\\\w*|&)</m\w>", found)
    if odd:
        raise SuperFencesException(
            f"{', '.join(odd)} is not understood in the formula {source!r}. Write it differently."
        )
    ElementTree.fromstring(found)
    tags = "".join(f"<span>({number})</span>" for number in numbers)
    return f'<div class="math">{found}{tags}</div>'


def laws(source: str, *_: Any, **__: Any) -> str:
    """Render a table of the laws of the named classes: name and sentence.

    Example:
        >>> "never enlarges" in laws("ClipLaws")
        True
    """
    rows = []
    for name in source.split():
        rows += [
            (law.removeprefix("test_").replace("_", " "), sentence)
            for law, sentence in laws_of(name).items()
        ]
    cells = "".join(
        f"<tr><td>{html.escape(law)}</td><td>{_code(sentence)}</td></tr>" for law, sentence in rows
    )
    head = "<thead><tr><th>law</th><th>what it says</th></tr></thead>"
    return f"<table>{head}<tbody>{cells}</tbody></table>"


def message(source: str, *_: Any, **__: Any) -> str:
    """Render messages, one on each line, that wrap at the edge of the page.

    Example:
        >>> message("it is <…>\\nit is not")
        '<pre class="message"><code>it is &lt;…&gt;</code><code>it is not</code></pre>'
    """
    lines = "".join(
        f"<code>{html.escape(line, quote=False)}</code>" for line in source.splitlines()
    )
    return f'<pre class="message">{lines}</pre>'


def laws_of(name: str) -> dict[str, str]:
    """Return the laws of a class of `kfactk.testing`, inherited ones first.

    Keys are names of methods; values are the first paragraphs of their docstrings.
    """
    owner = getattr(testing, name)
    marked = {
        law: getattr(owner, law) for law in dir(owner) if hasattr(getattr(owner, law), "kfactk_law")
    }
    ancestors = [each.__module__ for each in reversed(owner.__mro__)]

    def place(law: str) -> tuple[int, int]:
        written = marked[law].kfactk_law.function
        return ancestors.index(written.__module__), written.__code__.co_firstlineno

    return {
        law: " ".join((marked[law].__doc__ or "").split("\n\n")[0].split())
        for law in sorted(marked, key=place)
    }


def _code(sentence: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(sentence))
