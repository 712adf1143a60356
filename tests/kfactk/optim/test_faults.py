"""After each fault, training goes on with what it should have, or an error names the culprit.

This is the list of all faults that are injected, here and elsewhere.

Numbers
    NaN and inf in inputs, targets, gradients, at the first step and later: here
    NaN and inf in one micro-batch: test_preconditioner
    a step that overflows: here
    all-zero, tiny and huge activations, a branch that starts at zero: test_preconditioner
    the same without damping: here
    rank-deficient factors (one example, equal features): here, test_linalg, test_exactness
Decompositions
    eigh and Cholesky fail once, for one refresh, at the first one, always: here
    attempt by attempt: test_linalg
Interruptions
    an error or Ctrl-C anywhere in a step: test_faults_interrupted; in the forward:
    test_hooks_lifetime
    gradients and weight decay come back when the update rule fails: test_optimizer_loop
    exhausted memory passes through as it is: test_faults_plugins
Saved states
    a file that was cut off; entries lost, replaced, of other shapes, with NaN: test_faults_state
    a state of another model or recipe, or of a newer version: test_optimizer_state, test_layerstate
Plugins
    every method of every stage raises, at its first or its last call: test_faults_plugins
    every hook raises: test_faults_plugins, test_plugins, test_registry
    a stage returns what nobody can use: test_blame
    a tracker fails: test_faults_plugins, test_figures
Use
    layers that did not run, ran twice, have no gradient, whose input was overwritten:
    test_uneven_layers, test_hooks
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

import kfactk
from kfactk import CaptureError, KfactkWarning, Optimizer
from kfactk.optim.nonfinite import all_finite
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.clip.none import NoClip
from tests.covering import covering
from tests.kfactk.small import (
    F64,
    assert_equal,
    batch,
    bound,
    factors,
    net,
    rule_state,
    train,
    values,
)

BASES: dict[str, Any] = {
    "kfac": "kfac",
    "ekfac": "ekfac",
    "running": {"name": "ekfac", "scale": "running"},
}
UPDATES = ("sgd", "momentum", "nag", "velocity", "adam", "adamw", "radam")
EACH: dict[str, Any] = {"factor_every": 1, "scale_every": 1, "basis_every": 1}


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(5)
    return [batch() for _ in range(count)]


def close(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


# ------------------------------------------------------------------------------------------ numbers


def bad_inputs(value: float) -> Callable[..., None]:
    def fault(optimizer: Optimizer, model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
        x = data[0].clone()
        x[2, 1] = value
        train(optimizer, model, (x, data[1]))

    return fault


def bad_targets(value: float) -> Callable[..., None]:
    def fault(optimizer: Optimizer, model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        weights = torch.ones(len(data[0]), dtype=F64)
        weights[0] = value
        (F.cross_entropy(model(data[0]), data[1], reduction="none") * weights).mean().backward()
        optimizer.step()

    return fault


def bad_gradient(value: float) -> Callable[..., None]:
    def fault(optimizer: Optimizer, model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        model[2].bias.grad[0] = value
        optimizer.step()

    return fault


BAD = {
    f"{name} {value}": (make(value), (name, str(value)) == ("inputs", "nan"))
    for name, make in (("inputs", bad_inputs), ("targets", bad_targets), ("gradient", bad_gradient))
    for value in (float("nan"), float("inf"))
}
"""A fault, and whether all statistics suffer too: behind a tanh an inf is a 1."""


@covering(basis=BASES, kind=BAD, at=[0, 2], update=UPDATES)
def test_a_batch_that_is_not_finite_is_skipped(basis: str, kind: str, at: int, update: str) -> None:
    """Its step is not taken; where the statistics suffer too, the run is that without the batch."""
    fault, statistics = BAD[kind]
    model, data = net(), batches(5)
    reference = copy.deepcopy(model)
    optimizer, other = (
        bound(each, basis=BASES[basis], update=update, weight_decay=0.01, **EACH)
        for each in (model, reference)
    )
    said = "NaN or inf in its gradient, and its step was not taken. Such batches are skipped"
    for number, each in enumerate(data):
        if number == at:
            before, rule = values(model), rule_state(optimizer)
            with pytest.warns(KfactkWarning, match=said):
                fault(optimizer, model, each)
            assert_equal(before, values(model))
            assert rule == rule_state(optimizer)
            continue
        train(optimizer, model, each)
        if statistics:
            train(other, reference, each)
    assert finite(model)
    assert optimizer.counters["skipped_batches"] == 1
    assert optimizer.steps == 5
    if statistics:
        close(values(model), values(reference))
        close(factors(optimizer), factors(other))


def test_parameters_without_a_block_are_kept_from_bad_gradients_too() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    optimizer = bound(model)
    train(optimizer, model, batch())
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    model[1].weight.grad[0] = float("inf")
    before = values(model)
    with pytest.warns(KfactkWarning, match="step was not taken"):
        optimizer.step()
    assert_equal(before, values(model))


def test_a_sparse_gradient_is_looked_into() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 3))
    optimizer = kfactk.build(update="sgd", lr=0.1).bind(model)
    for value in (1.0, float("nan")):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.tensor([1, 1, 4])), torch.tensor([0, 1, 2])).backward()
        model[0].weight.grad = model[0].weight.grad * value
        before = values(model)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.step()
        assert bool(said) == (value != 1.0)
        assert torch.equal(before[0], model[0].weight) == (value != 1.0)


def test_what_is_finite_is_known_without_data_and_on_meshes(tmp_path: Path) -> None:
    assert all_finite([torch.ones(2, device="meta"), torch.ones(3)])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        shared = distribute_tensor(
            torch.tensor([1.0, 2.0]), init_device_mesh("cpu", (1,)), [Shard(0)]
        )
        assert all_finite([shared, torch.ones(3)])
        assert not all_finite([shared * float("nan"), torch.ones(3)])
        assert not all_finite([shared, torch.ones(3) * float("inf")])
    finally:
        dist.destroy_process_group()


def test_an_input_that_was_overwritten_spoils_one_step_only() -> None:
    model, (x, y) = net(), batch()
    optimizer, fresh = bound(model, **EACH), x.clone()
    F.cross_entropy(model(x), y).backward()
    x.mul_(2)
    with pytest.raises(CaptureError, match="modified in place"):
        optimizer.step()
    before = values(model)
    train(optimizer, model, (fresh, y))
    assert any(not torch.equal(old, new) for old, new in zip(before, values(model), strict=True))


class Forgetful(Ekfac):
    """Can say how its moments decay only so many times."""

    left = 1000

    @property
    def moment_decay(self) -> float:
        type(self).left -= 1
        if self.left < 0:
            raise MemoryError
        return 0.9


def test_moments_stay_with_their_basis_when_a_refresh_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Forgetful, "left", 1000)
    model = net()
    optimizer = bound(model, basis=Forgetful(), **EACH)
    train(optimizer, model, batch())
    names = list(optimizer.layers)
    kept = [
        copy.deepcopy((optimizer.layers[n].scale, optimizer.layers[n].decomposition)) for n in names
    ]
    monkeypatch.setattr(Forgetful, "left", 1)
    with pytest.raises(MemoryError):
        train(optimizer, model, batch())
    for name, (scale, decomposition) in zip(names, kept, strict=True):
        assert torch.equal(optimizer.layers[name].scale["scale"], scale["scale"])
        for factor, parts in decomposition.items():
            assert all(
                torch.equal(optimizer.layers[name].decomposition[factor][part], parts[part])
                for part in parts
            )


def test_what_a_failed_step_recorded_is_not_the_next_ones(tmp_path: Path) -> None:
    model = net()
    optimizer = bound(
        model,
        clip=Faulty(),
        tracker={"name": "jsonl", "path": str(tmp_path / "run.jsonl"), "every": 1},
    )
    optimizer.record(loss=70707.0)
    with pytest.raises(kfactk.PluginError):
        train(optimizer, model, batch())
    train(optimizer, model, batch())
    optimizer.close()
    assert "70707.0" not in (tmp_path / "run.jsonl").read_text()


class Faulty(NoClip):
    """Fails once, by an assertion of its own."""

    def clip(self, pairs: Any, dot: Any) -> Any:
        if not hasattr(type(self), "failed"):
            type(self).failed = True
            raise AssertionError("not yet")
        return super().clip(pairs, dot)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_finite_is_known_at_every_scale(dtype: torch.dtype) -> None:
    largest = torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite([])
    assert all_finite(
        [torch.zeros(0, dtype=dtype), largest, -largest, torch.ones((), dtype=torch.float32)]
    )
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite([largest, torch.tensor([[0.0, bad]], dtype=dtype)])


class Exploding(NoClip):
    """Beyond all bounds at its second call."""

    calls = 0

    def clip(self, pairs: Any, dot: Any) -> Any:
        type(self).calls += 1
        return [
            pair.preconditioned * (float("inf") if self.calls == 2 else 1.0) for pair in pairs
        ], torch.ones(())


def test_a_step_that_overflows_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exploding, "calls", 0)
    model = net()
    optimizer = bound(model, clip=Exploding())
    train(optimizer, model, batch())
    before = values(model)
    with pytest.warns(KfactkWarning, match="step was not taken"):
        train(optimizer, model, batch())
    assert_equal(before, values(model))
    train(optimizer, model, batch())
    assert finite(model)
    assert optimizer.counters["skipped_batches"] == 1


def dead(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def equal_features(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x).clone()


def one_example(x: Tensor) -> Tensor:
    return x[:1]


@covering(
    basis=BASES,
    degenerate=[dead, equal_features, one_example],
    damping=[0.0, 1e-30, 1e-3],
    dtype=[torch.float32, torch.float64],
)
def test_degenerate_factors_train_on(
    basis: str, degenerate: Callable[[Tensor], Tensor], damping: float, dtype: torch.dtype
) -> None:
    """Factors without full rank or of zeros, also without any damping, which then has its floor."""
    model = net().to(dtype)
    optimizer = bound(
        model, basis=BASES[basis], damping=damping, clip="kl", update="momentum", **EACH
    )
    for x, y in batches(4):
        x = degenerate(x).to(dtype)
        train(optimizer, model, (x, y[: len(x)]))
    assert finite(model)
    assert optimizer.counters == {"skipped_batches": 0, "failed_decompositions": 0}


# ----------------------------------------------------------------------------------- decompositions


class Sabotage:
    """A function that fails while it is told to."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original, self.failures, self.failed = original, 0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.failures:
            self.failures -= 1
            self.failed += 1
            raise torch.linalg.LinAlgError("it did not converge")
        return self.original(*args, **kwargs)


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> dict[str, Sabotage]:
    made = {"ekfac": Sabotage(torch.linalg.eigh), "kfac": Sabotage(torch.linalg.cholesky_ex)}
    monkeypatch.setattr(torch.linalg, "eigh", made["ekfac"])
    monkeypatch.setattr(torch.linalg, "cholesky_ex", made["kfac"])
    return made


def decomposed(
    basis: str, function: Sabotage, failures: dict[int, int], **periods: Any
) -> tuple[nn.Module, Optimizer]:
    """Train with so many failures at each step."""
    torch.manual_seed(1)
    model = net()
    optimizer = bound(model, basis=basis, **(EACH | periods))
    for step, data in enumerate(batches(5)):
        function.failures = failures.get(step, 0)
        train(optimizer, model, data)
        function.failures = 0
    return model, optimizer


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
def test_a_decomposition_that_fails_at_first_is_tried_again(
    sabotage: dict[str, Sabotage], basis: str, times: int
) -> None:
    """Up to three times; the result is the undisturbed one within the jitter that was added."""
    function = sabotage[basis]
    found, optimizer = decomposed(basis, function, {0: times, 3: times})
    assert function.failed == 2 * times
    assert optimizer.counters["failed_decompositions"] == 0
    expected, _ = decomposed(basis, function, {})
    for a, b in zip(values(found), values(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
def test_a_refresh_that_fails_leaves_the_last_good_one(
    sabotage: dict[str, Sabotage], basis: str
) -> None:
    """The run is that in which this refresh was not due."""
    with pytest.warns(
        KfactkWarning,
        match=r"failed in every way tried .*; the last good decomposition stays in use \(said",
    ):
        found, optimizer = decomposed(basis, sabotage[basis], {2: 1000})
    assert optimizer.counters == {"skipped_batches": 0, "failed_decompositions": 2}
    expected, other = decomposed(
        basis, sabotage[basis], {}, basis_every=lambda step: 3 if step == 2 else 1
    )
    close(values(found), values(expected))
    close(factors(optimizer), factors(other))


@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
def test_a_first_refresh_that_fails_is_made_up_for(
    sabotage: dict[str, Sabotage], basis: str
) -> None:
    """One plain step, then decomposed at once, whatever the schedule says."""
    with pytest.warns(
        KfactkWarning, match="its plain gradient is used until the next decomposition"
    ):
        found, optimizer = decomposed(basis, sabotage[basis], {0: 1000}, basis_every=100)
    assert optimizer.counters["failed_decompositions"] == 2
    assert all(view.decomposition for view in optimizer.layers.values())
    torch.manual_seed(1)
    model = net()
    data = batches(5)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    plain.step()
    assert finite(found)
    with pytest.warns(KfactkWarning, match="its plain gradient"):
        one, _ = decomposed(basis, sabotage[basis], dict.fromkeys(range(5), 1000))
    for x, y in data[1:]:
        plain.zero_grad()
        F.cross_entropy(model(x), y).backward()
        plain.step()
    close(values(one), values(model))  # one that always fails is the plain update rule
