"""A controller in training: what it changes, what it leaves, what is saved, what is refused."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler

import kfactk
from kfactk import (
    CaptureError,
    CombinationError,
    KfactkWarning,
    Optimizer,
    PluginError,
    QuadraticModel,
)
from kfactk.testing._support.ranks import shared_workers
from kfactk_stages.controller.quadratic import Quadratic
from tests.kfactk.small import F64, batch, net

EIGH = {"name": "kfac", "solver": "eigh"}
EACH = {"factor_every": 1, "basis_every": 1}
Loss = Callable[[], Tensor]


def recipe(**options: Any) -> kfactk.Recipe:
    given = {
        "curvature": "kfac",
        "basis": EIGH,
        "fisher": "exact",
        "update": "velocity",
        "controller": {"name": "quadratic", "model_damping": 1.0, "adapt_every": 2},
    }
    return kfactk.build(**{**given, **EACH, **options})


def closure_of(
    optimizer: Optimizer, model: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor]
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0]), data[1])
        loss.backward()
        return loss

    return closure


def trained(model: nn.Module, steps: int, made: kfactk.Recipe | None = None) -> Optimizer:
    optimizer = (recipe() if made is None else made).bind(model)
    for number in range(steps):
        torch.manual_seed(100 + number)
        optimizer.step(closure_of(optimizer, model, batch()))
    return optimizer


def numbers(optimizer: Optimizer) -> list[float]:
    names = "lr", "momentum", "damping", "model_damping"
    return [optimizer.param_groups[0][name] for name in names]


# ------------------------------------------------------------------------------------ no traces


class Restless(nn.Module):
    """A model with dropout, BatchNorm, and numbers drawn by the module `random`."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.other = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = F.dropout(self.norm(self.one(x)), 0.5, self.training)
        return self.other(torch.tanh(hidden)) * (1 + 0.1 * random.random())


def test_the_second_evaluation_sees_what_the_first_saw_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    random.seed(0)
    model = Restless().double()
    plain = copy.deepcopy(model)
    optimizer = recipe(controller={"name": "quadratic", "adapt_every": 1}).bind(model)
    data = batch(8)
    states = torch.get_rng_state(), random.getstate()
    seen: list[Any] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        buffers = [each.clone() for each in model.buffers()]
        seen.append((buffers, torch.get_rng_state(), random.getstate()))
        loss = F.cross_entropy(model(data[0]), data[1])
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(seen) == 2
    assert all(map(torch.equal, seen[0][0], seen[1][0]))
    assert torch.equal(seen[0][1], seen[1][1])
    assert seen[0][2] == seen[1][2]
    # One forward by hand leaves what the whole step leaves.
    after = torch.get_rng_state(), random.getstate()
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    F.cross_entropy(plain(data[0]), data[1]).backward()
    assert torch.equal(torch.get_rng_state(), after[0])
    assert random.getstate() == after[1]
    assert all(map(torch.equal, model.buffers(), plain.buffers()))
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_metrics_tell_of_the_first_evaluation() -> None:
    told: list[Mapping[str, Any]] = []

    class Ledger:
        every = 1

        def start(self, recipe: Any) -> None: ...
        def record(self, step: int, metrics: Mapping[str, Any]) -> None:
            told.append(dict(metrics))

        def flush(self) -> None: ...
        def close(self) -> None: ...

    model = net()
    optimizer = recipe(tracker=Ledger()).bind(model)
    losses = [optimizer.step(closure_of(optimizer, model, batch())) for _ in range(2)]
    assert [float(each["loss"]) for each in told] == [float(each) for each in losses]
    assert "loss_change" not in told[0]
    assert told[1]["loss_change"] < 0
    assert told[1]["momentum"] == optimizer.param_groups[0]["momentum"]
    assert told[1]["model_damping"] == 1.0  # that of the step; it changes afterwards
    assert optimizer.param_groups[0]["model_damping"] != 1.0


# ---------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("saved_at", [1, 4, 7])
def test_a_resumed_run_is_the_uninterrupted_one(saved_at: int) -> None:
    torch.manual_seed(0)
    model = net()
    made = recipe(
        controller={"name": "quadratic", "adapt_every": 2, "search_every": 3}, basis_every=2
    )
    optimizer = trained(model, saved_at, made)
    other_model = copy.deepcopy(model)
    other = made.bind(other_model)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert numbers(other) == numbers(optimizer)
    for number in range(6):
        torch.manual_seed(number)
        data = batch()
        for each, module in ((optimizer, model), (other, other_model)):
            each.step(closure_of(each, module, data))
        assert numbers(other) == numbers(optimizer), number
        assert all(map(torch.equal, model.parameters(), other_model.parameters())), number


def test_negative_rates_are_saved_and_damaged_ones_refused() -> None:
    model = net()
    optimizer = trained(model, 2)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = -0.5
    other = recipe().bind(net())
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == -0.5
    state["param_groups"][0]["model_damping"] = float("nan")
    with pytest.raises(kfactk.KfactkError, match="model_damping"):
        recipe().bind(net()).load_state_dict(state)


def test_a_state_is_allocated_without_a_closure() -> None:
    """`torch.distributed.checkpoint` makes empty state so, to load into."""
    optimizer = recipe().bind(net())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert optimizer.steps == 0
    assert all("velocity" in entry for entry in optimizer.state.values())


def test_new_groups_get_the_numbers_of_the_others() -> None:
    model = net()
    model.extra = nn.Parameter(torch.zeros(3, dtype=F64))
    made = recipe()
    optimizer = made.bind(model, [p for n, p in model.named_parameters() if n != "extra"])
    data = batch()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0]) + 0 * model.extra.sum(), data[1])
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    optimizer.add_param_group({"params": [model.extra]})
    one, other = optimizer.param_groups
    assert all(one[name] == other[name] for name in ("lr", "momentum", "damping", "model_damping"))
    optimizer.step(closure)


# ----------------------------------------------------------------------------------- situations


def test_a_bad_batch_changes_no_number() -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = trained(model, 3)
    before, weights = numbers(optimizer), [p.detach().clone() for p in model.parameters()]
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch()[0] * float("nan")), batch()[1])
        loss.backward()
        return loss

    with pytest.warns(KfactkWarning, match="NaN or inf"):
        optimizer.step(closure)
    assert calls == [1], "a step that was not taken is not evaluated"
    assert numbers(optimizer) == before
    assert all(map(torch.equal, model.parameters(), weights))
    optimizer.step(closure_of(optimizer, model, batch()))
    assert numbers(optimizer) != before


def test_a_loss_that_is_lost_after_the_step_raises_lambda() -> None:
    model = net()
    optimizer = recipe(controller={"name": "quadratic", "adapt_every": 1}).bind(model)
    plain, calls = closure_of(optimizer, model, batch()), itertools.count()

    def closure() -> Tensor:
        loss = plain()
        return loss * float("inf") if next(calls) else loss

    optimizer.step(closure)
    assert optimizer.param_groups[0]["model_damping"] == pytest.approx(150.0 / 0.95)


def test_frozen_parts_and_other_parameters_take_part() -> None:
    """The model of the loss is exact for parameters without a block, and with frozen ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[0].requires_grad_(False)
    optimizer = recipe(
        likelihood="gaussian",
        controller={
            "name": "quadratic",
            "model_damping": 1e-6,
            "adapt_every": 1,
            "damped_ratio": False,
        },
    ).bind(model)
    x, y = torch.randn(30, 4, dtype=F64), torch.randn(30, 3, dtype=F64)
    frozen = model[0].weight.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum() / 60
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(12)]
    assert losses == sorted(losses, reverse=True)
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[1].weight, torch.ones(5, dtype=F64))


def in_parts(parts: int) -> list[float]:
    torch.manual_seed(0)
    model = net()
    optimizer = recipe().bind(model)
    for number in range(5):
        torch.manual_seed(number)
        x, y = batch(9)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            losses = [
                F.cross_entropy(model(a), b) / parts
                for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True)
            ]
            for loss in losses:
                loss.backward()
            return torch.stack(losses).sum()

        optimizer.step(closure)
    weights = nn.utils.parameters_to_vector(model.parameters()).tolist()
    return [*numbers(optimizer), *weights]


def test_micro_batches_in_the_closure_are_one_batch() -> None:
    assert in_parts(3) == pytest.approx(in_parts(1), rel=1e-9)


def test_other_optimizers_count_no_forward_of_a_second_evaluation() -> None:
    torch.manual_seed(0)
    one, other = net(), nn.Linear(3, 3).double()
    optimizer = recipe(controller={"name": "quadratic", "adapt_every": 1}).bind(one)
    second = kfactk.build(**EACH, fisher="exact").bind(other)
    x, y = batch()

    def closure() -> Tensor:
        optimizer.zero_grad()
        second.zero_grad()
        loss = F.cross_entropy(other(one(x)), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert second._micro_batches.measured == 1
    second.step()
    moment = second.layers[""].factors["A"]
    hidden = torch.cat([one(x), torch.ones(len(x), 1, dtype=F64)], 1).detach()
    assert not torch.allclose(moment, hidden.T @ hidden / len(x)), "it is that before the step"


def test_masked_entries_stay() -> None:
    torch.manual_seed(0)
    model = net()
    mask = (torch.arange(20).reshape(5, 4) % 3 > 0).double()
    with torch.no_grad():
        model[0].weight *= mask
    optimizer = recipe().bind(model, masks={"0.weight": mask})
    for _ in range(5):
        optimizer.step(closure_of(optimizer, model, batch()))
    assert not (model[0].weight[mask == 0]).any()


def test_works_with_manual_observation_and_an_entry() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def score(self, x: Tensor, *, factor: float) -> Tensor:
            return factor * self.inner(x)

        forward = None  # type: ignore[assignment]

    model = Own()
    optimizer = recipe(observe="manual").bind(model, entry="score")
    x, y = batch()

    def closure() -> Tensor:
        optimizer.zero_grad()
        model.score(torch.randn(2, 4, dtype=F64), factor=1.0)  # is not observed
        output = model.score(x, factor=2.0)
        optimizer.observe()
        loss = F.cross_entropy(output, y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(6)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "options",
    [
        {"basis": "ekfac", "scale_every": 1},
        {"basis": {"name": "ekfac", "scale": "running"}, "fisher": "empirical"},
        {"link": "two_level"},
        {"pace": "similar", "basis_every": None, "factor_every": 2},
        {"lag": 1, "basis_every": 3},
        {"stagger": True, "basis_every": 4, "factor_every": 2, "scale_every": 2},
        {"curvature": "all", "basis": EIGH},
    ],
)
def test_combines_with_other_stages(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = net()
    made = recipe(
        **{"controller": {"name": "quadratic", "model_damping": 0.1, "search_every": 2}, **options}
    )
    optimizer = made.bind(model)
    data = batch(30)
    losses = [float(optimizer.step(closure_of(optimizer, model, data))) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]
    assert len({each["damping"] for each in optimizer.param_groups}) == 1


# --------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"update": "momentum"}, "Give update='velocity'"),
        ({"damping": lambda step: 0.1}, "the function damping="),
        ({"clip": "kl"}, "Give clip='none'"),
        ({"first_moment": 0.9}, "Leave out first_moment"),
        ({"reduction": "sum"}, "Take the mean"),
        ({"weight_decay": 0.1}, "weight_decay_at='gradient'"),
        ({"basis": "kfac"}, "'solver': 'eigh'"),
        ({"basis": {"name": "kfac", "solver": "inverse"}}, "'solver': 'eigh'"),
        ({"curvature": "gradient", "basis": "soap"}, "waives this"),
        ({"curvature": "rows", "basis": "cg"}, "waives this"),
    ],
)
def test_what_cannot_be_controlled_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(CombinationError, match=says) as refused:
        recipe(**options)
    assert "controller 'quadratic'" in str(refused.value)


def test_chooses_damping_and_clip_where_they_are_not_given() -> None:
    made = recipe(weight_decay=0.25, weight_decay_at="gradient")
    assert (made.damping, made.clip, made.controller) == (1.25, made.clip, made.controller)
    assert made.summary()["clip"] == {"name": "none"}
    assert kfactk.Recipe.from_dict(made.to_dict()) == made
    plain = made.evolve(controller=None)
    assert plain.damping == 0.03
    assert plain.summary()["clip"] == {"name": "kl"}


def test_refuses_a_step_without_closure_and_without_loss() -> None:
    model = net()
    optimizer = recipe().bind(model)
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    with pytest.raises(CaptureError, match=r"optimizer\.step\(closure\)"):
        optimizer.step()
    closure = closure_of(optimizer, model, batch())
    with pytest.raises(CaptureError, match="returned NoneType"):
        optimizer.step(lambda: closure() and None)

    def idle() -> Tensor:
        optimizer.zero_grad()
        return F.cross_entropy(model(batch()[0]), batch()[1])

    with pytest.raises(CaptureError, match="gave no trained parameter a gradient"):
        optimizer.step(idle)
    optimizer.step(closure)


class Recurrent(nn.Module):
    """A recurrent layer whose forward has a kernel without derivatives in forward mode."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.filterwarnings("error")
def test_recurrent_layers_are_moved_as_their_jacobian_says(kind: type[nn.RNNBase]) -> None:
    """The first lr, once by a Jacobian, and kernels as they were afterwards."""
    torch.manual_seed(0)
    model = Recurrent(kind)
    x, y = torch.randn(9, 6, 4), torch.arange(9) % 3
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = recipe().bind(model)
    optimizer.step(closure_of(optimizer, model, (x, y)))
    assert torch.backends.mkldnn.enabled
    assert torch.backends.cudnn.enabled
    group = optimizer.param_groups[0]
    moves = {n: (p.detach() - before[n]) / group["lr"] for n, p in model.named_parameters()}
    double = copy.deepcopy(model).double()
    start = {name: value.double() for name, value in before.items()}

    def at(size: float) -> Tensor:
        moved = {name: start[name] + size * moves[name].double() for name in start}
        return torch.func.functional_call(double, moved, (x.double(),)).detach()

    width = 1e-5
    along = (at(width) - at(-width)) / (2 * width)
    p = at(0.0).softmax(1)
    curved = ((p * along**2).sum(1) - (p * along).sum(1) ** 2).mean()
    labels = F.one_hot(y, 3).double()
    slope = ((p - labels) * along).sum(1).mean()
    square = sum(each.double().square().sum() for each in moves.values())
    assert group["lr"] == pytest.approx(float(-slope / (curved + square)), rel=1e-3)


def test_refuses_a_closure_without_forward_or_with_another_batch() -> None:
    model = net()
    optimizer = recipe(controller={"name": "quadratic", "adapt_every": 1}).bind(model)
    data = batch()
    loss = F.cross_entropy(model(data[0]), data[1])

    def late() -> Tensor:
        loss.backward()
        return loss

    with pytest.raises(CaptureError, match="made no forward of the bound model"):
        optimizer.step(late)
    drawn = iter([torch.randn(6, 4, dtype=F64) for _ in range(2)])

    def drawing() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(next(drawn)), data[1])
        loss.backward()
        return loss

    with pytest.raises(CaptureError, match="another batch when it ran again"):
        optimizer.step(drawing)


def test_refuses_gradients_that_were_gathered_before() -> None:
    model = net()
    optimizer = recipe().bind(model)
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()

    def closure() -> Tensor:
        loss = F.cross_entropy(model(batch()[0]), batch()[1])
        loss.backward()
        return loss

    with pytest.raises(CaptureError, match="left gradients of before"):
        optimizer.step(closure)


def test_refuses_whoever_else_writes_the_numbers() -> None:
    model = net()
    optimizer = recipe().bind(model)
    lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(CombinationError, match="lr_scheduler"):
        optimizer.step(closure_of(optimizer, model, batch()))
    for name in ("lr", "momentum", "damping", "model_damping"):
        model = net()
        optimizer = trained(model, 1)
        optimizer.param_groups[0][name] += 0.25
        with pytest.raises(CombinationError, match=f"left {name}="):
            optimizer.step(closure_of(optimizer, model, batch()))


def test_refuses_groups_and_scalers_at_bind() -> None:
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}]
    with pytest.raises(CombinationError, match="sets one lr for all"):
        recipe().bind(model, groups)
    decayed = [{"params": model.parameters(), "weight_decay": 0.1}]
    with pytest.raises(CombinationError, match="weight_decay_at='gradient'"):
        recipe().bind(model, decayed)
    with pytest.raises(CombinationError, match="GradScaler"):
        recipe().bind(model, scaler=torch.amp.GradScaler("cpu"))
    assert not model._forward_hooks


@pytest.mark.parametrize("name", ["lr", "momentum"])
def test_numbers_of_groups_without_effect_are_refused(name: str) -> None:
    """At bind, and at the first step; the first damping has an effect, and a loaded state too."""
    model, says = net(), rf"sets {name} in each step, so that {name}=0\.25 of the parameter groups"
    with pytest.raises(CombinationError, match=says):
        recipe().bind(model, [{"params": model.parameters(), name: 0.25}])
    optimizer = recipe().bind(model, [{"params": model.parameters(), "damping": 7.0}])
    state = trained(net(), 1).state_dict()
    optimizer.param_groups[0][name] = 0.25
    with pytest.raises(CombinationError, match=says):
        optimizer.step(closure_of(optimizer, model, batch()))
    optimizer.load_state_dict(state)
    optimizer.param_groups[0][name] = 0.25
    optimizer.step(closure_of(optimizer, model, batch()))
    assert optimizer.param_groups[0][name] != 0.25


@attrs.frozen
class Wrong(Quadratic):
    """A controller with an answer that cannot be."""

    answers: Mapping[str, Any] = attrs.field(factory=dict, hash=False)

    def dampings(self, step: int, numbers: Mapping[str, float]) -> Sequence[float]:
        return self.answers.get("dampings", super().dampings(step, numbers))

    def decide(self, models: Sequence[QuadraticModel], numbers: Mapping[str, float]) -> Any:
        return self.answers.get("decide", super().decide(models, numbers))

    def adapt(self, *arguments: Any) -> Mapping[str, float]:
        return self.answers.get("adapt", super().adapt(*arguments))


@pytest.mark.parametrize(
    "answers",
    [
        {"dampings": []},
        {"dampings": [7.0]},
        {"decide": (3, 0.1, 0.0)},
        {"decide": (0, float("nan"), 0.0)},
        {"adapt": {}},
        {"adapt": {"model_damping": float("nan")}},
    ],
)
def test_a_controller_that_breaks_its_protocol_is_named(answers: dict[str, Any]) -> None:
    model = net()
    optimizer = recipe(controller=Wrong(adapt_every=1, answers=answers)).bind(model)
    with pytest.raises(PluginError, match="Wrong"):
        optimizer.step(closure_of(optimizer, model, batch()))


# ----------------------------------------------------------------------------------------- ranks


def run_on(rank: int, ranks: int, placement: str) -> tuple[list[list[float]], list[float]]:
    torch.manual_seed(0)
    model = Buffered().double()
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = recipe(
        placement=placement,
        controller={
            "name": "quadratic",
            "model_damping": 0.3,
            "adapt_every": 2,
            "search_every": 3,
        },
        weight_decay=0.01,
        weight_decay_at="gradient",
    ).bind(wrapped)
    found = []
    for number in range(9):
        torch.manual_seed(number)
        x, y = batch(12)
        optimizer.step(closure_of(optimizer, wrapped, (x[rank::ranks], y[rank::ranks])))
        found.append(numbers(optimizer))
    return found, nn.utils.parameters_to_vector(model.parameters()).tolist()


class Buffered(nn.Module):
    """A net with a buffer that DistributedDataParallel sends around."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) * (1 + 0.01 * self.calls)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("placement", ["replicated", "mem_opt"])
def test_two_ranks_are_one_process(placement: str) -> None:
    one, other = shared_workers().run(2, run_on, 2, placement)
    assert one == other, "ranks have different bits"
    alone = run_on(0, 1, "replicated")
    for mine, theirs in zip(one[0], alone[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-7)
    assert one[1] == pytest.approx(alone[1], rel=1e-7, abs=1e-9)


def fail_on_one(rank: int, size: int, fault: str) -> tuple[str, list[float]]:
    torch.manual_seed(0)
    model = net()
    made = recipe(controller={"name": "quadratic", "adapt_every": 1})
    wrapped = DistributedDataParallel(model)
    optimizer = made.bind(wrapped)
    calls = itertools.count()

    def closure() -> Tensor:
        optimizer.zero_grad()
        x, y = batch(6)
        x = x + (next(calls) if rank == 1 and fault == "other batch" else 0)
        loss = F.cross_entropy(wrapped(x), y)
        loss.backward()
        if rank == 1 and fault == "in place":
            x += 1
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(CaptureError) as raised:
        optimizer.step(closure)
    assert all(map(torch.equal, model.parameters(), before))
    return str(raised.value), numbers(optimizer)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("fault", "says"),
    [("other batch", "gave the model another batch"), ("in place", "modified in place")],
)
def test_a_closure_that_fails_on_one_rank_stops_all(fault: str, says: str) -> None:
    one, other = shared_workers().run(2, fail_on_one, 2, fault)
    assert says in other[0]
    assert "another rank" in one[0]
    assert one[1] == other[1]


# --------------------------------------------------------------------------- what losses tell


def test_steps_that_fit_noise_are_told() -> None:
    torch.manual_seed(0)
    options = {"name": "quadratic", "model_damping": 0.1, "adapt_every": 1}
    model = net()
    optimizer = recipe(controller=options).bind(model)

    def train() -> None:
        for _ in range(200):
            x, y = torch.randn(4, 4, dtype=F64), torch.randint(3, (4,))
            optimizer.step(closure_of(optimizer, model, (x, y)))

    with pytest.warns(KfactkWarning, match="Give the controller much larger batches"):
        train()


@pytest.mark.filterwarnings("error::kfactk.KfactkWarning")
def test_large_batches_of_the_same_noise_tell_nothing() -> None:
    torch.manual_seed(0)
    options = {"name": "quadratic", "model_damping": 0.1, "adapt_every": 1}
    model = net()
    optimizer = recipe(controller=options).bind(model)
    for _ in range(100):
        x, y = torch.randn(2000, 4, dtype=F64), torch.randint(3, (2000,))
        optimizer.step(closure_of(optimizer, model, (x, y)))


def test_gradients_that_are_not_of_the_loss_are_told() -> None:
    torch.manual_seed(0)
    model, data = net(), batch(30)
    optimizer = recipe(controller={"name": "quadratic", "adapt_every": 1}).bind(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0]), data[1])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        return loss

    def train() -> None:
        for _ in range(10):
            optimizer.step(closure)

    with pytest.warns(KfactkWarning, match="Clip or scale no gradients in the closure"):
        train()
