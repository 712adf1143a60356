"""When what is refreshed: the periods alone, and whole runs against steps done by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk import Optimizer, OptionError, linalg
from kfactk.preconditioner.schedule import DueWork, UpdateSchedule, due_at
from kfactk.testing import effort
from kfactk.testing._support.truth import dense_kron, unvec, vec
from tests.kfactk import dense

F64 = torch.float64
periods = st.integers(1, 12)


# ------------------------------------------------------------------------------------ what is due


@given(periods, periods, periods)
def test_everything_is_due_at_the_first_step(factors: int, scale: int, basis: int) -> None:
    assert due_at(0, factors, scale, basis) == DueWork(True, True, True, True)


@settings(max_examples=effort(30))
@given(periods, periods, periods)
def test_each_period_is_on_its_own(factors: int, scale: int, basis: int) -> None:
    """A new basis measures its scale anew."""
    for step in range(40):
        due = due_at(step, factors, scale, basis)
        assert due.factors == (step in range(0, 40, factors))
        assert due.basis == (step in range(0, 40, basis))
        assert due.scale == (step in range(0, 40, scale) or due.basis)


def test_a_period_may_be_a_function_of_the_step() -> None:
    def early_often(step: int) -> int:
        return 1 if step < 3 else 4

    due = [step for step in range(14) if due_at(step, early_often, 100, 100).factors]
    assert due == [0, 1, 2, 4, 8, 12]


# ----------------------------------------------------------------------------- steps by hand


def net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(6)
    return [
        (
            torch.randn(9, 3, dtype=F64, generator=generator),
            torch.randint(3, (9,), generator=generator),
        )
        for _ in range(count)
    ]


@attrs.define(eq=False)
class ByHand:
    """One layer's history. Every mean is a weighted sum over the whole past.

    Args:
        decay: epsilon.
        scale_decay: Decay of the scale's mean between changes of basis.
        past: Factors of the steps that measured them.
        scale: The scale's mean, carried into each new basis.
        weight: Sum of the weights of the scales in that mean.
        vectors: Eigenvectors of the current basis.
        block: The dense block of K-FAC's last refresh.
    """

    decay: float
    scale_decay: float
    past: list[dict[str, Tensor]] = attrs.Factory(list)
    scale: Tensor | None = None
    weight: float = 0.0
    vectors: dict[str, Tensor] = attrs.Factory(dict)
    block: Tensor | None = None

    def mean(self, name: str) -> Tensor:
        weights = [self.decay ** (len(self.past) - 1 - k) for k in range(len(self.past))]
        return sum(w * each[name] for w, each in zip(weights, self.past, strict=True)) / sum(
            weights
        )

    def change_basis(self, vectors: dict[str, Tensor]) -> None:
        """Take a new basis; the scale becomes the diagonal of its operator there."""
        for name, each in vectors.items():
            assert dense.is_eigenbasis(self.mean(name), each, 1e-9), name
        if self.scale is not None:
            operator = dense.ekfac_block(self.vectors["A"], self.vectors["G"], self.scale, 0.0)
            q = dense_kron(vectors["A"], vectors["G"])
            self.scale = unvec((q.T @ operator @ q).diagonal(), len(vectors["G"]))
        self.vectors = {name: each.clone() for name, each in vectors.items()}

    def measure(self, new: Tensor) -> None:
        self.weight = self.scale_decay * self.weight + 1.0
        self.scale = new if self.scale is None else self.scale + (new - self.scale) / self.weight


Every = int | Callable[[int], int]


def due(every: Every, step: int) -> bool:
    return step % (every(step) if callable(every) else every) == 0


@attrs.frozen
class Timetable:
    """The three periods and the damping."""

    factors: Every
    scale: Every
    basis: Every
    damping: float | Callable[[int], float] = 0.05

    def tau(self, step: int) -> float:
        return self.damping(step) if callable(self.damping) else self.damping


TIMETABLES = {
    "factors 3, scale 4, basis 5": Timetable(3, 4, 5),
    "factors 4, scale 5, basis 3": Timetable(4, 5, 3),
    "factors 5, scale 3, basis 4": Timetable(5, 3, 4),
    "functions": Timetable(
        lambda step: 1 if step < 3 else 4,
        lambda step: 2 + step % 2,
        lambda step: 3 if step < 7 else 5,
        lambda step: 0.5 / (1 + step),
    ),
}
KINDS: dict[str, Any] = {
    "kfac": "kfac",
    "exact": "ekfac",
    "exact, averaged": {"name": "ekfac", "scale_decay": 0.7},
    "running": {"name": "ekfac", "scale": "running"},
}
SCALE_DECAY = {"kfac": 0.0, "exact": 0.0, "exact, averaged": 0.7, "running": 0.95}
COUNT, LR, DECAY = 13, 0.2, 0.8


def block_by_hand(
    kind: str,
    table: Timetable,
    step: int,
    hand: ByHand,
    seen: dense.Seen,
    gradient: Tensor,
    decomposition: dict[str, dict[str, Tensor]],
) -> Tensor:
    """Return the dense block of a layer at this step."""
    examples = seen.inputs.shape[-3]
    if due(table.factors, step):
        hand.past.append(dense.factors(seen, "sud", examples))
    if kind == "kfac":  # damping is seen at a refresh only
        if due(table.basis, step):
            hand.block = dense.kfac_block(hand.mean("A"), hand.mean("G"), table.tau(step))
        assert hand.block is not None
        return hand.block
    if due(table.basis, step):
        hand.change_basis({name: parts["eigenvectors"] for name, parts in decomposition.items()})
    u_a, u_g = hand.vectors["A"], hand.vectors["G"]
    if due(table.scale, step) or due(table.basis, step):
        running = examples * (u_g.T @ gradient @ u_a) ** 2
        hand.measure(
            running if kind == "running" else dense.exact_scale(seen.products, u_a, u_g, examples)
        )
    assert hand.scale is not None
    return dense.ekfac_block(u_a, u_g, hand.scale, table.tau(step))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TIMETABLES)
def test_refreshes_happen_when_they_are_due_and_in_the_right_order(name: str, kind: str) -> None:
    """Factors, then the basis, then the scale in the new basis on the same batch."""
    table, model = TIMETABLES[name], net()
    optimizer = kfactk.build(
        basis=KINDS[kind],
        fisher="exact",
        update="sgd",
        clip="none",
        lr=LR,
        factor_decay=DECAY,
        damping=table.damping,
        factor_every=table.factors,
        scale_every=table.scale,
        basis_every=table.basis,
    ).bind(model)
    hands = {layer: ByHand(DECAY, SCALE_DECAY[kind]) for layer in ("0", "2")}
    reference = copy.deepcopy(model)
    for step, (x, y) in enumerate(batches(COUNT)):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        reference = step_by_hand(
            reference,
            x,
            y,
            hands,
            lambda *of, step=step: block_by_hand(kind, table, step, *of),
            optimizer,
        )
        for (parameter, found), truth in zip(
            model.named_parameters(), reference.parameters(), strict=True
        ):
            torch.testing.assert_close(
                found,
                truth,
                rtol=1e-8,
                atol=1e-9,
                msg=lambda text, at=(step, parameter): f"{at}: {text}",
            )


def step_by_hand(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    hands: dict[str, ByHand],
    block: Callable[..., Tensor],
    optimizer: Optimizer,
) -> nn.Module:
    problem = dense.Problem(
        model,
        x,
        lambda output: F.cross_entropy(output, y),
        dense.exact_scores(dense.categorical_labels),
        float(len(x)),
    )
    gradients, changed = problem.gradients(), {}
    for layer, seen in problem.watch((nn.Linear,)).items():
        matrix = dense.layer_gradient(seen, layer, gradients)
        decomposition = optimizer.layers[layer].decomposition
        solution = dense.solve(block(hands[layer], seen, matrix, decomposition), matrix)
        changed |= {
            f"{layer}.{key}": tensor
            for key, tensor in dense.as_tensors(seen.module, solution).items()
        }
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= LR * changed[name]
    return model


def test_the_reference_tells_timetables_apart() -> None:
    """The same run with another period ends elsewhere."""
    ends = []
    for table in (Timetable(3, 4, 5), Timetable(4, 4, 5), Timetable(3, 5, 5), Timetable(3, 4, 6)):
        model = net()
        optimizer = kfactk.build(
            fisher="exact", update="sgd", clip="none", lr=LR, damping=0.05,
            factor_every=table.factors, scale_every=table.scale, basis_every=table.basis,
        ).bind(model)  # fmt: skip
        for x, y in batches(COUNT):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        ends.append(
            torch.cat([vec(p.detach()) if p.ndim == 2 else p.detach() for p in model.parameters()])
        )
    for i in range(len(ends)):
        for j in range(i):
            assert float((ends[i] - ends[j]).norm()) > 1e-6


def test_a_group_keeps_its_own_damping_while_the_recipes_follows_its_function() -> None:
    model = net()
    own = [
        {"params": list(model[0].parameters()), "damping": 0.7},
        {"params": list(model[2].parameters())},
    ]
    optimizer = kfactk.build(fisher="exact", damping=lambda step: 0.5 / (1 + step), lr=LR).bind(
        model, own
    )
    for step, (x, y) in enumerate(batches(3)):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert [group["damping"] for group in optimizer.param_groups] == [0.7, 0.5 / (1 + step)]


def test_staggered_work_has_steps_of_its_own() -> None:
    schedule = UpdateSchedule(4, 4, 12, stagger=True)
    for kind in ("factors", "scale"):
        due = [
            [step for step in range(13) if getattr(schedule.due(step, part=part), kind)]
            for part in (0, 1)
        ]
        assert due == [[0, 4, 8, 12], [1, 5, 9]]
    assert [step for step in range(13) if schedule.due(step).inputs] == [2, 6, 10]
    assert [step for step in range(13) if schedule.due(step, part=1).inputs] == [2, 6, 10]
    slots = {step: slot for step in range(13) if (slot := schedule.slot(step)) is not None}
    assert slots == {3: 0, 7: 1, 11: 2}
    assert [step for step in range(35) if schedule.due(step, slot=1).basis] == [7, 19, 31]
    usual = UpdateSchedule(10, 10, 100, stagger=True)
    # Until step 6 the input factors are those of step 0.
    assert [usual.slot(step) for step in range(9)] == [*[None] * 7, 0, 1]
    assert [usual.slot(step) for step in (101, 102, 107)] == [66, 67, 0]
    together = UpdateSchedule(4, 4, 12)
    assert together.slots == 1
    assert [step for step in range(25) if together.due(step).basis] == [0, 12, 24]
    assert all(together.due(step) == due_at(step, 4, 4, 12) for step in range(25))


def test_the_early_period_doubles_with_the_age_of_the_run() -> None:
    due = [step for step in range(401) if due_at(step, 1, 1, kfactk.early).basis]
    assert due == [0, 10, 20, 30, 40, 60, 80, 120, 160, 240, 320, 400]


def test_without_a_quiet_step_slots_lie_on_all_steps() -> None:
    schedule = UpdateSchedule(1, 2, 6, stagger=True)
    assert [schedule.slot(step) for step in range(7)] == [0, 1, 2, 3, 4, 5, 0]


@given(factors=st.integers(4, 9), times=st.integers(1, 5), step=st.integers(0, 300))
def test_at_most_one_thing_is_due_in_a_step(factors: int, times: int, step: int) -> None:
    schedule = UpdateSchedule(factors, factors, factors * times, stagger=True)
    due, other = schedule.due(step), schedule.due(step, part=1)
    passes = [each.factors or each.scale for each in (due, other)]
    assert sum(passes) + due.inputs + (schedule.slot(step) is not None) <= 1
    assert due.inputs == other.inputs, "input factors of all layers are due together"


@given(
    scale=st.integers(1, 30),
    factors=st.integers(1, 30),
    step=st.integers(0, 300),
    part=st.integers(0, 1),
)
def test_a_first_scale_waits_for_the_schedule_a_third_of_a_period_at_most(
    scale: int, factors: int, step: int, part: int
) -> None:
    schedule = UpdateSchedule(factors, scale, 1, stagger=True)
    comes = [
        later
        for later in range(1, min(factors, scale) // 3 + 1)
        if schedule.due(step + later, part=part).scale
    ]
    assert schedule.soon(step, part) == bool(comes)


@given(
    factors=st.integers(1, 6),
    scale=st.integers(1, 6),
    basis=st.integers(1, 40),
    step=st.integers(0, 200),
)
def test_every_slot_comes_once_a_period(factors: int, scale: int, basis: int, step: int) -> None:
    schedule = UpdateSchedule(factors, scale, basis, stagger=True)
    assert 1 <= schedule.slots <= basis
    step += 2 * factors // 3
    slots = [
        slot for each in range(step, step + basis) if (slot := schedule.slot(each)) is not None
    ]
    assert sorted(slots) == list(range(schedule.slots))


def test_slots_need_whole_numbers() -> None:
    with pytest.raises(
        OptionError,
        match="stagger=True needs factor_every, scale_every and basis_every as whole numbers",
    ):
        kfactk.build(stagger=True, basis_every=lambda step: 10)
    with pytest.raises(OptionError, match="stagger"):
        kfactk.build(stagger="yes")  # type: ignore[arg-type]


def test_layers_are_decomposed_in_their_slots_and_carry_their_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    optimizer = kfactk.build(
        lr=0.01, damping=0.1, factor_every=4, scale_every=4, basis_every=12, stagger=True
    ).bind(model)
    assert kfactk.build(stagger=True).schedule.slots == 70
    bases: dict[str, list[int]] = {name: [] for name in optimizer.layers}
    scales: dict[str, list[int]] = {name: [] for name in optimizer.layers}
    before: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for step in range(26):
        x, y = torch.randn(12, 6, dtype=torch.float64), torch.randint(3, (12,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        for name, view in optimizer.layers.items():
            right, left = (view.decomposition[key]["eigenvectors"] for key in ("A", "G"))
            scale = view.scale.get("scale")
            assert (scale is None) == (step == 0), (
                "the first scale comes with the second forward, for both parts"
            )
            if name not in before or not torch.equal(right, before[name][0]):
                bases[name].append(step)
                rotated = right.T @ view.factors["A"] @ right
                torch.testing.assert_close(
                    rotated, torch.diag(rotated.diagonal()), rtol=0, atol=1e-12
                )
                if step:
                    turned = torch.kron(left, right).T @ torch.kron(
                        before[name][1], before[name][0]
                    )
                    carried = (
                        (turned @ torch.diag(before[name][2].flatten()) @ turned.T)
                        .diagonal()
                        .view_as(scale)
                    )
                    assert torch.allclose(
                        carried.sum(), scale.sum()
                    )  # directions in a null space share their mean
                    seen = [
                        ~linalg.null_mask(view.decomposition[key]["eigenvalues"])
                        for key in ("G", "A")
                    ]
                    kept = seen[0][:, None] & seen[1]
                    torch.testing.assert_close(scale[kept], carried[kept])
            elif before[name][2] is None or not torch.equal(scale, before[name][2]):
                scales[name].append(step)
            before[name] = right, left, scale
    assert bases == {"0": [0, 7, 19], "2": [0, 3, 15], "4": [0, 11, 23]}
    assert scales == {
        "0": [1, 5, 9, 13, 17, 21, 25],
        "2": [1, 4, 8, 12, 16, 20, 24],
        "4": [1, 4, 8, 12, 16, 20, 24],
    }


def test_slots_and_parts_follow_what_is_trained() -> None:
    """A resumed run divides layers as the uninterrupted run does."""
    torch.manual_seed(0)
    data = [(torch.randn(12, 5, dtype=torch.float64), torch.randint(3, (12,))) for _ in range(16)]

    def made(frozen: bool) -> tuple[nn.Sequential, kfactk.Optimizer]:
        torch.manual_seed(1)
        middle = [layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.Tanh())]
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), *middle, nn.Linear(8, 3)).double()
        model[2].bias.requires_grad_(not frozen)
        return model, kfactk.build(
            lr=0.01, damping=0.1, factor_every=3, scale_every=3, basis_every=4, stagger=True
        ).bind(model)

    def train(model: nn.Sequential, optimizer: kfactk.Optimizer, steps: range) -> None:
        for step in steps:
            model[2].bias.requires_grad_(step < 4)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data[step][0]), data[step][1]).backward()
            optimizer.step()

    model, optimizer = made(frozen=False)
    train(model, optimizer, range(6))
    kept, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(6, 16))
    other, resumed = made(frozen=True)
    other.load_state_dict(kept)
    resumed.load_state_dict(saved)
    train(other, resumed, range(6, 16))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
