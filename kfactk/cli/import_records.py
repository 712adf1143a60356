"""`python -m kfactk import-records`: send the records that a tracker could not send."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kfactk.errors import OptionError, near_names
from kfactk.registry.registry import Registry

URI = "tracking_uri"
"""The option of a tracker that names its store."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="the file that a warning of the tracker named")
    add("--tracking-uri", metavar="URI", help="the store; by default the one that is set")
    add("--tracker", metavar="NAME", help="whose records; needed if several trackers import")


def run(plugins: Registry, arguments: argparse.Namespace) -> str:
    """Run the command, and return its output.

    Raises:
        OptionError: No tracker can import the file.
    """
    importers = dict(_importers(plugins, arguments.tracking_uri))
    name = arguments.tracker
    if name is None and len(importers) == 1:
        (name,) = importers
    if name not in importers:
        known = ", ".join(importers) or "none"
        what = "" if name is None else f", and {name!r} is none of them"
        raise OptionError(
            f"{len(importers)} installed trackers import records ({known}){what}."
            f"{near_names(name or '', importers)} Give the name of one as --tracker; see `python "
            "-m kfactk plugins` for what is installed, and what failed."
        )
    return str(importers[name].import_records(arguments.file))


def _importers(plugins: Registry, uri: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the trackers that have the option `tracking_uri` and the method `import_records`."""
    for info in plugins.stages("tracker"):
        if not (info.blocked or info.conflict) and URI in [option.name for option in info.options]:
            options = {} if uri is None else {URI: uri}
            tracker = plugins.resolve("tracker", {"name": info.name, **options})
            if hasattr(tracker, "import_records"):
                yield info.name, tracker
