"""What the products with curvature refuse, and what they skip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import Optimizer, OptionError

METHODS = ("fisher_product", "precondition")


def trained(model: nn.Module, inputs: Tensor, **recipe: Any) -> Optimizer:
    optimizer = kfactk.build(fisher="exact", clip="none", update="sgd", lr=0.0, **recipe).bind(
        model
    )
    F.cross_entropy(model(inputs).float(), torch.arange(len(inputs)) % 3).backward()
    optimizer.step()
    return optimizer


def convolutional() -> tuple[Optimizer, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.LayerNorm(3), nn.Flatten(), nn.Linear(36, 3))
    return trained(model, torch.randn(9, 2, 5, 5)), model


KERNEL = torch.randn(4, 2, 3, 3)
WRONG: dict[str, tuple[Any, str]] = {
    "a permuted kernel": (
        KERNEL.permute(0, 2, 3, 1),
        r"shape \(4, 3, 3, 2\).*shape \(4, 2, 3, 3\)",
    ),
    "a flat kernel": (KERNEL.flatten(1), r"shape \(4, 18\)"),
    "one more dimension": (KERNEL.unsqueeze(0), r"shape \(1, 4, 2, 3, 3\)"),
    "one that broadcasts": (KERNEL[:1], r"shape \(1, 2, 3, 3\)"),
    "None": (None, "as None. Leave the name out"),
    "a list": (KERNEL.tolist(), "as list; it must be a tensor"),
    "an array": (KERNEL.numpy(), "as ndarray; it must be a tensor"),
    "a number": (1, "as int; it must be a tensor"),
    "a string": ("ones", "as str; it must be a tensor"),
    "double": (KERNEL.double(), "torch.float64 on cpu; it must be"),
    "half": (KERNEL.half(), "torch.float16 on cpu; it must be"),
    "integers": (KERNEL.long(), "torch.int64 on cpu; it must be"),
    "complex": (KERNEL.to(torch.complex64), "torch.complex64 on cpu; it must be"),
    "another device": (KERNEL.to("meta"), "on meta; it must be .* on cpu"),
    "sparse": (KERNEL.to_sparse(), "sparse_coo; it must be"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_like_its_parameter_is_refused(case: str, method: str) -> None:
    optimizer, _ = convolutional()
    given, message = WRONG[case]
    with pytest.raises(OptionError, match=f"'0.weight' is given .*{message}"):
        getattr(optimizer, method)({"0.weight": given, "0.bias": torch.ones(4)})
    with pytest.raises(OptionError, match=f"'weight' is given .*{message}"):
        getattr(optimizer.layers["0"], method)({"weight": given})
    with pytest.raises(OptionError, match=f"'weight' is given .*{message}"):
        optimizer.layers["0"].matrix({"weight": given})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", [None, [KERNEL], KERNEL, "weight", iter([("weight", KERNEL)])])
def test_only_a_mapping_has_names(given: Any, method: str) -> None:
    optimizer, _ = convolutional()
    for owner in (optimizer, optimizer.layers["0"]):
        with pytest.raises(OptionError, match=f"as {type(given).__name__}; give a dict from param"):
            getattr(owner, method)(given)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strict", [True, False])
def test_a_name_of_no_parameter_is_refused(method: str, strict: bool) -> None:
    """With a layer, too: a name that is misspelt must not count as zero."""
    optimizer, _ = convolutional()
    with pytest.raises(OptionError, match=r"not a parameter of the bound.*mean '0.weight'"):
        getattr(optimizer, method)({"0.wieght": KERNEL}, strict=strict)
    with pytest.raises(OptionError, match=r"layer '0' has no parameter 'wieght'.*mean 'weight'"):
        getattr(optimizer.layers["0"], method)({"wieght": KERNEL}, strict=strict)


@pytest.mark.parametrize("method", METHODS)
def test_names_without_a_block_are_skipped_where_that_is_asked_for(method: str) -> None:
    optimizer, model = convolutional()
    gradients: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    gradients["1.bias"] = None  # not looked at
    ask: Callable[..., dict[str, Tensor]] = getattr(optimizer, method)
    with pytest.raises(OptionError, match=r"'1.weight' is not a precond.*strict=False.*Covered"):
        ask(gradients)
    found = ask(gradients, strict=False)
    covered = {name: each for name, each in gradients.items() if not name.startswith("1.")}
    alone = ask(covered)
    assert set(found) == set(covered) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert all(torch.equal(found[name], alone[name]) for name in found)
    assert ask({"1.weight": gradients["1.weight"]}, strict=False) == {}


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_bias_has_no_block(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    optimizer = trained(model, torch.randn(6, 4))
    view, both = optimizer.layers[""], {"weight": torch.ones(3, 4), "bias": torch.ones(3)}
    with pytest.raises(OptionError, match=r"does not treat the parameter 'bias' .it treats weight"):
        getattr(view, method)(both)
    found = getattr(view, method)(both, strict=False)
    assert set(found) == {"weight"}
    torch.testing.assert_close(
        found["weight"], getattr(view, method)({"weight": both["weight"]})["weight"], rtol=0, atol=0
    )


def test_a_tied_parameter_goes_by_the_name_of_its_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    optimizer = trained(model, torch.randn(6, 3))
    for strict in (True, False):
        with pytest.raises(OptionError, match=r"'2.weight' is the same parameter as '0.weight'"):
            optimizer.fisher_product({"2.weight": torch.ones(3, 3)}, strict=strict)


def test_a_half_precision_layer_takes_its_own_answers_again() -> None:
    """Products are float32 there, and may be multiplied again."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).bfloat16()
    optimizer = trained(model, torch.randn(6, 4).bfloat16(), damping=0.5)
    given = torch.randn(3, 4)
    once = optimizer.fisher_product({"weight": given})
    assert once["weight"].dtype == torch.float32
    back = optimizer.precondition(
        {name: each + 0.5 * (given if name == "weight" else 0.0) for name, each in once.items()}
    )
    torch.testing.assert_close(back["weight"], given, rtol=1e-4, atol=1e-4)
    exact = given.bfloat16()
    torch.testing.assert_close(
        optimizer.fisher_product({"weight": exact}),
        optimizer.fisher_product({"weight": exact.float()}),
    )
