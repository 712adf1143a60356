"""The error of two views of a transposed convolution, layer by layer, in a small decoder.

    ||F - F_hat||_F / ||F||_F

A row is either an output position, with what it sees of the input (as `conv_kfac` has it), or an
input position, with the patch of output gradients that it reaches. Both give the same per-example
gradients. F is the dense Fisher matrix of Bernoulli pixels in float64, without sampling noise.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GEOMETRIES = ((2, 2, 0), (4, 2, 1), (3, 2, 1), (3, 1, 1))
"""Kernel, stride and padding."""
VIEWS = ("output positions", "input positions")


def smooth(examples: int, channels: int, size: int) -> Tensor:
    """Return images whose neighbouring pixels are similar."""
    coarse = torch.randn(examples, channels, 2, 2)
    return F.interpolate(coarse, size=(size, size), mode="bilinear")


def decoder(kernel: int, stride: int, padding: int) -> nn.Sequential:
    """Return a network of two transposed convolutions without bias."""
    first, second = (
        nn.ConvTranspose2d(*channels, kernel, stride, padding, bias=False)
        for channels in ((3, 3), (3, 2))
    )
    return nn.Sequential(first, nn.ReLU(), second)


def train(model: nn.Module, images: Tensor, targets: Tensor, steps: int) -> None:
    """Take steps of Adam on all images."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(images), targets).backward()
        optimizer.step()


def exact_gradients(model: nn.Module, layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the layer's input, and its output's gradients in every pass of the exact Fisher."""
    seen: dict[str, Tensor] = {}
    handle = layer.register_forward_hook(
        lambda module, given, output: seen.update(x=given[0].detach(), y=output)
    )
    logits = model(images)
    handle.remove()
    columns = logits.flatten(1) * (p := logits.sigmoid().flatten(1).detach()).mul(1 - p).sqrt()
    found = [
        torch.autograd.grad(column.sum(), seen["y"], retain_graph=True)[0]
        for column in columns.unbind(1)
    ]
    return seen["x"], torch.stack(found)


def errors(layer: nn.ConvTranspose2d, x: Tensor, passes: Tensor) -> dict[tuple[str, str], float]:
    """Return the relative error of both views, for K-FAC and for EKFAC."""
    n, c, taps = len(x), x.shape[1], layer.weight[0, 0].numel()
    kernel, (stride, _), (padding, _) = layer.kernel_size, layer.stride, layer.padding
    eye = torch.eye(c * taps).view(c, taps, c * taps).transpose(1, 2).reshape(c, -1, *kernel)
    patches = F.conv_transpose2d(x, eye, None, stride, padding).flatten(2)  # [n, c taps, T]
    g = passes.flatten(3)  # [K, n, d, T]
    reached = F.unfold(passes.flatten(0, 1), kernel, 1, padding, stride)
    reached = reached.view(len(passes), n, -1, reached.shape[-1])  # [K, n, d taps, S]
    pixels = x.flatten(2)
    gradients = torch.einsum("kndt,nat->knda", g, patches).flatten(0, 1)
    fisher = gradients.flatten(1).T @ gradients.flatten(1) / n
    outputs = g.shape[2]
    sides = {
        VIEWS[0]: (patches, g, lambda m: m),
        VIEWS[1]: (pixels, reached, lambda m: _by_outputs(m, outputs, taps, c)),
    }
    found = {}
    for view, (a, b, ordered) in sides.items():
        left = torch.einsum("kndt,knet->de", b, b) / (n * b.shape[-1])
        right = torch.einsum("nat,nbt->ab", a, a) / n
        kron = ordered(torch.kron(left, right))
        q = ordered(torch.kron(*(torch.linalg.eigh(each)[1] for each in (left, right))))
        ekfac = (q * (q.T @ fisher @ q).diagonal()) @ q.T
        for name, mine in (("K-FAC", kron), ("EKFAC", ekfac)):
            found[name, view] = float((fisher - mine).norm() / fisher.norm())
    return found


def _by_outputs(matrix: Tensor, outputs: int, taps: int, channels: int) -> Tensor:
    """Return rows (output, tap, channel) in the order (output, channel, tap), and columns too.

    Of a basis the order of columns does not matter.
    """
    order = torch.arange(len(matrix)).view(outputs, taps, channels).transpose(1, 2).flatten()
    return matrix[order][:, order]


def main() -> None:
    """Train, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=32, help="images")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100], help="when to measure")
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    for kernel, stride, padding in GEOMETRIES:
        torch.manual_seed(0)
        images = smooth(arguments.examples, 3, 4) + 0.3 * torch.randn(arguments.examples, 3, 4, 4)
        model, done = decoder(kernel, stride, padding), 0
        shape = model(images).shape
        targets = (smooth(arguments.examples, 2, shape[-1]) > 0).double()
        for steps in arguments.steps:
            train(model, images, targets, steps - done)
            done = steps
            found = [errors(model[i], *exact_gradients(model, model[i], images)) for i in (0, 2)]
            for basis, view in itertools.product(("K-FAC", "EKFAC"), VIEWS):
                numbers = "  ".join(f"{each[basis, view]:.3f}" for each in found)
                print(f"{kernel}x{kernel}/{stride}  step {steps:3}  {basis}  {view:18} {numbers}")


if __name__ == "__main__":
    main()
