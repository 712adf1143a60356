"""Whether our stages of a family take the arguments that its protocol gives their methods."""

from __future__ import annotations

import inspect
from typing import Any

from kfactk.registry.hookspecs import PROJECT
from kfactk.registry.inspection import PROTOCOLS
from kfactk.registry.registry import registry


def arguments(method: Any) -> list[tuple[str, Any]]:
    """Return the name and the kind of each argument."""
    return [(each.name, each.kind) for each in inspect.signature(method).parameters.values()]


def unlike(protocol: type[Any], stage: type[Any]) -> list[str]:
    """Return the members of a protocol that a class has otherwise: names, kinds, or at all."""
    wrong = []
    for name, member in vars(protocol).items():
        if name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        found = inspect.getattr_static(stage, name, None)
        if inspect.isfunction(member):
            same = inspect.isfunction(found) and arguments(found) == arguments(member)
        else:
            same = found is not None and not inspect.isfunction(found)
        wrong += [] if same else [f"{stage.__name__}.{name}"]
    return wrong


def check(family: str) -> None:
    """Check that all our stages of a family have the members of its protocol."""
    infos = [info for info in registry().stages(family) if info.distribution == PROJECT]
    stages = [registry().resolve(family, info.name) for info in infos]
    assert stages, f"there is no {family}"
    wrong = [member for stage in stages for member in unlike(PROTOCOLS[family], type(stage))]
    assert not wrong, f"the protocol of a {family} has other arguments: {wrong}"
