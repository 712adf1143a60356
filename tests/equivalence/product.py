"""The product of registered first-party stages: accepted recipes, placements, and refusals."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from random import Random
from types import MappingProxyType
from typing import Any

import attrs

import kfactk
from kfactk import Assignment, KfactkError, Share, Workload
from kfactk.registry.registry import registry

FAMILIES = ("curvature", "basis", "fisher", "clip", "update")
WITH = MappingProxyType({"controller": "velocity", "link": "sgd", "pace": "sgd"})
"""Families of which a recipe may have none, each with the update rule that it is tried with; the
clip is none."""
ELSEWHERE = MappingProxyType({"curvature": "experts"})
"""Stages whose layers the model here does not have: tests of their own compare ranks."""
RANKS = (1, 2, 3, 4)
VARIANTS: Mapping[tuple[str, str], list[dict[str, Any]]] = {
    ("curvature", "kfac"): [{}, {"spatial": "reduce"}],
    ("curvature", "conv_kfac"): [
        *({}, {"spatial": "sua"}, {"spatial": "reduce"}),
        {"max_side": 4, "wide": "blocks"},
    ],
    ("basis", "ekfac"): [{}, {"scale": "running"}],
    ("basis", "kfac"): [{}, {"solver": "inverse"}, {"solver": "eigh"}],
    ("curvature", "rnn"): [{}, {"time": "chain"}],
    ("basis", "lgm"): [{}, {"option": 1}],
    ("basis", "singd"): [
        {},
        {"structure": "diagonal", "momentum": 0.5},
        {"variant": "ingd", "structure": "blocks", "block": 3},
    ],
    ("basis", "soap"): [{"eps": 0.1, "refresh": "eigh"}],
    ("basis", "shampoo"): [{"eps": 0.01}],
    ("basis", "kl"): [{"eps": 0.01}],
    ("basis", "muon"): [{"precision": "full"}],
    ("basis", "newton_muon"): [{"precision": "full"}, {"precision": "full", "power": 0.5}],
    ("fisher", "mc"): [{"samples": 2}],
    ("clip", "value"): [{"limit": 0.05}],
    ("clip", "norm"): [{"limit": 0.1}],
    ("clip", "kl"): [{"limit": 1e-4}],
    ("clip", "trust_region"): [{"radius": 1e-4}],
    ("controller", "quadratic"): [{"model_damping": 0.3, "adapt_every": 2, "search_every": 3}],
}
"""Options that select another code path of a stage, limits that bind, and an eps that rounding
does not reach; default: no options."""

Recipe = Mapping[str, Any]


@attrs.frozen
class Case:
    """One recipe and the model it is tried on.

    Args:
        recipe: Arguments of `kfactk.build`, but for the placement.
        taps: Size of the model's kernels.
    """

    recipe: Recipe
    taps: int

    def __str__(self) -> str:
        families = (family for family in (*FAMILIES, *WITH) if family in self.recipe)
        return " x ".join(written(self.recipe[family]) for family in families)


@attrs.frozen
class Anyhow:
    """Assign each layer to random ranks: every matrix, and independently its gradient.

    Args:
        seed: Of the draws, with the layer's name.
    """

    seed: int
    process_group: Any = None
    wire_dtype: str | None = None

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        """Any assignment that there can be."""
        shares = {}
        for work in workload.works:
            random = Random(f"{self.seed},{work.layer},{ranks}")
            some = [
                tuple(sorted(random.sample(range(ranks), random.randint(1, ranks))))
                for _ in range(len(work.matrices) + 1)
            ]
            inverse_workers = {
                name: some[0 if work.indivisible else number]
                for number, name in enumerate(sorted(work.matrices))
            }
            gradient_workers = some[-1]
            if work.follows:  # decompositions go on from the last ones
                each = itertools.chain(gradient_workers, *inverse_workers.values())
                gradient_workers = tuple(sorted(set(each)))
            shares[work.layer] = Share(inverse_workers, gradient_workers)
        return Assignment("anyhow", shares)


def stages(family: str) -> list[dict[str, Any]]:
    """Every stage of ours that is registered, with each of its variants."""
    names = sorted(info.name for info in registry().stages(family) if info.distribution == "kfactk")
    return [
        {"name": name, **options}
        for name in names
        if name != ELSEWHERE.get(family)
        for options in VARIANTS.get((family, name), [{}])
    ]


def placements() -> list[dict[str, Any]]:
    """Every placement of ours that is registered."""
    return stages("placement")


def combinations() -> Iterator[Recipe]:
    """Yield the product, and with one update rule and no clip each controller, link and pace."""
    for combination in itertools.product(*map(stages, FAMILIES)):
        recipe = dict(zip(FAMILIES, combination, strict=True))
        yield recipe
        for family, rule in WITH.items():
            if (recipe["update"]["name"], recipe["clip"]["name"]) == (rule, "none"):
                yield from ({**recipe, family: each} for each in stages(family))


@functools.cache
def cases() -> tuple[list[Case], list[str]]:
    """Return the accepted recipes, and those that are refused with their messages."""
    accepted, refused = [], []
    for recipe in combinations():
        try:
            made = kfactk.build(**recipe)
        except KfactkError as error:
            refused.append(f"{Case(recipe, 2)}: {error}")
            continue
        [rule] = made.rules
        own = rule.of_gradient or rule.curvature.must_be_read
        if own and rule.basis != made.basis:
            refused.append(f"{Case(recipe, 2)}: it is the recipe of the curvature's own basis")
            continue
        accepted.append(Case(recipe, 2 if determined(recipe) else 1))
    return accepted, refused


def possible(case: Case, placement: Any) -> bool:
    """Whether a placement takes a recipe: a link wants all layers on every rank."""
    return "link" not in case.recipe or placement == {"name": "replicated"}


def determined(recipe: Recipe) -> bool:
    """Whether the matrices determine the step, kernels having several taps.

    Under SUA, A is Omega kron I: each eigenvalue is repeated once a tap. Rounding then chooses the
    eigenvectors, and the scale of EKFAC depends on the choice. One tap repeats nothing.
    """
    return not (recipe["curvature"].get("spatial") == "sua" and recipe["basis"]["name"] == "ekfac")


def written(stage: Any) -> str:
    """A stage in words."""
    if not isinstance(stage, Mapping):
        return repr(stage)
    return " ".join(
        [stage["name"], *(f"{name}={value}" for name, value in stage.items() if name != "name")]
    )
