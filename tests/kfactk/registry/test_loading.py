"""Plugins load one by one: one that fails is named and stops no other."""

import re
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from kfactk import PLUGIN_API, KfactkWarning, PluginError
from kfactk._version import __version__
from kfactk.registry import loading
from kfactk.registry.hookspecs import hookimpl
from kfactk.registry.loading import DISABLE, PluginInfo, Plugins
from tests.distributions import CLIP, Site, site as site

GOOD = CLIP.format(name="Good", stage="good")


def load(site: Site, disabled: tuple[str, ...] = ()) -> tuple[dict[str, PluginInfo], list[str]]:
    """Return information on each plugin, and the warnings."""
    plugins = Plugins(disabled)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plugins.load_entry_points(site.entry_points())
    assert all(issubclass(warning.category, KfactkWarning) for warning in caught), [
        str(warning.message) for warning in caught
    ]
    return {record.name: record.info() for record in plugins.records}, [
        str(warning.message) for warning in caught
    ]


def test_correct_plugin_loads_without_a_warning(site: Site) -> None:
    site.module("good_plugin", GOOD)
    site.install("good-dist", {"good": "good_plugin"}, version="2.5")
    infos, messages = load(site)
    assert infos == {
        "good": PluginInfo(
            "good", "good-dist", "2.5", "good_plugin", ("clip.good",), "loaded", "", 1
        )
    }
    assert messages == []


FAULTS: dict[str, tuple[str, str]] = {
    "import": ("import no_such_package_at_all", "No module named 'no_such_package_at_all'"),
    "raises": ("raise RuntimeError('boom')", "RuntimeError: boom"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "syntax": ("def (", "SyntaxError"),
    "empty": ("", "no function marked with @kfactk.hookimpl"),
    "misspelt": (
        "@hookimpl\ndef kfactk_clip(): return {}",
        "no hook 'kfactk_clip'. Did you mean 'kfactk_clips'",
    ),
    "far": ("@hookimpl\ndef zzz(): return {}", "the hooks are kfactk_curvatures, kfactk_bases"),
    "unmarked": (
        "def kfactk_clips(): return {}",
        "'kfactk_clips' is not marked with @kfactk.hookimpl",
    ),
    "unmarked and misspelt": (
        "def kfactk_clip(): return {}",
        "nor does kfactk have that hook. Did you mean 'kfactk_clips'",
    ),
    "signature": ("@hookimpl\ndef kfactk_clips(config): return {}", "'config'"),
    "hook raises": (
        "@hookimpl\ndef kfactk_clips(): return 1 / 0",
        "kfactk_clips raised ZeroDivisionError: division by zero",
    ),
    "no mapping": (
        "@hookimpl\ndef kfactk_clips(): return ['a']",
        "kfactk_clips returned list, not a mapping",
    ),
    "nothing": (
        "@hookimpl\ndef kfactk_clips(): pass",
        "kfactk_clips returned NoneType, not a mapping",
    ),
    "wrapper": (
        "@hookimpl(wrapper=True)\ndef kfactk_clips(): return (yield)",
        "returned generator, not a mapping",
    ),
    "odd name": (
        "@hookimpl\ndef kfactk_clips(): return {'a:b': dict}",
        "a name is text without a colon",
    ),
    "no factory": (
        "@hookimpl\ndef kfactk_clips(): return {'a': 3}",
        "clip 'a' is 3, which cannot be called",
    ),
    "options raise": (
        "@attrs.frozen\nclass C:\n    a: int = attrs.field(factory=lambda: 1 / 0)\n"
        "@hookimpl\ndef kfactk_clips(): return {'a': C}",
        "clip 'a' has options that cannot be read: ZeroDivisionError",
    ),
    "option called name": (
        "class C:\n    def __init__(self, name): ...\n"
        "@hookimpl\ndef kfactk_clips(): return {'a': C}",
        "an option 'name'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_plugin_is_named_once_and_others_work(site: Site, fault: str) -> None:
    source, problem = FAULTS[fault]
    site.module("bad_plugin", source)
    site.module("good_plugin", GOOD)
    site.install("bad-dist", {"bad": "bad_plugin"}, version="0.3")
    site.install("good-dist", {"good": "good_plugin"})
    infos, messages = load(site)
    assert infos["good"].status == "loaded"
    assert infos["good"].stages == ("clip.good",)
    assert (infos["bad"].status, infos["bad"].stages) == ("failed", ())
    assert (infos["bad"].distribution, infos["bad"].version) == ("bad-dist", "0.3")
    assert problem in infos["bad"].error
    (message,) = messages
    for part in ("'bad' (bad-dist 0.3)", problem, "`pip install -U bad-dist`", f"{DISABLE}=bad"):
        assert part in message


def test_entry_point_without_its_attribute_fails(site: Site) -> None:
    site.module("good_plugin", GOOD)
    site.install("bad-dist", {"bad": "good_plugin:missing"})
    infos, _ = load(site)
    assert "AttributeError" in infos["bad"].error


def test_failed_plugin_keeps_the_stages_that_work(site: Site) -> None:
    site.module("half_plugin", GOOD + "\n@hookimpl\ndef kfactk_bases(): raise KeyError('x')\n")
    site.install("half-dist", {"half": "half_plugin"})
    infos, messages = load(site)
    assert infos["half"].status == "failed"
    assert infos["half"].stages == ("clip.good",)
    assert len(messages) == 1


def test_plugin_may_have_helpers_and_optional_hooks(site: Site) -> None:
    optional = (
        "\n@hookimpl(optionalhook=True)\ndef kfactk_of_the_future(): return {}\n"
        "def _kfactk_helper(): ...\nkfactk_number = 3\n"
    )
    site.module(
        "good_plugin", GOOD + optional + "from kfactk.registry.hookspecs import kfactk_bases\n"
    )
    site.install("good-dist", {"good": "good_plugin"})
    infos, messages = load(site)
    assert infos["good"].status == "loaded", infos
    assert messages == []


def test_plugins_of_the_same_name_both_load_with_a_warning(site: Site) -> None:
    site.module("good_plugin", GOOD)
    site.module("other_plugin", CLIP.format(name="Other", stage="other"))
    site.install("a-dist", {"same": "good_plugin"})
    site.install("b-dist", {"same": "other_plugin"}, version="7")
    plugins = Plugins()
    with pytest.warns(KfactkWarning, match="named 'same'") as caught:
        plugins.load_entry_points(site.entry_points())
    (message,) = [str(warning.message) for warning in caught]
    assert "a-dist 1.0: good_plugin" in message
    assert "b-dist 7: other_plugin" in message
    assert [record.info().stages for record in plugins.records] == [("clip.good",), ("clip.other",)]


def test_blocking_one_of_two_plugins_resolves_a_duplicate_name(site: Site) -> None:
    site.module("good_plugin", GOOD)
    site.module("other_plugin", CLIP.format(name="Other", stage="other"))
    site.install("a-dist", {"same": "good_plugin"})
    site.install("b-dist", {"same": "other_plugin"})
    assert load(site, ("b-dist",))[1] == []


def test_plugin_found_twice_loads_once(site: Site) -> None:
    site.module("good_plugin", GOOD)
    site.install("good-dist", {"good": "good_plugin"})
    site.install("good-dist", {"good": "good_plugin"}, version="0.9")
    assert len(site.entry_points()) == 2
    infos, messages = load(site)
    assert list(infos) == ["good"]
    assert messages == []


def test_second_name_of_a_module_fails(site: Site) -> None:
    site.module("good_plugin", GOOD)
    site.install("good-dist", {"first": "good_plugin", "second": "good_plugin"})
    infos, messages = load(site)
    assert {info.status for info in infos.values()} == {"loaded", "failed"}
    assert "same object as plugin 'first'" in messages[0]


@pytest.mark.parametrize(
    ("declared", "problem", "upgrade"),
    [
        (
            f"{PLUGIN_API + 1}",
            f"for version {PLUGIN_API + 1} of the plugin API, and this kfactk {__version__} "
            "supports version 1: a newer kfactk is needed",
            "kfactk",
        ),
        (
            "0",
            "for version 0 of the plugin API.* supports version 1: a newer other-dist is needed",
            "other-dist",
        ),
        ("-3", "a newer other-dist is needed", "other-dist"),
        ("'1'", "kfactk_api is '1', not an integer: write kfactk_api = 1", "other-dist"),
        ("1.0", "kfactk_api is 1.0, not an integer", "other-dist"),
        ("True", "kfactk_api is True, not an integer", "other-dist"),
        ("None", "kfactk_api is None, not an integer", "other-dist"),
    ],
)
def test_plugin_of_another_api_is_refused(
    site: Site, declared: str, problem: str, upgrade: str
) -> None:
    site.module("other_plugin", f"kfactk_api = {declared}\n{GOOD}")
    site.module("good_plugin", GOOD)
    site.install("other-dist", {"other": "other_plugin"})
    site.install("good-dist", {"good": "good_plugin"})
    infos, messages = load(site)
    assert (infos["other"].status, infos["other"].stages, infos["good"].status) == (
        "failed",
        (),
        "loaded",
    )
    assert re.search(problem, infos["other"].error)
    (message,) = messages
    assert message.startswith(
        f"The kfactk plugin 'other' (other-dist 1.0) failed: {infos['other'].error}. Try `pip "
        f"install -U {upgrade}`"
    )


def test_plugin_may_declare_its_api(site: Site) -> None:
    site.module("good_plugin", f"kfactk_api = {PLUGIN_API}\n{GOOD}")
    site.install("good-dist", {"good": "good_plugin"})
    infos, messages = load(site)
    assert (infos["good"].status, infos["good"].api, messages) == ("loaded", PLUGIN_API, [])


def test_plugins_of_supported_older_apis_load(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PLUGIN_API", 3)
    monkeypatch.setattr(loading, "SUPPORTED_APIS", range(2, 4))
    for version in (1, 2, 3, 4):
        site.module(
            f"plugin_{version}",
            f"kfactk_api = {version}\n" + CLIP.format(name="Clip", stage=f"clip{version}"),
        )
        site.install(f"dist-{version}", {f"p{version}": f"plugin_{version}"})
    site.module("plugin_silent", GOOD)
    site.install("dist-silent", {"silent": "plugin_silent"})
    infos, _ = load(site)
    assert {name: (info.status, info.api) for name, info in infos.items()} == {
        "p1": ("failed", 1),
        "p2": ("loaded", 2),
        "p3": ("loaded", 3),
        "p4": ("failed", 4),
        "silent": ("failed", 1),
    }
    assert "supports versions 2 to 3" in infos["p4"].error


def test_register_refuses_an_object_of_another_api() -> None:
    class Mine:
        kfactk_api = 7

        @hookimpl
        def kfactk_clips(self) -> dict[str, type]:
            raise AssertionError("asked for its stages")

    plugins = Plugins()
    for declared, problem in [
        (7, "written for version 7 .*a newer kfactk is needed. Try `pip install -U kfactk`"),
        (0, "a newer plugin"),
        ("", "''"),
    ]:
        Mine.kfactk_api = declared  # type: ignore[assignment]
        with pytest.raises(PluginError, match=problem):
            plugins.register(Mine())
    assert plugins.records == []

    class Raising(Mine):
        @property
        def kfactk_api(self) -> int:  # type: ignore[override]
            raise ValueError("boom")

    with pytest.raises(PluginError, match="its kfactk_api cannot be read: ValueError: boom"):
        plugins.register(Raising())


@pytest.mark.parametrize("pattern", ["bad", "bad-dist", "Bad_Dist", "ba*", "bad-?ist"])
def test_blocked_plugin_is_not_imported(site: Site, pattern: str) -> None:
    site.module("bad_plugin", "raise RuntimeError('boom')")
    site.module("good_plugin", GOOD)
    site.install("bad-dist", {"bad": "bad_plugin"})
    site.install("good-dist", {"good": "good_plugin"})
    infos, messages = load(site, (f" {pattern} ", ""))
    assert infos["bad"].status == "blocked"
    assert infos["bad"].error == f"blocked by {DISABLE}={pattern}"
    assert infos["good"].status == "loaded"
    assert messages == []
    assert "bad_plugin" not in sys.modules


def test_pattern_that_blocks_nothing_warns_with_near_names(site: Site) -> None:
    site.module("good_plugin", GOOD)
    site.install("good-dist", {"good": "good_plugin"})
    infos, messages = load(site, ("godo", "good-dist", "good"))
    assert infos["good"].status == "blocked"
    (message,) = messages
    assert "'godo'" in message
    assert "Did you mean 'good'" in message


def namespace(**functions: Callable[..., Any]) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        **{name: hookimpl(function) for name, function in functions.items()}
    )


class Clip:
    def clip(self, pairs: Any, dot: Any) -> Any: ...


def test_register_and_unregister_plugins_of_this_process() -> None:
    plugins = Plugins()
    mine = namespace(kfactk_clips=lambda: {"mine": Clip})
    assert plugins.register(mine, "mine") == "mine"
    assert [record.info() for record in plugins.records] == [
        PluginInfo("mine", None, None, "SimpleNamespace", ("clip.mine",), "loaded", "", 1)
    ]
    with pytest.raises(PluginError, match="unregister\\('mine'\\)"):
        plugins.register(namespace(kfactk_clips=lambda: {"mine": Clip}), "mine")
    plugins.unregister(mine)
    assert plugins.records == []
    plugins.register(mine, "mine")
    plugins.unregister("mine")
    with pytest.raises(PluginError, match="No plugin 'mine'"):
        plugins.unregister("mine")


def test_register_takes_an_object_with_methods() -> None:
    class Mine:
        @hookimpl
        def kfactk_clips(self) -> dict[str, type]:
            return {"mine": Clip}

    plugins = Plugins()
    assert plugins.register(Mine()) == "Mine"
    assert plugins.records[0].info().stages == ("clip.mine",)


@pytest.mark.parametrize(
    ("functions", "problem"),
    [
        ({}, "no function marked"),
        ({"kfactk_clip": lambda: {}}, "Did you mean 'kfactk_clips'"),
        ({"kfactk_clips": lambda: 3}, "returned int"),
        ({"kfactk_clips": lambda extra: {}}, "extra"),
    ],
)
def test_register_of_a_faulty_plugin_raises_and_leaves_nothing(
    functions: dict[str, Any], problem: str
) -> None:
    plugins = Plugins()
    faulty = namespace(kfactk_stepped=lambda step: None, **functions) if functions else namespace()
    with pytest.raises(PluginError, match=problem):
        plugins.register(faulty, "faulty")
    assert plugins.records == []
    assert not plugins.manager.is_registered(faulty)
    assert plugins.manager.hook.kfactk_stepped.get_hookimpls() == []


def test_register_refuses_a_blocked_name() -> None:
    with pytest.raises(PluginError, match=f"{DISABLE}=mi\\*"):
        Plugins(["mi*"]).register(namespace(kfactk_clips=lambda: {}), "mine")
