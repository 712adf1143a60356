"""Lightning against a loop written by hand, bit for bit on one process, to 1e-10 on two."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

import kfactk
from kfactk.testing._support.ranks import shared_workers
from tests.integrations.by_hand import bound, loader, network, numbers, points, same, trained

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore:.*litlogger", "ignore:`isinstance"
    ),
]
PATIENCE = 300.0
"""Seconds for two processes to import the framework and train, on a busy machine too."""
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Module(lightning.LightningModule):
    """As in Lightning's tutorials, on the network that all frameworks are tried on."""

    def __init__(
        self, *, bind_self: bool = False, dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        super().__init__()
        self.network, self.bind_self, self.options = network(dtype), bind_self, options

    def forward(self, x: Tensor) -> Any:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor | None:
        x, y = batch
        output = self(x) if self.bind_self else self.network(x)
        return F.cross_entropy(output.to(x.dtype), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        self.log("loss", F.cross_entropy(self(x) * 100, y), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = bound(self if self.bind_self else self.network, **self.options)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def fitted(
    module: Module, epochs: int = 2, path: Path | None = None, **options: Any
) -> tuple[nn.Module, kfactk.Optimizer]:
    trainer = lightning.Trainer(
        max_epochs=epochs, **{**QUIET, "enable_checkpointing": False, **options}
    )
    trainer.fit(module, loader(), loader(), ckpt_path=path)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, kfactk.Optimizer)
    return module.network, optimizer


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "lightning.pytorch")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 2}, {"micro": 2}),
        ({"gradient_clip_val": 0.1}, {"clip": 0.1}),
        ({"precision": "bf16-mixed"}, {"half": True}),
        (
            {"accumulate_grad_batches": 3, "precision": "bf16-mixed", "gradient_clip_val": 0.1},
            {"micro": 3, "half": True, "clip": 0.1},
        ),
    ],
    ids=["plain", "accumulated", "clipped", "bf16", "all"],
)
def test_automatic_optimisation(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """With closure and scheduler; forwards of sanity check and validation do not count."""
    same(fitted(Module(), **theirs), trained(**ours))


def test_the_step_is_given_a_closure(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    step = kfactk.Optimizer.step

    def seen(self: kfactk.Optimizer, closure: Callable[[], float] | None = None) -> float | None:
        given.append(closure)
        return step(self, closure)

    monkeypatch.setattr(kfactk.Optimizer, "step", seen)
    fitted(Module(), epochs=1)
    assert len(given) == 5
    assert all(callable(closure) for closure in given)


def test_the_module_itself_may_be_bound() -> None:
    same(fitted(Module(bind_self=True)), trained())


def test_a_run_resumed_from_a_checkpoint_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    saved = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fitted(Module(), epochs=3, callbacks=[saved], enable_checkpointing=True)
    fresh = Module()
    nn.init.zeros_(fresh.network[0].weight)
    resumed = fitted(fresh, epochs=3, path=tmp_path / "epoch=0.ckpt")
    same(resumed, whole)
    same(resumed, trained(epochs=3))


class Manual(Module):
    """Steps of its own, with or without a closure."""

    def __init__(self, *, closure: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.closure = False, closure

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            loss = super(Manual, self).training_step(batch, index)
            assert loss is not None
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        if self.closure:
            optimizer.step(closure=closure)
        else:
            closure()
            optimizer.step()
        if self.trainer.is_last_batch:
            scheduler: Any = self.lr_schedulers()
            scheduler.step()
            assert set(optimizer.layers) == {"0", "2"}, (
                "the wrapper has the optimizer's own methods"
            )
            assert len(optimizer.state) == 4, "and its state"


@pytest.mark.parametrize("closure", [True, False])
def test_manual_optimisation(closure: bool) -> None:
    same(fitted(Manual(closure=closure)), trained())


class Skipping(Module):
    """Leaves out the first batch, on which curvature is due."""

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor | None:
        loss = super().training_step(batch, index)
        return None if index == 0 else loss


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_training_step_may_skip_a_batch() -> None:
    model, optimizer = fitted(Skipping(), epochs=1)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert all(view.factors for view in optimizer.layers.values())


class Communicator(LightningEnvironment):
    """Processes that were started by others, in a process group that exists."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self._rank, self._ranks = rank, ranks

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return self._ranks

    def global_rank(self) -> int:
        return self._rank

    def local_rank(self) -> int:
        return self._rank

    def set_world_size(self, size: int) -> None:
        assert size == self._ranks

    def set_global_rank(self, rank: int) -> None:
        assert rank == self._rank


def rank_fits(rank: int, micro: int, bind_self: bool) -> list[Tensor]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Module(bind_self=bind_self, dtype=torch.float64, fisher="exact")
    strategy = DDPStrategy(cluster_environment=Communicator(rank, 2), process_group_backend="gloo")
    options = {
        "max_epochs": 2,
        "devices": 2,
        "accumulate_grad_batches": micro,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(
        strategy=strategy, use_distributed_sampler=False, **options, **QUIET
    )
    data = points(torch.float64)
    mine = DataLoader(data, 4, sampler=DistributedSampler(data, 2, rank, shuffle=False))
    trainer.fit(module, mine, mine)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, kfactk.Optimizer)
    return numbers(module.network, optimizer)


@pytest.mark.parametrize(("micro", "bind_self"), [(1, False), (2, False), (1, True)])
def test_two_ranks_with_half_a_batch_equal_one_process(micro: int, bind_self: bool) -> None:
    """The sampler gives the ranks a batch of 8 in turns; Lightning's own would shuffle."""
    first, second = shared_workers().run(2, rank_fits, micro, bind_self, patience=PATIENCE)
    expected = numbers(*trained(micro=micro, dtype=torch.float64))
    for mine, other, theirs in zip(first, second, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))
        assert torch.equal(mine, other)
