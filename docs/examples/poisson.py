"""Solve -(u_xx + u_yy) = f on a square, u = 0 on its edge: K-FAC of the residual against Adam."""

import itertools
import time

import torch
from torch import nn

import kfactk


class Jet(nn.Module):
    """The residual of the equation, by derivatives that are carried forward through each layer.

    Each point is d + 2 rows: the value, its d first derivatives, and its Laplacian. A linear layer
    maps all of them by the same weight, but only values have a bias: it is the last column of the
    weight, and its input is 1 for values and 0 for derivatives.
    """

    def __init__(self, *widths):
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.layers = nn.ModuleList(nn.Linear(a + 1, b, bias=False) for a, b in pairs)

    def forward(self, points, inside):
        """Map points `[N, d]` to residuals `[N, 1]`: of the equation inside, else of the edge."""
        jet = self.jets(points)
        return torch.where(inside, jet[:, -1] + source(points), 10 * jet[:, 0])

    def jets(self, points):
        """Map points `[N, d]` to u, its derivatives and its Laplacian, `[N, d + 2, 1]`."""
        count, d = points.shape
        directions = torch.eye(d).expand(count, d, d)
        jet = torch.cat([points[:, None], directions, torch.zeros(count, 1, d)], 1)
        ones = torch.zeros(count, d + 2, 1)
        ones[:, 0] = 1
        for i, layer in enumerate(self.layers):
            jet = tanh(jet) if i else jet
            jet = layer(torch.cat([jet, ones], -1))
        return jet


def tanh(jet):
    """Apply tanh to jets `[N, d + 2, width]`, by the chain rule."""
    value, first, laplacian = jet[:, :1], jet[:, 1:-1], jet[:, -1:]
    y = value.tanh()
    slope = 1 - y**2
    bend = -2 * y * slope
    squares = first.square().sum(1, keepdim=True)
    return torch.cat([y, slope * first, slope * laplacian + bend * squares], 1)


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
                u = model.jets(grid)[:, 0]
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
    return Jet(2, 32, 32, 32, 1)


def main(steps=400):
    recipe = kfactk.build(
        curvature="kfac",
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
