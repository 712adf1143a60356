"""Load plugins from entry points, each on its own: one that fails is named, the others work.

Plain pluggy skips an entry point whose name is taken, stops at the first ImportError, and ignores
misspelt hooks. Here every plugin has a record of what happened to it.
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
from kfactk.registry.hookspecs import (
    PLUGIN_API,
    PROJECT,
    STAGE_HOOKS,
    SUPPORTED_APIS,
    UNDECLARED_API,
)
from kfactk.registry.inspection import options_of
from kfactk.registry.serialization import explain

DISABLE = "KFACTK_DISABLE_PLUGINS"
"""Environment variable with the plugins or distributions to block, separated by commas.

`*` and `?` match as in file names."""
PREFIX = f"{PROJECT}_"
DECLARATION = "kfactk_api"
"""Attribute of a plugin: the version of the plugin API it was written for."""


@attrs.frozen
class PluginInfo:
    """Public information on one plugin.

    Args:
        name: Name of its entry point, or the name it was registered under.
        distribution: Its distribution; `None` where it was registered in this process.
        version: Version of the distribution.
        module: Value of its entry point.
        stages: The stages it provides, as "family.name".
        status: "loaded", "failed" or "blocked". A failed plugin may still provide some stages.
        error: Why it failed or what blocks it, or "".
        api: Version of the plugin API it was written for; `None` if that could not be read.
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
class RegisteredStage:
    """The factory of a stage and the plugin that provides it."""

    family: str
    name: str
    factory: Callable[..., Any]
    plugin: PluginRecord


@attrs.define(eq=False)
class PluginRecord:
    """Everything known of one plugin.

    Args:
        name: Name of its entry point, or the name it was registered under.
        distribution: Its distribution; `None` where it was registered in this process.
        version: Version of the distribution.
        module: Value of its entry point.
        problems: What is wrong with it, in words that follow its name.
        blocked_by: What blocks it, or "".
        stages: The stages it provides.
        loaded: The module or object, once it is registered.
        api: Version of the plugin API it was written for; `None` if that could not be read.
        outdated: The distribution to upgrade, where the API does not fit.
    """

    name: str
    distribution: str | None = None
    version: str | None = None
    module: str = ""
    problems: list[str] = attrs.field(factory=list)
    blocked_by: str = ""
    stages: list[RegisteredStage] = attrs.field(factory=list)
    loaded: Any = None
    api: int | None = None
    outdated: str | None = None

    def __str__(self) -> str:
        origin = f"{self.distribution or 'registered in this process'} {self.version or ''}"
        return f"{self.name!r} ({origin.strip()})"

    def info(self) -> PluginInfo:
        """Return the public information."""
        return PluginInfo(
            self.name,
            self.distribution,
            self.version,
            self.module,
            stages=tuple(f"{stage.family}.{stage.name}" for stage in self.stages),
            status="blocked" if self.blocked_by else "failed" if self.problems else "loaded",
            error=f"blocked by {self.blocked_by}" if self.blocked_by else "; ".join(self.problems),
            api=self.api,
        )


class Plugins:
    """The plugins of one registry, in the order of loading.

    Args:
        disabled: Patterns of plugins to block, as in `KFACTK_DISABLE_PLUGINS`.
    """

    def __init__(self, disabled: Iterable[str] = ()) -> None:
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.disabled = tuple(filter(None, (pattern.strip() for pattern in disabled)))
        self.records: list[PluginRecord] = []

    @property
    def hook(self) -> pluggy.HookRelay:
        """Hooks to call in every plugin, such as `hook.kfactk_bound(optimizer=...)`."""
        return self.manager.hook

    def plugins(self) -> list[PluginInfo]:
        """Return every plugin, also failed and blocked ones."""
        return [record.info() for record in self.records]

    def load_entry_points(self, entry_points: Iterable[EntryPoint]) -> None:
        """Load entry points, each on its own.

        Warn about each that failed, about names that are used twice, and about patterns that block
        nothing. The same name and value found twice (an editable install and its built metadata)
        is one plugin.
        """
        unique: dict[tuple[str, str], EntryPoint] = {}
        for entry in entry_points:
            unique.setdefault((entry.name, entry.value), entry)
        messages = [message for entry in unique.values() for message in self._load(entry)]
        for message in [*messages, *self._duplicate_names(), *self._unmatched_patterns()]:
            warnings.warn(message, KfactkWarning, stacklevel=3)

    def register(self, plugin: object, name: str | None = None) -> str:
        """Register a module or object of this process, and return its name.

        Nothing of it stays where anything is wrong with it.

        Raises:
            PluginError: Its name is taken or blocked, its plugin API is not supported, it
                implements no hook, misspells one, or one of its stage hooks fails.
        """
        name = name or getattr(plugin, "__name__", None) or type(plugin).__name__
        record = PluginRecord(name, module=getattr(plugin, "__name__", type(plugin).__qualname__))
        if any(other.name == name for other in self.records):
            raise PluginError(
                f"A plugin named {name!r} is registered already. Call unregister({name!r}) first, "
                "or give another name."
            )
        if blocker := self._blocker(record):
            raise PluginError(
                f"The plugin {name!r} is blocked by {blocker}. Change that variable, or give "
                "another name."
            )
        record.problems += self._register(record, plugin)
        if record.problems:
            if self.manager.is_registered(plugin):
                self.manager.unregister(plugin)
            upgrade = f"Try `pip install -U {record.outdated}`" if record.outdated else ""
            raise PluginError(
                f"The plugin {name!r} cannot be registered: {'; '.join(record.problems)}. "
                f"{upgrade or 'Correct it and register it again'}."
            )
        self.records.append(record)
        return name

    def unregister(self, plugin: object) -> None:
        """Unregister a plugin, given itself or its name.

        Raises:
            PluginError: It is not registered.
        """
        for record in self.records:
            if record.loaded is not None and (record.loaded is plugin or record.name == plugin):
                self.manager.unregister(record.loaded)
                self.records.remove(record)
                return
        hint = near_names(str(plugin), [record.name for record in self.records])
        raise PluginError(
            f"No plugin {plugin!r} is registered.{hint} See `python -m kfactk plugins` for the "
            "installed ones."
        )

    def _load(self, entry: EntryPoint) -> list[str]:
        """Load one entry point, and return warnings."""
        record = PluginRecord(entry.name, *_distribution(entry), module=entry.value)
        self.records.append(record)
        record.blocked_by = self._blocker(record)
        if record.blocked_by:
            return []
        try:
            plugin = entry.load()
        except (Exception, SystemExit) as error:
            record.problems.append(f"it could not be imported: {explain(error)}")
        else:
            record.problems += self._register(record, plugin)
        if not record.problems:
            return []
        outdated = record.outdated or record.distribution
        upgrade = f"Try `pip install -U {outdated}`, or block" if outdated else "Block"
        return [
            f"The kfactk plugin {record} failed: {'; '.join(record.problems)}. "
            f"{upgrade} it with {DISABLE}={record.name}."
        ]

    def _register(self, record: PluginRecord, plugin: Any) -> list[str]:
        """Register with pluggy, check hooks, collect stages, and return problems."""
        if problem := _check_api(record, plugin):
            return [problem]
        if (other := self.manager.get_name(plugin)) is not None:
            return [
                f"it is the same object as plugin {other!r}, which is loaded already: remove one "
                "of the two entry points"
            ]
        suffix = f" = {record.module}" if self.manager.has_plugin(record.name) else ""
        try:
            self.manager.register(plugin, name=record.name + suffix)
        except Exception as error:
            if self.manager.is_registered(plugin):
                self.manager.unregister(plugin)
            return [f"its hooks do not fit: {explain(error)}"]
        record.loaded = plugin
        problems = [*self._unknown_hooks(plugin), *_unmarked_hooks(plugin)]
        if not problems and not self.manager.get_hookcallers(plugin):
            problems.append(
                f"{plugin!r} has no function marked with @kfactk.hookimpl (an entry point must "
                "name a module or object that has one)"
            )
        for family, hook in STAGE_HOOKS.items():
            for implementation in getattr(self.hook, hook).get_hookimpls():
                if implementation.plugin is plugin:
                    problems += _collect_stages(record, family, hook, implementation.function)
        return problems

    def _unknown_hooks(self, plugin: Any) -> list[str]:
        """Return a problem for each hook that kfactk does not have."""
        problems = []
        for caller in self.manager.get_hookcallers(plugin) or []:
            mine = (each for each in caller.get_hookimpls() if each.plugin is plugin)
            if not caller.has_spec() and not all(each.optionalhook for each in mine):
                problems.append(f"kfactk has no hook {caller.name!r}{_hook_hint(caller.name)}")
        return problems

    def _blocker(self, record: PluginRecord) -> str:
        """Return the pattern that blocks a plugin, as `KFACTK_DISABLE_PLUGINS=pattern`, or ""."""
        patterns = (pattern for pattern in self.disabled if _matches(pattern, record))
        return next((f"{DISABLE}={pattern}" for pattern in patterns), "")

    def _duplicate_names(self) -> list[str]:
        """Return a warning for each name that several plugins have."""
        by_name: dict[str, list[str]] = {}
        for record in (each for each in self.records if not each.blocked_by):
            origin = f"{record.distribution} {record.version}: {record.module}"
            by_name.setdefault(record.name, []).append(origin)
        return [
            f"Several kfactk plugins are named {name!r} ({'; '.join(origins)}), and all are used. "
            f"To choose one, uninstall a distribution, or block it with {DISABLE}=<its name>."
            for name, origins in by_name.items()
            if len(origins) > 1
        ]

    def _unmatched_patterns(self) -> list[str]:
        """Return a warning for each pattern that blocks nothing."""
        names = {name for record in self.records for name in (record.name, record.distribution)}
        known = sorted(filter(None, names))
        return [
            f"{DISABLE} has {pattern!r}, which is neither a plugin nor a distribution that has one."
            f"{near_names(pattern, known)} See `python -m kfactk plugins` for their names."
            for pattern in self.disabled
            if not any(_matches(pattern, record) for record in self.records)
        ]


def installed_entry_points() -> list[EntryPoint]:
    """Return the entry points of the group `kfactk` in the environment."""
    return list(importlib.metadata.entry_points(group=PROJECT))


def _distribution(entry: EntryPoint) -> tuple[str | None, str | None]:
    """Return name and version of an entry point's distribution."""
    metadata: Any = entry.dist.metadata if entry.dist else {}
    known = {key: metadata[key] for key in metadata}
    return known.get("Name"), known.get("Version")


def _check_api(record: PluginRecord, plugin: Any) -> str:
    """Record the plugin API of a plugin, and return why it cannot work here, or ""."""
    try:
        version = getattr(plugin, DECLARATION, UNDECLARED_API)
    except Exception as error:
        return f"its {DECLARATION} cannot be read: {explain(error)}"
    if isinstance(version, bool) or not isinstance(version, int):
        return (
            f"its {DECLARATION} is {version!r}, not an integer: write {DECLARATION} = "
            f"{PLUGIN_API}, the version it was written for"
        )
    record.api = version
    if version in SUPPORTED_APIS:
        return ""
    newer = version > PLUGIN_API
    record.outdated = PROJECT if newer else record.distribution
    supported = f"version {PLUGIN_API}"
    if len(SUPPORTED_APIS) > 1:
        supported = f"versions {SUPPORTED_APIS[0]} to {PLUGIN_API}"
    return (
        f"it was written for version {version} of the plugin API, and this kfactk {__version__} "
        f"supports {supported}: a newer {record.outdated or 'plugin'} is needed"
    )


def _matches(pattern: str, record: PluginRecord) -> bool:
    distribution = normal_name(record.distribution or "")
    matches = fnmatch.fnmatchcase
    return matches(record.name, pattern) or matches(distribution, normal_name(pattern))


def normal_name(distribution: str) -> str:
    """Return a distribution's name as package indexes compare it: lower case, single dashes."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _hook_hint(name: str) -> str:
    """Return near names, compared without the prefix of all hooks, and all names."""
    hooks = [hook for hook in vars(hookspecs) if hook.startswith(PREFIX)]
    short = [hook.removeprefix(PREFIX) for hook in hooks]
    near = near_names(name.removeprefix(PREFIX), short).rstrip("?").replace(" '", f" '{PREFIX}")
    return f"{near and '.'}{near}; the hooks are {', '.join(hooks)}"


def _unmarked_hooks(plugin: Any) -> list[str]:
    """Return a problem for each own function with the name of a hook but without the mark."""
    problems = []
    for name in (each for each in dir(plugin) if each.startswith(PREFIX)):
        function = inspect.getattr_static(plugin, name, None)
        function = getattr(function, "__func__", function)
        if not inspect.isfunction(function) or hasattr(function, f"{PROJECT}_impl"):
            continue
        if not inspect.ismodule(plugin) or function.__module__ == plugin.__name__:
            hint = f" (nor does kfactk have that hook{_hook_hint(name)})"
            problems.append(
                f"its function {name!r} is not marked with @kfactk.hookimpl"
                f"{'' if hasattr(hookspecs, name) else hint}: "
                "mark it if it is a hook, rename it if not"
            )
    return problems


def _collect_stages(
    record: PluginRecord, family: str, hook: str, function: Callable[[], Any]
) -> list[str]:
    """Add the stages of a hook to the record, and return problems."""
    try:
        stages = function()
        if not isinstance(stages, Mapping):
            kind = type(stages).__name__
            return [f"its hook {hook} returned {kind}, not a mapping of names to factories"]
        items = list(stages.items())
    except Exception as error:
        return [f"its hook {hook} raised {explain(error)}"]
    problems = []
    for name, factory in items:
        if not isinstance(name, str) or not name or ":" in name:
            found = f"its hook {hook} names a stage {name!r}: a name is text without a colon"
            problems.append(found)
        elif problem := _factory_problem(factory):
            problems.append(f"its {family} {name!r} {problem}")
        else:
            record.stages.append(RegisteredStage(family, name, factory, record))
    return problems


def _factory_problem(factory: Any) -> str:
    """Return what is wrong with a factory, or ""."""
    if not callable(factory):
        return f"is {factory!r}, which cannot be called to make a stage"
    try:
        if "name" not in options_of(factory).names():
            return ""
    except Exception as error:
        return f"has options that cannot be read: {explain(error)}"
    return "has an option 'name', which in a recipe is the name of the stage: rename the option"
