"""`build` and `Recipe`: which stages, with which options; resolved and checked before any model is seen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor, nn

from kfactk._version import __version__
from kfactk.capture.support import supported_model
from kfactk.errors import CombinationError, OptionError, near_names
from kfactk.optim.optimizer import Optimizer, Params
from kfactk.options import Number, Period, number_at, period_at
from kfactk.preconditioner.coverage import Coverage, ModelSurvey
from kfactk.preconditioner.schedule import UpdateSchedule
from kfactk.registry.hookspecs import STAGE_HOOKS
from kfactk.registry.registry import registry
from kfactk.registry.serialization import from_json, to_json
from kfactk.stages import Basis, Clip, Curvature, Fisher, Likelihood, Placement, Tracker, Update


def _number(high: float = float("inf")) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not callable(value):
            number_at(attribute.name, value, 0, high=high)

    return check


def _plain_number(high: float = float("inf")) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if callable(value):
            remedy = (
                "use a torch.optim.lr_scheduler"
                if attribute.name == "lr"
                else "set it in optimizer.param_groups"
            )
            raise OptionError(
                f"{attribute.name} must be a number; to change it while training, {remedy}."
            )
        number_at(attribute.name, value, 0, high=high)

    return check


def _period(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not callable(value):
        period_at(attribute.name, value, 0)


def _one_of(*allowed: str) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value not in allowed:
            hint = near_names(str(value), allowed)
            raise OptionError(
                f"{attribute.name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.{hint}"
            )

    return check


def _callable(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and not callable(value):
        raise OptionError(
            f"{attribute.name} must be a function of what the model returns, not {value!r}."
        )


def _flag(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, bool):
        raise OptionError(f"{attribute.name} is {value!r}; it must be True or False.")


def _patterns(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(pattern, str) and pattern for pattern in value
    ):
        raise OptionError(
            f"exclude is {value!r}; it must be a list of names of modules, such as ['head'] or ['*.attention']."
        )
    return tuple(value)


@attrs.frozen(kw_only=True, repr=False)
class Recipe:
    """A checked combination of stages and numbers; frozen, `evolve` makes a changed one.

    Made by `kfactk.build`, which documents the fields.

    Example:
        >>> import kfactk
        >>> recipe = kfactk.build(update="nag", lr=0.01)
        >>> recipe
        kfactk.build(update='nag', lr=0.01)
        >>> kfactk.Recipe.from_dict(recipe.to_dict()) == recipe
        True
    """

    curvature: Curvature
    basis: Basis
    fisher: Fisher
    likelihood: Likelihood
    clip: Clip
    update: Update
    placement: Placement
    tracker: Tracker | None
    lr: float = attrs.field(validator=_plain_number())
    damping: Number = attrs.field(validator=_number())
    weight_decay: float = attrs.field(validator=_plain_number())
    weight_decay_at: str = attrs.field(validator=_one_of("update", "gradient"))
    factor_decay: float = attrs.field(validator=_plain_number(high=1.0))
    factor_every: Period = attrs.field(validator=_period)
    scale_every: Period = attrs.field(validator=_period)
    basis_every: Period = attrs.field(validator=_period)
    stagger: bool = attrs.field(validator=_flag)
    reduction: str = attrs.field(validator=_one_of("mean", "sum"))
    observe: str = attrs.field(validator=_one_of("automatic", "manual"))
    output: Callable[[Any], Tensor] | None = attrs.field(validator=_callable)
    strict: bool = attrs.field(validator=_flag)
    exclude: tuple[str, ...] = attrs.field(converter=_patterns)

    def __attrs_post_init__(self) -> None:
        _ = self.calendar  # turns need whole numbers
        missing = self.basis.requires - self.curvature.provides
        if missing:
            raise CombinationError(
                f"basis {self._label('basis')} needs {', '.join(sorted(missing))}, which curvature {self._label('curvature')} does not "
                f"provide (it provides {', '.join(sorted(self.curvature.provides)) or 'nothing'}). Choose another basis, or a curvature "
                "that provides it: python -m kfactk stages."
            )

    def bind(
        self, model: nn.Module, params: Params | None = None, *, scaler: Any = None
    ) -> Optimizer:
        """Make the optimizer of a model.

        Args:
            model: The module that the training loop calls.
            params: Parameters, named parameters or groups, as for any torch optimizer; groups may have their own `lr`, `damping`,
                `weight_decay` and options of the update rule. `None` for all parameters of the model.
            scaler: The loop's `torch.amp.GradScaler`; needed only with a Fisher stage that listens to the user's backward.

        Returns:
            A `torch.optim.Optimizer`.
        """
        hooks = registry().hook
        optimizer = Optimizer(self, model, params, scaler=scaler, stepped=hooks.kfactk_stepped)
        try:
            hooks.kfactk_bound(optimizer=optimizer)
        except BaseException:
            optimizer.close()
            raise
        return optimizer

    def coverage(self, model: nn.Module) -> Coverage:
        """Which parameters would be preconditioned, by which block, or why not; prints as a table.

        Raises:
            CombinationError: The model is of a kind that `bind` refuses.
        """
        return ModelSurvey(supported_model(model), self.curvature, self.exclude).coverage(
            lambda parameter: True
        )

    @property
    def calendar(self) -> UpdateSchedule:
        """What is due when."""
        return UpdateSchedule(self.factor_every, self.scale_every, self.basis_every, self.stagger)

    def evolve(self, **changes: Any) -> Recipe:
        """The recipe with some fields changed; takes what `kfactk.build` takes.

        Raises:
            OptionError: A field is unknown or its value cannot work.
        """
        return attrs.evolve(self, **_resolved(changes))

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form, from which `from_dict` makes an equal recipe.

        Raises:
            OptionError: A value cannot be written (a lambda, a tensor); names the field and the remedy.
        """
        return {"kfactk": __version__} | {field: self._written(field) for field in FIELDS}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_dict`; fields that are left out have their defaults."""
        return build(**{name: value for name, value in written.items() if name != "kfactk"})

    def summary(self) -> dict[str, Any]:
        """Like `to_dict`, with the repr of what cannot be written: for records, never refused."""
        out: dict[str, Any] = {"kfactk": __version__}
        for field in FIELDS:
            try:
                out[field] = self._written(field)
            except OptionError:
                out[field] = repr(getattr(self, field))
        return out

    def shared(self) -> dict[str, str]:
        """The fields that have to be the same on all ranks, as text; of what cannot be written, its type."""
        out = {}
        for field in FIELDS:
            if field in (
                "tracker",
                "output",
                "placement",
            ):  # a rank's own, but for what travels how
                continue
            try:
                out[field] = repr(self._written(field))
            except OptionError:
                out[field] = type(getattr(self, field)).__qualname__
        return out | {
            "placement": type(self.placement).__qualname__,
            "wire_dtype": repr(self.placement.wire_dtype),
        }

    def __repr__(self) -> str:
        mine, usual, shown = self.summary(), inspect.signature(build).parameters, []
        for field in FIELDS:
            if mine[field] != _written_default(field, usual[field].default):
                value = mine[field]
                if field in STAGE_HOOKS and isinstance(value, dict) and set(value) == {"name"}:
                    value = value["name"]
                shown.append(f"{field}={value!r}")
        return f"kfactk.build({', '.join(shown)})"

    def _written(self, field: str) -> Any:
        value = getattr(self, field)
        if field in STAGE_HOOKS:
            return None if value is None else registry().describe(field, value)
        return to_json(value, field)

    def _label(self, field: str) -> str:
        written = self.summary()[field]
        return repr(written["name"] if isinstance(written, dict) else written)


FIELDS = tuple(field.name for field in attrs.fields(Recipe))


def build(
    *,
    curvature: Any = "conv_kfac",
    basis: Any = "ekfac",
    update: Any = "adam",
    fisher: Any = "mc",
    likelihood: Any = "categorical",
    clip: Any = "kl",
    placement: Any = "replicated",
    tracker: Any = None,
    lr: float = 0.003,
    damping: Number = 0.001,
    weight_decay: float = 0.0,
    weight_decay_at: str = "update",
    factor_decay: float = 0.95,
    factor_every: Period = 10,
    scale_every: Period = 10,
    basis_every: Period = 100,
    stagger: bool = False,
    reduction: str = "mean",
    observe: str = "automatic",
    output: Callable[[Any], Tensor] | None = None,
    strict: bool = False,
    exclude: Sequence[str] = (),
    **unknown: Any,
) -> Recipe:
    """Combine stages into a recipe. The defaults are the study's EKFACadam, without its weight decay.

    A stage is given by name (`"ekfac"`), by name with options (`{"name": "ekfac", "scale_decay": 0.9}`), by import path
    (`"package.module:Class"`), or as an object. `python -m kfactk stages` lists names and options.

    Args:
        curvature: How layers' parameters form matrices, and their factors: "conv_kfac", "kfac".
        basis: How the factors are decomposed and the gradient preconditioned: "ekfac", "kfac".
        update: The update rule: "sgd", "momentum", "nag", "adam", "adamw", "radam", or any `torch.optim.Optimizer` class.
        fisher: Whose targets: "mc", "exact", "empirical".
        likelihood: What the model's output means: "categorical", "bernoulli", "gaussian".
        clip: Bound on the preconditioned gradients: "none", "value", "norm", "kl".
        placement: Which rank does what: "replicated", "comm_opt", "mem_opt", "hybrid", "auto".
        tracker: Where runs are recorded: "mlflow", "jsonl", or `None`.
        lr: Learning rate mu.
        damping: tau, in the units of the Fisher matrix of one likelihood term; a number, or a function of the step.
        weight_decay: Per step and unit of parameter, as torch.optim's update rules take it.
        weight_decay_at: "update": the update rule adds it, after preconditioning. "gradient": added before preconditioning.
        factor_decay: Decay epsilon of the factors' running means, in [0, 1].
        factor_every: T_c, steps between refreshes of the factors; a whole number or a function of the step, as the next two.
        scale_every: T_s, steps between refreshes of the scale.
        basis_every: T_inv, steps between decompositions.
        stagger: Spread what is due over steps, each as often as it is told to, so that no step after the first bears all.
        reduction: "mean" or "sum": how your loss reduces over examples, for what is measured on your own gradient (fisher "empirical").
        observe: "automatic", or "manual": only forwards followed by `optimizer.observe()` count.
        output: Function that finds the likelihood's parameters in what the model returns; by default the tensor itself, `.logits`,
            the item "logits", or the first element.
        strict: Refuse a model with a trained parameter that no block preconditions.
        exclude: Names of modules (shell-style patterns) whose layers are left alone, their plain gradient going to the update rule: a
            huge output layer, or a head trained on another output than the one the likelihood sees.

    Returns:
        A frozen `Recipe`.

    Raises:
        UnknownStageError: No plugin provides a stage of this name.
        OptionError: An argument is unknown, or its value cannot work.
        CombinationError: The stages cannot work together.

    Example:
        >>> build(curvature="kfac", basis={"name": "ekfac", "scale_decay": 0.9}, damping=0.01)
        kfactk.build(curvature='kfac', basis={'name': 'ekfac', 'scale_decay': 0.9}, damping=0.01)
    """
    return Recipe(
        **_resolved(
            {name: value for name, value in locals().items() if name != "unknown"} | unknown
        )
    )


def _resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    for name in values:
        if name not in FIELDS:
            raise OptionError(
                f"{name!r} is not an argument of kfactk.build.{near_names(name, FIELDS)} There are: {', '.join(FIELDS)}. A stage's own "
                "options go with its name: update={'name': 'adam', 'betas': (0.9, 0.99)}."
            )
    out = {}
    for name, value in values.items():
        if name in STAGE_HOOKS:
            if value is None and name != "tracker":
                raise OptionError(
                    f"{name} is None; every recipe has one. Leave it out for the default, or see python -m kfactk stages."
                )
            out[name] = None if value is None else registry().resolve(name, value)
        else:
            out[name] = from_json(value)
    return out


def _written_default(field: str, default: Any) -> Any:
    """A default of `build` as `Recipe.summary` writes it, without resolving it: its plugin may be missing."""
    return {"name": default} if field in STAGE_HOOKS and default is not None else to_json(default)
