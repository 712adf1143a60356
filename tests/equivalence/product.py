"""The product of registered first-party stages: accepted recipes, placements, and refusals."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Iterator, Mapping, Sequence
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
ABSENT: frozenset[str] = (
    frozenset() if importlib.util.find_spec("transformers") else frozenset({"experts"})
)
"""Stages whose layers cannot be made here: stacked experts are those of transformers."""
HEADS: Mapping[str, Any] = {
    "kind": "categorical",
    "size": {"name": "gaussian", "variance": 0.5, "divisor": "entries"},
}
"""Likelihoods of the model's two heads."""
LISTS: Sequence[Sequence[Any]] = (
    [
        {"curvature": "conv_kfac", "basis": "kfac", "layers": ["conv", "out"]},
        *("embedding", "norm", "attention", "rnn", "conv_kfac"),
    ],
    [
        {"curvature": "rows", "basis": "cg", "layers": ["wide"]},
        *({"name": "rnn", "time": "chain"}, "conv_kfac"),
    ],
    [
        {
            "curvature": "gradient",
            "basis": {"name": "muon", "precision": "full"},
            "layers": ["wide", "shared"],
        },
        "all",
        {"curvature": "gradient", "basis": {"name": "soap", "eps": 0.1, "refresh": "eigh"}},
    ],
)
"""Curvatures by blocks, with several bases in one recipe besides the recipe's own."""
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
        others = sorted(set(self.recipe) - {*FAMILIES, *WITH})
        told = [written(self.recipe[family]) for family in families]
        return " x ".join([*told, *(f"{name}={self.recipe[name]}" for name in others)])


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
        if name not in ABSENT
        for options in VARIANTS.get((family, name), [{}])
    ]


def placements() -> list[dict[str, Any]]:
    """Every placement of ours that is registered."""
    return stages("placement")


def extras() -> list[Recipe]:
    """What a recipe may have besides, two at a time; and alone what no family of `WITH` holds."""
    values: Mapping[str, Sequence[Any]] = {
        **{family: stages(family) for family in WITH},
        "lag": [2],
        "stagger": [True],
        "likelihood": [HEADS],
    }
    alone = [{name: value} for name in values if name not in WITH for value in values[name]]
    pairs = [
        dict(zip(names, pair, strict=True))
        for names in itertools.combinations(values, 2)
        for pair in itertools.product(*(values[name] for name in names))
    ]
    return [*alone, *pairs]


def combinations() -> Iterator[Recipe]:
    """Yield the recipes.

    They are the product of `FAMILIES`, and with one update rule and no clip each controller, link
    and pace. To these come all triples of a curvature, a basis and one of `extras`, and of one of
    `LISTS`, a basis and a clip; what else such a recipe has comes in turn.
    """
    known = {family: stages(family) for family in (*FAMILIES, *WITH)}
    for combination in itertools.product(*(known[family] for family in FAMILIES)):
        recipe = dict(zip(FAMILIES, combination, strict=True))
        yield recipe
        for family, rule in WITH.items():
            if (recipe["update"]["name"], recipe["clip"]["name"]) == (rule, "none"):
                yield from ({**recipe, family: each} for each in known[family])
    curvatures, bases = [*known["curvature"], *LISTS], known["basis"]
    besides = extras()
    for places in itertools.product(*map(_places, (curvatures, bases, besides))):
        curvature, basis, extra = places
        more = besides[extra]
        rule = WITH["controller" if "controller" in more else "link"]
        yield {
            **bare(curvatures[curvature], bases[basis], _turn(known["fisher"], places)),
            "update": {"name": rule},
            **more,
        }
    for places in itertools.product(*map(_places, (LISTS, bases, known["clip"]))):
        curvature, basis, clip = places
        yield {
            **bare(LISTS[curvature], bases[basis], _turn(known["fisher"], places)),
            "clip": known["clip"][clip],
            "update": _turn(known["update"], places),
        }


def bare(curvature: Any, basis: Recipe, fisher: Recipe) -> dict[str, Any]:
    """A recipe of these, without a clip and with the plain update rule."""
    return {
        "curvature": curvature,
        "basis": basis,
        "fisher": fisher,
        "clip": {"name": "none"},
        "update": {"name": "sgd"},
    }


def _places(values: Sequence[Any]) -> range:
    return range(len(values))


def _turn(values: Sequence[Recipe], places: tuple[int, ...]) -> Recipe:
    """The value whose turn it is: with one place fixed, each comes with each of another one."""
    return values[sum(places) % len(values)]


@functools.cache
def cases() -> tuple[list[Case], list[str]]:
    """Return the accepted recipes, and those that are refused with their messages.

    What is refused bare is refused with anything else, and is not built again.
    """
    accepted, refused = [], []
    plain: dict[str, str] = {}
    for recipe in combinations():
        three = bare(*(recipe[family] for family in FAMILIES[:3]))
        key = str(Case(three, 2))
        if key not in plain:
            plain[key] = refusal(three)
        if why := plain[key] or refusal(recipe):
            refused.append(f"{Case(recipe, 2)}: {why}")
            continue
        accepted.append(Case(recipe, 2 if determined(recipe) else 1))
    return accepted, refused


def refusal(recipe: Recipe) -> str:
    """Why a recipe is not accepted; empty where it is."""
    try:
        made = kfactk.build(**recipe)
    except KfactkError as error:
        return str(error)
    for rule in made.rules if len(made.rules) == 1 else ():
        own = rule.of_gradient or rule.curvature.must_be_read
        if own and rule.basis != made.basis:
            return "it is the recipe of the curvature's own basis"
    return ""


def possible(case: Case, placement: Any) -> bool:
    """Whether a placement takes a recipe: a link wants all layers on every rank."""
    return "link" not in case.recipe or placement == {"name": "replicated"}


def determined(recipe: Recipe) -> bool:
    """Whether the matrices determine the step, kernels having several taps.

    Under SUA, A is Omega kron I: each eigenvalue is repeated once a tap. Rounding then chooses the
    eigenvectors, and the scale of EKFAC depends on the choice. One tap repeats nothing.
    """
    sua = any("sua" in each.values() for each in named(recipe["curvature"]))
    return not (sua and recipe["basis"]["name"] == "ekfac")


def named(given: Any) -> Iterator[Recipe]:
    """Yield the stages with options in `curvature=`, also those of blocks."""
    for item in [given] if isinstance(given, Mapping | str) else given:
        stage = item.get("curvature", item) if isinstance(item, Mapping) else item
        yield {"name": stage} if isinstance(stage, str) else stage


def written(stage: Any) -> str:
    """A stage in words."""
    if not isinstance(stage, Mapping):
        return repr(stage)
    return " ".join(
        [stage["name"], *(f"{name}={value}" for name, value in stage.items() if name != "name")]
    )
