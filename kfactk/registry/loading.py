"""Loading plugins: entry points one by one, so that one that fails is named and the others work.

Bare pluggy skips an entry point whose name is taken, lets one plugin's ImportError stop all loading, and ignores misspelt hooks, each
in silence. Here every plugin leaves a record that says what became of it.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint
from typing import Any

import attrs
import pluggy

from kfactk._version import __version__
from kfactk.errors import KfactkWarning, PluginError, near_names
from kfactk.registry import hookspecs
from kfactk.registry.hookspecs import PLUGIN_API, PROJECT, SPOKEN, STAGE_HOOKS, UNDECLARED
from kfactk.registry.inspection import options_of
from kfactk.registry.serialization import explain

DISABLE = "KFACTK_DISABLE_PLUGINS"
"""Environment variable: names of plugins or distributions to block, separated by commas; `*` and `?` match as in file names."""
PREFIX = f"{PROJECT}_"
DECLARATION = f"{PREFIX}api"
"""Attribute of a plugin: the version of the plugin API it was written for."""


@attrs.frozen
class PluginInfo:
    """One plugin as listed.

    Args:
        name: Its entry-point name, or the name it was registered under.
        distribution: The distribution it came with; `None` for one registered in this process.
        version: Version of that distribution.
        module: What the entry point names.
        stages: What it provides, as "family.name".
        status: "loaded", "failed" (wholly or in part; what did work stays usable) or "blocked".
        error: Why it failed or what blocks it, or "".
        api: Version of the plugin API it was written for; `None` when that could not be read.
    """

    name: str
    distribution: str | None
    version: str | None
    module: str
    stages: tuple[str, ...]
    status: str
    error: str
    api: int | None = None


@attrs.frozen(eq=False)
class Provider:
    """A stage's factory and the plugin it came with."""

    family: str
    name: str
    factory: Callable[..., Any]
    plugin: Plugin


@attrs.define(eq=False)
class Plugin:
    """What is known of one plugin."""

    name: str
    distribution: str | None = None
    version: str | None = None
    module: str = ""
    problems: list[str] = attrs.field(factory=list)
    blocked_by: str = ""
    providers: list[Provider] = attrs.field(factory=list)
    loaded: Any = None
    api: int | None = None
    outdated: str | None = None

    def __str__(self) -> str:
        origin = (
            f"{self.distribution} {self.version or ''}".strip()
            if self.distribution
            else "registered in this process"
        )
        return f"{self.name!r} ({origin})"

    def info(self) -> PluginInfo:
        """The plugin as listed."""
        names = tuple(f"{provider.family}.{provider.name}" for provider in self.providers)
        status = "blocked" if self.blocked_by else "failed" if self.problems else "loaded"
        error = f"blocked by {self.blocked_by}" if self.blocked_by else "; ".join(self.problems)
        return PluginInfo(
            self.name, self.distribution, self.version, self.module, names, status, error, self.api
        )


class Plugins:
    """The plugins of one registry, in order of loading.

    Args:
        disabled: Patterns of what to block, as in `KFACTK_DISABLE_PLUGINS`.
    """

    def __init__(self, disabled: Iterable[str] = ()) -> None:
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.disabled = tuple(
            pattern for pattern in (entry.strip() for entry in disabled) if pattern
        )
        self.records: list[Plugin] = []

    def load(self, entry_points: Iterable[EntryPoint]) -> None:
        """Load entry points, each on its own, then warn once about each that failed, is doubled, or was to be blocked and is not there.

        The same name and value found twice (an editable install and its built metadata) is one plugin.
        """
        notes = []
        seen: dict[tuple[str, str], None] = {}
        for entry in entry_points:
            if (entry.name, entry.value) not in seen:
                seen[entry.name, entry.value] = None
                notes += self._load(entry)
        for message in [*notes, *self._doubled(), *self._idle_patterns()]:
            warnings.warn(message, KfactkWarning, stacklevel=3)

    def register(self, plugin: object, name: str | None = None) -> str:
        """Take in a module or object of this process; nothing of it stays when anything is wrong with it.

        Raises:
            PluginError: Its name is taken or blocked, it was written for a plugin API that this kfactk does not speak, it implements no
                hook, misspells one, or one of its stage hooks fails.
        """
        name = name or getattr(plugin, "__name__", None) or type(plugin).__name__
        record = Plugin(name, module=getattr(plugin, "__name__", type(plugin).__qualname__))
        if any(other.name == name for other in self.records):
            raise PluginError(
                f"A plugin named {name!r} is there already. Call unregister({name!r}) first, or give another name."
            )
        if blocker := self._blocker(record):
            raise PluginError(
                f"The plugin {name!r} is blocked by {blocker}. Change that variable, or give another name."
            )
        record.problems += self._admit(record, plugin)
        if record.problems:
            if self.manager.is_registered(plugin):
                self.manager.unregister(plugin)
            remedy = (
                f"Try `pip install -U {record.outdated}`"
                if record.outdated
                else "Correct it and register it again"
            )
            raise PluginError(
                f"The plugin {name!r} cannot be registered: {'; '.join(record.problems)}. {remedy}."
            )
        self.records.append(record)
        return name

    def unregister(self, plugin: object) -> None:
        """Take out a plugin, given itself or its name.

        Raises:
            PluginError: It is not there.
        """
        for record in self.records:
            if record.loaded is not None and (record.loaded is plugin or record.name == plugin):
                self.manager.unregister(record.loaded)
                self.records.remove(record)
                return
        names = [record.name for record in self.records]
        hint = near_names(plugin, names) if isinstance(plugin, str) else ""
        raise PluginError(
            f"No plugin {plugin!r} is registered.{hint} `python -m kfactk plugins` lists those installed."
        )

    def _load(self, entry: EntryPoint) -> list[str]:
        record = Plugin(entry.name, *_origin(entry), module=entry.value)
        self.records.append(record)
        record.blocked_by = self._blocker(record)
        if record.blocked_by:
            return []
        try:
            plugin = entry.load()
        except (Exception, SystemExit) as error:
            record.problems.append(f"it could not be imported: {explain(error)}")
        else:
            record.problems += self._admit(record, plugin)
        if not record.problems:
            return []
        outdated = record.outdated or record.distribution
        upgrade = f"`pip install -U {outdated}` or " if outdated else ""
        return [
            f"The kfactk plugin {record} failed: {'; '.join(record.problems)}. Try {upgrade}block it with {DISABLE}={record.name}."
        ]

    def _admit(self, record: Plugin, plugin: Any) -> list[str]:
        """Register with pluggy, check, and collect the stages; returns what is wrong."""
        if problem := _declared(record, plugin):
            return [problem]
        if (other := self.manager.get_name(plugin)) is not None:
            return [
                f"it is the same object as plugin {other!r}, which is loaded already: remove one of the two entry points"
            ]
        free = not self.manager.has_plugin(record.name)
        try:
            self.manager.register(
                plugin, name=record.name if free else f"{record.name} = {record.module}"
            )
        except Exception as error:
            if self.manager.is_registered(plugin):
                self.manager.unregister(plugin)
            return [f"its hooks do not fit: {explain(error)}"]
        record.loaded = plugin
        problems = [*self._misspelt(plugin), *_unmarked(plugin)]
        if not problems and not self.manager.get_hookcallers(plugin):
            problems.append(
                f"{plugin!r} has no function marked with @kfactk.hookimpl (an entry point names a module or object that has)"
            )
        for family, hook in STAGE_HOOKS.items():
            for implementation in getattr(self.manager.hook, hook).get_hookimpls():
                if implementation.plugin is plugin:
                    problems += _collect(record, family, hook, implementation.function)
        return problems

    def _misspelt(self, plugin: Any) -> list[str]:
        problems = []
        for caller in self.manager.get_hookcallers(plugin) or []:
            optional = all(
                impl.optionalhook for impl in caller.get_hookimpls() if impl.plugin is plugin
            )
            if not caller.has_spec() and not optional:
                problems.append(f"kfactk has no hook {caller.name!r}{_hook_hint(caller.name)}")
        return problems

    def _blocker(self, record: Plugin) -> str:
        """The pattern that blocks a plugin, as `KFACTK_DISABLE_PLUGINS=pattern`, or ""."""
        return next(
            (f"{DISABLE}={pattern}" for pattern in self.disabled if _matches(pattern, record)), ""
        )

    def _doubled(self) -> list[str]:
        by_name: dict[str, list[str]] = {}
        for record in self.records:
            if not record.blocked_by:
                by_name.setdefault(record.name, []).append(
                    f"{record.distribution} {record.version}: {record.module}"
                )
        return [
            f"Several kfactk plugins are named {name!r} ({'; '.join(origins)}), and all are used. "
            f"To choose, uninstall a distribution, or block it with {DISABLE}=<its name>."
            for name, origins in by_name.items()
            if len(origins) > 1
        ]

    def _idle_patterns(self) -> list[str]:
        known = sorted(
            {name for record in self.records for name in (record.name, record.distribution) if name}
        )
        return [
            f"{DISABLE} names {pattern!r}, which is neither a plugin nor a distribution that has one.{near_names(pattern, known)} "
            "`python -m kfactk plugins` lists them."
            for pattern in self.disabled
            if not any(_matches(pattern, record) for record in self.records)
        ]


def installed() -> list[EntryPoint]:
    """Entry points of the group `kfactk` in the environment."""
    return list(importlib.metadata.entry_points(group=PROJECT))


def _origin(entry: EntryPoint) -> tuple[str | None, str | None]:
    if entry.dist is None:
        return None, None
    metadata = entry.dist.metadata
    known = {key: metadata[key] for key in metadata}
    return known.get("Name"), known.get("Version")


def _declared(record: Plugin, plugin: Any) -> str:
    """Note which version of the plugin API a plugin was written for; returns why it cannot work here, or ""."""
    try:
        version = getattr(plugin, DECLARATION, UNDECLARED)
    except Exception as error:
        return f"its {DECLARATION} cannot be read: {explain(error)}"
    if isinstance(version, bool) or not isinstance(version, int):
        return f"its {DECLARATION} is {version!r}, not an integer: write {DECLARATION} = {PLUGIN_API}, the version it was written for"
    record.api = version
    if version in SPOKEN:
        return ""
    newer = version > PLUGIN_API
    record.outdated = PROJECT if newer else record.distribution
    speaks = (
        f"version {PLUGIN_API}" if len(SPOKEN) == 1 else f"versions {SPOKEN[0]} to {PLUGIN_API}"
    )
    needed = (
        "a newer kfactk is needed"
        if newer
        else f"a newer {record.distribution or 'plugin'} is needed"
    )
    return f"it was written for version {version} of the plugin API, and this kfactk {__version__} speaks {speaks}: {needed}"


def _matches(pattern: str, record: Plugin) -> bool:
    return fnmatch.fnmatchcase(record.name, pattern) or fnmatch.fnmatchcase(
        _normal(record.distribution), _normal(pattern)
    )


def _normal(distribution: str | None) -> str:
    return re.sub(r"[-_.]+", "-", distribution or "").lower()


def _hook_hint(name: str) -> str:
    """Near names, compared without the prefix that all hooks share, and all names."""
    hooks = [hook for hook in vars(hookspecs) if hook.startswith(PREFIX)]
    near = near_names(
        name.removeprefix(PREFIX), [hook.removeprefix(PREFIX) for hook in hooks]
    ).rstrip("?")
    near = near.replace(" '", f" '{PREFIX}")
    return f"{near and '.'}{near}; the hooks are {', '.join(hooks)}"


def _unmarked(plugin: Any) -> list[str]:
    """Functions named like hooks that the plugin defines itself and forgot to mark."""
    problems = []
    for name in dir(plugin):
        function = inspect.getattr_static(plugin, name, None)
        function = getattr(function, "__func__", function)
        own = inspect.isfunction(function) and (
            not inspect.ismodule(plugin) or function.__module__ == plugin.__name__
        )
        if own and name.startswith(PREFIX) and not hasattr(function, f"{PROJECT}_impl"):
            hint = (
                ""
                if hasattr(hookspecs, name)
                else f" (nor does kfactk have that hook{_hook_hint(name)})"
            )
            problems.append(
                f"its function {name!r} is not marked with @kfactk.hookimpl{hint}: mark it if it is a hook, rename it if not"
            )
    return problems


def _collect(record: Plugin, family: str, hook: str, function: Callable[[], Any]) -> list[str]:
    """Add a hook's stages to the record; returns what is wrong with them."""
    try:
        stages = function()
        if not isinstance(stages, Mapping):
            return [
                f"its hook {hook} returned {type(stages).__name__}, not a mapping of names to factories"
            ]
        items = list(stages.items())
    except Exception as error:
        return [f"its hook {hook} raised {explain(error)}"]
    problems = []
    for name, factory in items:
        if not isinstance(name, str) or not name or ":" in name:
            problems.append(
                f"its hook {hook} names a stage {name!r}: a name is text without a colon"
            )
        elif not callable(factory):
            problems.append(
                f"its {family} {name!r} is {factory!r}, which cannot be called to make a stage"
            )
        elif problem := _unusable(factory):
            problems.append(f"its {family} {name!r} {problem}")
        else:
            record.providers.append(Provider(family, name, factory, record))
    return problems


def _unusable(factory: Callable[..., Any]) -> str:
    try:
        names = options_of(factory).names()
    except Exception as error:
        return f"does not let its options be read: {explain(error)}"
    return (
        "has an option 'name', by which a recipe gives the stage's own name: rename the option"
        if "name" in names
        else ""
    )
