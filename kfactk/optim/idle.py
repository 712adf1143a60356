"""Fields of a recipe that change nothing, whatever the model is: no stage of it reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kfactk.errors import OptionError
from kfactk.optim.settings import Settings, name_of
from kfactk.preconditioner.rules import BlockRule
from kfactk.registry.registry import registry
from kfactk.sides import side_of
from kfactk.stages import Curvature

NEVER = "never"
"""What `Basis.damped_at` says where damping has no part."""


def idle_fields(recipe: Settings) -> dict[str, str]:
    """Return the fields that have no effect with the stages of a recipe, each with the reason.

    A field that acts in one block is not among them. Defaults, too, may be without effect.
    Groups of parameters may have a damping and a weight decay of their own, so that
    `weight_decay_at` always counts.

    Args:
        recipe: The recipe.

    Example:
        >>> import kfactk
        >>> idle_fields(kfactk.build(curvature="kfac", basis="kfac"))["scale_every"]
        "basis 'kfac' measures no scale"
    """
    return _idle_periods(recipe) | _idle_damping(recipe) | _idle_measuring(recipe)


def idle_options(recipe: Settings) -> dict[str, str]:
    """Return the options of stages that were given and have no effect, with the reason.

    Args:
        recipe: The recipe.

    Example:
        >>> import kfactk
        >>> likelihood = {"name": "gaussian", "variance": 0.5}
        >>> recipe = kfactk.build(likelihood=likelihood, fisher="empirical")
        >>> list(idle_options(recipe))
        ["variance of likelihood 'gaussian'"]
    """
    found = dict[str, str]()
    for rule in recipe.rules:
        if rule.basis.reads or rule.basis.moments_from is not None:
            continue
        given, label = _given("curvature", rule.curvature), name_of("curvature", rule.curvature)
        for option in getattr(rule.curvature, "only_measured", ()):
            if option in given:
                why = f"{_named('basis', [rule.basis])} measures nothing"
                found[f"{option} of curvature {label!r}"] = why
    for likelihood in dict.fromkeys(head.likelihood for head in recipe.heads):
        given, label = _given("likelihood", likelihood), name_of("likelihood", likelihood)
        for option, why in _unread(recipe, likelihood):
            if option in given:
                found[f"{option} of likelihood {label!r}"] = why
    return found


def _unread(recipe: Settings, likelihood: Any) -> Iterator[tuple[str, str]]:
    """Yield the options of a likelihood that nobody reads, each with the reason."""
    fisher = recipe.fisher
    if recipe.controller is None and not fisher.own_pass and any(map(_passes, recipe.rules)):
        for option in getattr(likelihood, "only_own_pass", ()):
            why = f"fisher {name_of('fisher', fisher)!r} measures the gradient of your own loss"
            yield option, why
    if getattr(fisher, "draw", None) is None:  # it may give labels that are left out
        for option, other in getattr(likelihood, "read_with", ()):
            if getattr(likelihood, other) is None:
                yield option, f"it is looked for in the labels, and {other}= does not name them"


def _idle_periods(recipe: Settings) -> dict[str, str]:
    """Return the periods, and the decay, of what no basis keeps."""
    rules, found = recipe.rules, dict[str, str]()
    bases = _named("basis", (rule.basis for rule in rules))
    if not any(rule.basis.moments_from for rule in rules):
        found["scale_every"] = f"{bases} measures no scale"
    if not any(rule.basis.requires for rule in rules):
        found["basis_every"] = f"{bases} decomposes nothing"
    if not any(rule.basis.reads for rule in rules):
        why = f"{bases} measures no factors"
        found |= {"factor_every": why, "factor_decay": why}
        if "scale_every" in found:
            found["stagger"] = f"{bases} measures nothing"
    elif all(rule.basis.reads <= rule.curvature.row_factors for rule in rules):
        curvatures = _named("curvature", (rule.curvature for rule in rules))
        found["factor_decay"] = f"{curvatures} keeps the last examples, and averages nothing"
    return found


def _idle_damping(recipe: Settings) -> dict[str, str]:
    """Return the damping where no basis adds it to anything."""
    if recipe.controller is not None or any(r.basis.damped_at != NEVER for r in recipe.rules):
        return {}
    bases = _named("basis", (rule.basis for rule in recipe.rules))
    return {"damping": f"{bases} does not damp by it"}


def _idle_measuring(recipe: Settings) -> dict[str, str]:
    """Return what says how samples are measured, where none are, or how an unread loss reduces."""
    rules, found = recipe.rules, dict[str, str]()
    curvatures = _named("curvature", (rule.curvature for rule in rules))
    bases = _named("basis", (rule.basis for rule in rules))
    if all(rule.of_gradient for rule in rules):
        why = f"{curvatures} measures your own gradient, and follows no forward"
    else:
        why = f"{bases} needs inputs alone, and no pass for gradients"
    read = ("likelihood", "output") if recipe.controller is None else ()
    if not any(map(_passes, rules)):
        found = dict.fromkeys(("fisher", *read, "reduction", "unseen"), why)
        if recipe.controller is None and all(rule.of_gradient for rule in rules):
            found["observe"] = why
        return found
    fisher = name_of("fisher", recipe.fisher)
    if recipe.fisher.own_pass and not any(map(_scales_by_terms, rules)):
        found["reduction"] = f"fisher {fisher!r} measures passes of its own, and not your loss"
    if not getattr(recipe.fisher, "reads_output", True):
        found |= dict.fromkeys(read, f"fisher {fisher!r} has its terms, and reads no output")
    return found


def _passes(rule: BlockRule) -> bool:
    """Return whether blocks of a rule need gradients of samples, or the number of their terms."""
    if rule.of_gradient:
        return False
    alone = type(rule.curvature).input_factors is not Curvature.input_factors
    of_inputs = all(side_of(name) in ("A", "C", "K") for name in rule.basis.reads)
    return rule.basis.moments_from is not None or not (alone and of_inputs)


def _scales_by_terms(rule: BlockRule) -> bool:
    """Return whether moments of the user's gradient are multiplied by the number of terms."""
    return rule.basis.moments_from == "gradient" and not rule.of_gradient


def _named(family: str, stages: Iterable[object]) -> str:
    """Return the names of stages, each once: "basis 'muon' or 'soap'"."""
    return f"{family} {' or '.join(dict.fromkeys(repr(name_of(family, s)) for s in stages))}"


def _given(family: str, stage: Any) -> set[str]:
    """Return the options of a stage that do not have their default; none where it has no name."""
    try:
        return set(registry().describe(family, stage)) - {"name"}
    except OptionError:
        return set()


def idle_message(given: Mapping[str, Any], why: Mapping[str, str]) -> str:
    """Return the warning about what was given and has no effect.

    Args:
        given: The values, by name; `None` for names that tell all.
        why: The reasons.

    Example:
        >>> print(idle_message({"scale_every": 5}, {"scale_every": "basis 'kfac' measures none"}))
        scale_every=5 has no effect: basis 'kfac' measures none. Leave it out
    """
    reasons: dict[str, list[str]] = {}
    for name in given:
        shown = name if given[name] is None else f"{name}={given[name]!r}"
        reasons.setdefault(why[name], []).append(shown)
    told = [
        f"{_listed(names)} {'has' if len(names) == 1 else 'have'} no effect: {reason}"
        for reason, names in reasons.items()
    ]
    return f"{'; '.join(told)}. Leave {'it' if len(given) == 1 else 'them'} out"


def _listed(names: list[str]) -> str:
    """Return "a, b and c"."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
