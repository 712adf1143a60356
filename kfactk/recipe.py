"""`Recipe` and what makes it: which stages, with which options, for which layers and outputs."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import attrs
from torch import Tensor, nn

from kfactk._version import __version__
from kfactk.capture.support import supported_model
from kfactk.errors import (
    CombinationError,
    KfactkWarning,
    OptionError,
    UnknownStageError,
    near_names,
)
from kfactk.optim.idle import idle_fields, idle_message, idle_options
from kfactk.optim.optimizer import Optimizer, Params
from kfactk.optim.predicted import with_notes
from kfactk.optim.settings import (
    FIELDS,
    BlockSpec,
    HeadSpec,
    Settings,
    as_patterns,
    default_damping,
    rules_of,
)
from kfactk.options import USUAL_LR, Number, Period, number_at, python_number, shortened
from kfactk.preconditioner.block import Block
from kfactk.preconditioner.coverage import Coverage, ModelSurvey
from kfactk.preconditioner.first_moment import as_first_moment
from kfactk.preconditioner.footprint import with_footprints
from kfactk.preconditioner.links import with_link
from kfactk.preconditioner.rules import BlockRule
from kfactk.preconditioner.schedule import early
from kfactk.registry.hookspecs import STAGE_HOOKS
from kfactk.registry.registry import registry
from kfactk.registry.serialization import from_json, to_json
from kfactk.stages import Controller, Link, Pace, Update
from kfactk.validation import attribute_errors

USUAL_BASIS = "ekfac"
"""The basis of a recipe that names none."""
ALL_CURVATURES = ("conv_kfac", "embedding", "norm", "attention", "rnn", "experts")
"""What `curvature="all"` means, in this order: every kind of layer that we cover."""


IN_REPEATED_BLOCKS = ("*[._][0-9]*.*",)
"""Patterns of the modules inside numbered ones: "blocks.0.mlp", "encoder_layer_3.mlp"."""
ATTENTION_IN_ONE = ("*qkv*.weight", "*in_proj_weight", "*c_attn.weight", "*query_key_value.weight")
"""Patterns of parameters that hold the projections to queries, keys and values side by side."""
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "thesis": {},
        "short": {
            "basis": {"name": "ekfac", "scale": "running"},
            "fisher": "empirical",
            "clip": "none",
            "lr": 0.005,
            "damping": 0.0001,
            "scale_every": 1,
            "basis_every": early,
            "factor_decay": 0.6,
        },
        "cheap": {
            "curvature": {"name": "conv_kfac", "spatial": "sua"},
            "basis": {"name": "ekfac", "inputs": "channels", "scale": "running"},
            "fisher": "empirical",
            "clip": "none",
            "stagger": True,
        },
        "transformer": {
            "curvature": [
                {
                    "curvature": {"name": "gradient", "squares": ATTENTION_IN_ONE},
                    "basis": {"name": "muon", "scale": "match_rms", "factor": 4.0, "even": True},
                    "layers": IN_REPEATED_BLOCKS,
                },
                {
                    "curvature": {"name": "gradient", "max_side": 1, "wide": "diagonal"},
                    "basis": "soap",
                },
            ],
            "update": "sgd",
            "first_moment": {"decay": 0.9, "nesterov": True},
            "lr": 0.002,
        },
    }
)
"""By name, what the preset gives to `build`."""


@attrs.frozen(kw_only=True, repr=False)
class Recipe(Settings):
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

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        used = any(rule.basis == self.basis for rule in self.rules)
        mine = None if used else self.summary()["basis"]
        if mine in (None, _written_default("basis", USUAL_BASIS)):
            return
        mine = _short("basis", mine)
        if all(spec.basis is not None for spec in self.curvature):
            raise CombinationError(
                f"no block uses basis={mine!r}: each names one of its own. Leave it out."
            )
        if all(rule.of_gradient for rule in self.rules):
            raise CombinationError(
                f"no block uses basis={mine!r}: its moments or matrices are not those of "
                "gradients. Give basis={'name': 'ekfac', 'scale': 'running'}, basis='kfac', "
                "'soap', 'shampoo' or 'muon', or leave it out."
            )
        own = " and ".join(dict.fromkeys(rule.label for rule in self.rules))
        raise CombinationError(
            f"no block uses basis={mine!r}: it fits no curvature of the recipe, and theirs are "
            f"used in its place ({own}). Leave it out, or give the block a basis that fits: "
            "kfactk.block(curvature, basis=...)."
        )

    def bind(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        scaler: Any = None,
        masks: Mapping[str, Tensor] | None = None,
        entry: str | Sequence[str] = "forward",
    ) -> Optimizer:
        """Make the optimizer of a model.

        Args:
            model: The module that the training loop calls.
            params: Parameters, named parameters or groups, as for any torch optimizer. Groups may
                have their own `lr`, `damping`, `weight_decay` and options of the update rule.
                `None` for all parameters of the model.
            scaler: The loop's `torch.amp.GradScaler`; needed only with a Fisher stage that listens
                to the user's backward.
            masks: By parameter name, what gradients are multiplied by, after preconditioning too,
                so that entries set to zero stay so.
            entry: The method of the model that a training loop calls in place of the model, such as
                "evaluate_actions", or a list of such methods. Calls of the model itself then count
                only where "forward" is among them. What the method returns is the output that the
                likelihood reads.

        Returns:
            A `torch.optim.Optimizer`.
        """
        optimizer = Optimizer(self, model, params, scaler=scaler, masks=masks, entry=entry)
        try:
            registry().hook.kfactk_bound(optimizer=optimizer)
        except BaseException:
            optimizer.close()
            raise
        return optimizer

    def coverage(self, model: nn.Module) -> Coverage:
        """Return which parameters would be preconditioned, by which block, or why not.

        It prints as a table. Where curvature is large, or has a side that is too wide to be a
        matrix, the row says so, with bytes and predicted seconds of a decomposition.

        Raises:
            CombinationError: The model is of a kind that `bind` refuses.
        """
        survey = ModelSurvey(supported_model(model), self.rules, self.exclude)
        trained = {id(parameter) for parameter in model.parameters()}
        blocks = [
            Block(layer, rule.curvature, rule.basis, pace=rule.pace)
            for layer, rule in survey.layers(trained)
        ]
        averages = self.first_moment.decay > 0
        found = with_footprints(survey.coverage(trained), blocks, averages=averages)
        return with_notes(with_link(found, self.link, self.link_name, blocks), self, blocks)

    def evolve(self, **changes: Any) -> Recipe:
        """Return the recipe with some fields changed; it takes what `kfactk.build` takes.

        What was chosen for the old stages (damping, clip, periods) is chosen anew for the new ones.

        Raises:
            OptionError: A field is unknown or its value cannot work.
        """
        names = ("curvature", "basis", "update", "pace", "controller", "link")
        stages = {name: getattr(self, name) for name in (*names, "factor_every", "weight_decay")}
        chosen = dict.fromkeys(self._as_usual())
        made = attrs.evolve(self, **_resolved(stages | chosen | changes))
        known = self.without_effect()
        _warn_of_idle(made, {n: why for n, why in made.without_effect().items() if n not in known})
        return made

    def without_effect(self) -> dict[str, str]:
        """Return the fields that do not have their default, and change nothing, with the reason.

        Whatever the model is, no stage of the recipe reads them. `build` warns of them.

        Example:
            >>> import kfactk
            >>> kfactk.Recipe.from_dict({"basis": "kfac", "scale_every": 5}).without_effect()
            {'scale_every': "basis 'kfac' measures no scale"}
        """
        idle = idle_fields(self)
        found = {name: idle[name] for name in self._changed() if name in idle}
        return found | idle_options(self)

    def _as_usual(self) -> list[str]:
        """Return the fields that follow from the stages and have the value that follows."""
        usual = usual_values(
            self.rules,
            self.update,
            self.pace,
            self.factor_every,
            self.controller,
            self.weight_decay,
            self.link,
        )
        mine = {name: getattr(self, name) for name in usual if name not in STAGE_HOOKS}
        mine |= {name: self.summary()[name] for name in usual if name in STAGE_HOOKS}
        return [n for n, value in usual.items() if mine[n] == _written_default(n, value)]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-safe form, from which `from_dict` makes an equal recipe.

        Raises:
            OptionError: A value cannot be written (a lambda, a tensor). The message names the field
                and the remedy.
        """
        return {"kfactk": __version__} | {field: self.written(field) for field in FIELDS}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any], *, trusted: bool = False) -> Recipe:
        """Return the inverse of `to_dict`; fields that are left out have their defaults.

        Args:
            written: The JSON-safe form.
            trusted: Whether import paths in it (of stages or functions of your own) may be
                imported, which runs code. Without it names of stages and of `torch.optim` classes
                resolve alone, so that a recipe from a stranger runs no code. It can still name a
                file or a server that a tracker writes to.

        Raises:
            OptionError: An import path is not trusted, or a value cannot work.
        """
        if not all(isinstance(name, str) for name in written):
            raise OptionError(f"a recipe has fields {list(written)!r}; their names must be text.")
        given = {name: value for name, value in written.items() if name != "kfactk"}
        try:
            made = cls(**_resolved(_defaults() | given, trusted=trusted))
        except RecursionError as error:
            raise OptionError(
                "a recipe is nested too deeply. Give what Recipe.to_dict returned."
            ) from error
        _warn_of_idle(made, made.without_effect())
        return made

    def __repr__(self) -> str:
        shown = [f"{n}={_short(n, value)!r}" for n, value in self._changed().items()]
        return f"kfactk.build({', '.join(shown)})"

    def _changed(self) -> dict[str, Any]:
        """Return the fields that do not have their default, as `summary` writes them."""
        mine, parameters = self.summary(), inspect.signature(build).parameters
        usual = self._as_usual()
        return {
            field: mine[field]
            for field in FIELDS
            if field not in usual
            and mine[field] != _written_default(field, parameters[field].default)
        }


def _short(field: str, value: Any) -> Any:
    """Return a stage without options by its name alone, also within a list of blocks."""
    if field in ("curvature", "likelihood") and isinstance(value, list):
        return [_short(field, each) for each in value]
    if field not in STAGE_HOOKS or not isinstance(value, Mapping):
        return value
    if "curvature" in value or "likelihood" in value:
        return {k: _short(k, v) if k in STAGE_HOOKS else v for k, v in value.items()}
    return shortened(value)


def block(curvature: Any, basis: Any = None, layers: Sequence[str] = ()) -> BlockSpec:
    """Name a curvature for some layers, and their basis, for `build(curvature=[...])`.

    Args:
        curvature: As for `build`.
        basis: As for `build`; `None` for the recipe's basis, or, where that does not fit, for the
            curvature's own.
        layers: Names of modules (shell-style patterns) that it may take; empty for all.

    Raises:
        UnknownStageError: No plugin provides a stage of this name.
        OptionError: An option is unknown, or its value cannot work.

    Example:
        >>> import kfactk
        >>> head = kfactk.block("conv_kfac", basis="kfac", layers=["head"])
        >>> kfactk.build(curvature=[head, "conv_kfac"])
        kfactk.build(curvature=[{'curvature': 'conv_kfac', 'basis': 'kfac', 'layers': ['head']}, \
'conv_kfac'])
    """
    return _block({"curvature": curvature, "basis": basis, "layers": layers}, trusted=True)


def _block(given: Mapping[str, Any], trusted: bool) -> BlockSpec:
    """Return the block of these arguments of `block`."""
    basis, layers = given.get("basis"), given.get("layers", ())
    found = as_patterns(layers)
    if not isinstance(found, tuple) or not all(isinstance(each, str) and each for each in found):
        raise OptionError(
            f"layers is {layers!r}; it must be a list of names of modules, such as ['head'] or "
            "['*.attention']."
        )
    resolve = functools.partial(registry().resolve, trusted=trusted)
    return BlockSpec(
        resolve("curvature", given["curvature"]),
        None if basis is None else resolve("basis", basis),
        found,
    )


def head(
    output: str | Callable[[Any], Tensor],
    likelihood: Any,
    weight: float = 1.0,
    *,
    optional: bool = False,
) -> HeadSpec:
    """Name the likelihood of a part of the output, for `build(likelihood=[...])`.

    With losses that are means over the terms of each head, it describes

        loss = sum_k weight_k loss_k,    F = sum_k weight_k F_k

    Args:
        output: Where the part is in what the model returns: keys, attributes and numbers, such as
            "value", "aux.logits" or "1"; or a function that finds it.
        likelihood: As for `build`.
        weight: The factor of its loss; positive.
        optional: Whether forwards may lack this part, on all ranks alike: it is `None`, or its
            last key is not there. Such a forward adds nothing to this head.

    Raises:
        UnknownStageError: No plugin provides a stage of this name.
        OptionError: An option is unknown, or its value cannot work.

    Example:
        >>> import kfactk
        >>> value = kfactk.head("value", "gaussian", weight=0.5)
        >>> kfactk.build(likelihood=[kfactk.head("policy", "categorical"), value])
        kfactk.build(likelihood=[{'output': 'policy', 'likelihood': 'categorical'}, \
{'output': 'value', 'likelihood': 'gaussian', 'weight': 0.5}])
    """
    given = {"output": output, "likelihood": likelihood, "weight": weight, "optional": optional}
    return _head(given, trusted=True)


def _head(given: Mapping[str, Any], trusted: bool) -> HeadSpec:
    """Return the head of these arguments of `head`."""
    if unknown := sorted(set(given) - {"output", "likelihood", "weight", "optional"}):
        raise OptionError(
            f"a head has no {', '.join(unknown)}; give output, likelihood, weight and optional."
        )
    if missing := sorted({"output", "likelihood"} - set(given)):
        raise OptionError(
            f"a head lacks its {' and its '.join(missing)}: give kfactk.head('value', 'gaussian')."
        )
    output = from_json(given["output"], trusted=trusted)
    if not callable(output) and not (isinstance(output, str) and output):
        raise OptionError(
            f"the output of a head is {output!r}; give where it is in what the model returns, such "
            "as 'value' or 'aux.logits', or a function that finds it."
        )
    weight = given.get("weight", 1.0)
    weight = 0.0 if callable(weight) else number_at("weight of a head", weight, 0)
    if weight == 0:
        raise OptionError(
            f"the weight of a head is {given['weight']!r}; give a positive number, or leave that "
            "head out."
        )
    optional = given.get("optional", False)
    if not isinstance(optional, bool):
        raise OptionError(f"optional of a head is {optional!r}; give True or False.")
    likelihood = registry().resolve("likelihood", given["likelihood"], trusted=trusted)
    return HeadSpec(output, likelihood, weight, optional)


def build(
    *,
    curvature: Any = "conv_kfac",
    basis: Any = USUAL_BASIS,
    update: Any = "adam",
    fisher: Any = "mc",
    likelihood: Any = "categorical",
    link: Any = None,
    clip: Any = None,
    controller: Any = None,
    placement: Any = "replicated",
    tracker: Any = None,
    lr: float = USUAL_LR,
    damping: Number | None = None,
    weight_decay: float = 0.0,
    weight_decay_at: str = "update",
    first_moment: float | Mapping[str, Any] = 0.0,
    factor_decay: float = 0.95,
    factor_every: Period | None = None,
    scale_every: Period | None = None,
    basis_every: Period | None = None,
    stagger: bool = False,
    lag: int = 0,
    pace: Any = None,
    reduction: str = "mean",
    observe: str = "automatic",
    output: Callable[[Any], Tensor] | None = None,
    max_skipped: int | None = 20,
    strict: bool = False,
    unseen: str = "error",
    exclude: Sequence[str] = (),
    **unknown: Any,
) -> Recipe:
    """Combine stages into a recipe. The defaults are EKFACadam's, without weight decay.

    They are the settings of the thesis, for runs of tens of thousands of steps. `preset` has faster
    ones: "short" for a few hundred steps, "cheap" for the least time of a step.

    A stage is given by name (`"ekfac"`), by name with options (`{"name": "ekfac", "scale_decay":
    0.9}`), by import path (`"package.module:Class"`), or as an object. `python -m kfactk stages`
    lists names and options.

    Args:
        curvature: How layers' parameters form matrices, and their factors: "conv_kfac", "kfac",
            "embedding", "norm", "attention", "rnn", "experts"; "taylor", for networks that are
            called with `kfactk.jet`; "rows", the data of single examples in place of matrices;
            or "gradient", statistics of the mini-batch gradient of any parameter. A list names
            several: the first that supports a module takes it, and "gradient" what others leave of
            it. Its items are as here, or made by `kfactk.block`.
            "all" is the list of every kind of layer that we cover: "conv_kfac", "embedding",
            "norm", "attention", "rnn", "experts".
        basis: How the factors are decomposed and the gradient preconditioned: "ekfac", "kfac",
            "unitwise"; with rows "cg"; with statistics of gradients "soap", "shampoo", "kl",
            "muon". Blocks whose curvature does not provide what it requires use the curvature's own
            basis.
        update: The update rule: "sgd", "momentum", "nag", "velocity", "adam", "adamw", "radam", or
            any `torch.optim.Optimizer` class.
        fisher: Whose targets: "mc", "exact", "empirical".
        likelihood: What the model's output means: "categorical", "bernoulli", "gaussian",
            "heteroscedastic", "poisson". A model with several heads has one for each:
            `{"policy": "categorical", "value": "gaussian"}` by their places in what it returns, or
            a list made by `kfactk.head`, with weights.
        link: What joins layers: "two_level", "block_tridiagonal", or `None`.
        clip: Bound on the preconditioned gradients: "none", "value", "norm", "kl", "trust_region".
            `None` for "kl", and for "none" where a basis waives a law that "kl" needs, or with a
            link or a controller.
        controller: What sets lr, momentum and damping in each step: "quadratic", with
            update="velocity" and `step(closure)`; or `None` for the numbers given here.
        placement: Which rank does what: "replicated", "comm_opt", "mem_opt", "hybrid", "auto".
        tracker: Where runs are recorded: "mlflow", "jsonl", or `None`.
        lr: Learning rate mu; a controller sets it, and takes none.
        damping: tau, in the units of the Fisher matrix of one likelihood term; a number, or a
            function of the step. `None` for the update rule's own, with which lr=0.003 is stable:
            0.001 for "adam", "adamw" and "radam", 0.01 for "sgd", 0.03 for "momentum" and "nag".
            Rules that do not divide by the size of their gradients step by up to lr / damping times
            the plain gradient: keep that below the learning rate of plain SGD.
        weight_decay: Per step and unit of parameter, as torch.optim's update rules take it.
        weight_decay_at: "update": the update rule adds it, after preconditioning. "gradient": it is
            added before preconditioning.
        first_moment: Decay of a running mean of the gradient, which is preconditioned in place of
            the gradient, in [0, 1); 0 for none. Or its options: `{"decay": 0.95, "corrected": True,
            "nesterov": False}`. Blocks have it; other parameters have the update rule's alone.
        factor_decay: Decay epsilon of the factors' running means, in [0, 1].
        factor_every: T_c, steps between refreshes of the factors; a whole number or a function of
            the step, as the next two. `None` for 10, and 1 where all curvatures are of gradients.
        scale_every: T_s, steps between refreshes of the scale; `None` likewise.
        basis_every: T_inv, steps between decompositions; `None` for 100, and 10 likewise.
        stagger: Whether to spread over steps what is due, so that no step after the first does all.
        lag: Steps between the beginning of a decomposition, on a thread, and its use; below
            `basis_every`. 0: a step waits for its decompositions.
        pace: What decides when each block is due: "similar" (less often while its factors hardly
            change), or `None` for the periods above. With a pace, `factor_every` is the unit of its
            intervals, and a block's factors, decomposition and scale are due together; leave out
            `basis_every`, and also `scale_every`, unless a basis takes it from your own gradient.
        reduction: "mean" or "sum": how your loss reduces over examples. Only what is measured on
            your own gradient needs it (fisher "empirical").
        observe: "automatic", or "manual": only forwards followed by `optimizer.observe()` count.
        output: Function that finds the likelihood's parameters in what the model returns. The
            default is the tensor itself, `.logits`, the item "logits", or the first element.
        unseen: What to do with layers that influence the output also past their own calls: "error"
            refuses the forward, "plain" leaves them to the update rule from then on.
        max_skipped: After how many batches in a row that were skipped, because they held NaN or
            inf, `step` raises an error; `None` for never. 20 lets a gradient scaler find its scale
            by halving. Batches that `torch.amp.GradScaler.step` skips by itself do not count.
        strict: Refuse a model with a trained parameter that no block preconditions.
        exclude: Names of modules (shell-style patterns) whose layers are left out. Their plain
            gradient goes to the update rule. Use it for a huge output layer, or for a head trained
            on another output than the likelihood's.

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
    given = {name: value for name, value in locals().items() if name != "unknown"} | unknown
    made = Recipe(**_resolved(given))
    _warn_of_idle(made, made.without_effect())
    return made


def preset(name: str, **changes: Any) -> Recipe:
    """Return a recipe that was measured, with changes of your own.

    The numbers are of the page *Performance*: ResNet-8 of 16 channels on images of CIFAR-10, 312
    steps, seeds 0 to 2, against SGD with momentum (loss 1.44). Time is that of a step over SGD's.

    | name | what it is | time | loss |
    |---|---|---|---|
    | "thesis" | EKFACadam with the periods of the thesis: the defaults of `build` | 1.34 | 1.01 |
    | "short" | for a few hundred steps: a basis that is fresh early on | 1.31 | 0.73 |
    | "cheap" | bases of channels alone: the least time | 1.14 | - |
    | "transformer" | `muon` in numbered blocks, Adam for all else; any loss | - | - |

    "transformer" was measured on a transformer of four blocks, width 256, 600 steps, three seeds
    (page *Results*). It ends at a training loss of 1.30, Muon with AdamW at 1.37, SOAP at 1.41,
    AdamW at 1.88: 0.961 times that of Muon, and 0.962 times its test loss. Rates from 0.0012 to
    0.0027 did nearly as well in trials, and 0.0035 worse. A step takes 1.17 times that of AdamW,
    one of Muon 1.10. Its layers are found by name, as in "blocks.0.mlp"; the recipe's
    `coverage(model)` shows them.

    "short" fits the training data faster than it generalizes (test accuracy 51.7 %, "thesis" 54.1
    %). "short" and "cheap" measure the gradient of your own loss, which must reduce as `reduction`
    says (by default to a mean). With a `GradScaler`, give it to `bind` as `scaler`. They were timed
    with `update={"name": "adam", "fused": True}`. Another kind of update rule, such as "momentum",
    gets the lr and the damping that `build` gives it.

    Args:
        name: "thesis", "short", "cheap" or "transformer".
        **changes: Arguments of `build` in place of the preset's.

    Raises:
        UnknownStageError: There is no preset of this name.
        OptionError: A change is unknown, or its value cannot work.

    Example:
        >>> preset("thesis") == build()
        True
        >>> preset("short", lr=0.003).lr
        0.003
    """
    if name not in PRESETS:
        raise UnknownStageError(
            f"There is no preset {name!r}.{near_names(str(name), PRESETS)} "
            f"Use one of: {', '.join(PRESETS)}."
        )
    given = dict(PRESETS[name])
    if changes.get("controller") is not None:
        given.pop("lr", None)  # the controller sets it
    made = _made(given | changes)
    usual = _made(PRESETS[name]).update
    if default_damping(made.update) != default_damping(usual):
        given = _without(given, {"lr", "damping"})  # the preset's are for rules like its own
        made = _made(given | changes)
    if made.without_effect().keys() & given.keys():  # the preset's are for other stages
        made = _made(_without(given, made.without_effect()) | changes)
    _warn_of_idle(made, made.without_effect())
    return made


def _made(given: Mapping[str, Any]) -> Recipe:
    """Return the recipe of some arguments of `build`."""
    return Recipe(**_resolved(_defaults() | dict(given)))


def _defaults() -> dict[str, Any]:
    """Return the defaults of `build`."""
    parameters = inspect.signature(build).parameters
    return {name: each.default for name, each in parameters.items() if name in FIELDS}


def _without(given: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the arguments but for these."""
    return {name: value for name, value in given.items() if name not in names}


def _warn_of_idle(made: Recipe, why: Mapping[str, str]) -> None:
    """Warn the caller of a function of this module of what it gave for nothing.

    Args:
        made: The recipe.
        why: The reasons, by field, or by option.
    """
    if why:
        told = made.summary()
        given = {name: _short(name, told[name]) if name in told else None for name in why}
        warnings.warn(idle_message(given, why), KfactkWarning, stacklevel=3)


def _resolved(values: Mapping[str, Any], *, trusted: bool = True) -> dict[str, Any]:
    """Return the arguments of `build` with stages in place of their names.

    Args:
        values: The arguments.
        trusted: Whether import paths may be imported.
    """
    for name in values:
        if name not in FIELDS:
            raise OptionError(
                f"{name!r} is not an argument of kfactk.build.{near_names(name, FIELDS)} Use one "
                f"of: {', '.join(FIELDS)}. Give a stage's own options with its name: "
                "update={'name': 'adam', 'betas': (0.9, 0.99)}."
            )
    out: dict[str, Any] = {}
    for name, value in values.items():
        if name in STAGE_HOOKS and value is None and name not in OPTIONAL:
            raise OptionError(
                f"{name} is None; every recipe has one. Leave it out for the default, or see "
                "python -m kfactk stages."
            )
        if value is None and name in ADAPTING:
            continue
        if name == "curvature":
            out[name] = _blocks(value, trusted)
        elif name == "first_moment":
            out[name] = as_first_moment(python_number(value))
        elif name == "likelihood" and _names_heads(value):
            out[name] = _heads(value, trusted)
        elif name in STAGE_HOOKS:
            made = None if value is None else registry().resolve(name, value, trusted=trusted)
            out[name] = made
        else:
            out[name] = python_number(from_json(value, trusted=trusted))
    if left := [name for name in ADAPTING if name in values and values[name] is None]:
        rules, unit = rules_of(out["curvature"], out["basis"]), out.get("factor_every")
        usual = usual_values(
            rules,
            out["update"],
            out.get("pace"),
            unit,
            out.get("controller"),
            out.get("weight_decay", 0.0),
            out.get("link"),
        )
        out |= _resolved({name: usual[name] for name in left})
    return out


OPTIONAL = ("tracker", "clip", "link", "pace", "controller")
"""Families of which a recipe may have none, or leave the choice."""
ADAPTING = ("damping", "clip", "factor_every", "scale_every", "basis_every")
"""Fields whose default follows from the stages."""


def usual_values(
    rules: Sequence[BlockRule],
    update: Update,
    pace: Pace | None,
    unit: Period | None,
    controller: Controller | None = None,
    weight_decay: float = 0.0,
    link: Link | None = None,
) -> dict[str, Any]:
    """Return what a recipe has where the user gives nothing.

    Statistics of gradients are cheap, and a single gradient tells little: they are taken in every
    step. With a pace, all of a block is due at once. A controller has a first damping of its own,
    and chooses the length of the step. The clip "kl" reads that off the blocks, which a link
    changes.

    Args:
        rules: Its curvatures with their bases.
        update: The update rule.
        pace: The pace.
        unit: The `factor_every` that the user gives.
        controller: The controller.
        weight_decay: The weight decay, which is part of the first damping of a controller.
        link: The link.
    """
    unbounded = any(each is not None for each in (controller, link)) or any(
        rule.basis.waives for rule in rules
    )
    clip, damping = "none" if unbounded else "kl", default_damping(update)
    if controller is not None:
        with attribute_errors("controller", controller, "giving its first damping"):
            damping = float(controller.first_damping(weight_decay))
    periods: tuple[Period, ...] = (10, 10, 100)
    if all(rule.of_gradient for rule in rules):
        periods = (1, 1, 10)
    elif pace is not None:
        periods = (10, *[10 if unit is None else unit] * 2)
    return dict(zip(ADAPTING, (damping, clip, *periods), strict=True))


def _blocks(given: Any, trusted: bool) -> tuple[BlockSpec, ...]:
    """Return the blocks that `curvature=` names."""
    items = list(given) if isinstance(given, list | tuple) else [given]
    if "all" in items:
        place = items.index("all")
        items[place : place + 1] = ALL_CURVATURES
    found = []
    for item in items:
        if isinstance(item, BlockSpec):
            found.append(item)
        elif isinstance(item, Mapping) and "curvature" in item:
            if unknown := sorted(set(item) - {"curvature", "basis", "layers"}):
                raise OptionError(
                    f"a block has no {', '.join(unknown)}; give curvature, basis and layers."
                )
            found.append(_block(item, trusted))
        else:
            found.append(_block({"curvature": item}, trusted))
    return tuple(found)


def _names_heads(given: Any) -> bool:
    """Return whether `likelihood=` names the heads of a model."""
    return isinstance(given, list | tuple | HeadSpec) or (
        isinstance(given, Mapping) and "name" not in given
    )


def _heads(given: Any, trusted: bool) -> tuple[HeadSpec, ...]:
    """Return the heads that `likelihood=` names."""
    if isinstance(given, Mapping) and "likelihood" not in given:
        if any(each is None or isinstance(each, int | float) for each in given.values()):
            raise OptionError(
                f"likelihood is {dict(given)!r}, without a name; give {{'name': 'categorical', "
                "...}, or, for several heads, a likelihood for each part of the output."
            )
        given = [{"output": path, "likelihood": each} for path, each in given.items()]
    items = given if isinstance(given, list | tuple) else [given]
    if not items:
        raise OptionError("likelihood is empty; name at least one, such as 'categorical'.")
    found = []
    for item in items:
        if not isinstance(item, HeadSpec | Mapping):
            raise OptionError(
                f"likelihood has {item!r} among several; each needs the part of the output that it "
                "is of: give kfactk.head('value', 'gaussian')."
            )
        found.append(item if isinstance(item, HeadSpec) else _head(item, trusted))
    return tuple(found)


def _written_default(field: str, default: Any) -> Any:
    """Return a default of `build` as `summary` writes it.

    The stage is not resolved: its plugin may be missing.
    """
    if field in STAGE_HOOKS and default is not None:
        return {"name": default}
    try:
        return to_json(default)
    except OptionError:
        return repr(default)
