"""Every accepted curvature x basis x clip x update, on one small convolutional net in float32.

Each trains some steps with finite loss, and its first step equals dense float64 algebra.
`python -m tests.kfactk.optim.test_optimizer_combinations` prints the table.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import KfactkError, OptionError
from kfactk.registry.registry import registry
from kfactk_stages.basis.ekfac import Ekfac
from tests.covering import covering
from tests.kfactk import dense

LR, TAU, STEPS = 0.02, 0.1, 20
LABELS, DRAWN = torch.tensor([0, 1, 2, 1, 0, 2]), torch.tensor([1, 1, 2, 0, 0, 2])

Variants = dict[str, list[tuple[dict[str, Any], Any]]]
"""For each stage, options with what the dense algebra needs to know of them."""
LINEAR, ALL = (nn.Linear,), (nn.Linear, nn.Conv2d)
CURVATURES: Variants = {
    "kfac": [({}, (LINEAR, "sud")), ({"spatial": "reduce"}, (LINEAR, "reduce"))],
    "taylor": [({}, (LINEAR, "sud"))],
    "conv_kfac": [
        ({}, (ALL, "sud")),
        ({"spatial": "sua"}, (ALL, "sua")),
        ({"spatial": "reduce"}, (ALL, "reduce")),
    ],
}
BASES: Variants = {
    "kfac": [({}, "kfac")],
    "ekfac": [({}, "exact"), ({"scale": "running"}, "running")],
}
CLIPS: Variants = {
    "none": [({}, math.inf)],
    "value": [({"limit": 0.05}, 0.05)],
    "norm": [({"limit": 0.1}, 0.1)],
    "kl": [({"limit": 1e-5}, 1e-5)],
    "trust_region": [({"radius": 1e-5}, 1e-5)],
}
UPDATES: Variants = {
    name: [({}, name)] for name in ("sgd", "momentum", "nag", "velocity", "adam", "adamw", "radam")
}
FAMILIES = {"curvature": CURVATURES, "basis": BASES, "clip": CLIPS, "update": UPDATES}
LINEAR_UPDATES = ("sgd", "momentum", "nag", "velocity", "radam")
"""Rules whose first step is linear in the gradient; that of the others follows its signs."""
TORCH_UPDATES = [
    each
    for each in vars(torch.optim).values()
    if isinstance(each, type)
    and issubclass(each, torch.optim.Optimizer)
    and each is not torch.optim.Optimizer
]


class Net(nn.Module):
    """A strided convolution, a norm for plain parameters, and a linear layer over two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = (
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.GroupNorm(2, 4),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.conv(x))).reshape(-1, 2, 8)).sum(1)


@attrs.frozen
class Combination:
    """One row of the table."""

    curvature: dict[str, Any]
    basis: dict[str, Any]
    clip: dict[str, Any]
    update: Any
    layers: tuple[type[nn.Module], ...]
    spatial: str
    scale: str
    limit: float
    rule: str | type

    def __str__(self) -> str:
        shown = [
            " ".join(map(str, each.values())) for each in (self.curvature, self.basis, self.clip)
        ]
        return " x ".join([*shown, self.rule if isinstance(self.rule, str) else self.rule.__name__])


@attrs.frozen
class Outcome:
    """The outcome: `error` is the largest deviation of the first step over its size."""

    combination: Combination
    refused: str = ""
    error: float = math.nan
    losses: tuple[float, ...] = ()


def combined(
    curvature: tuple[str, int], basis: tuple[str, int], clip: str, update: str
) -> Combination:
    """Variants of a curvature and a basis with a clip and an update."""
    (c_options, (layers, spatial)), (b_options, scale) = (
        CURVATURES[curvature[0]][curvature[1]],
        BASES[basis[0]][basis[1]],
    )
    (options, limit), (more, rule) = CLIPS[clip][0], UPDATES[update][0]
    named = (
        {"name": curvature[0], **c_options},
        {"name": basis[0], **b_options},
        {"name": clip, **options},
        {"name": update, **more},
    )
    return Combination(*named, layers, spatial, scale, limit, rule)


def combinations(curvature: tuple[str, int], basis: tuple[str, int]) -> Iterator[Combination]:
    """All clips and updates with the given variants of a curvature and a basis."""
    for clip, update in itertools.product(CLIPS, UPDATES):
        yield combined(curvature, basis, clip, update)


@functools.cache
def problem() -> dense.Problem:
    """The net in float64, its parameters and inputs being float32 numbers."""
    torch.manual_seed(0)
    model, inputs = Net(), torch.randn(6, 1, 4, 4)
    return dense.Problem(
        model.double(),
        inputs.double(),
        lambda output: F.cross_entropy(output, LABELS),
        lambda output, n: [F.cross_entropy(output, DRAWN[n : n + 1])],
        6.0,
    )


@functools.cache
def seen(layers: tuple[type[nn.Module], ...]) -> dict[str, dense.Seen]:
    return problem().watch(layers)


def trial(combination: Combination) -> Outcome:
    """Build, bind, train; refusals are told, any other error is raised."""
    model = copy.deepcopy(problem().model).float()
    try:
        optimizer = kfactk.build(
            curvature=combination.curvature,
            basis=combination.basis,
            clip=combination.clip,
            update=combination.update,
            fisher={"name": "mc", "draw": lambda view: DRAWN.unsqueeze(1)},
            lr=LR,
            damping=TAU,
            factor_every=5,
            scale_every=4,
            basis_every=7,
        ).bind(model)
    except KfactkError as error:
        return Outcome(combination, refused=str(error))
    inputs, losses, error = problem().inputs.float(), [], math.nan
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), LABELS)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if step == 0:
            error = deviation(combination, model, optimizer)
    losses.append(float(F.cross_entropy(model(inputs), LABELS).detach()))
    return Outcome(combination, "", error, tuple(losses))


def deviation(combination: Combination, model: nn.Module, optimizer: kfactk.Optimizer) -> float:
    """Return the largest deviation of the first step, over each tensor's largest change."""
    vectors = {
        name: {
            key: parts["eigenvectors"].double()
            for key, parts in view.decomposition.items()
            if "eigenvectors" in parts
        }
        for name, view in optimizer.layers.items()
    }
    what, gradients = seen(combination.layers), problem().gradients()
    assert set(vectors) == set(what)
    changed = dense.all_preconditioned(
        problem(),
        what,
        vectors,
        spatial=combination.spatial,
        basis=combination.scale,
        tau=TAU,
        tolerance=1e-4,
        null=1e-5,
    )
    replaced = gradients | dense.clipped(
        combination.clip["name"],
        combination.limit,
        gradients,
        changed,
        dict.fromkeys(changed, LR),
        TAU,
    )
    expected, before = (
        dense.updated(combination.rule, problem().model, replaced, LR),
        dict(problem().model.named_parameters()),
    )
    worst = 0.0
    for name, parameter in model.named_parameters():
        truth, found = (
            expected[name] - before[name].detach(),
            parameter.detach().double() - before[name].detach(),
        )
        size = float(truth.abs().max())
        steady = (
            replaced[name].abs()
            >= (0.0 if combination.rule in LINEAR_UPDATES else 1e-3) * replaced[name].abs().max()
        )
        worst = max(
            worst,
            float((found - truth)[steady].abs().max()) / size,
            *((found[~steady].abs() / size - 1).tolist()),
        )
    return worst


def assert_trains(outcome: Outcome) -> None:
    assert not outcome.refused, f"{outcome.combination}: {outcome.refused}"
    assert outcome.error < 2e-3, (
        f"{outcome.combination}: first step off by {outcome.error:.2g} of its size"
    )
    assert len(outcome.losses) == STEPS + 1
    assert all(map(math.isfinite, outcome.losses)), f"{outcome.combination}: {outcome.losses}"


def variants(family: Variants) -> list[tuple[str, int]]:
    return [(name, number) for name, each in family.items() for number in range(len(each))]


OTHER_LAYERS = {
    "curvature": {"attention", "embedding", "norm", "rnn", "experts", "gradient", "rows"},
    "basis": {
        *("unitwise", "soap", "shampoo", "kl", "muon", "newton_muon", "cg", "lgm", "singd"),
    },
}
"""Stages for layers that the model here does not have, and those on statistics of gradients: see
test_optimizer_blocks and test_optimizer_gradients. Clips of the table refuse `singd`."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_has_every_stage_of_ours_that_is_listed(family: str) -> None:
    listed = {info.name for info in registry().stages(family) if info.distribution == "kfactk"}
    assert listed - OTHER_LAYERS.get(family, set()) == set(FAMILIES[family])


@covering(curvature=variants(CURVATURES), basis=variants(BASES), clip=CLIPS, update=UPDATES)
def test_every_accepted_combination_trains_from_a_first_step_that_is_dense_algebra(
    curvature: tuple[str, int], basis: tuple[str, int], clip: str, update: str
) -> None:
    assert_trains(trial(combined(curvature, basis, clip, update)))


REFUSED = {
    torch.optim.LBFGS: "points that have no preconditioned gradient",
    torch.optim.SparseAdam: "it takes sparse gradients only",
}
if hasattr(torch.optim, "Muon"):
    REFUSED[torch.optim.Muon] = "only supports 2D parameters"


def with_torch(rule: type) -> Combination:
    return Combination(
        {"name": "conv_kfac"},
        {"name": "ekfac"},
        {"name": "none"},
        rule,
        ALL,
        "sud",
        "exact",
        math.inf,
        rule,
    )


@pytest.mark.parametrize("rule", TORCH_UPDATES, ids=lambda rule: rule.__name__)
def test_every_torch_optimizer_trains_too_or_is_refused_with_the_reason(rule: type) -> None:
    outcome = trial(with_torch(rule))
    if rule in REFUSED:
        assert REFUSED[rule] in outcome.refused
    else:
        assert_trains(outcome)


@attrs.frozen
class NeedsMore(Ekfac):
    """A basis of a factor that no curvature of ours has."""

    requires = frozenset({"A", "G", "Psi"})


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "factors the curvature lacks": (
        {"basis": NeedsMore()},
        "needs Psi, which curvature 'conv_kfac' does not provide",
    ),
    "a way of summing rows that is for convolutions": (
        {"curvature": {"name": "kfac", "spatial": "sua"}},
        "Kfac: spatial='sua' cannot work",
    ),
    "a limit of nothing": (
        {"clip": {"name": "kl", "limit": 0.0}},
        "limit=0.0 cannot work: it must be a finite number greater than 0",
    ),
    "no basis at all": ({"basis": None}, "basis is None; every recipe has one"),
    "an unknown stage": ({"update": "lion"}, "There is no update 'lion'"),
    "an unknown option": (
        {"basis": {"name": "kfac", "scale": "exact"}},
        "basis 'kfac' .* has no option 'scale'",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_says_why(case: str) -> None:
    recipe, why = REFUSALS[case]
    with pytest.raises(KfactkError, match=why):
        kfactk.build(**recipe)


def test_an_update_without_weight_decay_is_refused_one() -> None:
    with pytest.raises(OptionError, match="Rprop has no weight decay, but one is set"):
        kfactk.build(update=torch.optim.Rprop, weight_decay=0.1).bind(Net())


def main() -> None:
    """Print a line for each curvature and basis, then what is refused and why."""
    print(
        f"{'curvature x basis':<36}{'accepted':>9}{'finite':>8}"
        f"{'first step off by':>19}{'loss falls':>12}"
    )
    for curvature, basis in itertools.product(variants(CURVATURES), variants(BASES)):
        outcomes = [trial(each) for each in combinations(curvature, basis)]
        accepted = [each for each in outcomes if not each.refused]
        head = str(outcomes[0].combination).rsplit(" x ", 2)[0]
        finite = sum(all(map(math.isfinite, each.losses)) for each in accepted)
        falls = sum(each.losses[-1] < each.losses[0] for each in accepted)
        worst = max(each.error for each in accepted)
        print(
            f"{head:<36}{f'{len(accepted)}/{len(outcomes)}':>9}{finite:>8}{worst:>19.1e}{f'{falls}/{len(accepted)}':>12}"
        )
    print("\ntorch.optim classes, with conv_kfac x ekfac x none:")
    for outcome in (trial(with_torch(rule)) for rule in TORCH_UPDATES):
        told = (
            outcome.refused
            or f"first step off by {outcome.error:.1e}, "
            f"loss {outcome.losses[0]:.3f} to {outcome.losses[-1]:.3f}"
        )
        print(f"  {outcome.combination.rule.__name__:<12}{told}")
    print("\nrefused:")
    for case, (recipe, _) in REFUSALS.items():
        try:
            kfactk.build(**recipe)
        except KfactkError as error:
            print(f"  {case}: {error}")


if __name__ == "__main__":
    main()
