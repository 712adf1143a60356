"""A run resumed from its saved state equals the uninterrupted one, however it is saved."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn import functional as F

import kfactk
from kfactk import Optimizer, Recipe, StateError
from tests.covering import covering
from tests.kfactk.small import assert_equal, values

BASES: dict[str, Any] = {
    "kfac": "kfac",
    "ekfac": {"name": "ekfac", "scale_decay": 0.5},
    "running": {"name": "ekfac", "scale": "running"},
}
UPDATES = ("sgd", "momentum", "nag", "adam", "adamw", "radam")
SAVED_AT, AFTER = 7, 6
"""Not a multiple of any period below; each comes due again afterwards."""


def recipe(basis: str = "ekfac", update: Any = "adam", **more: Any) -> Recipe:
    lr = 0.01 if update in ("adam", "adamw", "radam") else 0.1
    periods = {"factor_every": 2, "scale_every": 3, "basis_every": 5}
    return kfactk.build(
        basis=BASES[basis],
        update=update,
        lr=lr,
        damping=0.05,
        weight_decay=0.01,
        **(periods | more),
    )


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv1d(2, 4, 2),
        nn.Flatten(),
        nn.Tanh(),
        nn.LayerNorm(12),
        nn.Linear(12, 5, bias=False),
        nn.Linear(5, 3),
    ).to(dtype)


def run(optimizer: Optimizer, model: nn.Module, start: int, steps: int) -> list[float]:
    losses, dtype = [], next(model.parameters()).dtype
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x, y = (
            torch.randn(6, 2, 4, generator=generator).to(dtype),
            torch.randint(3, (6,), generator=generator),
        )
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(one: Any, other: Any) -> None:
    """Equal all the way down: keys, types, dtypes, and every bit of every number."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert set(one) == set(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def assert_continues_alike(
    first: tuple[Optimizer, nn.Module], resumed: tuple[Optimizer, nn.Module]
) -> None:
    assert resumed[0].steps == first[0].steps == SAVED_AT
    assert run(*resumed, SAVED_AT, AFTER) == run(*first, SAVED_AT, AFTER)
    assert_same(first[1].state_dict(), resumed[1].state_dict())
    assert_same(first[0].state_dict(), resumed[0].state_dict())


@covering(update=UPDATES, basis=BASES, dtype=[torch.float32, torch.float64, torch.bfloat16])
def test_a_resumed_run_is_the_uninterrupted_one(
    update: str, basis: str, dtype: torch.dtype
) -> None:
    made, model = recipe(basis, update), net(dtype)
    optimizer = made.bind(model)
    run(optimizer, model, 0, SAVED_AT)
    weights, state = through_file(model.state_dict()), through_file(optimizer.state_dict())
    fresh = net(dtype)
    fresh.load_state_dict(weights)
    resumed = made.bind(fresh)
    resumed.load_state_dict(state)
    least = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(
        value.dtype in (least, torch.float64, torch.int64)
        for e in resumed.state.values()
        for k, value in e.items()
        if "kfactk" in k
    )
    assert_continues_alike((optimizer, model), (resumed, fresh))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_resumed_run_with_groups_a_schedule_and_damping_of_its_own(fisher: str) -> None:
    made = recipe(fisher=fisher).evolve(damping=lambda step: 0.1 / (1 + step), clip="norm")

    def bound(model: nn.Sequential) -> tuple[Optimizer, Any]:
        plain = [p for p in model.parameters() if p.ndim == 1]
        shaped = [p for p in model.parameters() if p.ndim > 1]
        optimizer = made.bind(
            model, [{"params": shaped, "damping": 0.3}, {"params": plain, "weight_decay": 0.0}]
        )
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=40)

    model, fresh = net(), net()
    optimizer, scheduler = bound(model)
    for step in range(SAVED_AT):
        run(optimizer, model, step, 1)
        scheduler.step()
    state, clock = through_file(optimizer.state_dict()), through_file(scheduler.state_dict())
    resumed, timer = bound(fresh)
    fresh.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    timer.load_state_dict(clock)
    for step in range(SAVED_AT, SAVED_AT + AFTER):
        assert run(resumed, fresh, step, 1) == run(optimizer, model, step, 1)
        scheduler.step()
        timer.step()
    assert_same(optimizer.state_dict(), resumed.state_dict())


def test_a_state_loaded_twice_into_the_same_optimizer() -> None:
    model = net()
    optimizer = recipe().bind(model)
    run(optimizer, model, 0, SAVED_AT)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    first = run(optimizer, model, SAVED_AT, AFTER)
    model.load_state_dict(weights)
    optimizer.load_state_dict(copy.deepcopy(state))
    assert run(optimizer, model, SAVED_AT, AFTER) == first


Way = Callable[[nn.Module, Optimizer, nn.Module, Optimizer, Path], None]


def _optimizer_only(options: StateDictOptions) -> Way:
    def move(
        model: nn.Module, optimizer: Optimizer, fresh: nn.Module, resumed: Optimizer, folder: Path
    ) -> None:
        fresh.load_state_dict(copy.deepcopy(model.state_dict()))
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        set_optimizer_state_dict(fresh, resumed, state, options=options)

    return move


def _whole(options: StateDictOptions) -> Way:
    def move(
        model: nn.Module, optimizer: Optimizer, fresh: nn.Module, resumed: Optimizer, folder: Path
    ) -> None:
        weights, state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
        set_state_dict(
            fresh, resumed, model_state_dict=weights, optim_state_dict=state, options=options
        )

    return move


def _files(options: StateDictOptions) -> Way:
    def move(
        model: nn.Module, optimizer: Optimizer, fresh: nn.Module, resumed: Optimizer, folder: Path
    ) -> None:
        weights, state = get_state_dict(model, optimizer, options=options)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder, no_dist=True)
        weights, state = get_state_dict(fresh, resumed, options=options)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder, no_dist=True)
        set_state_dict(
            fresh, resumed, model_state_dict=weights, optim_state_dict=state, options=options
        )

    return move


WAYS = {"optimizer": _optimizer_only, "whole": _whole, "files": _files}


@pytest.mark.filterwarnings("ignore:.*(torch.distributed|process group|TypedStorage).*")
@covering(
    case=[*((update, "ekfac") for update in UPDATES), ("adam", "kfac"), ("momentum", "running")],
    way=WAYS,
    flat=[False, True],
)
def test_distributed_checkpoints(
    case: tuple[str, str], way: str, flat: bool, tmp_path: Path
) -> None:
    made, model, fresh = recipe(case[1], case[0]), net(), net()
    optimizer, resumed = made.bind(model), made.bind(fresh)
    run(optimizer, model, 0, SAVED_AT)
    WAYS[way](StateDictOptions(flatten_optimizer_state_dict=flat))(
        model, optimizer, fresh, resumed, tmp_path
    )
    assert_continues_alike((optimizer, model), (resumed, fresh))


@pytest.mark.filterwarnings("ignore:.*(torch.distributed|process group|TypedStorage).*")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_distributed_checkpoints_of_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    made, model, fresh = recipe(weight_decay_at="gradient"), net(dtype), net(dtype)
    optimizer, resumed = made.bind(model), made.bind(fresh)
    run(optimizer, model, 0, SAVED_AT)
    _files(StateDictOptions())(model, optimizer, fresh, resumed, tmp_path)
    assert_continues_alike((optimizer, model), (resumed, fresh))


@pytest.mark.parametrize(("at", "decay"), [("update", 0.0), ("update", 0.1), ("gradient", 0.1)])
@pytest.mark.parametrize("basis", BASES)
def test_the_step_that_makes_room_for_a_checkpoint_does_nothing_else(
    basis: str, at: str, decay: float
) -> None:
    model = net()
    made = recipe(basis, "momentum", weight_decay_at=at).evolve(weight_decay=decay)
    optimizer, other = made.bind(model), net()
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = made.lr
    assert_same(before, model.state_dict())
    assert optimizer.steps == 0
    trained = made.bind(other)
    run(trained, other, 0, 1)
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        ours, theirs = optimizer.state[parameter], trained.state[twin]
        assert {key: value.shape for key, value in ours.items()} == {
            key: value.shape for key, value in theirs.items()
        }
    if (
        not decay
    ):  # else torch's momentum holds the decay of that step, as it does for torch's own optimizers
        plain = net()
        assert run(optimizer, model, 0, 3) == run(made.bind(plain), plain, 0, 3)


def test_a_plain_adam_checkpoint_is_welcome() -> None:
    model = net()
    plain = torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.8, 0.99))
    for _ in range(3):
        plain.zero_grad()
        F.cross_entropy(model(torch.randn(6, 2, 4)), torch.arange(6) % 3).backward()
        plain.step()
    optimizer = kfactk.build(damping=0.3).bind(model)
    optimizer.load_state_dict(through_file(plain.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["damping"]) == (0.02, (0.8, 0.99), 0.3)
    assert optimizer.steps == 0
    for parameter in model.parameters():
        for key, value in plain.state[parameter].items():
            assert torch.equal(optimizer.state[parameter][key], value)
    run(optimizer, model, 0, 2)
    assert float(optimizer.state[model[0].weight]["step"]) == 5.0
    assert optimizer.layers["0"].factors


def _wider() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 2),
        nn.Flatten(),
        nn.Tanh(),
        nn.LayerNorm(12),
        nn.Linear(12, 6, bias=False),
        nn.Linear(6, 3),
    )


def _biased() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 2, bias=False),
        nn.Flatten(),
        nn.Tanh(),
        nn.LayerNorm(12),
        nn.Linear(12, 5),
        nn.Linear(5, 3),
    )


OTHERS: dict[str, tuple[Recipe, Callable[[], nn.Module], type[Exception], str]] = {
    "a wider layer": (recipe(), _wider, StateError, "'4' does not fit"),
    "biases elsewhere": (recipe(), _biased, StateError, "does not fit"),
    "another basis": (recipe("kfac"), net, StateError, r"eigenvectors.*cholesky"),
    "another curvature": (
        recipe(curvature={"name": "conv_kfac", "spatial": "sua"}),
        net,
        StateError,
        "'0' does not fit",
    ),
    "another update": (
        recipe(update="nag"),
        net,
        StateError,
        "another update rule's: .*previous_momentum",
    ),
    "fewer layers": (recipe(), lambda: net()[:5], ValueError, "parameter group"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("trained", [True, False])
def test_a_checkpoint_of_something_else_is_refused_and_changes_nothing(
    kind: str, trained: bool
) -> None:
    made, build, error, message = OTHERS[kind]
    source = net()
    saved = recipe().bind(source)
    run(saved, source, 0, 2)
    model = build()
    optimizer = made.bind(model)
    run(optimizer, model, 0, 3 if trained else 0)
    before, groups = copy.deepcopy(optimizer.state_dict()), optimizer.param_groups
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved.state_dict())
    assert_same(before, optimizer.state_dict())
    assert optimizer.param_groups is groups
    run(optimizer, model, 3, 2)


def test_a_checkpoint_from_the_future_is_refused() -> None:
    model = net()
    optimizer = recipe().bind(model)
    run(optimizer, model, 0, 1)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["kfactk.tensor_train"] = torch.ones(1)
    with pytest.raises(StateError, match="newer kfactk"):
        optimizer.load_state_dict(state)


def test_a_groups_missing_options_are_those_of_the_optimizer() -> None:
    """What an older torch did not save yet."""
    model = net()
    optimizer = recipe().bind(model)
    run(optimizer, model, 0, 1)
    state = copy.deepcopy(optimizer.state_dict())
    for name in ("foreach", "capturable", "damping"):
        del state["param_groups"][0][name]
    resumed = recipe().evolve(damping=0.7).bind(net())
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["damping"] == 0.7
    assert resumed.param_groups[0]["foreach"] is None


def test_the_loaded_curvature_is_a_copy() -> None:
    model = net()
    optimizer = recipe().bind(model)
    run(optimizer, model, 0, 1)
    state = optimizer.state_dict()
    twin = net()
    resumed = recipe().bind(twin)
    resumed.load_state_dict(copy.deepcopy(state))
    kept = copy.deepcopy(resumed.state_dict())
    for entry in state["state"].values():
        for key, value in entry.items():
            if key.startswith("kfactk."):
                value.zero_()
    assert_same(kept, resumed.state_dict())


@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
def test_loading_decomposes_nothing_of_the_size_of_a_layer(
    basis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, model = recipe(basis), net()
    optimizer = made.bind(model)
    run(optimizer, model, 0, 1)
    sizes = []
    for name in ("eigh", "cholesky_ex"):
        whole = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg,
            name,
            lambda matrix, whole=whole: sizes.append(matrix.shape[-1]) or whole(matrix),
        )
    made.bind(net()).load_state_dict(optimizer.state_dict())
    assert set(sizes) == {1}


def test_the_state_of_an_optimizer_that_never_stepped_changes_nothing() -> None:
    model, twin = net(), net()
    optimizer, other = recipe().bind(model), recipe().bind(twin)
    optimizer.load_state_dict(recipe().bind(net()).state_dict())
    assert not optimizer.state
    assert run(optimizer, model, 0, 2) == run(other, twin, 0, 2)
    assert_equal(values(model), values(twin))
