"""The error of curvatures of convolutions, layer by layer, in a network trained for some steps.

    ||F - F_hat||_F / ||F||_F

F is the dense Fisher matrix in float64, without sampling noise: that of the network's predictions
on images it was trained on. Factors, bases and scales come from the same images, by kfactk's own
stages, and are assembled to dense matrices here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.data import load
from experiments.settings import Data
from kfactk import FactorContext, Layer, LayerCall, Samples
from kfactk.linalg import block_diagonal, kron
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.curvature.conv_kfac import ConvKfac
from kfactk_stages.fisher.exact import Exact
from kfactk_stages.likelihood.categorical import Categorical

Matrices = dict[str, Tensor]
SETTINGS: dict[str, tuple[str, str]] = {
    "K-FAC, sud": ("sud", ""),
    "EKFAC, sud": ("sud", "full"),
    "K-FAC, sua": ("sua", ""),
    "EKFAC, sua": ("sua", "full"),
    "EKFAC, channels, sua": ("sua", "channels"),
    "EKFAC, channels, sud": ("sud", "channels"),
    "K-FAC, stationary": ("stationary", ""),
    "EKFAC, channels+taps, stationary": ("stationary", "channels+taps"),
    "EKFAC, channels+taps, sud": ("sud", "channels+taps"),
}
"""For each name, `spatial` of the curvature and `inputs` of the basis ("" for A kron G)."""


def network(channels: int, width: int, classes: int) -> nn.Sequential:
    """Return a network of four 3x3 convolutions, two of which halve the image."""
    torch.manual_seed(0)
    convolutions: list[nn.Module] = []
    for before, after, stride in (
        (channels, width, 1),
        (width, width, 2),
        (width, width, 1),
        (width, width, 2),
    ):
        convolutions += [nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(
        *convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes)
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> float:
    """Take steps of Adam on mini-batches of 64; return the last loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    loss = torch.zeros(())
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def passes(model: nn.Module, images: Tensor) -> Iterator[dict[str, LayerCall]]:
    """Yield the call of each convolution in each pass of the exact Fisher."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def noting(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, given, output: calls.__setitem__(name, (given[0].detach(), output))

    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
    }
    handles = [module.register_forward_hook(noting(name)) for name, module in layers.items()]
    likelihood = Categorical()
    view = likelihood.view(model(images))
    for handle in handles:
        handle.remove()
    for loss in Exact().losses(view, likelihood, None, torch.Generator()):
        found = torch.autograd.grad(loss, [calls[name][1] for name in layers], retain_graph=True)
        yield {
            name: LayerCall(calls[name][0], gradient)
            for name, gradient in zip(layers, found, strict=True)
        }


def input_side(parts: Mapping[str, Mapping[str, Tensor]], layer: Layer) -> Tensor:
    """Return U_A: as it is, or made of channels and taps, the bias apart."""
    vectors = {name: each["eigenvectors"] for name, each in parts.items()}
    if "A" in vectors:
        return vectors["A"]
    taps = layer.tensors()["weight"].shape[2:].numel()
    found = kron(vectors["C"], vectors.get("K", torch.eye(taps, dtype=vectors["C"].dtype)))
    return block_diagonal(found, found.new_ones(1, 1)) if layer.bias else found


def errors(layer: Layer, calls: list[LayerCall], num_terms: int) -> dict[str, float]:
    """Return the relative error of each setting on one layer."""
    curvatures = {spatial: ConvKfac(spatial=spatial) for spatial, _ in SETTINGS.values()}
    samples = [
        curvatures["sud"].samples(layer, [call], num_terms=num_terms, first=not k)
        for k, call in enumerate(calls)
    ]
    gradients = torch.cat([each.per_example_gradients() for each in samples])
    rows = gradients.transpose(-1, -2).flatten(1)  # vec stacks columns
    fisher = rows.T @ rows / num_terms
    found = {}
    for name, (spatial, inputs) in SETTINGS.items():
        matrices = mean_matrices(curvatures[spatial], layer, samples, num_terms)
        mine = (
            kron(matrices["A"], matrices["G"])
            if not inputs
            else ekfac(Ekfac(inputs=inputs), matrices, samples, num_terms, layer)
        )
        found[name] = float((fisher - mine).norm() / fisher.norm())
    return found


def mean_matrices(
    curvature: ConvKfac, layer: Layer, samples: list[Samples], num_terms: int
) -> Mapping[str, Tensor]:
    """Return the assembled factors of all passes."""
    totals: Matrices = {}
    counts: dict[str, float] = {}
    for each in samples:
        for name, statistic in curvature.factors(layer, each).items():
            if statistic.total is not None:
                totals[name] = totals.get(name, torch.zeros(())) + statistic.total
                counts[name] = counts.get(name, 0.0) + float(statistic.count)
    return curvature.assemble(layer, {name: total / counts[name] for name, total in totals.items()})


def ekfac(
    basis: Ekfac,
    matrices: Mapping[str, Tensor],
    samples: list[Samples],
    num_terms: int,
    layer: Layer,
) -> Tensor:
    """Return the block of a basis, dense."""
    parts = {
        name: basis.decompose(name, matrices[name], FactorContext(0.0, {}))
        for name in basis.requires
    }
    totals = [
        statistic.total for each in samples for statistic in basis.moments(parts, each).values()
    ]
    scale = torch.stack([total for total in totals if total is not None]).sum(0) / num_terms
    q = kron(input_side(parts, layer), parts["G"]["eigenvectors"])
    return (q * scale.T.flatten()) @ q.T


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table with a row for each setting and a column for each layer."""
    lines = [f"{'':34}" + "".join(f"{layer:>22}" for layer in found)]
    lines += [
        f"{name:34}" + "".join(f"{each[name]:22.3f}" for each in found.values())
        for name in SETTINGS
    ]
    return "\n".join(lines)


def main() -> None:
    """Train, measure, and print a table."""
    parser = argparse.ArgumentParser(
        description="Relative error of curvatures of convolutions, in the Frobenius norm."
    )
    parser.add_argument("--width", type=int, default=8, help="channels of each convolution")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[0, 300],
        help="after how many training steps to measure",
    )
    parser.add_argument(
        "--examples", type=int, default=256, help="images that the Fisher matrix is of"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="a folder of CIFAR-10's images, as the experiments take it; digits without",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = Data(source="cifar10" if arguments.data_dir else "digits")
    dataset = load(source, arguments.data_dir, Path("runs/cache"), print)
    mean, deviation = dataset.normalisation()
    images, labels = (dataset.train.inputs - mean) / deviation, dataset.train.labels
    model, done = network(images.shape[1], arguments.width, len(dataset.classes)), 0
    for steps in arguments.steps:
        loss = train(model, images, labels, steps - done)
        done = steps
        exact = network(images.shape[1], arguments.width, len(dataset.classes)).double()
        exact.load_state_dict(model.state_dict())
        calls = list(passes(exact, images[: arguments.examples].double()))
        found = {}
        for name in calls[0]:
            module = exact.get_submodule(name)
            side = calls[0][name].gradient.shape[-1]
            label = f"{module.weight.shape[1]} to {module.weight.shape[0]}, {side} x {side}"
            layer = Layer(name, module, ("weight", "bias"))
            found[f"{name}: {label}"] = errors(
                layer, [call[name] for call in calls], arguments.examples
            )
        print(
            f"{dataset.name}, {arguments.examples} images, after {steps} steps"
            + (f" (loss {loss:.2f})" if steps else "")
        )
        print(table(found), flush=True)


if __name__ == "__main__":
    main()
