"""The hooks: one for each stage family, all specified and documented with an example."""

import inspect

import pluggy

from kfactk import PLUGIN_API, build
from kfactk.registry import hookspecs
from kfactk.registry.hookspecs import PROJECT, STAGE_HOOKS, SUPPORTED_APIS, UNDECLARED_API

HOOKS = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("kfactk_")}


def test_every_stage_family_has_a_hook_and_is_an_argument_of_build() -> None:
    assert set(STAGE_HOOKS.values()) <= HOOKS.keys()
    assert STAGE_HOOKS.keys() <= inspect.signature(build).parameters.keys()


def test_pluggy_knows_every_hook() -> None:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    assert all(getattr(manager.hook, name).has_spec() for name in HOOKS)


def test_every_hook_shows_how_to_implement_it() -> None:
    for name, hook in HOOKS.items():
        assert f">>> @hookimpl\n... def {name}(" in (inspect.getdoc(hook) or "").replace(
            "    ", ""
        ), name


def test_own_and_undeclared_apis_are_supported() -> None:
    assert PLUGIN_API in SUPPORTED_APIS
    assert UNDECLARED_API in SUPPORTED_APIS
