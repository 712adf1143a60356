"""Models, data and our measurements of them."""

from __future__ import annotations

import copy
from typing import Any

import attrs
import torch
from torch import Tensor, nn

import kfactk
from kfactk import Optimizer

F64 = torch.float64
DAMPING = 0.03


class Mean(nn.Module):
    """The mean over the positions of a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Tokens(nn.Module):
    """A sequence model: two layers on every position, a mean over positions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(hidden.mean(1))


@attrs.frozen(eq=False)
class Problem:
    """A model with one batch.

    Args:
        model: The model, float64.
        inputs: The batch.
        targets: Its labels.
        loss: The mean loss.
        likelihood: What kfactk is told about the output.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: nn.Module
    likelihood: Any

    def layers(self) -> dict[str, nn.Module]:
        """Return the layers with a matrix, by name."""
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return {name: m for name, m in self.model.named_modules() if isinstance(m, kinds)}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return their parameters."""
        return {
            f"{layer}.{name}": parameter
            for layer, module in self.layers().items()
            for name, parameter in module.named_parameters()
        }

    def vector(self) -> dict[str, Tensor]:
        """Return a fixed vector of the parameters' shapes."""
        generator = torch.Generator().manual_seed(1)
        return {
            name: torch.randn(p.shape, generator=generator, dtype=F64)
            for name, p in self.parameters().items()
        }


LOSSES: dict[str, tuple[type[nn.Module], Any]] = {
    "softmax": (nn.CrossEntropyLoss, "categorical"),
    "mse": (nn.MSELoss, {"name": "gaussian", "variance": 0.5, "divisor": "entries"}),
    "bce": (nn.BCEWithLogitsLoss, {"name": "bernoulli", "divisor": "entries"}),
}
"""torch's losses with their mean, and the likelihoods that say the same."""
OUTPUTS = 3


def _perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, OUTPUTS)
    )


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, (2, 3), stride=(2, 1), padding=(0, 1), dilation=(2, 1), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 2 * 4, OUTPUTS),
    )


def _batch_norm() -> nn.Module:
    """A batch norm in evaluation mode, with statistics of its own."""
    norm = nn.BatchNorm1d(6).eval()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    nn.init.normal_(norm.running_mean)
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, OUTPUTS))


def _normalized() -> nn.Module:
    norm = nn.LayerNorm(5)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    first, batch_norm, tanh, _ = _batch_norm()
    return nn.Sequential(
        first, batch_norm, tanh, nn.Linear(6, 5), norm, nn.Tanh(), nn.Linear(5, OUTPUTS)
    )


def _signals() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 4, OUTPUTS),
    )


def _volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 3, (1, 2, 2), stride=(2, 1, 1), padding=(0, 1, 0)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 2 * 4 * 2, OUTPUTS),
    )


def _grown() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(2, 3, (3, 2), stride=2, padding=(1, 0)),
        nn.Tanh(),
        nn.ConvTranspose2d(3, 2, 2, stride=(1, 3), dilation=(2, 1), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(2 * 5 * 11, OUTPUTS),
    )


def _embedded() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 5), nn.Tanh(), Mean(), nn.Linear(5, 3)
    )


MODELS = {
    "perceptron": (_perceptron, (40, 4)),
    "convolutions": (_convolutions, (40, 2, 5, 4)),
    "tokens": (Tokens, (40, 6, 3)),
    "batch_norm": (_batch_norm, (40, 4)),
    "normalized": (_normalized, (40, 4)),
}
"""Models with the shape of a batch that leaves no factor without full rank but softmax's G."""
OTHERS = {
    "signals": (_signals, (60, 2, 7)),
    "volumes": (_volumes, (60, 2, 3, 3, 3)),
    "embedded": (_embedded, (40, 5)),
    "grown": (_grown, (40, 2, 2, 2)),
}
"""Models with layers for which only some peers have anything."""
ROWS = {"convolutions": {"0": 20, "2": 8}, "tokens": {"first": 6, "second": 6}}
"""T of the layers that see several rows of an example."""


def problem(model: str, loss: str = "softmax") -> Problem:
    torch.manual_seed(0)
    make, shape = (MODELS | OTHERS)[model]
    kind, likelihood = LOSSES[loss]
    inputs = torch.randn(shape, dtype=F64)
    if model == "embedded":
        inputs = torch.randint(6, shape)
    targets = {
        "softmax": torch.randint(OUTPUTS, shape[:1]),
        "mse": torch.randn(shape[0], OUTPUTS, dtype=F64),
        "bce": torch.randint(2, (shape[0], OUTPUTS)).to(F64),
    }[loss]
    return Problem(make().double(), inputs, targets, kind(), likelihood)


def measured(case: Problem, **recipe: Any) -> Optimizer:
    """Return our optimizer after it has measured the curvature on the batch."""
    recipe = {"curvature": "conv_kfac", "fisher": "exact", "damping": DAMPING} | recipe
    model = copy.deepcopy(case.model)
    optimizer = kfactk.build(likelihood=case.likelihood, lr=0.0, update="sgd", **recipe).bind(model)
    case.loss(model(case.inputs), case.targets).backward()
    optimizer.step()
    return optimizer


def conv_kfac(spatial: str) -> dict[str, Any]:
    """Return the curvature that sums the rows of an example in this way."""
    return {"name": "conv_kfac", "spatial": spatial}
