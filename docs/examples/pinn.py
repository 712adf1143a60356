"""Solve u'' = -pi^2 sin(pi x), u(-1) = u(1) = 0 with a physics-informed network."""

import torch
from torch import nn

import kfactk


def main():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )
    recipe = kfactk.build(
        curvature="kfac",
        fisher="exact",  # of u(x), the output of the model; one pass, since u is one number
        likelihood="gaussian",
        update="adam",
        lr=0.003,
        damping=0.001,
    )
    optimizer = recipe.bind(model)
    ends = torch.tensor([[-1.0], [1.0]])

    for step in range(300):
        inside = (2 * torch.rand(64, 1) - 1).requires_grad_()
        u = model(torch.cat([inside, ends]))  # one forward: the derivatives are taken outside
        [slope] = torch.autograd.grad(u.sum(), inside, create_graph=True)
        [bend] = torch.autograd.grad(slope.sum(), inside, create_graph=True)
        residual = bend + torch.pi**2 * (torch.pi * inside).sin()
        loss = residual.square().mean() + 10 * u[-2:].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == 299:
            x = torch.linspace(-1, 1, 101)[:, None]
            with torch.no_grad():
                error = (model(x) - (torch.pi * x).sin()).abs().max()
            print(f"step {step}: loss {loss:.3f}, largest error {error:.3f}")


if __name__ == "__main__":
    main()
