"""Use any `torch.optim.Optimizer` class as an update rule."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import attrs
import torch

from kfactk.errors import OptionError, near_names
from kfactk.options import USUAL_DAMPING

UNSUPPORTED: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.LBFGS: "it evaluates the loss several times a step, at points that have no "
    "preconditioned gradient",
    torch.optim.SparseAdam: "it takes sparse gradients only, and preconditioned gradients are "
    "dense",
}
"""Classes that cannot be an update rule, and why."""
RECIPE_ARGUMENTS = ("lr", "weight_decay")
"""Arguments that `build` and the parameter groups decide."""


def _check_class(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    name, why = repr(value), ""
    if not (isinstance(value, type) and issubclass(value, torch.optim.Optimizer)):
        why = "it is not a class derived from torch.optim.Optimizer"
    else:
        name = value.__name__
        why = next((why for kind, why in UNSUPPORTED.items() if issubclass(value, kind)), "")
        closure = inspect.signature(value.step).parameters.get("closure")
        if not why and closure is not None and closure.default is closure.empty:
            why = "its step needs a closure, which it would call on the plain gradients"
        if not why and not {"lr", "**"} & set(_arguments(value)):
            why = "it takes no `lr`, which clips and schedulers rely on"
    if why:
        raise OptionError(
            f"{name} cannot be an update rule: {why}. Use another, such as torch.optim.SGD."
        )


def _check_options(
    instance: TorchOptimizer, attribute: attrs.Attribute[Any], value: Mapping[str, Any]
) -> None:
    arguments = _arguments(instance.optimizer)
    options = [name for name in arguments if name not in ("params", "**", *RECIPE_ARGUMENTS)]
    update = f"Update {instance.optimizer.__name__}"
    for name in value:
        if name in RECIPE_ARGUMENTS:
            raise OptionError(
                f"{update} takes no option {name!r}: give it to build, or to a parameter group."
            )
        if name == "params" or (name not in options and "**" not in arguments):
            raise OptionError(
                f"{update} has no option {name!r}.{near_names(str(name), options)} Use one of: "
                f"{', '.join(options)}."
            )


def _as_tuples(value: Any) -> Any:
    """Return nested lists as tuples, so that betas read from JSON equal those written."""
    if isinstance(value, list | tuple):
        return tuple(_as_tuples(item) for item in value)
    return value


def _frozen_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _as_tuples(value) for name, value in options.items()}


@attrs.frozen
class TorchOptimizer:
    """Take the step of a `torch.optim.Optimizer` class on preconditioned gradients.

    Args:
        optimizer: The class. It must take `lr`, and step on dense gradients that are computed once.
        options: Its other keyword arguments; `build` and the parameter groups give `lr` and
            `weight_decay`. Lists become tuples.

    Raises:
        OptionError: The class cannot take the step (LBFGS, SparseAdam), or lacks an option.

    Example:
        >>> parameter = torch.nn.Parameter(torch.ones(1))
        >>> update = TorchOptimizer(torch.optim.SGD, {"momentum": 0.9})
        >>> optimizer = update.make([{"params": [parameter], "lr": 0.5}], lr=0.1, weight_decay=0.0)
        >>> [group] = optimizer.param_groups
        >>> type(optimizer).__name__, group["lr"], group["momentum"]
        ('SGD', 0.5, 0.9)
    """

    optimizer: type[torch.optim.Optimizer] = attrs.field(validator=_check_class)
    options: Mapping[str, Any] = attrs.field(
        factory=dict, converter=_frozen_options, validator=_check_options, hash=False
    )

    @property
    def default_damping(self) -> float:
        """tau where the recipe gives none: more for `torch.optim.SGD`, which divides by nothing."""
        if not issubclass(self.optimizer, torch.optim.SGD):
            return USUAL_DAMPING
        return 0.03 if self.options.get("momentum") else 0.01

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Return the optimiser whose `param_groups` are the dicts in `groups`, not copies of them.

        Args:
            groups: Dicts with "params" and optional values of other options.
            lr: Learning rate of groups without their own.
            weight_decay: Weight decay of groups without their own.

        Raises:
            OptionError: The class has no weight decay though one is set, it refuses its arguments,
                or it copies `groups`.
        """
        name, arguments = self.optimizer.__name__, _arguments(self.optimizer)
        given = {"lr": lr, **self.options}
        if "weight_decay" in arguments or "**" in arguments:
            given["weight_decay"] = weight_decay
        elif weight_decay or any(group.get("weight_decay") for group in groups):
            raise OptionError(
                f"Update {name} has no weight decay, but one is set. Set weight_decay=0, or use "
                "another update."
            )
        try:
            made = cast("Callable[..., torch.optim.Optimizer]", self.optimizer)(groups, **given)
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"Update {name} refuses its arguments: {error}. Check its options, lr and "
                "weight_decay."
            ) from error
        if [id(group) for group in made.param_groups] != [id(group) for group in groups]:
            raise OptionError(
                f"Update {name} copies the parameter groups it is given, so that learning-rate "
                "schedulers would not reach it. Let it pass them to "
                "torch.optim.Optimizer.__init__ unchanged."
            )
        return made

    @classmethod
    def known(cls, path: str) -> type[torch.optim.Optimizer] | None:
        """Return the class of `torch.optim` that an import path names, if it does.

        Nothing is imported: what data says may be read so.
        """
        module, _, name = path.partition(":")
        found = getattr(torch.optim, name, None) if module == torch.optim.__name__ else None
        optimizer = isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
        return found if optimizer and found.__module__.startswith("torch.optim.") else None

    @classmethod
    def adapt(cls, candidate: Any) -> Callable[..., TorchOptimizer] | None:
        """Return a factory of updates for an optimiser class or a `functools.partial` of one.

        Return `None` for anything else.
        """
        bound: dict[str, Any] = {}
        if isinstance(candidate, functools.partial):
            if candidate.args:
                return None
            candidate, bound = candidate.func, candidate.keywords
        if not (isinstance(candidate, type) and issubclass(candidate, torch.optim.Optimizer)):
            return None

        def factory(**options: Any) -> TorchOptimizer:
            return cls(candidate, {**bound, **options})

        factory.__doc__ = candidate.__doc__
        factory.__signature__ = _signature(candidate, bound)  # type: ignore[attr-defined]
        return factory

    @classmethod
    def unwrap(cls, stage: object) -> tuple[type[Any], Mapping[str, Any]] | None:
        """Return class and options of a `TorchOptimizer`; `None` for others, also subclasses."""
        return (stage.optimizer, stage.options) if type(stage) is cls else None


def _arguments(optimizer: type[torch.optim.Optimizer]) -> tuple[str, ...]:
    """Return the names of the class's arguments, with "**" if it takes any."""
    parameters = inspect.signature(optimizer).parameters.values()
    return tuple("**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters)


def _signature(
    optimizer: type[torch.optim.Optimizer], bound: Mapping[str, Any]
) -> inspect.Signature:
    """Return the signature of the options, with bound values as defaults."""
    parameters = []
    for each in inspect.signature(optimizer).parameters.values():
        if each.kind is each.VAR_KEYWORD:
            parameters.append(each)
        elif each.kind is not each.VAR_POSITIONAL and each.name not in (
            "params",
            *RECIPE_ARGUMENTS,
        ):
            default = bound.get(each.name, each.default)
            parameters.append(each.replace(kind=each.KEYWORD_ONLY, default=default))
    return inspect.Signature(parameters)
