"""Which parameter is meant where a wrapper puts another one in its place.

`fully_shard` replaces each parameter by its sharded form, once and for all, and during a forward puts a gathered form in the place of
that: until the module's forward is over, until its backward is, or until the next forward, as it was told. Parameters made on the meta
device are replaced by real ones. The parameter that an optimizer trains, and whose `.grad` counts, is the sharded or real one throughout.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from kfactk.distributed.sharding import is_sharded
from kfactk.errors import KfactkError


class ParameterTracker:
    """The parameters that are meant at the places of one model, as they were last seen there.

    Args:
        model: The model.

    Example:
        >>> model = nn.Linear(2, 2, device="meta")
        >>> originals = ParameterTracker(model)
        >>> made = model.to_empty(device="cpu")
        >>> [(old.device.type, new.device.type) for old, new in originals.look()]
        [('meta', 'cpu'), ('meta', 'cpu')]
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[tuple[nn.Module, str], nn.Parameter] = {}
        self._seen: list[list[nn.Parameter]] = []
        self.look()

    def look(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Look at all places again, and tell what was replaced for good by another form of the same: old and new."""
        replaced, known_at = [], self._known
        modules = _modules(self._model)
        self._divided = _divided(modules)
        for module in modules:
            for name, here in module._parameters.items():
                known = known_at.get((module, name))
                if (
                    here is known
                    or here is None
                    or (known is not None and self._stands_in(here, known))
                ):
                    continue
                if known is not None and self._succeeds(here, known):
                    replaced.append((known, here))
                known_at[module, name] = here
        return replaced

    def follow(self, groups: Sequence[dict[str, Any]], state: Mapping[Any, Any]) -> None:
        """Keep parameter groups and model together: what was replaced in the one, for good, is replaced in the other.

        Args:
            groups: Parameter groups of an optimizer, the same ones each time.
            state: What the update rule keeps, by parameter.

        Raises:
            KfactkError: What was replaced has a state already.
        """
        for before, group in zip(self._seen, groups, strict=False):
            for old, new in zip(before, group["params"], strict=False):
                if old is not new and _alike(old, new):
                    self._known.update(
                        {place: new for place, known in self._known.items() if known is old}
                    )
        replaced = {id(old): new for old, new in self.look()}
        for group in groups if replaced else ():
            if any(
                id(parameter) in replaced and parameter in state for parameter in group["params"]
            ):
                raise KfactkError(
                    "parameters were replaced (by fully_shard, say) after the optimizer's first step, and its state is that of the old "
                    "ones. Shard the model before training; or save state_dict(), shard, bind anew and load it through "
                    "torch.distributed.checkpoint.state_dict."
                )
            group["params"][:] = [
                replaced.get(id(parameter), parameter) for parameter in group["params"]
            ]
        self._seen = [list(group["params"]) for group in groups]

    def at(self, module: nn.Module, name: str) -> nn.Parameter | None:
        """The parameter that is meant at one place."""
        here = module._parameters.get(name)
        if not self._divided:
            return here
        known = self._known.get((module, name))
        return (
            known
            if here is not None and known is not None and self._stands_in(here, known)
            else here
        )

    def _stands_in(self, here: nn.Parameter, known: nn.Parameter) -> bool:
        """Whether `here` is there for a while only: a gathered form of `known`, or of its sharded form that has not been seen yet."""
        return (
            self._divided
            and here is not known
            and _alike(here, known)
            and not self._succeeds(here, known)
        )

    def _succeeds(self, new: nn.Parameter, old: nn.Parameter) -> bool:
        """Whether `new` is `old` sharded or made real."""
        sharded = is_sharded(new)
        made_real = old.is_meta and not new.is_meta and (sharded or not self._divided)
        return _alike(new, old) and (made_real or (sharded and not is_sharded(old)))


def _modules(model: nn.Module) -> list[nn.Module]:
    """What `model.modules()` gives, in another order and in a fraction of the time: it is asked for at every step."""
    found: dict[nn.Module, None] = {}
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is not None and module not in found:
            found[module] = None
            stack.extend(module._modules.values())
    return list(found)


def _divided(modules: Sequence[nn.Module]) -> bool:
    """Whether `fully_shard` has had a hand in one of these."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and any(isinstance(each, module.FSDPModule) for each in modules)


def _alike(one: nn.Parameter, other: nn.Parameter) -> bool:
    return (
        not isinstance(one, UninitializedParameter)
        and not isinstance(other, UninitializedParameter)
        and one.shape == other.shape
    )
