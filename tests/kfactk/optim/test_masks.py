"""Gradient masks: entries set to zero stay so, and the others move as without a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import OptionError


def trained(
    masks: dict[str, Tensor] | None, hooked: bool, **recipe: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters before and after one step; with the mask also as a hook, or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for name, mask in (masks or {}).items() if hooked else ():
        parameters[name].register_hook(lambda gradient, mask=mask: gradient * mask)
    optimizer = kfactk.build(**{"curvature": "kfac", "lr": 0.1, **recipe}).bind(model, masks=masks)
    x = torch.randn(8, 4, dtype=torch.float64)
    F.cross_entropy(model(x), torch.arange(8) % 2).backward()
    optimizer.step()
    return before, {name: p.detach().clone() for name, p in parameters.items()}


MASKS = {
    "0.weight": torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 1, 0]]).bool(),
    "1.bias": torch.tensor([0.0, 1.0, 1.0]),  # of a layer without a block
    "3.bias": torch.tensor([1.0, 0.0]),
}


@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
@pytest.mark.parametrize("update", ["sgd", "adamw", "nag"])
@pytest.mark.parametrize("hooked", [True, False])
def test_masked_entries_do_not_move(update: str, basis: str, hooked: bool) -> None:
    before, after = trained(MASKS, hooked, update=update, basis=basis)
    for name in before:
        moved = before[name] != after[name]
        assert torch.equal(moved, MASKS[name].bool() if name in MASKS else torch.ones_like(moved))


def test_the_other_entries_move_as_without_a_mask() -> None:
    _, plain = trained(None, False, update="sgd", clip="none")
    _, masked = trained(MASKS, False, update="sgd", clip="none")
    for name, value in masked.items():
        kept = MASKS[name].bool() if name in MASKS else torch.ones_like(value).bool()
        torch.testing.assert_close(value[kept], plain[name][kept], rtol=0, atol=0)


def test_the_clip_sees_masked_gradients() -> None:
    limit = 1e-3
    before, after = trained(
        MASKS, True, update="sgd", clip={"name": "norm", "limit": limit}, lr=1.0, exclude=["1"]
    )
    moved = [after[name] - before[name] for name in ("0.weight", "0.bias", "3.weight", "3.bias")]
    found = torch.cat([each.flatten() for each in moved]).norm()
    torch.testing.assert_close(found, torch.tensor(limit, dtype=torch.float64))


@pytest.mark.parametrize(
    ("masks", "told"),
    [
        ({"0.wieght": torch.ones(3, 4)}, "Did you mean '0.weight'"),
        ({"0.weight": torch.ones(4, 3)}, r"shape \(3, 4\), like the parameter, not \(4, 3\)"),
        ({"0.weight": True}, "not bool"),
    ],
)
def test_a_mask_that_fits_no_parameter_is_refused(masks: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        trained(masks, False)


def test_two_masks_of_one_parameter_must_be_equal() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    recipe, mask = kfactk.build(curvature="kfac"), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    recipe.bind(model, masks={"0.weight": mask, "1.weight": mask.clone()}).close()
    with pytest.raises(OptionError, match="which are the same parameter"):
        recipe.bind(model, masks={"0.weight": mask, "1.weight": 1 - mask})


@pytest.mark.parametrize("at", ["update", "gradient"])
def test_a_mask_of_ones_changes_nothing(at: str) -> None:
    ones = {name: torch.ones(mask.shape) for name, mask in MASKS.items()}
    decay = {"weight_decay": 0.5, "weight_decay_at": at, "update": "sgd"}
    (_, plain), (_, masked) = trained(None, False, **decay), trained(ones, False, **decay)
    torch.testing.assert_close(masked, plain, rtol=0, atol=0)


def test_a_masked_parameter_that_is_gone_is_an_error_at_the_step() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = kfactk.build(curvature="kfac").bind(model, masks={"1.weight": torch.ones(2, 2)})
    F.cross_entropy(model(torch.ones(2, 2)), torch.tensor([0, 1])).backward()
    del model[1]
    with pytest.raises(OptionError, match=r"1\.weight"):
        optimizer.step()
