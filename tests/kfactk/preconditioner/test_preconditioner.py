"""The first step against dense float64 algebra, and what faults do to a step."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CaptureError, CombinationError, DecompositionError, KfactkWarning, Optimizer
from kfactk_stages.basis.ekfac import Ekfac
from tests.kfactk import dense

F64 = torch.float64
TAU = 0.03
CURVATURES = [
    ("kfac", "sud"),
    ("kfac", "reduce"),
    ("conv_kfac", "sud"),
    ("conv_kfac", "sua"),
    ("conv_kfac", "reduce"),
]
BASES: dict[str, Any] = {
    "kfac": "kfac",
    "exact": "ekfac",
    "running": {"name": "ekfac", "scale": "running"},
}
FISHERS = ("exact", "mc", "empirical")
CLIPS = {"none": 0.0, "value": 0.05, "norm": 0.1, "kl": 1e-5}
UPDATES = ("sgd", "momentum", "nag", "adam", "adamw", "radam")
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])
DRAWN = torch.tensor([1, 1, 0, 2, 2, 0])


class ConvNet(nn.Module):
    """Convolutions, one grouped without bias; linear layers, one over two tokens; maybe a norm."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False)
        self.norm = nn.GroupNorm(2, 4) if norm else nn.Identity()
        self.hidden = nn.Linear(8, 5)
        self.out = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x))
        x = torch.tanh(self.norm(self.grouped(x)))
        return self.out(torch.tanh(self.hidden(x.reshape(-1, 2, 8))).flatten(1))


def label_score(labels: Tensor) -> dense.Scores:
    """One pass: the negative log-likelihood of given labels."""
    return lambda output, n: [F.cross_entropy(output, labels[n : n + 1])]


@functools.cache
def problem(fisher: str, norm: bool) -> dense.Problem:
    torch.manual_seed(1)
    model, inputs = ConvNet(norm).double(), torch.randn(6, 2, 5, 5, dtype=F64)
    scores = {
        "exact": dense.exact_scores(dense.categorical_labels),
        "mc": label_score(DRAWN),
        "empirical": label_score(LABELS),
    }
    return dense.Problem(
        model,
        inputs,
        lambda output: F.cross_entropy(output, LABELS),
        scores[fisher],
        float(len(inputs)),
    )


@functools.cache
def seen(curvature: str, fisher: str, norm: bool) -> dict[str, dense.Seen]:
    return problem(fisher, norm).watch(
        (nn.Linear,) if curvature == "kfac" else (nn.Linear, nn.Conv2d)
    )


def fisher_stage(name: str) -> Any:
    return {"name": "mc", "draw": lambda view: DRAWN.unsqueeze(1)} if name == "mc" else name


def stepped(prob: dense.Problem, params: Any = None, **recipe: Any) -> tuple[nn.Module, Optimizer]:
    """Return a copy of the problem's model after one step of the recipe."""
    model = copy.deepcopy(prob.model)
    optimizer = kfactk.build(**recipe).bind(model, params(model) if params else None)
    prob.loss(model(prob.inputs)).backward()
    optimizer.step()
    return model, optimizer


def vectors(optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    found = {name: view.decomposition for name, view in optimizer.layers.items()}
    return {
        name: {
            key: parts["eigenvectors"].double()
            for key, parts in each.items()
            if "eigenvectors" in parts
        }
        for name, each in found.items()
    }


def assert_parameters(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.detach(),
            expected[name],
            rtol=1e-9,
            atol=1e-9,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("curvature", "spatial"), CURVATURES)
def test_the_first_step_is_dense_algebra(
    curvature: str, spatial: str, basis: str, fisher: str
) -> None:
    """Each Fisher takes a third of all clips and updates, so that the three take all of them."""
    norm, lr = fisher != "mc", 0.05
    prob, what = problem(fisher, norm), seen(curvature, fisher, norm)
    gradients, expected = prob.gradients(), None
    for number, (clip, update) in enumerate(itertools.product(CLIPS, UPDATES)):
        if (number + number // len(UPDATES)) % 3 != FISHERS.index(fisher):
            continue
        model, optimizer = stepped(
            prob,
            curvature={"name": curvature, "spatial": spatial},
            basis=BASES[basis],
            fisher=fisher_stage(fisher),
            clip={"name": clip, "limit": CLIPS[clip]} if clip != "none" else "none",
            update=update,
            lr=lr,
            damping=TAU,
            weight_decay=0.01,
        )
        assert set(optimizer.layers) == set(what)
        if expected is None:
            expected = dense.all_preconditioned(
                prob, what, vectors(optimizer), spatial=spatial, basis=basis, tau=TAU
            )
        bounded = dense.clipped(clip, CLIPS[clip], gradients, expected, dict.fromkeys(expected, lr))
        assert clip == "none" or any(
            not torch.equal(bounded[name], expected[name]) for name in expected
        )
        assert_parameters(
            model, dense.updated(update, prob.model, gradients | bounded, lr, weight_decay=0.01)
        )


@pytest.mark.parametrize("clip", ["value", "norm", "kl"])
def test_a_clip_that_does_not_bind_changes_nothing(clip: str) -> None:
    prob = problem("exact", True)
    model, optimizer = stepped(
        prob, fisher="exact", clip={"name": clip, "limit": 1e6}, update="sgd", lr=0.05, damping=TAU
    )
    changed = dense.all_preconditioned(
        prob,
        seen("conv_kfac", "exact", True),
        vectors(optimizer),
        spatial="sud",
        basis="exact",
        tau=TAU,
    )
    assert_parameters(model, dense.updated("sgd", prob.model, prob.gradients() | changed, 0.05))


def test_groups_have_their_own_lr_damping_and_weight_decay() -> None:
    """A block is damped as its anchor's group; the KL clip takes each parameter's learning rate."""
    prob, what = problem("exact", True), seen("conv_kfac", "exact", True)
    own = {"hidden.weight": (0.2, 0.5, 0.0), "hidden.bias": (0.4, 7.0, 0.3)}

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        parameters = dict(model.named_parameters())
        special = [
            {"params": [parameters.pop(n)], "lr": lr, "damping": t, "weight_decay": wd}
            for n, (lr, t, wd) in own.items()
        ]
        return [{"params": list(parameters.values())}, *special]

    model, optimizer = stepped(
        prob,
        groups,
        fisher="exact",
        clip={"name": "kl", "limit": 1e-5},
        update="sgd",
        lr=0.05,
        damping=TAU,
        weight_decay=0.01,
    )
    turned = vectors(optimizer)
    changed = dense.all_preconditioned(prob, what, turned, spatial="sud", basis="exact", tau=TAU)
    hidden = dense.all_preconditioned(
        prob, {"hidden": what["hidden"]}, turned, spatial="sud", basis="exact", tau=0.5
    )
    lr = {name: own.get(name, (0.05,))[0] for name, _ in prob.model.named_parameters()}
    bounded = prob.gradients() | dense.clipped("kl", 1e-5, prob.gradients(), changed | hidden, lr)
    expected = {
        name: p.detach() - lr[name] * (bounded[name] + own.get(name, (0, 0, 0.01))[2] * p.detach())
        for name, p in prob.model.named_parameters()
    }
    assert_parameters(model, expected)


@pytest.mark.parametrize("basis", BASES)
def test_weight_decay_at_the_gradient_is_preconditioned_with_it(basis: str) -> None:
    """It is no part of what curvature is measured on."""
    prob, what, decay = problem("exact", True), seen("conv_kfac", "exact", True), 0.3
    model, optimizer = stepped(
        prob,
        basis=BASES[basis],
        fisher="exact",
        clip="none",
        update="sgd",
        lr=0.05,
        damping=TAU,
        weight_decay=decay,
        weight_decay_at="gradient",
    )
    decayed = {
        name: gradient + decay * prob.model.get_parameter(name).detach()
        for name, gradient in prob.gradients().items()
    }
    changed = dense.all_preconditioned(
        prob, what, vectors(optimizer), applied=decayed, spatial="sud", basis=basis, tau=TAU
    )
    assert_parameters(model, dense.updated("sgd", prob.model, decayed | changed, 0.05))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [decay]


def test_gradients_are_left_as_they_were_found() -> None:
    prob = problem("exact", True)
    model, _ = stepped(prob, fisher="exact", damping=TAU)
    for name, gradient in prob.gradients().items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-12, atol=1e-14)


# ----------------------------------------------------------------------------------------- faults


def small(seed: int = 0, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def train(model: nn.Module, optimizer: Optimizer, batches: list[Tensor]) -> None:
    """Take one step over micro-batches; those that are not finite leave no gradient."""
    optimizer.zero_grad()
    for x in batches:
        loss = F.cross_entropy(model(x), torch.arange(len(x)) % 3)
        if bool(torch.isfinite(loss)):
            loss.backward()
    optimizer.step()


def statistics(optimizer: Optimizer) -> dict[str, Tensor]:
    out = {}
    for name, view in optimizer.layers.items():
        out |= {
            f"{name}.{key}": tensor.clone() for key, tensor in (view.factors | view.scale).items()
        }
    return out


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10
) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor,
            expected[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


EVERY_STEP: dict[str, Any] = {
    "fisher": "exact",
    "factor_every": 1,
    "scale_every": 1,
    "basis_every": 1,
    "lr": 0.1,
    "damping": 0.1,
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("basis_every", [1, 3])
def test_a_batch_that_is_not_finite_is_skipped_and_counted(bad: float, basis_every: int) -> None:
    """The averages after it equal those of a run that never saw it."""
    torch.manual_seed(2)
    good, broken = (
        [torch.randn(6, 4, dtype=F64) for _ in range(2)],
        torch.full((6, 4), bad, dtype=F64),
    )
    model, optimizer = _bound(basis_every)
    train(model, optimizer, [good[0]])
    with pytest.warns(KfactkWarning, match="NaN or inf"):
        train(model, optimizer, [broken])
    train(model, optimizer, [good[1]])
    assert optimizer.counters["skipped_batches"] == 1
    reference, other = _bound(basis_every)
    for batch in good:
        train(reference, other, [batch])
    assert_same(statistics(optimizer), statistics(other))
    assert_same(dict(model.named_parameters()), dict(reference.named_parameters()))


def _bound(basis_every: int) -> tuple[nn.Module, Optimizer]:
    model = small()
    return model, kfactk.build(**{**EVERY_STEP, "basis_every": basis_every}).bind(model)


def test_one_micro_batch_that_is_not_finite_leaves_the_others() -> None:
    torch.manual_seed(2)
    good, broken = torch.randn(6, 4, dtype=F64), torch.full((2, 4), float("nan"), dtype=F64)
    (model, optimizer), (reference, other) = _bound(1), _bound(1)
    with pytest.warns(KfactkWarning, match="NaN or inf"):
        train(model, optimizer, [good[:3], broken, good[3:]])
    train(reference, other, [good[:3], good[3:]])
    assert_same(statistics(optimizer), statistics(other))
    assert_same(dict(model.named_parameters()), dict(reference.named_parameters()))


def test_a_first_batch_that_is_not_finite_leaves_curvature_to_the_next() -> None:
    torch.manual_seed(2)
    good, broken = torch.randn(6, 4, dtype=F64), torch.full((6, 4), float("nan"), dtype=F64)
    model = small()
    optimizer = kfactk.build(
        **{**EVERY_STEP, "factor_every": 100, "scale_every": 100, "basis_every": 100}
    ).bind(model)
    with pytest.warns(KfactkWarning, match="NaN or inf"):
        train(model, optimizer, [broken])
    assert statistics(optimizer) == {}
    train(model, optimizer, [good])
    reference = small()
    other = kfactk.build(**EVERY_STEP).bind(reference)
    train(reference, other, [good])
    assert_same(statistics(optimizer), statistics(other))
    assert_same(dict(model.named_parameters()), dict(reference.named_parameters()))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e12])
def test_zero_tiny_and_huge_activations_survive(basis: str, size: float) -> None:
    model = small()
    optimizer = kfactk.build(**EVERY_STEP, basis=BASES[basis]).bind(model)
    for seed in range(3):
        torch.manual_seed(seed)
        train(model, optimizer, [size * torch.randn(6, 4, dtype=F64)])
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert optimizer.counters == {"skipped_batches": 0, "failed_decompositions": 0}


@pytest.mark.parametrize("basis", BASES)
def test_a_branch_that_starts_at_zero_trains(basis: str) -> None:
    """Zero-initialised output: G of the first layer is zero."""
    model = small()
    nn.init.zeros_(model[2].weight)
    optimizer = kfactk.build(**EVERY_STEP, basis=BASES[basis]).bind(model)
    for _ in range(3):
        train(model, optimizer, [torch.randn(6, 4, dtype=F64)])
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert float(optimizer.layers["0"].factors["G"].abs().max()) > 0


class Failing(Ekfac):
    """Decomposes G while `works`."""

    works = True

    def decompose(
        self, name: str, matrix: Tensor, context: kfactk.FactorContext
    ) -> dict[str, Tensor]:
        if not Failing.works and name == "G":
            raise DecompositionError("it would not decompose")
        return super().decompose(name, matrix, context)


def test_a_failed_decomposition_leaves_the_last_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    optimizer = kfactk.build(**EVERY_STEP, basis=Failing()).bind(model)
    train(model, optimizer, [torch.randn(6, 4, dtype=F64)])
    good = {
        name: view.decomposition["A"]["eigenvectors"].clone()
        for name, view in optimizer.layers.items()
    }
    monkeypatch.setattr(Failing, "works", False)
    with pytest.warns(
        KfactkWarning, match="it would not decompose; the last good decomposition stays in use"
    ):
        train(model, optimizer, [torch.randn(6, 4, dtype=F64)])
    assert optimizer.counters["failed_decompositions"] == 2
    x = torch.randn(6, 4, dtype=F64)
    train(model, optimizer, [x])
    for name, view in optimizer.layers.items():
        assert torch.equal(view.decomposition["A"]["eigenvectors"], good[name])
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_without_any_decomposition_the_plain_gradient_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Failing, "works", False)
    model, x = small(), torch.randn(6, 4, dtype=F64)
    optimizer = kfactk.build(**EVERY_STEP, basis=Failing(), update="sgd", clip="none").bind(model)
    with pytest.warns(
        KfactkWarning, match="its plain gradient is used until the next decomposition"
    ):
        train(model, optimizer, [x])
    reference = small()
    F.cross_entropy(reference(x), torch.arange(6) % 3).backward()
    assert_same(
        dict(model.named_parameters()),
        {n: p.detach() - 0.1 * p.grad for n, p in reference.named_parameters()},
    )


def test_a_layer_that_gives_no_sample_is_an_error_and_changes_nothing() -> None:
    model = small()
    optimizer = kfactk.build(**EVERY_STEP).bind(model)
    before = copy.deepcopy(model.state_dict())
    F.cross_entropy(
        model[2](model[1](model[0](torch.randn(6, 4, dtype=F64)))), torch.arange(6) % 3
    ).backward()  # not through the model
    with pytest.raises(CaptureError, match=r"'0', '2' has a gradient but gave no sample"):
        optimizer.step()
    assert_same(dict(model.state_dict()), before)
    assert optimizer.steps == 0
    train(model, optimizer, [torch.randn(6, 4, dtype=F64)])
    assert optimizer.steps == 1


def test_a_basis_that_needs_what_the_curvature_lacks_is_refused() -> None:
    @attrs.frozen
    class Tridiagonal(Ekfac):
        requires = frozenset({"A", "G", "Psi"})

    with pytest.raises(
        CombinationError,
        match=r"needs Psi, which curvature 'kfac' does not provide \(it provides A, G\)",
    ):
        kfactk.build(curvature="kfac", basis=Tridiagonal())
