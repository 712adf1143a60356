"""Which parameter is meant where a wrapper has put another one in its place.

`fully_shard` replaces each parameter by its sharded form for good. During a forward it puts a
gathered form in that place: until the module's forward ends, until its backward ends, or until the
next forward. A parameter on the meta device is replaced by a real one. An optimizer trains the
sharded or real parameter throughout, and reads the `.grad` of that one.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from kfactk.distributed.sharding import is_sharded
from kfactk.errors import KfactkError
from kfactk.preconditioner.state import is_ours
from kfactk.stages import owner_of


class ParameterTracker:
    """The trained parameters of one model, by the place where they were last seen.

    Args:
        model: The model.

    Attributes:
        signature: Names and ids of all modules and parameters; it changes when the model's
            structure does.

    Example:
        >>> model = nn.Linear(2, 2, device="meta")
        >>> tracker = ParameterTracker(model)
        >>> made = model.to_empty(device="cpu")
        >>> [(old.device.type, new.device.type) for old, new in tracker.look()]
        [('meta', 'cpu'), ('meta', 'cpu')]
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.signature: tuple[int | str, ...] = ()
        self._known: dict[tuple[nn.Module, str], nn.Parameter] = {}
        self._seen: list[list[nn.Parameter]] = []
        self.look()

    def look(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Look at all places again.

        Returns:
            The old and the new parameter of each place where another form of the same parameter
            has come for good.
        """
        replaced, known_at = [], self._known
        modules = _modules(self._model)
        self._divided = _divided(modules)
        signature: list[int | str] = []
        for module in modules:
            signature.append(id(module))
            signature += module._modules.keys()
            if module._parameters and module is not self._model:
                # what computes may be replaced; that of the root wrappers replace for a while
                signature += id(type(module)), id(vars(module).get("forward"))
            signature += module._parameters.keys()
            for name, here in module._parameters.items():
                if here is None:
                    signature.append(0)
                    continue
                known = known_at.get((module, name))
                if here is known or (known is not None and self._stands_in(here, known)):
                    signature.append(id(known))
                    continue
                if known is not None and self._succeeds(here, known):
                    replaced.append((known, here))
                known_at[module, name] = here
                signature.append(id(here))
        if tuple(signature) != self.signature:
            there = set(modules)
            self._known = {place: p for place, p in known_at.items() if place[0] in there}
            self.signature = tuple(signature)
        return replaced

    def follow(
        self, groups: Sequence[dict[str, Any]], state: Mapping[Any, Any]
    ) -> dict[nn.Parameter, nn.Parameter]:
        """Keep parameter groups and model together: a parameter replaced in one is in the other.

        Args:
            groups: Parameter groups of an optimizer.
            state: What the optimizer keeps, by parameter.

        Returns:
            By each old parameter, the new one that has come into the groups.

        Raises:
            KfactkError: The update rule has a state of a replaced parameter already.
        """
        if any(
            len(before) != len(group["params"])
            or any(map(operator.is_not, before, group["params"]))
            for before, group in zip(self._seen, groups, strict=False)
        ):
            self._follow_groups(groups)
        replaced = {id(old): (old, new) for old, new in self.look()}
        for group in groups if replaced else ():
            if any(id(p) in replaced and _kept(state.get(p)) for p in group["params"]):
                raise KfactkError(
                    "parameters were replaced (by fully_shard, say) after the optimizer's first "
                    "step, and its state belongs to the old ones. Shard the model before training. "
                    "Or save state_dict(), shard, bind anew, and load it through "
                    "torch.distributed.checkpoint.state_dict."
                )
            group["params"][:] = [replaced.get(id(p), (p, p))[1] for p in group["params"]]
        self._seen = [list(group["params"]) for group in groups]
        return dict(replaced.values())

    def _follow_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Note where a parameter was replaced in its group, before it is in the model.

        One that was moved, taken out or put in beside others has not replaced any.
        """
        before = {id(p) for params in self._seen for p in params}
        after = {id(p) for group in groups for p in group["params"]}
        here = {id(p) for p in self._known.values()}
        for params, group in zip(self._seen, groups, strict=False):
            for old, new in zip(params, group["params"], strict=False):
                moved = id(old) in after or id(new) in before or id(new) in here
                if old is not new and not moved and _alike(old, new):
                    places = [place for place, known in self._known.items() if known is old]
                    self._known.update(dict.fromkeys(places, new))

    def at(self, module: nn.Module, name: str) -> nn.Parameter | None:
        """Return the trained parameter that is meant at one place, or inside: "out_proj.weight"."""
        module, name = owner_of(module, name)
        here = module._parameters.get(name)
        if not self._divided:
            return here
        known = self._known.get((module, name))
        stands_in = here is not None and known is not None and self._stands_in(here, known)
        return known if stands_in else here

    def _stands_in(self, here: nn.Parameter, known: nn.Parameter) -> bool:
        """Return whether `here` is there for a while only.

        It is a gathered form of `known`, or of its sharded form that has not been seen yet.
        """
        return (
            self._divided
            and here is not known
            and _alike(here, known)
            and not self._succeeds(here, known)
        )

    def _succeeds(self, new: nn.Parameter, old: nn.Parameter) -> bool:
        """Return whether `new` is `old` after sharding, or made real."""
        sharded = is_sharded(new)
        made_real = old.is_meta and not new.is_meta and (sharded or not self._divided)
        return _alike(new, old) and (made_real or (sharded and not is_sharded(old)))


def _kept(entry: Any) -> bool:
    """Return whether an entry of an optimizer's state holds anything of the update rule."""
    ours = isinstance(entry, Mapping) and bool(entry) and all(map(is_ours, entry))
    return entry is not None and not ours


def _modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules in a fixed order, faster than `model.modules()`: each step asks."""
    found: dict[nn.Module, None] = {}
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is not None and module not in found:
            found[module] = None
            stack.extend(module._modules.values())
    return list(found)


def _divided(modules: Sequence[nn.Module]) -> bool:
    """Return whether `fully_shard` was applied to one of the modules."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in modules)


def _alike(one: nn.Parameter, other: nn.Parameter) -> bool:
    lazy = isinstance(one, UninitializedParameter) or isinstance(other, UninitializedParameter)
    return not lazy and one.shape == other.shape
