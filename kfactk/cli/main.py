"""The command line, `python -m kfactk`: stages, plugins, new-plugin, plan and import-records."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shlex
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import attrs

from kfactk._version import __version__
from kfactk.cli import import_records as importing, plan as planning
from kfactk.cli.new_plugin import new_plugin
from kfactk.errors import KfactkError
from kfactk.registry.hookspecs import STAGE_HOOKS
from kfactk.registry.inspection import REQUIRED, OptionInfo, StageInfo
from kfactk.registry.loading import PluginInfo
from kfactk.registry.registry import Registry, registry
from kfactk.registry.serialization import callable_path

WIDTH = 100
CONFLICT = "several plugins claim this name, and none is used; the warning tells how to choose"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return the exit code.

    Args:
        argv: Arguments without the name of the program; `None` for those of the process.
    """
    arguments = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda text, *_, **__: print(f"warning: {text}", file=sys.stderr)
        # A plugin that prints on import must not break the JSON output.
        with contextlib.redirect_stdout(sys.stderr):
            plugins = registry()
    try:
        text, code = COMMANDS[arguments.command](plugins, arguments)
    except KfactkError as error:
        print(f"kfactk: {_on_one_line(error)}", file=sys.stderr)
        return 2
    try:
        return code if _print(text) else 1
    except OSError as error:  # such as a full disk
        print(f"kfactk: the output cannot be written: {error.strerror or error}", file=sys.stderr)
        _discard_output()
        return 2


def _on_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.encode("utf-8", "backslashreplace").decode()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help shows all options)\n")


def _parser() -> argparse.ArgumentParser:
    what = "List stages and plugins, start a plugin, or plan a training."
    parser = _Parser(prog="kfactk", description=what)
    parser.add_argument("--version", action="version", version=f"kfactk {__version__}")
    command = parser.add_subparsers(dest="command", required=True).add_parser
    stages = command("stages", help="list stages: options, defaults, plugin, version and paper")
    stages.add_argument("--family", help="one family only, such as basis")
    plugins = command(
        "plugins", help="list plugins: status, stages, errors; exit code 1 if one failed"
    )
    for each in (stages, plugins):
        each.add_argument("--json", action="store_true", help="JSON on standard output")
    new = command("new-plugin", help="write a package with a stage of your own, whose tests pass")
    new.add_argument("name", metavar="NAME", help="the package's name, such as kfactk-diagonal")
    families = f"the stage's family: {', '.join(STAGE_HOOKS)}"
    new.add_argument("--stage", required=True, metavar="FAMILY", help=families)
    where = "where to make the package's folder; by default the current folder"
    new.add_argument("--directory", type=Path, default=Path(), help=where)
    plan = command("plan", help="predict what training takes on many devices, for every placement")
    planning.add_arguments(plan)
    records = command("import-records", help="send records that a tracker could not send")
    importing.add_arguments(records)
    return parser


def _print(text: str) -> bool:
    """Print the text, and return whether the reader is still there."""
    try:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        _discard_output()
        return False
    return True


def _discard_output() -> None:
    """Let what is still buffered not fail at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stages(plugins: Registry, arguments: argparse.Namespace) -> tuple[str, int]:
    infos = plugins.stages(arguments.family)
    if arguments.json:
        return _json([info.to_dict() for info in infos]), 0
    if not infos:
        ours = "`pip install .` in a clone of kfactk installs ours"
        return f"No stage is loaded. `python -m kfactk plugins` says why; {ours}.", 0
    lines = []
    for family, group in itertools.groupby(infos, key=lambda info: info.family):
        members = list(group)
        indent = 4 + max(len(info.name) for info in members)
        lines += [family, *(line for info in members for line in _stage_lines(info, indent)), ""]
    return "\n".join(lines).rstrip(), 0


def _stage_lines(info: StageInfo, indent: int) -> list[str]:
    options = ", ".join(_option_text(option) for option in info.options)
    origin = f"from {_origin(info)} (plugin {info.plugin})"
    rows = [info.summary, f"options: {options or 'none'}", origin]
    if info.paper:
        rows.append(f"paper: {info.paper}")
    if info.conflict:
        rows.append(
            "CONFLICT: several plugins claim this name, and this one is not used; the warning says "
            "how to choose it"
        )
    if info.blocked:
        rows = [f"BLOCKED by {info.blocked}", origin]
    lines = [line for row in rows if row for line in _wrap(row, indent)]
    return [f"  {info.name}".ljust(indent) + lines[0].lstrip(), *lines[1:]]


def _wrap(text: str, indent: int) -> list[str]:
    wrapper = textwrap.TextWrapper(WIDTH, break_long_words=False, break_on_hyphens=False)
    wrapper.initial_indent, wrapper.subsequent_indent = " " * indent, " " * (indent + 2)
    return wrapper.wrap(text)


def _option_text(option: OptionInfo) -> str:
    if option.default is REQUIRED:
        return f"{option.name} (required)"
    if callable(option.default):
        with contextlib.suppress(KfactkError):
            return f"{option.name}={callable_path(option.default)}"
    return f"{option.name}={option.default!r}"


def _origin(info: StageInfo | PluginInfo) -> str:
    return f"{info.distribution or 'this process'} {info.version or ''}".strip()


def _json(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, indent=2, allow_nan=False)


def _plugins(plugins: Registry, arguments: argparse.Namespace) -> tuple[str, int]:
    infos = plugins.plugins()
    code = int(any(info.status == "failed" for info in infos))
    if arguments.json:
        return _json([attrs.asdict(info) for info in infos]), code
    if not infos:
        text = "no distribution has an entry point of the group kfactk"
        return f"No plugin is installed: {text}. Try `pip install .` in a clone of kfactk.", code
    rows = []
    for info in infos:
        api = f"API {'?' if info.api is None else info.api}"
        stages = ", ".join(info.stages) or "-"
        rows.append((info.name, _origin(info), api, info.status, stages))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines = []
    for info, row in zip(infos, rows, strict=True):
        head = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + "  "
        wrapped = textwrap.wrap(row[-1], max(20, WIDTH - len(head)), break_on_hyphens=False)
        lines += [head + wrapped[0], *(" " * len(head) + line for line in wrapped[1:])]
        if info.error:
            lines += _wrap(info.error, 4)
    return "\n".join(lines), code


def _new_plugin(plugins: Registry, arguments: argparse.Namespace) -> tuple[str, int]:
    package, folder = new_plugin(arguments.name, arguments.stage, arguments.directory, plugins)
    path = os.path.join(".", folder)  # pip would look up a bare name in the package index
    lines = [
        f"Made {folder} with the {package.family} {package.stage!r}:",
        *(f"  {file.name}" for file in sorted(folder.iterdir())),
        "Next:",
        f"  pip install -e {shlex.quote(f'{path}[test]')}",
        f"  pytest {shlex.quote(path)}",
        f"  python -m kfactk stages --family {package.family}",
    ]
    return "\n".join(lines), 0


def _plan(plugins: Registry, arguments: argparse.Namespace) -> tuple[str, int]:
    return planning.run(arguments), 0


def _import_records(plugins: Registry, arguments: argparse.Namespace) -> tuple[str, int]:
    return importing.run(plugins, arguments), 0


COMMANDS = {
    "stages": _stages,
    "plugins": _plugins,
    "new-plugin": _new_plugin,
    "plan": _plan,
    "import-records": _import_records,
}
