"""`Settings`: the stages and numbers of a recipe, checked before any model is seen."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

import attrs
from torch import Tensor

from kfactk._version import __version__
from kfactk.capture.heads import Head, at_path
from kfactk.capture.support import model_output
from kfactk.errors import CombinationError, OptionError
from kfactk.masking import mask_settings
from kfactk.options import (
    USUAL_DAMPING,
    USUAL_LR,
    Number,
    Period,
    choice,
    flag,
    function,
    number_at,
    period_at,
    refusal,
    shortened,
    whole,
)
from kfactk.preconditioner.first_moment import FirstMoment, as_first_moment
from kfactk.preconditioner.rules import BlockRule
from kfactk.preconditioner.schedule import UpdateSchedule
from kfactk.registry.hookspecs import STAGE_HOOKS
from kfactk.registry.registry import registry
from kfactk.registry.serialization import to_json
from kfactk.stages import (
    WAIVABLE,
    Basis,
    Clip,
    Controller,
    Curvature,
    Fisher,
    Likelihood,
    Link,
    Pace,
    Placement,
    Tracker,
    Update,
)
from kfactk.validation import attribute_errors, lag_message


@attrs.frozen
class BlockSpec:
    """A curvature for some layers; made by `kfactk.block`.

    Args:
        curvature: The curvature stage.
        basis: The basis of its blocks; `None` for the recipe's or the curvature's own.
        layers: Patterns of module names; empty for all modules.
    """

    curvature: Curvature
    basis: Basis | None = None
    layers: tuple[str, ...] = ()

    def written(self) -> dict[str, Any]:
        """Return the spec in JSON's types.

        Raises:
            OptionError: A stage cannot be written.
        """
        curvature = registry().describe("curvature", self.curvature)
        if self.basis is None and not self.layers:
            return curvature
        out: dict[str, Any] = {"curvature": curvature}
        if self.basis is not None:
            out["basis"] = registry().describe("basis", self.basis)
        if self.layers:
            out["layers"] = list(self.layers)
        return out


@attrs.frozen
class HeadSpec:
    """A likelihood for a part of the output; made by `kfactk.head`.

    Args:
        output: The path of its part, such as "aux.logits", or a function that finds it.
        likelihood: The likelihood stage.
        weight: The factor of its loss.
        optional: Whether a forward may lack it.
    """

    output: str | Callable[[Any], Tensor]
    likelihood: Likelihood
    weight: float = 1.0
    optional: bool = False

    @property
    def name(self) -> str:
        """What messages call it."""
        if isinstance(self.output, str):
            return self.output
        return getattr(self.output, "__name__", type(self.output).__name__)

    def find(self, returned: Any) -> Any:
        """Return its part of what a model returned."""
        if isinstance(self.output, str):
            return at_path(returned, self.output, optional=self.optional)
        return self.output(returned)

    def written(self) -> dict[str, Any]:
        """Return the spec in JSON's types.

        Raises:
            OptionError: A stage or function cannot be written.
        """
        return {
            "output": to_json(self.output, "output of a head"),
            "likelihood": registry().describe("likelihood", self.likelihood),
            **({} if self.weight == 1 else {"weight": self.weight}),
            **({"optional": True} if self.optional else {}),
        }

    def written_or_none(self) -> dict[str, Any] | None:
        """Return the same, or `None` where it has no such form."""
        with contextlib.suppress(OptionError):
            return self.written()
        return None


def _number(high: float = float("inf"), *, varies: bool = False) -> Any:
    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if callable(value) and not varies:
            remedy = "set it in optimizer.param_groups"
            if attribute.name == "lr":
                remedy = "use a torch.optim.lr_scheduler"
            raise OptionError(
                f"{attribute.name} must be a number; to change it while training, {remedy}."
            )
        if not callable(value):
            number_at(attribute.name, value, 0, high=high)

    return check


def _period(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not callable(value):
        period_at(attribute.name, value, 0)


def patterns(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Check that a value is a tuple of names of modules."""
    good = isinstance(value, tuple) and all(isinstance(each, str) and each for each in value)
    if not good:
        must = "a list of names of modules, such as ['head'] or ['*.attention']"
        raise refusal(instance, attribute, value, must)


def as_patterns(value: Any) -> Any:
    """Convert a list to a tuple; leave anything else to the validator."""
    return tuple(value) if isinstance(value, list | tuple) else value


def _specs(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not value:
        raise OptionError(
            "curvature is an empty list; name at least one curvature, such as 'conv_kfac'."
        )


@attrs.frozen(kw_only=True, repr=False)
class Settings:
    """The stages and numbers of a recipe. `kfactk.build` documents the fields.

    Raises:
        OptionError: A value cannot work.
        CombinationError: Stages cannot work together.
    """

    curvature: tuple[BlockSpec, ...] = attrs.field(validator=_specs)
    basis: Basis
    fisher: Fisher
    likelihood: Likelihood | tuple[HeadSpec, ...]
    link: Link | None
    clip: Clip
    update: Update
    controller: Controller | None
    placement: Placement
    tracker: Tracker | None
    lr: float = attrs.field(validator=_number())
    damping: Number = attrs.field(validator=_number(varies=True))
    weight_decay: float = attrs.field(validator=_number())
    weight_decay_at: str = attrs.field(validator=choice("update", "gradient"))
    first_moment: FirstMoment = attrs.field(converter=as_first_moment)
    factor_decay: float = attrs.field(validator=_number(high=1.0))
    factor_every: Period = attrs.field(validator=_period)
    scale_every: Period = attrs.field(validator=_period)
    basis_every: Period = attrs.field(validator=_period)
    stagger: bool = attrs.field(validator=flag)
    lag: int = attrs.field(validator=whole(0))
    pace: Pace | None
    reduction: str = attrs.field(validator=choice("mean", "sum"))
    observe: str = attrs.field(validator=choice("automatic", "manual"))
    output: Callable[[Any], Tensor] | None = attrs.field(
        validator=function(hint=" of what the model returns")
    )
    max_skipped: int | None = attrs.field(
        validator=whole(optional=True, hint=": it counts skipped batches in a row")
    )
    strict: bool = attrs.field(validator=flag)
    unseen: str = attrs.field(validator=choice("error", "plain"))
    exclude: tuple[str, ...] = attrs.field(converter=as_patterns, validator=patterns)
    rules: tuple[BlockRule, ...] = attrs.field(init=False, eq=False)
    schedule: UpdateSchedule = attrs.field(init=False, eq=False)

    def __attrs_post_init__(self) -> None:
        schedule = UpdateSchedule(
            self.factor_every, self.scale_every, self.basis_every, self.stagger
        )
        object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "rules", rules_of(self.curvature, self.basis, self.pace))
        self._check_blocks()
        self._check_lag()
        self._check_pace()
        self._check_clip()
        if self.link is not None:
            self._check_link(self.link)
        if self.controller is not None:
            self._check_controller(self.controller)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The likelihoods, each with what finds its part of the model's output."""
        if not isinstance(self.likelihood, tuple):
            written = None
            with contextlib.suppress(OptionError):  # it has no such form
                written = {"likelihood": registry().describe("likelihood", self.likelihood)}
            return (Head(self.likelihood, self.output or model_output, written=written),)
        return tuple(
            Head(
                spec.likelihood,
                functools.partial(self._find, spec),
                spec.weight,
                spec.optional,
                spec.name,
                written=spec.written_or_none(),
            )
            for spec in self.likelihood
        )

    @property
    def finds_output(self) -> bool:
        """Whether the user's own function finds an output, so that the model may return none."""
        heads = self.likelihood if isinstance(self.likelihood, tuple) else ()
        return self.output is not None or any(callable(spec.output) for spec in heads)

    @property
    def link_name(self) -> str:
        """The name of the link; empty where there is none."""
        return "" if self.link is None else name_of("link", self.link)

    def _find(self, spec: HeadSpec, returned: Any) -> Any:
        """Return the part of a head, in what `output` makes of what the model returned."""
        return spec.find(returned if self.output is None else self.output(returned))

    def _check_blocks(self) -> None:
        """Check that no block has all its layers taken by one before it."""
        for number, rule in enumerate(self.rules):
            for before in self.rules[:number]:
                if before.takes_all_of(rule):
                    raise CombinationError(
                        f"block {number + 1} of curvature= ({rule.label}) never gets a layer: an "
                        f"earlier one ({before.label}) has the same curvature, and takes the "
                        "first choice of all its layers. Give the block with layers=[...] first, "
                        "or leave one of them out."
                    )

    def _check_lag(self) -> None:
        """Check that every decomposition is adopted before the next one begins, and there is one.

        A basis that requires no matrix decomposes nothing.
        """
        if isinstance(self.basis_every, int) and 0 < self.basis_every <= self.lag:
            raise OptionError(lag_message(self.lag, self.basis_every))
        if self.lag and not any(rule.basis.requires for rule in self.rules):
            names = dict.fromkeys(repr(name_of("basis", rule.basis)) for rule in self.rules)
            raise CombinationError(
                f"lag={self.lag} lets decompositions begin earlier, beside the loop, and basis "
                f"{' and '.join(names)} decomposes nothing, so that it has no effect. Leave out "
                "lag, or choose a basis that decomposes matrices."
            )

    def _check_pace(self) -> None:
        """Check that nothing else says when blocks are due, and that samples are measured."""
        if self.pace is None:
            return
        pace = f"pace {name_of('pace', self.pace)!r}"
        if self.stagger or self.lag:
            other = "stagger=True" if self.stagger else f"lag={self.lag}"
            why = "lays out slots over one period" if self.stagger else "looks ahead by the period"
            raise CombinationError(
                f"{pace} and {other} cannot work together: {other.partition('=')[0]} {why}, and "
                "with a pace each block has its own. Leave one of the two out."
            )
        if self.link is not None:
            raise CombinationError(
                f"link {self.link_name!r} measures all layers on the same batch, and {pace} gives "
                "each its own time. Leave one of the two out."
            )
        if any(rule.curvature.row_factors for rule in self.rules):
            raise CombinationError(
                f"{pace} compares a statistic with earlier ones, and the curvature 'rows' keeps "
                "single examples, which are others in every batch. Give pace=None."
            )
        if any(rule.of_gradient for rule in self.rules):
            raise CombinationError(
                f"{pace} compares statistics of samples, and the curvature 'gradient' has none: a "
                "single mini-batch gradient tells little, so its statistics are taken in every "
                "step. Give pace=None, or curvature='all' without 'gradient'."
            )
        fixed = {"basis_every": self.basis_every}
        if all(rule.basis.moments_from != "gradient" for rule in self.rules):
            fixed["scale_every"] = self.scale_every
        for name, period in fixed.items():
            if period != self.factor_every:
                raise CombinationError(
                    f"{pace} decides when blocks are due, all of a block at once, in units of "
                    f"factor_every={self.factor_every!r}, and {name}={period!r} says otherwise. "
                    f"Leave {name} out, or give pace=None."
                )
        with attribute_errors("pace", self.pace, "saying how many refreshes it keeps"):
            keeps: Any = self.pace.keeps
            if not isinstance(keeps, int) or isinstance(keeps, bool) or keeps < 1:
                raise ValueError(f"keeps is {keeps!r}, and must be a whole number from 1 on")

    def _check_clip(self) -> None:
        """Check that no basis waives a law that the clip needs, and that no link breaks it."""
        needs: frozenset[str] = getattr(self.clip, "needs", frozenset())
        if self.link is not None and "damped-inverse" in needs:
            raise CombinationError(
                f"clip {name_of('clip', self.clip)!r} reads the length of a step off "
                "P = (F + damping I)^-1 of each layer, and with "
                f"link {self.link_name!r} P is the inverse of another matrix. Give clip='none', or "
                "clip={'name': 'norm', 'limit': 1.0}."
            )
        for rule in self.rules:
            if waived := sorted(needs & rule.basis.waives):
                laws = " and ".join(WAIVABLE[law] for law in waived)
                raise CombinationError(
                    f"clip {name_of('clip', self.clip)!r} needs a basis with which {laws}, and "
                    f"basis {name_of('basis', rule.basis)!r} waives this. Give clip='none', or "
                    "clip={'name': 'norm', 'limit': 1.0}."
                )

    def _check_controller(self, controller: Controller) -> None:
        """Check that the numbers which a controller sets have their meaning."""
        label = f"controller {name_of('controller', controller)!r}"
        update, clip = (name_of(each, getattr(self, each)) for each in ("update", "clip"))
        if not getattr(self.update, "velocity_key", ""):
            raise CombinationError(
                f"{label} sets lr and momentum for a step along the gradient and the last step, "
                f"and update {update!r} takes another one. Give update='velocity'."
            )
        self._check_numbers(label)
        if callable(self.damping):
            raise CombinationError(
                f"{label} sets damping, and so does the function damping=. Leave out one of them."
            )
        if clip != "none":
            raise CombinationError(
                f"{label} chooses the length of the step, and clip {clip!r} would shorten the "
                "gradient before, without effect. Give clip='none', or leave it out."
            )
        if self.first_moment.decay:
            raise CombinationError(
                f"{label} sets the momentum of the step, and first_moment averages gradients "
                "besides. Leave out first_moment."
            )
        if self.reduction == "sum":
            raise CombinationError(
                f"{label} compares the loss with a model of its mean over likelihood terms, and "
                "reduction='sum' says that the loss is a sum. Take the mean, and leave out "
                "reduction='sum'."
            )
        if self.weight_decay and self.weight_decay_at != "gradient":
            raise CombinationError(
                f"{label} takes weight decay as part of the loss, so it belongs to the gradient "
                "that is preconditioned. Give weight_decay_at='gradient'."
            )
        self._check_damped(label, getattr(controller, "needs", frozenset()))

    def _check_numbers(self, label: str) -> None:
        """Check that nobody gives a number that a controller sets, and that would have no effect.

        A damping has one: it is the first that the blocks have.
        """
        if self.lr != USUAL_LR:
            raise CombinationError(
                f"{label} sets lr in each step, so lr={self.lr:g} would have no effect. Leave out "
                f"lr (evolve takes its default, lr={USUAL_LR:g}), or give controller=None."
            )
        try:
            given = registry().describe("update", self.update)
        except OptionError:  # an object of the user's own, whose options have no names here
            return
        if "momentum" in given:
            kept = {name: value for name, value in given.items() if name != "momentum"}
            raise CombinationError(
                f"{label} sets momentum in each step, so momentum={given['momentum']!r} of the "
                f"update rule would have no effect. Give update={shortened(kept)!r}, or "
                "controller=None."
            )

    def _check_damped(self, label: str, needs: frozenset[str]) -> None:
        """Check that a damping which a controller sets acts at once."""
        for rule in self.rules:
            basis = f"basis {name_of('basis', rule.basis)!r}"
            remedy = "Give basis={'name': 'kfac', 'solver': 'eigh'}"
            if unread := sorted(rule.curvature.must_be_read):
                curvature = name_of("curvature", rule.curvature)
                remedy += f", and curvature {curvature!r} without what measures {', '.join(unread)}"
            if waived := sorted(needs & rule.basis.waives):
                laws = " and ".join(WAIVABLE[law] for law in waived)
                raise CombinationError(
                    f"{label} needs a basis with which {laws}, and {basis} waives this. {remedy}."
                )
            if rule.basis.damped_at != "solve":
                late = rule.basis.damped_at == "refresh"
                seen = "sees a changed damping at its next refresh only" if late else "has none"
                raise CombinationError(
                    f"{label} tries several dampings in a step, and {basis} {seen}. {remedy}."
                )

    def _check_link(self, link: Link) -> None:
        """Check that every block can be joined with others."""
        label = f"link {self.link_name!r}"
        remedy = "Choose another one, or leave out the link."
        if self.stagger:
            raise CombinationError(
                f"{label} measures all layers on the same batch, and stagger=True spreads them "
                "over steps. Leave out stagger=True, or the link."
            )
        for rule in self.rules:
            curvature, basis = (
                f"{family} {name_of(family, getattr(rule, family))!r}"
                for family in ("curvature", "basis")
            )
            if rule.of_gradient:
                raise CombinationError(
                    f"{label} measures layers together on samples, and {curvature} has none, but "
                    f"the mini-batch gradient. {remedy}"
                )
            if waived := sorted(link.needs & rule.basis.waives):
                laws = " and ".join(WAIVABLE[law] for law in waived)
                raise CombinationError(
                    f"{label} needs a basis with which {laws}, and {basis} waives this. {remedy}"
                )
        able = [rule for rule in self.rules if link.requires <= rule.basis.requires]
        if not able:
            basis = f"basis {name_of('basis', self.rules[0].basis)!r}"
            missing = sorted(link.requires - self.rules[0].basis.requires)
            raise CombinationError(
                f"{label} reads {', '.join(missing)} of each layer, which {basis} does not "
                f"require, so that nobody keeps it. {remedy}"
            )
        if link.solves:
            self._check_solving(label, able)

    def _check_solving(self, label: str, rules: Sequence[BlockRule]) -> None:
        """Check that nothing is measured or made for nothing, where a link solves by itself."""
        for rule in rules:
            if rule.basis.moments_from is not None:
                raise CombinationError(
                    f"{label} solves with the matrices by itself, so that the moments of basis "
                    f"{name_of('basis', rule.basis)!r} would be measured for nothing. Give "
                    "basis='kfac', or leave out the link."
                )
        if self.lag:
            raise CombinationError(
                f"{label} decomposes the matrices when they are due, and lag={self.lag} lets "
                "decompositions begin earlier, beside the loop. Leave out lag, or the link."
            )

    def written(self, field: str) -> Any:
        """Return one field in JSON's types.

        Raises:
            OptionError: Its value cannot be written (a lambda, a tensor).
        """
        value = getattr(self, field)
        if field == "first_moment":
            return value.written()
        if field == "curvature":
            specs = [spec.written() for spec in value]
            return specs[0] if len(specs) == 1 and "name" in specs[0] else specs
        if field == "likelihood" and isinstance(value, tuple):
            return [spec.written() for spec in value]
        if field in STAGE_HOOKS:
            return None if value is None else registry().describe(field, value)
        return to_json(value, field)

    def with_option(self, curvatures: Collection[Curvature], name: str, value: Any) -> str | None:
        """Return what to paste so that curvatures of the recipe get an option.

        Args:
            curvatures: Those that get it, where they have it.
            name: The option.
            value: Its value.

        Returns:
            The argument of `build`, with all other curvatures as they are; `None` where none of
            them has the option or takes the value, and where the recipe cannot be written.
        """
        specs = [
            _with_option(s, name, value) if s.curvature in curvatures else s for s in self.curvature
        ]
        if all(one is other for one, other in zip(specs, self.curvature, strict=True)):
            return None
        try:
            written = [_without_options(spec.written()) for spec in specs]
        except OptionError:
            return None
        return f"curvature={written if len(written) > 1 else written[0]}"

    def summary(self) -> dict[str, Any]:
        """Return all fields for a record: JSON's types, or the repr of what cannot be written.

        Credentials are masked; `to_dict` keeps them, so that it can be loaded.
        """
        out: dict[str, Any] = {"kfactk": __version__}
        for field in FIELDS:
            try:
                out[field] = self.written(field)
            except OptionError:
                out[field] = repr(getattr(self, field))
        masked: dict[str, Any] = mask_settings(out)
        return masked

    def shared(self) -> dict[str, str]:
        """Return the fields that must be equal on all ranks, as text.

        Of a value that cannot be written, it is the type.
        """
        out = {}
        for field in FIELDS:
            if field in ("tracker", "output", "placement"):  # a rank may have its own
                continue
            try:
                out[field] = repr(self.written(field))
            except OptionError:
                out[field] = type(getattr(self, field)).__qualname__
        placement = type(self.placement).__qualname__
        return out | {"placement": placement, "wire_dtype": repr(self.placement.wire_dtype)}


def rules_of(
    specs: Sequence[BlockSpec], basis: Basis, pace: Pace | None = None
) -> tuple[BlockRule, ...]:
    """Return the rules of a recipe's blocks, each with its basis.

    Args:
        specs: What the recipe names.
        basis: The recipe's basis.
        pace: The recipe's pace.

    Raises:
        CombinationError: A basis cannot work with its curvature.
    """
    served = any(_fits(spec.curvature, basis) for spec in specs)
    return tuple(_rule(spec, basis, pace, served=served) for spec in specs)


def _rule(spec: BlockSpec, usual: Basis, pace: Pace | None, *, served: bool) -> BlockRule:
    """Return the rule of a spec.

    The basis is the one that the spec names; else the recipe's, where it fits the curvature; else
    the curvature's own default.

    Args:
        spec: The spec.
        usual: The recipe's basis.
        pace: The recipe's pace.
        served: Whether the recipe's basis fits a curvature of it.
    """
    curvature, basis = spec.curvature, usual if spec.basis is None else spec.basis
    default = curvature.default_basis
    if spec.basis is None and not _fits(curvature, basis) and default is not None:
        basis = registry().resolve("basis", default)
    names = name_of("curvature", curvature), name_of("basis", basis)
    if not _fits(curvature, basis):
        if served and spec.basis is None:
            _name_own(curvature, basis, *names)
        _refuse(curvature, basis, *names)
    return BlockRule(curvature, basis, spec.layers, ", ".join(names), pace)


def _fits(curvature: Curvature, basis: Basis) -> bool:
    """Return whether a curvature has what a basis needs, and the basis a use for it."""
    of_gradient = curvature.statistics_from == "gradient"
    measures = (
        basis.moments_from != "samples"
        if of_gradient
        else bool(basis.requires) or "fisher" not in basis.waives
    )
    return basis.reads <= curvature.provides and curvature.must_be_read <= basis.reads and measures


def _name_own(curvature: Curvature, basis: Basis, curvature_name: str, basis_name: str) -> None:
    """Refuse a basis that fits another curvature of the recipe, where A and G need no other."""
    missing = basis.reads - curvature.provides
    if missing and {"A", "G"} <= curvature.provides and not curvature.must_be_read:
        given = registry().describe("curvature", curvature)
        short = repr(curvature_name if len(given) == 1 else given)
        raise CombinationError(
            f"basis {basis_name!r} needs {', '.join(sorted(missing))}, which curvature "
            f"{curvature_name!r} does not provide, and another curvature of the recipe does. Give "
            f"this one a basis of its own: kfactk.block({short}, basis='kfac')."
        )


def _refuse(curvature: Curvature, basis: Basis, curvature_name: str, basis_name: str) -> NoReturn:
    """Refuse a basis that does not fit a curvature."""
    if missing := basis.reads - curvature.provides:
        raise CombinationError(
            f"basis {basis_name!r} needs {', '.join(sorted(missing))}, which curvature "
            f"{curvature_name!r} does not provide (it provides "
            f"{', '.join(sorted(curvature.provides)) or 'nothing'}). Choose another basis, or a "
            f"curvature that provides it: {basis.measured_by or 'python -m kfactk stages'}."
        )
    if unread := curvature.must_be_read - basis.reads:
        raise CombinationError(
            f"curvature {curvature_name!r} measures {', '.join(sorted(unread))} with its options, "
            f"which basis {basis_name!r} does not read. Give basis={curvature.default_basis!r}, or "
            "leave out the option."
        )
    if curvature.statistics_from == "gradient":
        raise CombinationError(
            f"basis {basis_name!r} measures its moments on samples, and curvature "
            f"{curvature_name!r} has none, but the mini-batch gradient. Choose moments of the "
            "gradient: basis={'name': 'ekfac', 'scale': 'running'}, or basis='soap'."
        )
    raise CombinationError(
        f"basis {basis_name!r} is no inverse of a curvature, so that curvature "
        f"{curvature_name!r} would measure for nothing. Give curvature='gradient'."
    )


FIELDS = tuple(field.name for field in attrs.fields(Settings) if field.init)
"""Names of the fields, which are the arguments of `kfactk.build`."""


def _with_option(spec: BlockSpec, name: str, value: Any) -> BlockSpec:
    """Return a spec whose curvature has an option; the same one where it does not take it."""
    stage: Any = spec.curvature
    field = attrs.fields_dict(type(stage)).get(name) if attrs.has(type(stage)) else None
    if field is None or not field.init:
        return spec
    try:
        return attrs.evolve(spec, curvature=attrs.evolve(stage, **{name: value}))
    except OptionError:
        return spec


def _without_options(written: dict[str, Any]) -> Any:
    """Return a written stage that has no options by its name; also those of a block."""
    stages = ("curvature", "basis")
    return shortened({k: shortened(each) if k in stages else each for k, each in written.items()})


def default_damping(update: Update) -> float:
    """Return the damping for an update rule where the user gives none."""
    return float(getattr(update, "default_damping", USUAL_DAMPING))


def name_of(family: str, stage: object) -> str:
    """Return the name of a stage, or that of its class where it has none."""
    try:
        return str(registry().describe(family, stage)["name"])
    except OptionError:
        return type(stage).__qualname__
