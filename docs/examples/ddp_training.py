"""Train in any number of processes, and resume from the last checkpoint.

torchrun --standalone --nproc-per-node 2 ddp_training.py
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import kfactk

BATCH, EPOCHS, FOLDER = 64, 4, Path("checkpoints")


def save(model, optimizer, epoch):
    """Write the part of every rank; the checkpoint counts once all parts are there."""
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state, "epoch": epoch}
    dcp.save(saved, checkpoint_id=FOLDER / str(epoch))
    if dist.get_rank() == 0:
        (FOLDER / "new").write_text(str(epoch))
        (FOLDER / "new").replace(FOLDER / "latest")


def load(model, optimizer):
    """Load the last checkpoint, if there is one; any number of ranks may have saved it."""
    if not (FOLDER / "latest").exists():
        return 0
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state, "epoch": 0}
    dcp.load(saved, checkpoint_id=FOLDER / (FOLDER / "latest").read_text())
    parts = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
    set_state_dict(model, optimizer, **parts)
    return saved["epoch"]


def main():
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(0)
    points = torch.rand(2048, 2) * 2 - 1
    labels = (points.prod(1) > 0).long()  # XOR of the signs: not linearly separable
    sampler = DistributedSampler(TensorDataset(points, labels))
    loader = DataLoader(sampler.dataset, batch_size=BATCH // dist.get_world_size(), sampler=sampler)
    layers = nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    model = DDP(nn.Sequential(*layers).to(device))
    options = {"update": "momentum", "lr": 0.03, "damping": 0.03, "basis_every": 20}
    optimizer = kfactk.build(fisher="exact", placement="mem_opt", **options).bind(model)
    for epoch in range(load(model, optimizer), EPOCHS):
        sampler.set_epoch(epoch)
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            total += loss.detach() / len(loader)
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: loss {total / dist.get_world_size():.3f}")
        save(model, optimizer, epoch + 1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
