"""What the block-tridiagonal link does where it fails, and what it keeps between steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import kfactk
from kfactk import KfactkWarning
from kfactk_stages.link.block_tridiagonal import BlockTridiagonal
from tests.kfactk_stages.link.linking import TAU, saved, step
from tests.kfactk_stages.link.tridiagonal import (
    RECIPE,
    Seen,
    assert_inverse,
    claimed,
    class_scores,
    data,
    drawn,
    joined,
    net,
)


def test_a_pair_that_makes_no_fisher_matrix_is_left_apart_and_counted() -> None:
    class Apart(BlockTridiagonal):
        def statistics(self, layers: Any, rows: Any, num_terms: Any) -> Any:
            found = super().statistics(layers, rows, num_terms)
            return {n: each.scaled(9.0) if n.endswith("0") else each for n, each in found.items()}

    model, names = net(3, True)
    batch = data()
    optimizer = kfactk.build(**{**RECIPE, "link": Apart(), "lr": 0.0, "damping": 1e-6}).bind(model)
    with pytest.warns(KfactkWarning, match=r"leaves layer '0' apart from '2'.*\(said once\)"):
        step(model, optimizer, batch)
    step(model, optimizer, batch)
    assert optimizer.counters["failed_decompositions"] == 2
    seen = Seen(model, names, batch[0], class_scores)
    v = drawn(model)
    found = joined(model, names, optimizer.precondition(v))
    matrix = claimed(seen.moment, names, 1e-6, cut=[0])
    expected = torch.linalg.solve(matrix, joined(model, names, v))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_what_was_prepared_last_stays_where_nothing_can_be_made() -> None:
    class Failing(BlockTridiagonal):
        broken = False

        def prepare(self, layers: Any, statistics: Any) -> Any:
            if Failing.broken:
                raise kfactk.DecompositionError("no luck today")
            return super().prepare(layers, statistics)

    model, names = net(2, True)
    batch = data()
    optimizer = kfactk.build(**{**RECIPE, "link": Failing(), "lr": 0.0}).bind(model)
    step(model, optimizer, batch)
    Failing.broken = True
    with pytest.warns(KfactkWarning, match="no luck today"):
        step(model, optimizer, data(seed=1))
    seen = Seen(model, names, batch[0], class_scores)
    assert_inverse(optimizer, model, names, claimed(seen.moment, names, TAU))
    assert optimizer.counters["failed_decompositions"] == 1


@pytest.mark.parametrize("fault", ["shape", "missing", "nan"])
def test_a_damaged_state_is_refused(fault: str) -> None:
    model, _ = net(2, True)
    optimizer = kfactk.build(**RECIPE).bind(model)
    step(model, optimizer, data())
    state = saved(optimizer)
    entry, key = state["state"][0], "kfactk.prepared.psi.A.0"
    if fault == "shape":
        entry[key] = entry[key][:1].clone()
    elif fault == "missing":
        del entry[key]
    else:
        entry[key].fill_(float("nan"))
    with pytest.raises(kfactk.StateError, match=r"kfactk\.prepared"):
        optimizer.load_state_dict(state)


def test_a_resumed_run_goes_on_with_what_was_prepared() -> None:
    recipe = {**RECIPE, "basis_every": 3, "update": "momentum"}
    model, _ = net(3, True)
    optimizer = kfactk.build(**recipe).bind(model)
    for seed in range(2):
        step(model, optimizer, data(seed=seed))
    other = copy.deepcopy(model)
    resumed = kfactk.build(**recipe).bind(other)
    resumed.load_state_dict(saved(optimizer))
    for seed in range(2, 5):
        for each, opt in ((model, optimizer), (other, resumed)):
            step(each, opt, data(seed=seed))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_state_without_the_link_is_loaded() -> None:
    model, names = net(2, True)
    batch = data()
    first = kfactk.build(**{**RECIPE, "link": None, "lr": 0.0}).bind(model)
    step(model, first, batch)
    optimizer = kfactk.build(**{**RECIPE, "lr": 0.0, "factor_decay": 0.0}).bind(model)
    optimizer.load_state_dict(saved(first))
    step(model, optimizer, batch)
    seen = Seen(model, names, batch[0], class_scores)
    assert_inverse(optimizer, model, names, claimed(seen.moment, names, TAU))


def test_two_models_do_not_meet() -> None:
    models = [net(2, True)[0] for _ in range(2)]
    alone = copy.deepcopy(models[0])
    optimizers = [kfactk.build(**RECIPE).bind(model) for model in models]
    reference = kfactk.build(**RECIPE).bind(alone)
    for seed in range(2):
        outs = [model(data(seed=seed)[0]) for model in models]
        for optimizer, out in zip(optimizers, outs, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(out, data(seed=seed)[1]).backward()
        for optimizer in optimizers:
            optimizer.step()
        step(alone, reference, data(seed=seed))
    for one, two in zip(models[0].parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_gradient_scaler_changes_nothing() -> None:
    found = []
    for enabled in (True, False):
        model, _ = net(3, True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=enabled)
        recipe = {**RECIPE, "fisher": "empirical"}
        optimizer = kfactk.build(**recipe).bind(model, scaler=scaler)
        for seed in range(3):
            x, y = data(seed=seed)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_autocast_trains() -> None:
    model, _ = net(3, True)
    model.float()
    optimizer = kfactk.build(**{**RECIPE, "fisher": "mc"}).bind(model)
    x, y = data(n=32)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x.float()), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert optimizer.state[model[0].weight]["kfactk.prepared.psi.A.0"].dtype == torch.float32
