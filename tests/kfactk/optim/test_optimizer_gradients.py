"""Statistics of gradients in the loops of users: no forward is followed, and nothing is asked."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import CaptureError, CombinationError, KfactkError, OptionError

F64 = torch.float64
MUON = {"decay": 0.9, "corrected": False, "nesterov": True}
BASES = [
    *("soap", "shampoo", "kl", "muon", "kfac"),
    {"name": "ekfac", "scale": "running", "power": 0.5},
]


def recipe(basis: Any = "soap", **more: Any) -> kfactk.Recipe:
    given = {"curvature": "gradient", "update": "sgd", "lr": 0.01, "first_moment": 0.9}
    return kfactk.build(**given | {"basis": basis} | more)


class Everything(nn.Module):
    """A shared layer, tied weights, attention, a recurrent layer, parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.shared, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.offsets = nn.Parameter(0.1 * torch.randn(3, 8))
        self.gain = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        x = self.table(tokens)
        x = x + self.attention(x, x, x)[0]
        x = self.shared(F.relu_(self.shared(self.norm(x))))
        x = self.gain * self.recurrent(x)[0] + self.offsets.mean(0)
        return {"found": [self.head(x)], "hidden": x}


def trained(model: nn.Module, optimizer: Any, steps: int, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (6, 5), generator=generator)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(tokens)
        loss = F.cross_entropy(out["found"][0].flatten(0, 1), tokens.flatten())
        loss = loss + 0.01 * out["hidden"].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("basis", BASES, ids=str)
def test_any_model_and_any_loss_trains_and_resumes_bit_for_bit(basis: Any) -> None:
    made = recipe(basis, first_moment=MUON, basis_every=3)
    model, again = Everything(), Everything()
    optimizer = made.bind(model)
    losses = trained(model, optimizer, 7)
    assert losses[-1] < losses[0]
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    resumed = made.bind(again)
    resumed.load_state_dict(saved["optimizer"])
    assert trained(model, optimizer, 5) == trained(again, resumed, 5)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_every_parameter_has_a_block_of_its_own_and_tied_ones_have_one() -> None:
    model = Everything()
    rows = {row.parameter: row.block for row in recipe().coverage(model)}
    assert rows["table.weight"] == "table"
    assert rows["attention.in_proj_weight"] == "attention[in_proj_weight]"
    assert rows["shared.bias"] == "shared[bias]"
    assert rows["offsets"] == "[offsets]"
    assert rows["gain"] == "[gain]"
    assert "head.weight" not in rows
    assert None not in rows.values()


def test_what_the_curvature_does_not_take_is_left_with_the_reason() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.LayerNorm(3), nn.Linear(3, 2))
    chosen = kfactk.block({"name": "gradient", "vectors": False}, layers=["0", "1"])
    rows = {row.parameter: row for row in recipe(curvature=[chosen]).coverage(model)}
    assert "sparse=True" in rows["0.weight"].reason
    assert "vectors=False" in rows["1.weight"].reason
    assert rows["2.weight"].reason == "no block's layers= matches it"
    assert not any(row.block for row in rows.values())


def test_what_the_basis_does_not_take_is_left_with_the_reason() -> None:
    model = Everything()
    plain = {row.parameter: row.reason for row in recipe("muon").coverage(model) if not row.block}
    assert set(plain) == {name for name, p in model.named_parameters() if p.ndim < 2}
    assert set(plain.values()) == {"basis muon orthogonalises matrices, and this is a vector"}


def test_forwards_are_not_followed_and_nothing_is_asked_of_them() -> None:
    model, calls = nn.Linear(3, 2), []
    optimizer = recipe(likelihood={"name": "categorical", "targets": "missing"}).bind(model)
    model(torch.randn(4, 3))
    model.eval()
    with torch.no_grad():
        model(torch.randn(4, 3))
    model.weight.grad, model.bias.grad = torch.randn(2, 3), torch.randn(2)
    hook = model.register_forward_hook(lambda *each: calls.append(each))
    optimizer.step()
    hook.remove()
    assert not calls
    assert set(optimizer.layers[""].factors) == {"L", "R"}


def dense_soap(gradients: list[Tensor], weight: Tensor, lr: float, decay: float) -> Tensor:
    """Adam in a basis that is made anew at every step, written out; the first step is even."""
    d_out, d_in = weight.shape
    left, right, m = (torch.zeros(n, n, dtype=F64) for n in (d_out, d_in, 1))
    dense = torch.zeros(d_out * d_in, d_out * d_in, dtype=F64)
    m, norm = torch.zeros_like(weight), 0.0
    for t, g in enumerate(gradients):
        left, right = 0.95 * left + g @ g.T, 0.95 * right + g.T @ g
        u = torch.kron(torch.linalg.eigh(right)[1], torch.linalg.eigh(left)[1])
        square = (u.T @ g.T.flatten()).square()
        carried = (u.T @ dense @ u).diagonal() * norm
        norm = 0.95 * norm + 1
        s = carried * (0.95 / norm) + square / norm
        dense = u @ torch.diag(s) @ u.T
        if not t:  # the gradient is diagonal in what it alone has made
            s = g.square().mean().expand(d_out * d_in)
        m = decay * m + (1 - decay) * g
        step = u @ ((u.T @ (m / (1 - decay ** (t + 1))).T.flatten()) * s**-0.5)
        weight = weight - lr * step.view(d_in, d_out).T
    return weight


def test_soap_is_adam_in_the_dense_eigenbasis() -> None:
    layer = nn.Linear(4, 4, bias=False, dtype=F64)
    gradients = [torch.randn(4, 4, dtype=F64) for _ in range(12)]
    expected = dense_soap(gradients, layer.weight.detach(), 0.01, 0.9)
    made = recipe({"name": "soap", "refresh": "eigh", "eps": 0.0}, basis_every=1)
    optimizer = made.bind(layer)
    for g in gradients:
        layer.weight.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), expected)


@pytest.mark.parametrize("at", ["update", "gradient"])
def test_weight_decay_before_preconditioning_is_measured_too(at: str) -> None:
    layer = nn.Linear(3, 3, bias=False, dtype=F64)
    optimizer = recipe(weight_decay=0.5, weight_decay_at=at).bind(layer)
    layer.weight.grad = gradient = torch.randn(3, 3, dtype=F64)
    seen = gradient + 0.5 * layer.weight.detach() if at == "gradient" else gradient
    optimizer.step()
    torch.testing.assert_close(optimizer.layers[""].factors["L"], seen @ seen.T)
    assert layer.weight.grad is gradient


def test_without_a_first_moment_nothing_is_kept_of_it() -> None:
    for first, kept in ((0.0, False), (0.5, True)):
        layer = nn.Linear(3, 2)
        optimizer = kfactk.build(first_moment=first).bind(layer)
        F.cross_entropy(layer(torch.randn(4, 3)), torch.zeros(4, dtype=torch.long)).backward()
        optimizer.step()
        assert ("kfactk.gradient.mean" in optimizer.state[layer.weight]) is kept


def test_the_mean_of_gradients_is_preconditioned_by_every_basis() -> None:
    """K-FAC of averaged gradients is the average of K-FAC's, while factors stay as they are."""
    torch.manual_seed(1)
    layer = nn.Linear(3, 2, dtype=F64)
    x, y = torch.randn(8, 3, dtype=F64), torch.zeros(8, dtype=torch.long)
    made = kfactk.build(
        curvature="kfac", basis="kfac", update="sgd", clip="none", first_moment=0.5, lr=0.1
    )
    optimizer = made.bind(layer)
    seen, before = [], None
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(layer(x), y).backward()
        before = layer.weight.detach().clone()
        seen.append({n: p.grad.clone() for n, p in layer.named_parameters()})
        optimizer.step()
    weights = [0.25, 0.5, 1.0]
    mean = {
        n: sum(w * g[n] for w, g in zip(weights, seen, strict=True)) / sum(weights)
        for n in ("weight", "bias")
    }
    expected = before - 0.1 * optimizer.precondition(mean)["weight"]
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_a_gradient_that_is_not_finite_changes_no_statistics() -> None:
    layer = nn.Linear(3, 2)
    optimizer = recipe().bind(layer)
    for bad in (False, False, True, False):
        layer.weight.grad, layer.bias.grad = torch.randn(2, 3), torch.randn(2)
        if bad:
            layer.weight.grad[0, 0] = float("nan")
        before = {k: v.clone() for k, v in optimizer.state[layer.weight].items()}
        parameters = [p.detach().clone() for p in layer.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        if bad:
            after = optimizer.state[layer.weight]
            kept = ("factor.L", "factor.R", "moment.square", "gradient.mean")
            assert all(torch.equal(before[f"kfactk.{k}"], after[f"kfactk.{k}"]) for k in kept)
            assert all(map(torch.equal, parameters, layer.parameters()))
    assert optimizer.counters["skipped_batches"] == 1
    assert all(bool(torch.isfinite(p).all()) for p in layer.parameters())


def test_a_parameter_without_gradient_waits_until_it_has_one() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = recipe().bind(model)
    x = torch.randn(4, 3)
    for used in (1, 1, 2):
        optimizer.zero_grad()
        model[:used](x).square().sum().backward()
        before = model[1].weight.detach().clone()
        optimizer.step()
        assert torch.equal(before, model[1].weight) is (used == 1)
        assert bool(optimizer.layers["1"].factors) is (used == 2)


@pytest.mark.parametrize("counts", ["now", "next"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_step_without_data_allocates_for_a_checkpoint(steps: int, counts: str) -> None:
    layer, other = nn.Linear(3, 2), nn.Linear(3, 2)
    made = recipe(first_moment=MUON, curvature={"name": "gradient", "counts": counts})
    optimizer, blank = made.bind(layer), made.bind(other)
    layer.weight.grad, layer.bias.grad = torch.randn(2, 3), torch.randn(2)
    for _ in range(steps):
        optimizer.step()
    for p in other.parameters():
        p.grad = torch.zeros_like(p)
    blank.param_groups[0]["lr"] = 0.0
    blank.step()
    assert blank.steps == 0
    for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        found, expected = blank.state[theirs], optimizer.state[mine]
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}


def test_a_mean_of_another_shape_is_refused_and_one_without_use_is_dropped() -> None:
    layer = nn.Linear(3, 2)
    optimizer = recipe().bind(layer)
    layer.weight.grad, layer.bias.grad = torch.randn(2, 3), torch.randn(2)
    optimizer.step()
    saved = optimizer.state_dict()
    plain = recipe(first_moment=0.0).bind(nn.Linear(3, 2))
    plain.load_state_dict(saved)
    assert "kfactk.gradient.mean" not in plain.state[plain.param_groups[0]["params"][0]]
    saved["state"][0]["kfactk.gradient.mean"] = torch.zeros(3, 3)
    with pytest.raises(KfactkError, match=r"mean of the gradients of layer '' has the shape"):
        recipe().bind(nn.Linear(3, 2)).load_state_dict(saved)


def test_a_scaler_is_not_asked_for_where_no_backward_is_listened_to() -> None:
    layer, scaler = nn.Linear(3, 2), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = recipe(fisher="empirical").bind(layer)
    scaler.scale(layer(torch.randn(4, 3)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.steps == 1
    other = kfactk.build(fisher="empirical").bind(nn.Linear(3, 2))
    layer = other.layers[""].layer.module
    scaler.scale(layer(torch.randn(4, 3)).square().mean()).backward()
    with pytest.raises(CaptureError, match="GradScaler"):
        scaler.step(other)


def test_defaults_follow_from_the_stages() -> None:
    soap, usual = recipe(), kfactk.build()
    assert kfactk.Recipe.from_dict(soap.to_dict()) == soap
    written = [(r.written("clip")["name"], r.factor_every, r.basis_every) for r in (soap, usual)]
    assert written == [("none", 1, 10), ("kl", 10, 100)]
    assert usual.evolve(curvature="gradient", basis="soap").written("clip") == {"name": "none"}
    assert kfactk.build(curvature="gradient").evolve(curvature="kfac") == kfactk.build(
        curvature="kfac"
    )
    mixed = kfactk.build(curvature=["conv_kfac", "gradient"])
    assert [rule.label for rule in mixed.rules] == ["conv_kfac, ekfac", "gradient, soap"]
    assert (mixed.written("clip")["name"], mixed.factor_every) == ("none", 10)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"clip": "kl"}, CombinationError, r"'kl' needs .*'soap' waives.*clip='none'"),
        (
            {"basis": {"name": "ekfac"}, "curvature": [kfactk.block("gradient", "ekfac")]},
            CombinationError,
            r"has none, but the mini-batch gradient.*'scale': 'running'",
        ),
        (
            {"basis": {"name": "ekfac", "power": 0.5}},
            CombinationError,
            r"no block uses .*'power': 0.5.*basis='kfac'",
        ),
        ({"curvature": "kfac"}, CombinationError, r"'soap' needs L, R, which curvature 'kfac'"),
        ({"curvature": "kfac", "basis": "muon"}, CombinationError, "Give curvature='gradient'"),
        ({"first_moment": 1.0}, OptionError, "decay=1.0"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(
    given: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        recipe(**given)


def test_blocks_without_a_fisher_matrix_say_so() -> None:
    layer = nn.Linear(3, 2, bias=False)
    optimizer = recipe("muon").bind(layer)
    vector = {"weight": torch.randn(2, 3)}
    assert optimizer.precondition(vector)["weight"].shape == (2, 3)
    with pytest.raises(KfactkError, match="no F to multiply by"):
        optimizer.fisher_product(vector)


def test_a_mix_by_blocks_shares_out_modules_and_what_is_left_of_them() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2))
    mix = [kfactk.block("gradient", basis="muon", layers=["2"]), "all", "gradient"]
    made = kfactk.build(curvature=mix, lr=0.01, update="sgd")
    stages = {row.parameter: row.stages for row in made.coverage(model)}
    assert stages == {
        "0.weight": "conv_kfac, ekfac",
        "0.bias": "conv_kfac, ekfac",
        "1.weight": "norm, unitwise",
        "1.bias": "norm, unitwise",
        "2.weight": "gradient, muon",
        "2.bias": "gradient, soap",
        "3.weight": "conv_kfac, ekfac",
        "3.bias": "conv_kfac, ekfac",
    }
    optimizer = made.bind(model)
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert set(optimizer.layers["0"].factors) == {"A", "G"}
    assert optimizer.layers["2"].factors == {}


def test_muon_before_other_curvatures_leaves_them_what_it_refuses() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    made = kfactk.build(curvature=[kfactk.block("gradient", basis="muon"), "norm"])
    stages = {row.parameter: row.stages for row in made.coverage(model)}
    assert stages == {
        "0.weight": "norm, unitwise",
        "0.bias": "norm, unitwise",
        "1.weight": "gradient, muon",
        "1.bias": "",
    }


def test_moments_beside_other_curvatures_are_of_every_step() -> None:
    """The periods of a list suit Fisher passes; a divisor of one gradient in ten would be poor."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(F64)
    bias = nn.Parameter(model[2].bias.detach().clone())
    optimizer = kfactk.build(
        curvature=[kfactk.block("kfac", layers=["0"]), "gradient"],
        fisher="exact",
        update="sgd",
        lr=0.01,
        first_moment=0.9,
    ).bind(model)
    assert optimizer.recipe.scale_every == 10
    other = torch.optim.Adam([bias], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(15):
        optimizer.zero_grad()
        x = torch.randn(8, 4, dtype=F64)
        torch.nn.functional.cross_entropy(model(x), torch.arange(8) % 2).backward()
        bias.grad = model[2].bias.grad.clone()
        optimizer.step()
        other.step()
        torch.testing.assert_close(model[2].bias, bias, rtol=1e-5, atol=1e-5)
