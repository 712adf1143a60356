"""Solve -(u_xx + u_yy) = f on a square, u = 0 on its edge: K-FAC of the residual against Adam."""

import time

import torch
from torch import nn

import kfactk


class Residual(nn.Module):
    """The residual of the equation, by derivatives that a jet carries through the network."""

    def __init__(self, width=32):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(2, width), nn.Tanh()),
            *(nn.Linear(width, width), nn.Tanh()),
            *(nn.Linear(width, width), nn.Tanh()),
            nn.Linear(width, 1),
        )

    def forward(self, points, inside):
        """Map points `[N, 2]` to residuals `[N, 1]`: of the equation inside, else of the edge."""
        u = self.net(kfactk.jet(points))
        return torch.where(inside, u.laplacian + source(points), 10 * u.value)


def solution(points):
    return (torch.pi * points).sin().prod(-1, keepdim=True)


def source(points):
    return 2 * torch.pi**2 * solution(points)


def draw():
    """Return 200 points inside and 100 on the edge, and which are inside."""
    inside, edge = torch.rand(200, 2), torch.rand(100, 2)
    edge[torch.arange(100), torch.arange(100) % 2] = torch.arange(100).div(2).floor() % 2
    return torch.cat([inside, edge]), (torch.arange(300) < 200)[:, None]


def train(name, model, optimizer, steps):
    axis = torch.linspace(0, 1, 33)
    grid = torch.cartesian_prod(axis, axis)
    start = time.perf_counter()
    for step in range(steps + 1):
        if step % (steps // 4) == 0:
            with torch.no_grad():
                u = model.net(grid)
            error = (u - solution(grid)).norm() / solution(grid).norm()
            seconds = time.perf_counter() - start
            print(f"{name}, step {step}, {seconds:.1f} s: relative error {error:.5f}")
        residual = model(*draw())
        loss = residual.square().mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def network():
    torch.manual_seed(0)
    return Residual()


def main(steps=400):
    recipe = kfactk.build(
        curvature="taylor",  # of layers that are called with jets
        basis="ekfac",
        fisher="exact",  # one pass, since a residual is one number
        likelihood="gaussian",  # of half a squared residual
        update="adam",
        lr=0.01,
        damping=0.1,
        factor_every=1,
        scale_every=1,
        basis_every=10,
    )
    model = network()
    train("kfactk", model, recipe.bind(model), steps)
    model = network()
    train("Adam", model, torch.optim.Adam(model.parameters(), lr=0.01), steps)


if __name__ == "__main__":
    main()
