"""One rank is killed during a run: the others end with a clear error, and the run resumes.

Started by torchrun, this module is the run itself: see `main`.
"""

from __future__ import annotations

import datetime
import functools
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import kfactk
from kfactk import KfactkError
from kfactk.testing._support.ranks import process_context, shared_workers
from tests.kfactk.small import F64, assert_equal
from tests.torchrun import torchrun

pytestmark = pytest.mark.xdist_group("ranks")

ROOT = Path(__file__).parents[2]
STEPS, EVERY, FATAL = 9, 2, 5
"""Checkpoints come every other step. Everything is due at the fatal step, after the second one."""
DOOMED = 1
TIMEOUT, BOUND = datetime.timedelta(minutes=30), 300.0
"""Timeout of a collective, which must not end the others; seconds for a whole run."""


class Run:
    """A small model that learns on several ranks, from the last checkpoint on if there is one.

    Args:
        folder: Of its checkpoints.
        placement: Name of the placement.
    """

    def __init__(self, folder: Path, placement: str) -> None:
        torch.manual_seed(3)
        layers = (
            nn.Conv1d(2, 4, 3),
            nn.Tanh(),
            nn.Flatten(),
            nn.LayerNorm(16),
            nn.Linear(16, 6),
            nn.Tanh(),
            nn.Linear(6, 3),
        )
        # Without it, DDP's first backward sums in another order, which changes the last bit.
        self.model = DistributedDataParallel(
            nn.Sequential(*layers).double(), find_unused_parameters=True
        )
        recipe = kfactk.build(
            curvature="conv_kfac",
            basis="ekfac",
            update="adam",
            placement=placement,
            lr=0.02,
            damping=0.05,
            factor_every=1,
            scale_every=1,
            basis_every=FATAL,
        )
        self.optimizer = recipe.bind(self.model)
        self.step = 0
        self._folder = folder
        self._latest = folder / "latest"
        if self._latest.exists():
            self._load(self._latest.read_text())

    def save(self) -> None:
        """Write a checkpoint beside the last one, and only then call it the last one."""
        name = f"step-{self.step}"
        weights, state = get_state_dict(self.model, self.optimizer)
        dcp.save(
            {"model": weights, "optimizer": state, "step": self.step},
            checkpoint_id=self._folder / name,
        )
        if dist.get_rank() == 0:
            (self._folder / "new").write_text(name)
            (self._folder / "new").replace(self._latest)

    def _load(self, name: str) -> None:
        weights, state = get_state_dict(self.model, self.optimizer)
        saved = {"model": weights, "optimizer": state, "step": 0}
        dcp.load(saved, checkpoint_id=self._folder / name)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
        self.step = saved["step"]

    def train(self, at: Callable[[str, int], None] = lambda place, step: None) -> list[Tensor]:
        """Learn to the end, tell `at` where the run is, and return the weights."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        while self.step < STEPS:
            generator = torch.Generator().manual_seed(self.step)
            x, y = (
                torch.randn(12, 2, 6, generator=generator, dtype=F64),
                torch.randint(3, (12,), generator=generator),
            )
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x[rank::ranks]), y[rank::ranks])
            at("backward", self.step)
            loss.backward()
            at("step", self.step)
            self.optimizer.step()
            self.step += 1
            if self.step % EVERY == 0:
                at("checkpoint", self.step)
                self.save()
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(place: str) -> Callable[[str, int], None]:
    """Kill this process at a place of the fatal step; "refresh" is its first decomposition."""

    def at(where: str, step: int) -> None:
        if step == FATAL and where == "step" and place == "refresh":
            torch.linalg.eigh = lambda *_, **__: die()  # type: ignore[assignment]
        elif step == FATAL + (place == "checkpoint") and where == place:
            die()

    return at


def doomed(rank: int, ranks: int, folder: str, placement: str, place: str) -> None:
    """Run one rank in a process of its own; the surviving ranks write their errors down."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=TIMEOUT,
    )
    try:
        Run(Path(folder), placement).train(
            killed(place) if rank == DOOMED else lambda where, step: None
        )
    except Exception as error:
        (Path(folder) / f"{rank}.error").write_text(
            f"{'kfactk' if isinstance(error, KfactkError) else 'torch'}: {error}"
        )
        raise


def whole(rank: int, folder: str, placement: str) -> tuple[int, list[Tensor]]:
    """Run to the end from the last checkpoint, if any; return the first step and the weights."""
    run = Run(Path(folder), placement)
    first, weights = run.step, run.train()
    run.optimizer.close()
    return first, weights


@functools.cache
def uninterrupted(ranks: int, placement: str) -> list[Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        everyones = shared_workers().run(ranks, whole, folder, placement)
    for first, weights in everyones:
        assert first == 0
        assert_equal(weights, everyones[0][1])
    return everyones[0][1]


@pytest.mark.parametrize(
    ("ranks", "placement", "place"),
    [
        (2, "replicated", "backward"),
        (3, "replicated", "step"),
        (2, "mem_opt", "step"),
        (3, "comm_opt", "refresh"),
        (2, "mem_opt", "checkpoint"),
    ],
)
def test_the_others_end_and_the_run_goes_on(
    ranks: int, placement: str, place: str, tmp_path: Path
) -> None:
    context = process_context()
    processes = [
        context.Process(target=doomed, args=(rank, ranks, str(tmp_path), placement, place))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(BOUND)
        assert [process.exitcode for process in processes] == [
            -signal.SIGKILL if rank == DOOMED else 1 for rank in range(ranks)
        ]
    finally:
        for process in processes:
            process.kill()
    for rank in set(range(ranks)) - {DOOMED}:
        told = (tmp_path / f"{rank}.error").read_text()
        if place in ("step", "refresh"):  # elsewhere it is torch that waits for the others
            assert told.startswith("kfactk: the ranks could not exchange curvature (")
            for words in (
                "another rank ended",
                "look at its output",
                "start all ranks again from the last checkpoint",
            ):
                assert words in told
    assert (tmp_path / "latest").read_text() == "step-4"
    (tmp_path / "rendezvous").unlink(missing_ok=True)
    for first, weights in shared_workers().run(ranks, whole, str(tmp_path), placement):
        assert first == FATAL - 1
        assert_equal(weights, uninterrupted(ranks, placement))


def test_torchrun_starts_a_run_again_that_lost_a_rank(tmp_path: Path) -> None:
    """The variable gives each start its own store; else gloo finds processes that have ended."""
    done = torchrun(
        Path(__file__),
        tmp_path,
        folder=ROOT,
        restarts=1,
        variables={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "starts").read_text() == "from 0\nfrom 4\n"
    for rank in range(2):
        assert_equal(
            torch.load(tmp_path / f"{rank}.pt", weights_only=True), uninterrupted(2, "replicated")
        )


def main(folder: Path) -> None:
    """Run one rank under torchrun; the first start kills the doomed one in the fatal step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    run, first = Run(folder, "replicated"), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if dist.get_rank() == 0:
        with (folder / "starts").open("a") as file:
            file.write(f"from {run.step}\n")
    weights = run.train(
        killed("step") if first and dist.get_rank() == DOOMED else lambda where, step: None
    )
    torch.save(weights, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
