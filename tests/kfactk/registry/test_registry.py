"""The registry makes stages from what users write, describes them again, and lists them."""

import functools
import importlib.metadata
import json
import types
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, strategies as st

from kfactk import Basis, KfactkWarning, OptionError, PluginError, UnknownStageError
from kfactk.registry.hookspecs import STAGE_HOOKS, hookimpl
from kfactk.registry.loading import DISABLE
from kfactk.registry.registry import Registry, registry
from kfactk.registry.torch_optimizer import TorchOptimizer
from kfactk_stages.curvature.kfac import Kfac
from tests.distributions import CLIP, Site, site as site

HERE = __name__


def halve(value: float) -> float:
    return value / 2


@attrs.frozen
class Scale:
    """Scale by a number.

    Args:
        by: The number.

    References:
        Nobody et al. 2001, Scaling.
    """

    by: float = attrs.field(default=1.0)
    power: int = 1
    label: str | None = None
    bounds: tuple[float, ...] = attrs.field(default=(), converter=tuple)
    weights: dict[str, float] = attrs.field(factory=dict)
    rule: Any = halve
    dtype: torch.dtype = torch.float32
    path: Path = attrs.field(default=Path("a"), converter=Path)
    _private: int = 0

    @by.validator
    def _finite(self, attribute: Any, value: float) -> None:
        if value < 0:
            raise ValueError("by must not be negative")

    def clip(self, pairs: Any, dot: Any) -> Any: ...


@attrs.frozen
class NamedGradients:
    """A clip whose tuple option lacks a converter."""

    bounds: tuple[float, ...] = ()

    def clip(self, pairs: Any, dot: Any) -> Any: ...


@attrs.frozen
class Derived:
    """A clip with an option whose default depends on another one."""

    by: float = 1.0
    again: float | None = attrs.Factory(lambda self: self.by, takes_self=True)

    def clip(self, pairs: Any, dot: Any) -> Any: ...


@attrs.frozen
class Needy:
    must: float

    def clip(self, pairs: Any, dot: Any) -> Any: ...


class Forgetful:
    def __init__(self, by: float = 1.0) -> None:
        self.factor = by

    def clip(self, pairs: Any, dot: Any) -> Any: ...


class Broken:
    """A class that is no clip."""


def failing() -> Any:
    raise ImportError("no module named extra")


def make_scale(by: float = 3.0) -> Scale:
    return Scale(by=by)


ready = Scale(by=7.0)


class Mine(torch.optim.SGD):
    """My own descent."""


def namespace(clips: dict[str, Any], updates: dict[str, Any] | None = None) -> Any:
    @hookimpl
    def kfactk_clips() -> dict[str, Any]:
        return clips

    @hookimpl
    def kfactk_updates() -> dict[str, Any]:
        return updates or {}

    return types.SimpleNamespace(kfactk_clips=kfactk_clips, kfactk_updates=kfactk_updates)


CLIPS = {
    "scale": Scale,
    "raw": NamedGradients,
    "needy": Needy,
    "forgetful": Forgetful,
    "broken": Broken,
    "failing": failing,
    "made": make_scale,
}


@pytest.fixture
def ours() -> Registry:
    return ours_()


def ours_() -> Registry:
    made = Registry()
    made.register(namespace(CLIPS, {"mine": Mine}), "ours")
    return made


def test_resolve_takes_names_options_paths_classes_factories_and_instances(ours: Registry) -> None:
    scale = Scale(by=2.0)
    assert ours.resolve("clip", "scale") == Scale()
    assert ours.resolve("clip", {"name": "scale", "by": 2.0}) == scale
    assert ours.resolve("clip", types.MappingProxyType({"name": "scale", "by": 2.0})) == scale
    assert ours.resolve("clip", {"name": Scale, "by": 2.0}) == scale
    assert ours.resolve("clip", Scale) == Scale()
    assert ours.resolve("clip", functools.partial(Scale, by=2.0)) == scale
    assert ours.resolve("clip", make_scale) == Scale(by=3.0)
    assert ours.resolve("clip", "made") == Scale(by=3.0)
    assert ours.resolve("clip", scale) is scale
    assert Registry().resolve("clip", {"name": f"{HERE}:Scale", "by": 2.0}) == scale
    assert Registry().resolve("clip", f"{HERE}:ready") is ready


def test_resolve_reads_options_in_their_json_forms(ours: Registry) -> None:
    spec = {
        "name": "scale",
        "rule": {"callable": "math:sqrt"},
        "dtype": {"dtype": "float64"},
        "by": {"float": "inf"},
    }
    stage = ours.resolve("clip", spec)
    assert (stage.rule(4.0), stage.dtype, stage.by) == (2.0, torch.float64, float("inf"))


@pytest.mark.parametrize(
    ("spec", "kind", "parts"),
    [
        (
            "scal",
            UnknownStageError,
            ["no clip 'scal'", "Did you mean 'scale'", "Use one of: broken, failing"],
        ),
        ("mine", UnknownStageError, ["stage of the family update", "update='mine'"]),
        ("some.module.Name", UnknownStageError, ["'some.module:Name'"]),
        ({"by": 2.0}, OptionError, ["does not say which clip"]),
        ({"name": "scale", 3: 2.0}, OptionError, ["keys that are not text"]),
        (
            {"name": "scale", "bye": 2.0},
            OptionError,
            ["clip 'scale' of plugin 'ours'", "no option 'bye'", "'by'", "by, power, label"],
        ),
        ({"name": "scale", "damping": 2.0}, OptionError, ["argument of kfactk.build"]),
        (
            {"name": "scale", "by": -1},
            OptionError,
            ["refuses by=-1", "must not be negative", "by: float"],
        ),
        ("needy", OptionError, ["needs the option 'must'"]),
        (Needy, OptionError, ["needs the option 'must'"]),
        ("broken", PluginError, ["plugin 'ours'", "made a Broken", "lacks clip"]),
        (Broken, OptionError, ["clip Broken is no clip", "lacks clip"]),
        ("failing", PluginError, ["plugin 'ours'", "ImportError: no module named extra"]),
        (failing, OptionError, ["ImportError: no module named extra"]),
        (3, OptionError, ["clip 3 is no clip"]),
        (None, OptionError, ["lacks clip", "kfactk.stages.Clip"]),
        ({"name": ready, "by": 2.0}, OptionError, ["stage already", "by"]),
        ("no_such_package:Name", OptionError, ["No module named"]),
    ],
)
def test_resolve_names_what_is_wrong(
    ours: Registry, spec: Any, kind: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        ours.resolve("clip", spec)
    for part in parts:
        assert part in str(caught.value)
    assert type(caught.value) is kind


def test_resolve_chains_the_error_of_the_factory(ours: Registry) -> None:
    with pytest.raises(OptionError) as caught:
        ours.resolve("clip", {"name": "scale", "by": -1})
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    "call",
    [
        lambda r: r.resolve("clips", "x"),
        lambda r: r.stages("clips"),
        lambda r: r.describe("clips", ready),
    ],
)
def test_unknown_family_is_refused_with_near_names(ours: Registry, call: Any) -> None:
    with pytest.raises(UnknownStageError, match=r"no stage family 'clips'\. Did you mean 'clip'"):
        call(ours)


scales = st.builds(
    Scale,
    by=st.floats(0, allow_nan=False),
    power=st.integers(),
    label=st.none() | st.text(),
    bounds=st.lists(st.floats(allow_nan=False), max_size=3),
    weights=st.dictionaries(
        st.text().filter(lambda key: key not in {"callable", "dtype", "device", "float"}),
        st.floats(0, 1),
        max_size=3,
    ),
    rule=st.sampled_from([halve, abs, Scale, torch.nn.functional.relu]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    path=st.sampled_from(["a", "b/c"]),
    private=st.integers(0, 2),
)


@given(stage=scales, named=st.booleans())
def test_resolve_inverts_describe(stage: Scale, named: bool) -> None:
    registry = ours_() if named else Registry()
    text = json.dumps(registry.describe("clip", stage), allow_nan=False)
    assert registry.resolve("clip", json.loads(text)) == stage


@pytest.mark.parametrize(
    "stage", [Derived(), Derived(by=2.0), Derived(again=None), Derived(by=2.0, again=3.0)]
)
def test_describe_keeps_computed_defaults(stage: Derived) -> None:
    form = Registry().describe("clip", stage)
    assert Registry().resolve("clip", json.loads(json.dumps(form))) == stage


def test_describe_leaves_defaults_out(ours: Registry) -> None:
    assert ours.describe("clip", Scale()) == {"name": "scale"}
    assert ours.describe("clip", Scale(by=2, bounds=[1.0], private=4)) == {
        "name": "scale",
        "by": 2,
        "bounds": [1.0],
        "private": 4,
    }
    assert Registry().describe("clip", Scale(rule=abs)) == {
        "name": f"{HERE}:Scale",
        "rule": {"callable": "builtins:abs"},
    }
    assert ours.describe("clip", Needy(must=1.0)) == {"name": "needy", "must": 1.0}


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        (Scale(rule=lambda value: value), ["option 'rule' of clip 'scale'", "lambda", "top level"]),
        (Scale(by=torch.ones(())), ["option 'by' of clip 'scale'", "torch.Tensor"]),
        (Scale(label=float("nan")), ["option 'label'", "NaN"]),
        (
            NamedGradients(bounds=(1.0,)),
            ["option 'bounds' of clip 'raw'", "(1.0,)", "[1.0]", "converter=tuple"],
        ),
        (Forgetful(2.0), ["clip 'forgetful'", "does not keep its option 'by'"]),
    ],
)
def test_describe_names_what_has_no_json_form(ours: Registry, stage: Any, parts: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        ours.describe("clip", stage)
    for part in parts:
        assert part in str(caught.value)


def test_describe_needs_a_name_for_a_local_class(ours: Registry) -> None:
    @attrs.frozen
    class Local:
        def clip(self, pairs: Any, dot: Any) -> Any: ...

    with pytest.raises(OptionError, match=r"Local.*inside a function"):
        ours.describe("clip", Local())
    ours.register(namespace({"local": Local}), "notebook")
    assert ours.describe("clip", Local()) == {"name": "local"}


def test_resolve_makes_updates_of_torch_optimizers(ours: Registry) -> None:
    adagrad = TorchOptimizer(torch.optim.Adagrad, {"lr_decay": 0.1})
    assert ours.resolve("update", {"name": "torch.optim:Adagrad", "lr_decay": 0.1}) == adagrad
    assert ours.resolve("update", functools.partial(torch.optim.Adagrad, lr_decay=0.1)) == adagrad
    assert ours.resolve("update", torch.optim.Adagrad) == TorchOptimizer(torch.optim.Adagrad)
    assert ours.resolve("update", adagrad) is adagrad
    assert ours.resolve("update", {"name": "mine", "momentum": 0.5}) == TorchOptimizer(
        Mine, {"momentum": 0.5}
    )
    with pytest.raises(OptionError, match="LBFGS cannot be an update rule"):
        ours.resolve("update", "torch.optim:LBFGS")
    with pytest.raises(OptionError, match=r"no option 'lr'.*argument of kfactk.build"):
        ours.resolve("update", {"name": "torch.optim:SGD", "lr": 0.1})
    with pytest.raises(OptionError, match="it lacks clip"):
        ours.resolve(
            "clip", functools.partial(torch.optim.SGD, [torch.nn.Parameter(torch.ones(1))], lr=0.1)
        )


@pytest.mark.parametrize(
    ("update", "form"),
    [
        (TorchOptimizer(torch.optim.Adagrad), {"name": "torch.optim:Adagrad"}),
        (
            TorchOptimizer(torch.optim.Adam, {"betas": (0.8, 0.9)}),
            {"name": "torch.optim:Adam", "betas": [0.8, 0.9]},
        ),
        (TorchOptimizer(Mine, {"momentum": 0.5}), {"name": "mine", "momentum": 0.5}),
    ],
)
def test_resolve_inverts_describe_of_torch_optimizers(
    ours: Registry, update: TorchOptimizer, form: dict[str, Any]
) -> None:
    assert ours.describe("update", update) == form
    assert ours.resolve("update", json.loads(json.dumps(form))) == update


def load_conflict(site: Site) -> Registry:
    site.module(
        "first_plugin",
        CLIP.format(name="First", stage="shared")
        + "\n@hookimpl\ndef kfactk_updates(): return {'only': First}\n",
    )
    site.module("second_plugin", CLIP.format(name="Second", stage="shared"))
    site.install("a-dist", {"first": "first_plugin"}, version="1.5")
    site.install("b-dist", {"second": "second_plugin"}, version="2.5")
    with pytest.warns(KfactkWarning, match="2 plugins claim clip 'shared'"):
        return Registry.load(site.entry_points(), disabled=())


def test_name_of_two_plugins_is_refused_with_both_named(site: Site) -> None:
    found = load_conflict(site)
    with pytest.raises(PluginError) as caught:
        found.resolve("clip", "shared")
    for part in (
        "'first' (a-dist 1.5)",
        "'second' (b-dist 2.5)",
        f"{DISABLE}=second",
        "'first_plugin:First'",
        "'second_plugin:Second'",
    ):
        assert part in str(caught.value)
    assert [(info.plugin, info.conflict) for info in found.stages("clip")] == [
        ("first", True),
        ("second", True),
    ]
    assert [(info.name, info.conflict) for info in found.stages("update")] == [("only", False)]
    with pytest.raises(PluginError, match="lacks make"):
        found.resolve("update", {"name": "only", "by": 1.0})
    stage = found.resolve("clip", {"name": "first_plugin:First", "by": 2.0})
    assert found.describe("clip", stage) == {"name": "first_plugin:First", "by": 2.0}, (
        "a conflicting name would not resolve"
    )


def test_a_name_of_kfactks_own_stays_its_own(site: Site) -> None:
    site.module("own_plugin", CLIP.format(name="Own", stage="shared"))
    for name in ("stranger", "other"):
        site.module(f"{name}_plugin", CLIP.format(name=name.title(), stage="shared"))
        site.install(f"{name}-dist", {name: f"{name}_plugin"})
    site.install("kfactk", {"clip.shared": "own_plugin"})
    told = r"clip 'shared' is kfactk's own.* by 'other' .* and 'stranger' .*'stranger_plugin:Str"
    with pytest.warns(KfactkWarning, match=told):
        found = Registry.load(site.entry_points(), disabled=())
    stage = found.resolve("clip", {"name": "shared", "by": 2.0})
    assert type(stage).__name__ == "Own"
    assert found.describe("clip", stage) == {"name": "shared", "by": 2.0}
    other = found.resolve("clip", {"name": "stranger_plugin:Stranger", "by": 2.0})
    assert found.describe("clip", other)["name"] == "stranger_plugin:Stranger"
    assert {(info.plugin, info.conflict) for info in found.stages("clip")} == {
        ("clip.shared", False),
        ("stranger", True),
        ("other", True),
    }


def test_blocking_a_plugin_resolves_a_conflict(site: Site) -> None:
    load_conflict(site)
    found = Registry.load(site.entry_points(), disabled=["second"])
    assert type(found.resolve("clip", {"name": "shared", "by": 1.0})).__name__ == "First"


def test_same_factory_from_two_plugins_is_no_conflict(ours: Registry) -> None:
    ours.register(namespace({"scale": Scale}), "again")
    assert ours.resolve("clip", "scale") == Scale()
    ours.register(namespace({"scale": make_scale}), "other")
    with pytest.raises(PluginError, match="2 plugins claim clip 'scale'"):
        ours.resolve("clip", "scale")
    ours.unregister("other")
    assert ours.resolve("clip", "scale") == Scale()


def test_error_of_a_blocked_stage_names_the_pattern(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.module("first_plugin", CLIP.format(name="First", stage="first"))
    site.install("a-dist", {"clip.first": "first_plugin"})
    monkeypatch.setenv(DISABLE, "clip.f*")
    found = Registry.load(site.entry_points())
    with pytest.raises(
        UnknownStageError,
        match=r"provides it is blocked: 'clip.first' \(a-dist 1.0\): "
        r"by KFACTK_DISABLE_PLUGINS=clip.f\*",
    ):
        found.resolve("clip", "first")
    with pytest.raises(UnknownStageError, match="A plugin that is blocked may provide it"):
        found.resolve("clip", "unheard_of")
    (info,) = found.stages()
    assert (info.name, info.blocked, info.options) == ("first", f"{DISABLE}=clip.f*", ())


def test_error_of_a_missing_stage_names_failed_plugins(site: Site) -> None:
    site.module("bad_plugin", "import no_such_package_at_all")
    site.install("a-dist", {"clip.first": "bad_plugin", "whole": "bad_plugin:x"})
    with pytest.warns(KfactkWarning):
        found = Registry.load(site.entry_points(), disabled=())
    with pytest.raises(
        UnknownStageError,
        match=r"The plugin that provides it failed: 'clip.first'.*no_such_package_at_all'",
    ):
        found.resolve("clip", "first")
    with pytest.raises(
        UnknownStageError, match=r"A plugin that failed may provide it: 'clip.first'.*'whole'"
    ):
        found.resolve("clip", "second")


def test_stages_lists_what_plugins_provide(site: Site) -> None:
    site.module("first_plugin", CLIP.format(name="First", stage="first"))
    site.install("a-dist", {"one": "first_plugin"}, version="1.5")
    found = Registry.load(site.entry_points(), disabled=())
    (info,) = found.stages()
    assert (info.family, info.name, info.plugin, info.distribution, info.version) == (
        "clip",
        "first",
        "one",
        "a-dist",
        "1.5",
    )
    assert (
        info.paper
        == "Someone et al. 1999, A paper about dividing, arXiv:9901.00001; and another one 2001"
    )
    assert info.summary == "Divide by a number."
    by, mode = info.options
    assert (by.name, by.annotation, by.doc) == ("by", "float", "What to divide by, a plain number.")
    assert (mode.name, mode.default) == ("mode", "all")
    assert [plugin.name for plugin in found.plugins()] == ["one"]


def test_stages_lists_the_options_of_an_optimizer_class(ours: Registry) -> None:
    (info,) = ours.stages("update")
    assert info.summary == "My own descent."
    assert "momentum" in [option.name for option in info.options]
    assert not {"params", "lr", "weight_decay"} & {option.name for option in info.options}


def test_hook_calls_reach_plugins() -> None:
    calls = []

    @hookimpl
    def kfactk_stepped(step: int) -> None:
        calls.append(step)

    made = Registry()
    made.register(types.SimpleNamespace(kfactk_stepped=kfactk_stepped), "watcher")
    made.hook.kfactk_stepped(optimizer=None, step=3, metrics={})
    assert calls == [3]


def test_error_of_an_empty_registry_says_so() -> None:
    with pytest.raises(UnknownStageError, match="No loaded plugin provides any basis"):
        Registry.load([], disabled=()).resolve("basis", "any")


def test_registry_of_the_process_is_loaded_once_from_entry_points() -> None:
    assert registry() is registry()
    installed = {entry.name for entry in importlib.metadata.entry_points(group="kfactk")}
    assert {plugin.name for plugin in registry().plugins()} == installed
    assert {info.family for info in registry().stages()} <= set(STAGE_HOOKS)


class Apart:
    """Has members of a basis, and is none."""

    requires = frozenset({"A"})
    decompose = operator = None


class Half(Basis):
    requires = frozenset({"A"})


class Whole(Kfac):
    def factors(self, layer: Any, samples: Any) -> Any:
        return {}


@pytest.mark.parametrize(
    ("family", "stage", "says"),
    [
        ("basis", Apart, "basis Apart is no basis: it does not derive from kfactk.Basis. Give"),
        (
            "curvature",
            Apart(),
            "it does not derive from kfactk.Curvature, and lacks provides, unsupported, matrix",
        ),
        ("basis", Half, "basis Half cannot be made: its class does not define decompose, operator"),
        (
            "curvature",
            Whole,
            "curvature Whole is no curvature: it replaces `factors`, which is the sum of "
            "`input_factors` and `gradient_factors`; replace these instead",
        ),
    ],
)
def test_curvatures_and_bases_derive_from_their_base_class(
    family: str, stage: Any, says: str
) -> None:
    with pytest.raises(OptionError) as caught:
        Registry().resolve(family, stage)
    assert says in str(caught.value)
    assert f"`kfactk.stages.{family.capitalize()}` documents" in str(caught.value)


def test_a_plugin_whose_basis_is_none_is_blamed() -> None:
    @hookimpl
    def kfactk_bases() -> dict[str, Any]:
        return {"apart": Apart, "half": Half}

    fresh = Registry()
    fresh.register(types.SimpleNamespace(kfactk_bases=kfactk_bases), name="ours")
    with pytest.raises(PluginError, match="made a Apart, which does not derive from"):
        fresh.resolve("basis", "apart")
    with pytest.raises(PluginError, match="cannot be made: its class does not define dec"):
        fresh.resolve("basis", "half")
