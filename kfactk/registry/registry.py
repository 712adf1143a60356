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
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from importlib.metadata import EntryPoint
from typing import Any

from kfactk.errors import (
    KfactkError,
    KfactkWarning,
    OptionError,
    PluginError,
    UnknownStageError,
    near_names,
)
from kfactk.options import python_number
from kfactk.registry.hookspecs import PROJECT, STAGE_HOOKS
from kfactk.registry.inspection import (
    BASE_CLASSES,
    REQUIRED,
    OptionInfo,
    StageInfo,
    documentation,
    missing_members,
    options_of,
    paper,
    summary,
    undefined_members,
    unfit_factory,
)
from kfactk.registry.loading import (
    DISABLE,
    PluginRecord,
    Plugins,
    RegisteredStage,
    installed_entry_points,
)
from kfactk.registry.other_names import OTHER_NAMES
from kfactk.registry.serialization import (
    callable_path,
    explain,
    from_json,
    import_path,
    to_json,
    untrusted,
)
from kfactk.registry.torch_optimizer import TorchOptimizer
from kfactk.stages import WAIVABLE, Curvature

ADAPTERS: dict[str, type[TorchOptimizer]] = {"update": TorchOptimizer}
"""By family, the stage class that wraps objects which are not stages themselves."""

BUILD_ARGUMENTS = ("lr", "damping", "weight_decay")
"""Arguments of `build` that users take for options of a stage."""


class Registry(Plugins):
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
        made.load_entry_points(installed_entry_points() if entry_points is None else entry_points)
        for family in STAGE_HOOKS:
            for name, claims in made._claims(family).items():
                if len(claims) > 1:
                    winner = _usable(claims)
                    told = (
                        _conflict_error(family, name, claims) if winner is None else _lost(claims)
                    )
                    warnings.warn(str(told), KfactkWarning, stacklevel=2)
        return made

    def stages(self, family: str | None = None) -> list[StageInfo]:
        """Return every stage, sorted by name in each family, also conflicting and blocked ones.

        Raises:
            UnknownStageError: There is no such family.
        """
        if family is not None:
            _check_family(family)
        found: list[StageInfo] = []
        for each in STAGE_HOOKS if family is None else [family]:
            found += sorted(self._stage_infos(each), key=lambda info: info.name)
        return found

    def resolve(self, family: str, spec: Any, *, trusted: bool = True) -> Any:
        """Make a stage.

        Args:
            family: Its family, such as "basis".
            spec: A name, or an import path "package.module:Name" in its place;
                `{"name": ..., **options}`, with options as Python values or in the forms of
                `to_json`; a class or factory, called without options; or a stage, returned
                unchanged. For updates also a `torch.optim.Optimizer` class, or a
                `functools.partial` of one.
            trusted: Whether import paths may be imported, which runs code. Without it only names
                resolve, and the classes of `torch.optim`.

        Raises:
            UnknownStageError: No plugin provides the name.
            PluginError: Several plugins claim the name, or the plugin's factory fails.
            OptionError: An option is unknown, missing or has a wrong value; `spec` is, or makes, no
                stage of the family; or an import path is not trusted.
        """
        _check_family(family)
        options: dict[str, Any] = {}
        if isinstance(spec, Mapping):
            spec, options = _split_spec(family, spec, trusted=trusted)
        if not isinstance(spec, str):
            label = f"{family} {getattr(spec, '__qualname__', None) or reprlib.repr(spec)}"
            return _make(family, spec, options, label, None)
        label = f"{family} {spec!r}"
        if ":" in spec:
            return _make(family, _imported(family, spec, label, trusted), options, label, None)
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
        _check_family(family)
        wrapped = ADAPTERS[family].unwrap(stage) if family in ADAPTERS else None
        kind: type[Any] = wrapped[0] if wrapped else type(stage)
        name = self._name_of(family, kind)
        if name is None:
            try:
                name = callable_path(kind)
            except OptionError as error:
                what = f"{family} {kind.__qualname__!r}"
                raise OptionError(f"Cannot write {what}: {error}") from error
        label = f"{family} {name!r}"
        if not wrapped:
            return {"name": name} | _options_to_json(stage, label)
        given = wrapped[1].items()
        return {"name": name} | {k: to_json(v, f"option {k!r} of {label}") for k, v in given}

    def _claims(self, family: str) -> dict[str, list[RegisteredStage]]:
        """Return the different factories that plugins provide under each name."""
        claims: dict[str, list[RegisteredStage]] = {}
        for stage in (each for record in self.records for each in record.stages):
            if stage.family == family:
                others = claims.setdefault(stage.name, [])
                if all(other.factory is not stage.factory for other in others):
                    others.append(stage)
        return claims

    def _find(self, family: str, name: str) -> RegisteredStage:
        claims = self._claims(family)
        if name not in claims:
            raise self._unknown_stage_error(family, name, list(claims))
        found = _usable(claims[name])
        if found is None:
            raise _conflict_error(family, name, claims[name])
        return found

    def _unknown_stage_error(self, family: str, name: str, known: list[str]) -> UnknownStageError:
        other = OTHER_NAMES.get(family, {}).get(name)
        near = near_names(name, known) if other is None else f" {other}"
        hints = "".join(f" {hint}" for hint in self._hints(family, name) if hint)
        choice = f"Use one of: {', '.join(sorted(known))}."
        if not known:
            choice = f"No loaded plugin provides any {family}: see `python -m kfactk plugins`."
        return UnknownStageError(f"There is no {family} {name!r}.{near}{hints} {choice}")

    def _hints(self, family: str, name: str) -> Iterator[str]:
        """Yield the likely reasons why a name is not known."""
        others = [other for other in STAGE_HOOKS if other != family and name in self._claims(other)]
        if others:
            families = " and ".join(others)
            yield f"{name!r} is a stage of the family {families}: pass it as {others[0]}={name!r}."
        blocked = {each: f"by {each.blocked_by}" for each in self.records if each.blocked_by}
        failed = {each: "; ".join(each.problems) for each in self.records if each.problems}
        yield _likely_cause(f"{family}.{name}", "is blocked", blocked)
        yield _likely_cause(f"{family}.{name}", "failed", failed)
        if "." in name:
            path = ":".join(name.rsplit(".", 1))
            yield f"If {name!r} is an import path, write a colon before the last part: {path!r}."

    def _name_of(self, family: str, kind: type[Any]) -> str | None:
        """Return the name that `resolve` makes this class from, or `None`."""
        for name, stages in self._claims(family).items():
            usable = _usable(stages)
            if usable is not None and usable.factory is kind:
                return name
        return None

    def _stage_infos(self, family: str) -> list[StageInfo]:
        found = []
        for stages in self._claims(family).values():
            usable = _usable(stages)
            found += [_stage_info(stage, conflict=stage is not usable) for stage in stages]
        for each in self.records:
            kind, _, name = each.name.partition(".")
            if each.blocked_by and kind == family and name:
                origin = each.name, each.distribution, each.version
                found.append(StageInfo(family, name, (), *origin, "", "", blocked=each.blocked_by))
        return found


@functools.cache
def registry() -> Registry:
    """Return the registry of this process, loaded from installed entry points at the first call."""
    return Registry.load()


def _check_family(family: str) -> None:
    if family not in STAGE_HOOKS:
        raise UnknownStageError(
            f"There is no stage family {family!r}.{near_names(str(family), STAGE_HOOKS)} "
            f"Use one of: {', '.join(STAGE_HOOKS)}."
        )


def _usable(stages: list[RegisteredStage]) -> RegisteredStage | None:
    """Return the stage that a name stands for: the only one, or else kfactk's own."""
    own = [stage for stage in stages if stage.plugin.distribution == PROJECT]
    found = stages if len(stages) == 1 else own
    return found[0] if len(found) == 1 else None


def _lost(stages: list[RegisteredStage]) -> str:
    """Return the warning that plugins claim a name of kfactk's own."""
    own = _usable(stages)
    others = [stage for stage in stages if stage is not own]
    paths = " or ".join(repr(_path_of(stage)) for stage in others)
    plugins = " and ".join(str(stage.plugin) for stage in others)
    return (
        f"{others[0].family} {others[0].name!r} is kfactk's own, and stays so, though it is also "
        f"provided by {plugins}. To use that one, give its path in place of the name: {paths}. "
        f"Its authors should give it another name; {DISABLE}={others[-1].plugin.name} blocks it."
    )


def _conflict_error(family: str, name: str, stages: list[RegisteredStage]) -> PluginError:
    plugins = [stage.plugin for stage in stages]
    foreign = [plugin for plugin in plugins if plugin.distribution != PROJECT]
    last, names = (foreign or plugins)[-1], {plugin.name for plugin in plugins}
    pattern = last.name if len(names) == len(plugins) else last.distribution
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


def _imported(family: str, path: str, label: str, trusted: bool) -> Any:
    """Return the stage or factory at an import path; nothing of it has been called.

    Raises:
        OptionError: The path is not trusted, or what it names would not make a stage.
    """
    if family in ADAPTERS and (found := ADAPTERS[family].known(path)) is not None:
        return found
    if not trusted:
        raise untrusted(path)
    found = import_path(path)
    adapted = family in ADAPTERS and ADAPTERS[family].adapt(found)
    factory = None if adapted else _factory_of(family, found)
    if factory is not None and (why := unfit_factory(family, factory)):
        raise OptionError(
            f"{label} is not called, since it {why}. Give the path of a stage's class, or of a "
            f"function that is annotated with the class it returns; {_documented(family)}."
        )
    return found


def _split_spec(
    family: str, spec: Mapping[Any, Any], *, trusted: bool
) -> tuple[Any, dict[str, Any]]:
    """Return name (or class) and options of `{"name": ..., **options}`, options in Python."""
    unnamed, text = "name" not in spec, all(isinstance(key, str) for key in spec)
    if unnamed or not text:
        fault = f"does not say which {family}" if unnamed else "has keys that are not text"
        raise OptionError(f"{family}={dict(spec)!r} {fault}. Give {{'name': ..., **options}}.")
    options = {key: python_number(from_json(value, trusted=trusted)) for key, value in spec.items()}
    return options.pop("name"), options


def _factory_of(family: str, source: Any) -> Callable[..., Any] | None:
    """Return what makes stages from options; `None` where `source` can only be a stage."""
    if family in ADAPTERS and (adapted := ADAPTERS[family].adapt(source)):
        return adapted
    makes = inspect.isroutine(source) or isinstance(source, type | functools.partial)
    return source if makes else None


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
    if undefined := undefined_members(factory):
        blame: type[KfactkError] = PluginError if plugin else OptionError
        raise blame(
            f"{label} cannot be made: its class does not define {', '.join(undefined)}. Define "
            f"them; {_documented(family)}."
        )
    try:
        stage = factory(**options)
    except KfactkError:
        raise
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"
        known = options_of(factory).known
        has = ", ".join(f"{each.name}: {each.annotation or 'any'}" for each in known) or "none"
        raise OptionError(
            f"{label} refuses {given}: {explain(error)}. Correct them; its options are: {has}."
        ) from error
    except Exception as error:
        kind = PluginError if plugin else OptionError
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
            has = f"Use one of: {', '.join(names)}." if names else "Leave it out."
            ours = f" {name!r} is an argument of kfactk.build." if name in BUILD_ARGUMENTS else ""
            raise OptionError(
                f"{label} has no option {name!r}.{ours or near_names(name, names)} {has}"
            )
    for option in accepted.known:
        if option.default is REQUIRED and option.name not in options:
            raise OptionError(
                f"{label} needs the option {option.name!r}. Give "
                f"{{'name': ..., {option.name!r}: ...}}."
            )


def _check_stage(family: str, stage: Any, label: str, plugin: PluginRecord | None) -> Any:
    """Return the stage if it has what its family demands."""
    reason = _unfit(family, stage)
    if not reason:
        _check_attributes(family, stage, label)
        return stage
    if plugin:
        raise PluginError(
            f"{label} made a {type(stage).__qualname__}, which {reason}. Report it to its authors; "
            f"{_documented(family)}."
        )
    raise OptionError(
        f"{label} is no {family}: it {reason}. Give a name, a class or a stage; "
        f"{_documented(family)}."
    )


def _documented(family: str) -> str:
    return f"`kfactk.stages.{family.capitalize()}` documents what a {family} has"


def _unfit(family: str, stage: object) -> str:
    """Return why an object is no stage of the family, or ""."""
    base, missing = BASE_CLASSES.get(family), ", ".join(missing_members(family, stage))
    lacks = f"lacks {missing}" if missing else ""
    if base is not None and not isinstance(stage, base):
        derive = f"does not derive from kfactk.{base.__name__}"
        return f"{derive}, and {lacks}" if lacks else derive
    if isinstance(stage, Curvature) and type(stage).factors is not Curvature.factors:
        return (
            "replaces `factors`, which is the sum of `input_factors` and `gradient_factors`; "
            "replace these instead"
        )
    return lacks


NAME_SETS = {
    "curvature": ("provides",),
    "basis": ("requires", "laws", "waives"),
    "link": ("needs", "requires"),
}
"""By family, the attributes that must be sets of names."""


def _check_attributes(family: str, stage: Any, label: str) -> None:
    for name in NAME_SETS.get(family, ()):
        value: Any = getattr(stage, name)
        if not isinstance(value, Set) or not all(isinstance(item, str) for item in value):
            raise PluginError(
                f"{label} has {name}={value!r}, which must be a frozenset of names. Report it to "
                "its authors."
            )
    if family == "basis" and (unknown := sorted(stage.waives - WAIVABLE.keys())):
        raise PluginError(
            f"{label} waives the law {unknown[0]!r}, which is not known. There are: "
            f"{', '.join(WAIVABLE)}. Report it to its authors."
        )
    source = stage.moments_from if family == "basis" else None
    if source not in (None, "samples", "gradient"):
        raise PluginError(
            f"{label} has moments_from={source!r}, which must be 'samples', 'gradient' or None. "
            "Report it to its authors."
        )


def _options_to_json(stage: object, label: str) -> dict[str, Any]:
    """Return the options of a stage that do not have their default, in JSON's types."""
    written: dict[str, Any] = {}
    changed: list[tuple[OptionInfo, Any]] = []
    for option in options_of(type(stage)).known:
        if not hasattr(stage, option.attribute):
            raise OptionError(
                f"Cannot write {label}: it does not keep its option {option.name!r}. Make it an "
                "attribute of that name."
            )
        value = getattr(stage, option.attribute)
        if value is option.default:
            continue
        form = to_json(value, f"option {option.name!r} of {label}")
        if form == _default_form(option):
            continue
        written[option.name] = form
        if from_json(form) != value:
            changed.append((option, value))
    again = _remake(stage, written, label) if changed else None
    for option, value in changed:
        if (back := getattr(again, option.attribute)) != value:
            raise OptionError(
                f"Cannot write option {option.name!r} of {label}: {value!r} would be read back "
                f"as {back!r}. Give the option's attrs field a converter, such as "
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
