"""Train with kfactk in an Accelerate loop: gradient accumulation, clipping, scheduler, checkpoint.

One process: `python accelerate_loop.py`.
Two processes: `accelerate launch --cpu --num_processes 2 accelerate_loop.py`.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import kfactk


def main():
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    points = torch.rand(1024, 2) * 2 - 1
    labels = (points.prod(1) > 0).long()  # XOR of the signs: not linearly separable
    loader = DataLoader(TensorDataset(points, labels), batch_size=32, shuffle=True)

    model = nn.Sequential(
        nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    )
    recipe = kfactk.build(
        curvature="kfac", basis="ekfac", update="momentum", lr=0.03, damping=0.03, basis_every=20
    )
    optimizer = recipe.bind(model)  # the unwrapped model, before prepare
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=64)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    for epoch in range(4):
        total = torch.zeros(())
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 10.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            total += loss.detach()
        mean = accelerator.reduce(total / len(loader), "mean")
        accelerator.print(f"epoch {epoch}: loss {mean:.3f}")
        # Model, optimizer with its curvature, scheduler and random states.
        accelerator.save_state("checkpoint")

    accelerator.wait_for_everyone()  # each process writes a part of the checkpoint
    accelerator.load_state("checkpoint")
    accelerator.end_training()


if __name__ == "__main__":
    main()
