"""Predicted bytes and seconds: truth is what a step leaves behind."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfactk
from kfactk.preconditioner.footprint import footprint_of
from kfactk.preconditioner.gradient_mean import MEAN, TURNED
from kfactk.timing import SOLVER_RATES

WIDE = {"name": "conv_kfac", "max_side": 7, "wide": "blocks"}
GRADIENT_BLOCKS = {"name": "gradient", "max_side": 7, "wide": "blocks"}
RECIPES: dict[str, dict[str, Any]] = {
    "ekfac": {},
    "kfac": {"basis": "kfac"},
    "channels": {"basis": {"name": "ekfac", "inputs": "channels"}},
    "sua": {"curvature": {"name": "conv_kfac", "spatial": "sua"}},
    "running": {"basis": {"name": "ekfac", "scale": "running"}},
    "diagonal": {"curvature": {**WIDE, "wide": "diagonal"}},
    "identity": {"curvature": {**WIDE, "wide": "identity"}, "basis": "kfac"},
    "blocks": {"curvature": WIDE},
    "wide kfac": {"curvature": WIDE, "basis": "kfac"},
    "all": {"curvature": "all"},
    "soap": {"curvature": {**GRADIENT_BLOCKS, "wide": "diagonal"}},
    "soap in blocks": {"curvature": GRADIENT_BLOCKS},
    "soap of identities": {"curvature": {**GRADIENT_BLOCKS, "wide": "identity"}},
    "shampoo in blocks": {"curvature": GRADIENT_BLOCKS, "basis": "shampoo"},
    "kl in blocks": {"curvature": GRADIENT_BLOCKS, "basis": "kl"},
    "kfac in blocks of gradients": {"curvature": GRADIENT_BLOCKS, "basis": "kfac"},
    "shampoo": {"curvature": "gradient", "basis": "shampoo"},
    "kl": {"curvature": {**GRADIENT_BLOCKS, "wide": "diagonal"}, "basis": "kl"},
    "ingd": {"basis": {"name": "singd", "variant": "ingd"}, "clip": "none"},
    "roots in blocks": {
        "basis": {"name": "singd", "structure": "blocks", "block": 4},
        "clip": "none",
    },
    "kfac of gradients": {"curvature": "gradient", "basis": "kfac"},
    "muon": {"curvature": ["gradient"], "basis": "muon"},
    "muon of means": {"curvature": ["gradient"], "basis": "muon", "first_moment": 0.9},
    "soap of means": {"curvature": GRADIENT_BLOCKS, "first_moment": 0.9},
    "ekfac of means": {"curvature": "all", "first_moment": 0.9},
    "running, of means": {"basis": {"name": "ekfac", "scale": "running"}, "first_moment": 0.9},
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = OrderedDict(
        conv=nn.Conv2d(2, 4, 3),
        grouped=nn.Conv2d(4, 8, 2, groups=2),
        norm=nn.GroupNorm(2, 8),
        flat=nn.Flatten(),
        head=nn.Linear(8, 9),
    )
    return nn.Sequential(layers)


@pytest.mark.parametrize("name", RECIPES)
def test_bytes_are_those_of_the_state_after_steps(name: str) -> None:
    """The first gradient makes a basis; the second one is measured in it."""
    module = model()
    optimizer = kfactk.build(**RECIPES[name]).bind(module)
    blocks = optimizer._preconditioner.blocks.current()
    averages = optimizer._preconditioner.averages
    predicted = {block.name: footprint_of(block, averages=averages) for block in blocks}
    for _ in range(2):
        F.cross_entropy(module(torch.randn(6, 2, 4, 4)), torch.arange(6)).backward()
        optimizer.step()
    for block in blocks:
        each, state = predicted[block.name], block.state
        assert each is not None
        decomposition = [t for parts in state.decomposition.values() for t in parts.values()]
        assert each.factors == sum(t.nbytes for t in state.factor_values().values())
        assert each.decomposition == sum(t.nbytes for t in decomposition)
        assert each.moments == 2 * sum(t.nbytes for t in state.moment_values().values())
        means = {name: mean.value for name, mean in state.gradients.items()}
        assert (each.means, each.turned) == tuple(
            0 if (value := means.get(name)) is None else value.nbytes for name in (MEAN, TURNED)
        )
        rows = {row.block: row.bytes for row in optimizer.coverage().rows}
        assert rows[block.name] == each.kept
        kept = {**state.factor_values(), **state.moment_values()}.values()
        assert each.kept - each.moments // 2 == sum(
            t.nbytes for t in (*kept, *decomposition, *means.values()) if t is not None
        )


def test_a_table_tells_wide_and_large_layers_alone() -> None:
    recipe = kfactk.build(curvature={**WIDE, "wide": "diagonal"})
    rows = {row.parameter: row for row in recipe.coverage(model())}
    assert "input side 18: diagonal" not in str(rows["conv.weight"])
    assert rows["conv.weight"].wide == ("input side 19: diagonal",)
    assert rows["head.weight"].wide == ("input side 9: diagonal", "output side 9: diagonal")
    assert (
        "input side 19: diagonal; 1 kB, under 1 ms a decomposition" in rows["conv.weight"].treatment
    )
    usual = {row.parameter: row for row in kfactk.build().coverage(model())}
    assert usual["conv.weight"].treatment == "block conv (conv_kfac, ekfac)"
    assert usual["conv.weight"].bytes == 4 * (2 * (19**2 + 16) + 19 + 4 + 2 * 76)


def test_seconds_are_those_of_the_solver_on_this_kind_of_device() -> None:
    head = nn.Linear(4, 2000, bias=False)
    [eigh] = kfactk.build().coverage(head)
    [cholesky] = kfactk.build(basis="kfac").coverage(head)
    n, rates = 2000, SOLVER_RATES["cpu"]
    by_hand = n * 1e-5 + 4 / 3 * n**3 / 1e10 + 10 / 3 * n**3 / 19.2e9
    assert eigh.seconds == pytest.approx(by_hand + rates.seconds("eigh", 4))
    assert cholesky.seconds is not None
    assert cholesky.seconds < by_hand / 3
    [on_meta] = kfactk.build().coverage(head.to("meta"))
    assert on_meta.seconds is None
    assert on_meta.bytes == eigh.bytes


def test_wide_sides_of_gradients_are_told() -> None:
    recipe = kfactk.build(curvature={"name": "gradient", "max_side": 4}, basis="soap", update="sgd")
    weight, bias = recipe.coverage(nn.Linear(3, 7))
    assert weight.wide == ("output side 7: diagonal",)
    assert "(gradient, soap; output side 7: diagonal; " in weight.treatment
    assert bias.wide == ()
