"""The plugin registry: it makes stages from what a user writes, and describes them again.

`registry()` returns the registry of this process. `Registry.resolve` makes a stage from a name, a
name with options, an import path, a class or an instance; `Registry.describe` is its inverse.
"""

from __future__ import annotations

import functools
import inspect
import os
import reprlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Set
from importlib.metadata import EntryPoint
from typing import Any

import pluggy

from kfactk.errors import (
    KfactkError,
    KfactkWarning,
    OptionError,
    PluginError,
    UnknownStageError,
    near_names,
)
from kfactk.registry.hookspecs import PROJECT, STAGE_HOOKS
from kfactk.registry.inspection import (
    REQUIRED,
    OptionInfo,
    StageInfo,
    documentation,
    missing_members,
    options_of,
    paper,
    summary,
)
from kfactk.registry.loading import (
    DISABLE,
    PluginInfo,
    PluginRecord,
    Plugins,
    RegisteredStage,
    installed_entry_points,
)
from kfactk.registry.serialization import (
    callable_path as callable_path,
    explain,
    from_json as from_json,
    import_path as import_path,
    to_json as to_json,
)
from kfactk.registry.torch_optimizer import TorchOptimizer

ADAPTERS: dict[str, type[TorchOptimizer]] = {"update": TorchOptimizer}
"""By family, the stage class that wraps objects which are not stages themselves."""

BUILD_ARGUMENTS = ("lr", "damping", "weight_decay")
"""Arguments of `build` that users take for options of a stage."""


class Registry:
    """The plugins of a process and the stages they provide.

    Args:
        disabled: Names or patterns of plugins and distributions to block.

    Example:
        >>> import kfactk, types
        >>> class Halve:
        ...     def clip(self, pairs, dot):
        ...         return [pair.preconditioned / 2 for pair in pairs], torch.tensor(0.5)
        >>> @kfactk.hookimpl
        ... def kfactk_clips():
        ...     return {"halve": Halve}
        >>> fresh = Registry()
        >>> fresh.register(types.SimpleNamespace(kfactk_clips=kfactk_clips), name="mine")
        'mine'
        >>> type(fresh.resolve("clip", "halve")).__name__
        'Halve'
    """

    def __init__(self, disabled: Iterable[str] = ()) -> None:
        self._plugins = Plugins(disabled)

    @classmethod
    def load(
        cls, entry_points: Iterable[EntryPoint] | None = None, disabled: Iterable[str] | None = None
    ) -> Registry:
        """Load a registry from entry points, and warn about each plugin that fails.

        Args:
            entry_points: Those to load; `None` for the installed ones of the group `kfactk`.
            disabled: Patterns of plugins to block; `None` for those in `KFACTK_DISABLE_PLUGINS`.
        """
        made = cls(os.environ.get(DISABLE, "").split(",") if disabled is None else disabled)
        made._plugins.load(installed_entry_points() if entry_points is None else entry_points)
        for family in STAGE_HOOKS:
            for name, claims in made._claims(family).items():
                if len(claims) > 1:
                    message = str(_conflict_error(family, name, claims))
                    warnings.warn(message, KfactkWarning, stacklevel=2)
        return made

    @property
    def hook(self) -> pluggy.HookRelay:
        """Hooks to call in every plugin, such as `hook.kfactk_bound(optimizer=...)`."""
        return self._plugins.manager.hook

    def register(self, plugin: object, name: str | None = None) -> str:
        """Register a module or object with hooks, for this process only, and return its name.

        Raises:
            PluginError: Its name is taken or blocked, its plugin API is not supported, it
                implements no hook, misspells one, or one of its stage hooks fails.
        """
        return self._plugins.register(plugin, name)

    def unregister(self, plugin: object) -> None:
        """Unregister a plugin, given itself or its name.

        Raises:
            PluginError: It is not registered.
        """
        self._plugins.unregister(plugin)

    def plugins(self) -> list[PluginInfo]:
        """Return every plugin, also failed and blocked ones."""
        return [record.info() for record in self._plugins.records]

    def stages(self, family: str | None = None) -> list[StageInfo]:
        """Return every stage, sorted by name in each family, also conflicting and blocked ones.

        Raises:
            UnknownStageError: There is no such family.
        """
        families = list(STAGE_HOOKS) if family is None else [_known_family(family)]
        return [
            info
            for each in families
            for info in sorted(self._stage_infos(each), key=lambda info: info.name)
        ]

    def resolve(self, family: str, spec: Any) -> Any:
        """Make a stage.

        Args:
            family: Its family, such as "basis".
            spec: A name, or an import path "package.module:Name" in its place;
                `{"name": ..., **options}`, with options as Python values or in the forms of
                `to_json`; a class or factory, called without options; or a stage, returned
                unchanged. For updates also a `torch.optim.Optimizer` class, or a
                `functools.partial` of one.

        Raises:
            UnknownStageError: No plugin provides the name.
            PluginError: Several plugins claim the name, or the plugin's factory fails.
            OptionError: An option is unknown, missing or has a wrong value; or `spec` is, or makes,
                no stage of the family.
        """
        _known_family(family)
        options: dict[str, Any] = {}
        if isinstance(spec, Mapping):
            spec, options = _split_spec(family, spec)
        if not isinstance(spec, str):
            label = f"{family} {getattr(spec, '__qualname__', None) or reprlib.repr(spec)}"
            return _make(family, spec, options, label, None)
        label = f"{family} {spec!r}"
        if ":" in spec:
            return _make(family, import_path(spec), options, label, None)
        stage = self._find(family, spec)
        label += f" of plugin {stage.plugin}"
        return _make(family, stage.factory, options, label, stage.plugin)

    def describe(self, family: str, stage: object) -> dict[str, Any]:
        """Return a stage as `{"name": ..., **options}` in JSON's types, the inverse of `resolve`.

        Options that have their default are left out.

        Raises:
            OptionError: Its class has no name and no import path, or an option's value has no JSON
                form that reads back the same.
        """
        _known_family(family)
        wrapped = ADAPTERS[family].unwrap(stage) if family in ADAPTERS else None
        kind: type[Any] = wrapped[0] if wrapped else type(stage)
        name = self._name_of(family, kind)
        if name is None:
            try:
                name = callable_path(kind)
            except OptionError as error:
                raise OptionError(
                    f"Cannot write {family} {kind.__qualname__!r}: {error}"
                ) from error
        label = f"{family} {name!r}"
        if wrapped:
            return {"name": name} | {
                key: to_json(value, f"option {key!r} of {label}")
                for key, value in wrapped[1].items()
            }
        return {"name": name} | _options_to_json(stage, label)

    def _claims(self, family: str) -> dict[str, list[RegisteredStage]]:
        """Return the different factories that plugins provide under each name."""
        claims: dict[str, list[RegisteredStage]] = {}
        for record in self._plugins.records:
            for stage in record.stages:
                if stage.family == family:
                    others = claims.setdefault(stage.name, [])
                    if all(other.factory is not stage.factory for other in others):
                        others.append(stage)
        return claims

    def _find(self, family: str, name: str) -> RegisteredStage:
        claims = self._claims(family)
        if name not in claims:
            raise self._unknown_stage_error(family, name, list(claims))
        if len(claims[name]) > 1:
            raise _conflict_error(family, name, claims[name])
        return claims[name][0]

    def _unknown_stage_error(self, family: str, name: str, known: list[str]) -> UnknownStageError:
        parts = [f"There is no {family} {name!r}.{near_names(name, known)}"]
        others = [other for other in STAGE_HOOKS if other != family and name in self._claims(other)]
        if others:
            parts.append(
                f"{name!r} is a stage of the family {' and '.join(others)}: pass it as "
                f"{others[0]}={name!r}."
            )
        blocked = {
            record: f"by {record.blocked_by}"
            for record in self._plugins.records
            if record.blocked_by
        }
        failed = {
            record: "; ".join(record.problems)
            for record in self._plugins.records
            if record.problems
        }
        parts.append(_likely_cause(f"{family}.{name}", "is blocked", blocked))
        parts.append(_likely_cause(f"{family}.{name}", "failed", failed))
        if "." in name:
            parts.append(
                f"If {name!r} is an import path, write a colon before the last part: "
                f"{':'.join(name.rsplit('.', 1))!r}."
            )
        parts.append(
            f"There are: {', '.join(sorted(known))}."
            if known
            else f"No loaded plugin provides any {family}: see `python -m kfactk plugins`."
        )
        return UnknownStageError(" ".join(part for part in parts if part))

    def _name_of(self, family: str, kind: type[Any]) -> str | None:
        """Return the name that `resolve` makes this class from, or `None`."""
        for name, stages in self._claims(family).items():
            if len(stages) == 1 and stages[0].factory is kind:
                return name
        return None

    def _stage_infos(self, family: str) -> list[StageInfo]:
        infos = [
            _stage_info(stage, conflict=len(stages) > 1)
            for stages in self._claims(family).values()
            for stage in stages
        ]
        for record in self._plugins.records:
            kind, _, name = record.name.partition(".")
            if record.blocked_by and kind == family and name:
                infos.append(
                    StageInfo(
                        family=family,
                        name=name,
                        options=(),
                        plugin=record.name,
                        distribution=record.distribution,
                        version=record.version,
                        paper="",
                        summary="",
                        blocked=record.blocked_by,
                    )
                )
        return infos


@functools.cache
def registry() -> Registry:
    """Return the registry of this process, loaded from installed entry points at the first call."""
    return Registry.load()


def _known_family(family: str) -> str:
    if family not in STAGE_HOOKS:
        hint = near_names(str(family), STAGE_HOOKS)
        raise UnknownStageError(
            f"There is no stage family {family!r}.{hint} There are: {', '.join(STAGE_HOOKS)}."
        )
    return family


def _conflict_error(family: str, name: str, stages: list[RegisteredStage]) -> PluginError:
    plugins = [stage.plugin for stage in stages]
    last = next(
        (plugin for plugin in reversed(plugins) if plugin.distribution != PROJECT), plugins[-1]
    )
    names_differ = len({plugin.name for plugin in plugins}) == len(plugins)
    pattern = last.name if names_differ else last.distribution
    paths = ", ".join(repr(_path_of(stage)) for stage in stages)
    return PluginError(
        f"{len(plugins)} plugins claim {family} {name!r}: {' and '.join(map(str, plugins))}. "
        f"Uninstall or unregister all but one, block the others, for example with "
        f"{DISABLE}={pattern}, or give the path of the class in place of {name!r}: {paths}."
    )


def _likely_cause(expected: str, what: str, reasons: Mapping[PluginRecord, str]) -> str:
    """Return a sentence on plugins that may be why a stage is missing, or "".

    Args:
        expected: Name of the plugin that would provide it; it alone is named if it is among them.
        what: What happened to the plugins, in words that follow their names.
        reasons: Why it happened to each.
    """
    exact = {plugin: why for plugin, why in reasons.items() if plugin.name == expected}
    listed = "; ".join(f"{plugin}: {why}" for plugin, why in (exact or reasons).items())
    if exact:
        return f"The plugin that provides it {what}: {listed}."
    return f"A plugin that {what} may provide it: {listed}." if reasons else ""


def _split_spec(family: str, spec: Mapping[Any, Any]) -> tuple[Any, dict[str, Any]]:
    """Return name (or class) and options of `{"name": ..., **options}`, options in Python."""
    remedy = "Give {'name': ..., **options}."
    if "name" not in spec:
        raise OptionError(f"{family}={dict(spec)!r} does not say which {family}. {remedy}")
    if not all(isinstance(key, str) for key in spec):
        raise OptionError(f"{family}={dict(spec)!r} has keys that are not text. {remedy}")
    return spec["name"], {key: from_json(value) for key, value in spec.items() if key != "name"}


def _factory_of(family: str, source: Any) -> Callable[..., Any] | None:
    """Return what makes stages from options; `None` where `source` can only be a stage."""
    if family in ADAPTERS and (adapted := ADAPTERS[family].adapt(source)):
        return adapted
    return (
        source
        if inspect.isroutine(source) or isinstance(source, type | functools.partial)
        else None
    )


def _make(
    family: str, source: Any, options: dict[str, Any], label: str, plugin: PluginRecord | None
) -> Any:
    """Make a stage from a factory, or return the stage that `source` is.

    Args:
        family: The stage's family.
        source: A factory or a stage.
        options: Options for the factory.
        label: The stage in errors.
        plugin: The plugin that errors are attributed to; `None` for the user.
    """
    factory = _factory_of(family, source)
    if factory is None:
        if options:
            raise OptionError(
                f"{label} is a stage already, made with its options; {', '.join(options)} cannot "
                "be added. Give its class."
            )
        return _check_stage(family, source, label, None)
    _check_options(factory, options, label)
    try:
        stage = factory(**options)
    except KfactkError:
        raise
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"
        known = options_of(factory).known
        has = ", ".join(f"{option.name}: {option.annotation or 'any'}" for option in known)
        raise OptionError(
            f"{label} refuses {given}: {explain(error)}. Its options are: {has or 'none'}."
        ) from error
    except Exception as error:
        kind: type[KfactkError] = PluginError if plugin else OptionError
        raise kind(
            f"{label} could not be made: {explain(error)}. Install what it needs, or use another "
            f"{family}."
        ) from error
    return _check_stage(family, stage, label, plugin)


def _check_options(factory: Callable[..., Any], options: Mapping[str, Any], label: str) -> None:
    accepted = options_of(factory)
    names = accepted.names()
    for name in options:
        if name not in names and not accepted.open:
            has = f"It has: {', '.join(names)}." if names else "It has none."
            hint = near_names(name, names)
            if name in BUILD_ARGUMENTS:
                hint = f" {name!r} is an argument of kfactk.build."
            raise OptionError(f"{label} has no option {name!r}.{hint} {has}")
    for option in accepted.known:
        if option.default is REQUIRED and option.name not in options:
            raise OptionError(
                f"{label} needs the option {option.name!r}. Give "
                f"{{'name': ..., {option.name!r}: ...}}."
            )


def _check_stage(family: str, stage: Any, label: str, plugin: PluginRecord | None) -> Any:
    """Return the stage, if it has all members of its family."""
    missing = missing_members(family, stage)
    if not missing:
        _check_attributes(family, stage, label)
        return stage
    lacks = ", ".join(missing)
    where = f"`kfactk.stages.{family.capitalize()}` documents what a {family} has"
    if plugin:
        raise PluginError(
            f"{label} made a {type(stage).__qualname__}, which lacks {lacks}. Report it to its "
            f"authors; {where}."
        )
    raise OptionError(
        f"{label} is no {family}: it lacks {lacks}. Give a name, a class or a stage; {where}."
    )


NAME_SETS = {"curvature": ("provides",), "basis": ("requires", "laws")}
"""By family, the attributes that must be sets of names."""


def _check_attributes(family: str, stage: Any, label: str) -> None:
    for name in NAME_SETS.get(family, ()):
        value: Any = getattr(stage, name, frozenset())
        if not isinstance(value, Set) or not all(isinstance(item, str) for item in value):
            raise PluginError(
                f"{label} has {name}={value!r}, which must be a frozenset of names. Report it to "
                "its authors."
            )
    if family != "basis":
        return
    source = getattr(stage, "moments_from", None)
    if source not in (None, "samples", "gradient"):
        raise PluginError(
            f"{label} has moments_from={source!r}, which must be 'samples', 'gradient' or None. "
            "Report it to its authors."
        )


def _options_to_json(stage: object, label: str) -> dict[str, Any]:
    """Return the options of a stage that do not have their default, in JSON's types."""
    written: dict[str, Any] = {}
    changed: dict[str, Any] = {}
    for option in options_of(type(stage)).known:
        if not hasattr(stage, option.attribute):
            raise OptionError(
                f"Cannot write {label}: it does not keep its option {option.name!r}. Make it an "
                "attribute of that name."
            )
        value = getattr(stage, option.attribute)
        form = (
            to_json(value, f"option {option.name!r} of {label}")
            if value is not option.default
            else None
        )
        if value is option.default or form == _default_form(option):
            continue
        written[option.name] = form
        if from_json(form) != value:
            changed[option.name] = (option, value)
    if changed:
        again = _remake(stage, written, label)
        for name, (option, value) in changed.items():
            if (back := getattr(again, option.attribute)) != value:
                raise OptionError(
                    f"Cannot write option {name!r} of {label}: {value!r} would be read back as "
                    f"{back!r}. Give the option's attrs field a converter, such as "
                    "`converter=tuple`."
                )
    return written


def _remake(stage: object, written: Mapping[str, Any], label: str) -> object:
    """Make the stage again from its written options."""
    try:
        return type(stage)(**{name: from_json(form) for name, form in written.items()})
    except Exception as error:
        raise OptionError(
            f"Cannot write {label}: its class refuses its own options {written!r}: "
            f"{explain(error)}. Make the class accept the values that it keeps."
        ) from error


def _default_form(option: OptionInfo) -> Any:
    if option.default is REQUIRED:
        return REQUIRED
    try:
        return to_json(option.default)
    except OptionError:
        return REQUIRED


def _path_of(stage: RegisteredStage) -> str:
    try:
        return callable_path(stage.factory)
    except OptionError:
        return getattr(stage.factory, "__qualname__", repr(stage.factory))


def _stage_info(stage: RegisteredStage, *, conflict: bool) -> StageInfo:
    plugin, factory = stage.plugin, _factory_of(stage.family, stage.factory) or stage.factory
    doc = documentation(factory)
    return StageInfo(
        family=stage.family,
        name=stage.name,
        options=options_of(factory).known,
        plugin=plugin.name,
        distribution=plugin.distribution,
        version=plugin.version,
        paper=paper(doc),
        summary=summary(doc),
        conflict=conflict,
    )
