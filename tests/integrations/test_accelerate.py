"""Accelerate against a loop written by hand, bit for bit on one process, to 1e-10 on two."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk.testing._support.ranks import shared_workers
from tests.integrations.by_hand import bound, loader, network, numbers, same, trained

pytestmark = pytest.mark.xdist_group("ranks")

PATIENCE = 300.0
"""Seconds for two processes to import the framework and train, on a busy machine too."""


def forget() -> None:
    """Accelerate keeps one state a process."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    forget()
    yield
    forget()


class Run:
    """As in Accelerate's tutorials, on the network that all frameworks are tried on."""

    def __init__(
        self,
        *,
        micro: int = 1,
        half: bool = False,
        late: bool = False,
        batch: int = 8,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=micro, mixed_precision="bf16" if half else "no"
        )
        self.network = network(dtype)
        model: Any = self.accelerator.prepare(self.network) if late else self.network
        self.optimizer, scheduler = bound(
            model, **({"fisher": "exact"} if dtype == torch.float64 else {})
        )
        prepared = self.accelerator.prepare(
            *([] if late else [model]), self.optimizer, loader(batch, dtype), scheduler
        )
        self.model, self.wrapper, self.loader, self.scheduler = (
            [model, *prepared] if late else prepared
        )

    def train(
        self, epochs: int = 2, clip: float | None = None
    ) -> tuple[nn.Module, kfactk.Optimizer]:
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(F.cross_entropy(self.model(x), y))
                    if clip is not None and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                    self.wrapper.step()
                    self.scheduler.step()
                    self.wrapper.zero_grad()
        return self.network, self.optimizer


@pytest.mark.parametrize("late", [False, True], ids=["bound before prepare", "bound after"])
@pytest.mark.parametrize(
    ("micro", "clip", "half"),
    [(1, None, False), (2, None, False), (1, 0.1, False), (1, None, True), (3, 0.1, True)],
    ids=["plain", "accumulated", "clipped", "bf16", "all"],
)
def test_a_prepared_loop(micro: int, clip: float | None, half: bool, late: bool) -> None:
    run = Run(micro=micro, half=half, late=late)
    assert type(run.wrapper) is AcceleratedOptimizer
    same(run.train(clip=clip), trained(micro=micro, clip=clip, half=half, each="step"))


def test_a_run_resumed_from_its_state_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    begun = Run()
    begun.train(1)
    begun.accelerator.save_state(str(tmp_path))
    whole = begun.train(2)
    forget()
    resumed = Run()
    nn.init.zeros_(resumed.network[0].weight)
    resumed.accelerator.load_state(str(tmp_path))
    same(resumed.train(2), whole)
    same(whole, trained(epochs=3, each="step"))


class Masked(nn.Module):
    """A model with arguments that the likelihood asks for by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.layer(tokens)


def test_arguments_keep_their_names_under_mixed_precision() -> None:
    """`prepare` wraps the forward; positional arguments keep names; 3 of 10 terms are masked."""
    mask = torch.ones(2, 5)
    mask[0, 2:] = 0
    tokens = torch.randn(2, 5, 3)
    model = Masked()
    optimizer = kfactk.build(
        curvature="kfac",
        fisher="exact",
        likelihood={"name": "categorical", "class_axis": -1, "weights": "mask"},
    ).bind(model)
    model, wrapper = Accelerator(cpu=True, mixed_precision="bf16").prepare(model, optimizer)
    model(tokens, mask).sum().backward()
    wrapper.step()
    with torch.autocast("cpu", torch.bfloat16):
        probabilities = model.layer(tokens).double().softmax(-1)[mask.bool()]
    # G = (1 / (M T)) sum over the M terms of diag(p) - p p^T, with T = 5 rows an example
    expected = (probabilities.sum(0).diag() - probabilities.T @ probabilities) / (7 * 5)
    torch.testing.assert_close(
        optimizer.layers["layer"].factors["G"].double(), expected, rtol=0.02, atol=1e-4
    )


def test_the_wrapper_has_no_methods_but_those_of_torch() -> None:
    run = Run()
    assert run.wrapper.optimizer is run.optimizer
    assert not hasattr(run.wrapper, "observe"), (
        "docs/integrations.md says that it is to be looked for in optimizer.optimizer"
    )


@pytest.mark.filterwarnings("ignore:no layer is preconditioned")
def test_a_model_of_one_layer_is_bound_before_prepare_or_not_known() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    first = nn.Linear(3, 2)
    optimizer = kfactk.build().bind(first)
    accelerator.prepare(first, optimizer)
    assert optimizer.coverage().covered == ("weight", "bias")
    second = accelerator.prepare(nn.Linear(3, 2))
    assert "its forward was replaced on the instance" in str(kfactk.build().coverage(second))


def rank_trains(rank: int, micro: int) -> list[Tensor]:
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    os.environ.update(variables)
    forget()
    try:
        run = Run(micro=micro, batch=4, dtype=torch.float64)
        assert run.accelerator.num_processes == 2
        assert isinstance(run.model, nn.parallel.DistributedDataParallel)
        run.scheduler = nn.Identity()
        run.scheduler.step = lambda: None  # the wrapper would step once for each process
        return numbers(*run.train())
    finally:
        forget()
        for name in variables:
            os.environ.pop(name)


@pytest.mark.parametrize("micro", [1, 2])
def test_two_ranks_with_half_a_batch_equal_one_process(micro: int) -> None:
    """prepare deals the batches out in turn: both ranks together have the batch of 8."""
    first, second = shared_workers().run(2, rank_trains, micro, patience=PATIENCE)
    expected = numbers(*trained(micro=micro, dtype=torch.float64, each="never"))
    for mine, other, theirs in zip(first, second, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))
        assert torch.equal(mine, other)
