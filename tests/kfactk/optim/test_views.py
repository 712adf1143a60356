"""The reading interface against dense matrices made of what it shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import KfactkError, Optimizer, OptionError
from kfactk.testing._support.truth import as_matrix, dense_kron, vec
from tests.kfactk import dense

F64 = torch.float64
TAU = 0.07
BASES: dict[str, Any] = {"kfac": "kfac", "ekfac": "ekfac"}


def trained(basis: str, steps: int = 3, **recipe: Any) -> tuple[Optimizer, nn.Module]:
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 2, groups=2),
        nn.Flatten(),
        nn.Tanh(),
        nn.LayerNorm(12),
        nn.Linear(12, 3, bias=False),
    ).double()
    optimizer = kfactk.build(
        basis=BASES[basis], fisher="exact", damping=TAU, factor_every=1, basis_every=2, **recipe
    ).bind(model)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, 2, 4, dtype=F64)), torch.arange(6) % 3).backward()
        optimizer.step()
    return optimizer, model


def vectors(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {
        key: torch.randn_like(parameter)
        for key, parameter in model.get_submodule(name).named_parameters(recurse=False)
    }


def blocks(optimizer: Optimizer, basis: str, name: str, tau: float) -> list[Tensor]:
    """Return the dense F + tau I of each group of a layer, from what the view shows."""
    view = optimizer.layers[name]

    def split(tensor: Tensor) -> list[Tensor]:
        return list(tensor) if tensor.ndim == 3 else [tensor]

    if basis == "kfac":
        both = zip(split(view.factors["A"]), split(view.factors["G"]), strict=True)
        return [dense.kfac_block(a, g, tau) if tau else dense_kron(a, g) for a, g in both]
    turns = {key: split(parts["eigenvectors"]) for key, parts in view.decomposition.items()}
    return [
        dense.ekfac_block(a, g, s, tau)
        for a, g, s in zip(turns["A"], turns["G"], split(view.scale["scale"]), strict=True)
    ]


def assert_product(
    found: dict[str, Tensor], module: nn.Module, matrices: list[Tensor], given: dict[str, Tensor]
) -> None:
    ours, theirs = as_matrix(module, found), as_matrix(module, given)
    for block, one, other in zip(
        matrices, *[list(m) if m.ndim == 3 else [m] for m in (ours, theirs)], strict=True
    ):
        torch.testing.assert_close(vec(one), block @ vec(other), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("basis", BASES)
def test_products_with_the_fisher_and_its_inverse(basis: str) -> None:
    optimizer, model = trained(basis)
    for name in ("0", "4"):
        given, view = vectors(model, name), optimizer.layers[name]
        assert_product(
            view.fisher_product(given),
            model.get_submodule(name),
            blocks(optimizer, basis, name, 0.0),
            given,
        )
        if basis == "ekfac":
            inverse = [torch.linalg.inv(block) for block in blocks(optimizer, basis, name, TAU)]
            assert_product(view.precondition(given), model.get_submodule(name), inverse, given)
        whole = {f"{name}.{key}": value for key, value in given.items()}
        for method in ("fisher_product", "precondition"):
            found = getattr(optimizer, method)(whole)
            assert {
                key.removeprefix(f"{name}."): value.tolist() for key, value in found.items()
            } == {key: value.tolist() for key, value in getattr(view, method)(given).items()}


def test_the_kfac_inverse_right_after_its_refresh() -> None:
    optimizer, model = trained("kfac", steps=1)
    for name in ("0", "4"):
        given = vectors(model, name)
        inverse = [torch.linalg.inv(block) for block in blocks(optimizer, "kfac", name, TAU)]
        assert_product(
            optimizer.layers[name].precondition(given), model.get_submodule(name), inverse, given
        )


@pytest.mark.parametrize("basis", BASES)
def test_products_are_what_the_step_does(basis: str) -> None:
    """The next step refreshes the factors alone, so its preconditioner is the one that is asked."""
    optimizer, model = trained(basis, update="sgd", clip="none", lr=0.5, scale_every=10)
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    covered = {name: gradient for name, gradient in gradients.items() if not name.startswith("3.")}
    expected = optimizer.precondition(covered)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    F.cross_entropy(model(torch.randn(6, 2, 4, dtype=F64)), torch.arange(6) % 3)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            before[name] - parameter,
            0.5 * expected.get(name, gradients[name]),
            rtol=1e-9,
            atol=1e-12,
        )


def test_left_out_parameters_count_as_zero() -> None:
    optimizer, model = trained("ekfac")
    given = vectors(model, "0")
    half = optimizer.fisher_product({"0.weight": given["weight"]})
    full = optimizer.layers["0"].fisher_product(
        {"weight": given["weight"], "bias": torch.zeros_like(given["bias"])}
    )
    assert set(half) == {"0.weight", "0.bias"}
    assert all(torch.equal(half[f"0.{key}"], value) for key, value in full.items())
    assert half["0.bias"].any()


def test_matrix_joins_weight_and_bias() -> None:
    optimizer, model = trained("ekfac")
    given = vectors(model, "0")
    torch.testing.assert_close(optimizer.layers["0"].matrix(given), as_matrix(model[0], given))


@pytest.mark.parametrize("basis", BASES)
def test_the_condition_number(basis: str) -> None:
    optimizer, _ = trained(basis, steps=1)
    for name in ("0", "4"):
        found = optimizer.layers[name].condition()
        assert found is not None
        truth = max(
            float(torch.linalg.cond(block)) for block in blocks(optimizer, basis, name, TAU)
        )
        if basis == "ekfac":
            torch.testing.assert_close(float(found), truth)
        else:
            assert 1.0 <= float(found) <= truth * (1 + 1e-9)


def test_nothing_is_shown_before_it_is_measured() -> None:
    model = nn.Linear(2, 3)
    optimizer = kfactk.build().bind(model)
    view = optimizer.layers[""]
    assert (view.factors, view.decomposition, view.scale, view.condition()) == ({}, {}, {}, None)
    for method in (view.fisher_product, view.precondition):
        with pytest.raises(KfactkError, match=r"no curvature yet: take a step\(\)"):
            method({"weight": torch.ones(3, 2)})
    with pytest.raises(KfactkError, match="no curvature yet"):
        optimizer.fisher_product({"weight": torch.ones(3, 2)})


@pytest.mark.parametrize("method", ["fisher_product", "precondition"])
def test_a_parameter_without_a_block_is_refused(method: str) -> None:
    optimizer, _ = trained("ekfac")
    with pytest.raises(
        OptionError,
        match=r"'3.weight' is not a preconditioned.*Covered are: 0.weight, 0.bias, 4.weight\.",
    ):
        getattr(optimizer, method)({"3.weight": torch.ones(12)})
    assert getattr(optimizer, method)({}) == {}


@pytest.mark.parametrize("basis_every", [1, 2, 100])
def test_scale_decay_1_is_the_mean_of_all_measurements(basis_every: int) -> None:
    """New eigenvectors do not restart it; a change of basis keeps the trace, that of F."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = kfactk.build(
        basis={"name": "ekfac", "scale_decay": 1.0},
        fisher="exact",
        update="sgd",
        lr=0.0,
        observe="manual",
        factor_every=1,
        scale_every=1,
        basis_every=basis_every,
    ).bind(model)
    traces = []
    for k in range(5):
        inputs = (k + 1) * torch.randn(20, 4, dtype=F64)
        p = model(inputs).detach().softmax(-1)
        optimizer.observe()
        optimizer.step()
        traces.append(float(((inputs.square().sum(-1) + 1) * (p * (1 - p)).sum(-1)).mean()))
        found = float(optimizer.layers[""].scale["scale"].sum())
        assert found == pytest.approx(sum(traces) / len(traces), rel=1e-9)
