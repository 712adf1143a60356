"""What runs minimise, and what they measure: classes of examples, or images to reconstruct."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from experiments.data import Dataset
from experiments.errors import ExperimentError

WHITE = 255.0
"""The largest value of a pixel."""


class Task(Protocol):
    """What a loss of `settings.LOSSES` means for a run.

    Attributes:
        has_accuracy: Whether outputs can be right or wrong.
        lost: A value of the minimised loss from which no run recovers: errors of the optimizer
            beyond it are its end.
    """

    has_accuracy: ClassVar[bool]
    lost: ClassVar[float]

    def outputs(self, dataset: Dataset) -> int:
        """Return the number of outputs of a network."""

    def normalisation(self, dataset: Dataset) -> tuple[Tensor, Tensor] | None:
        """Return what is taken from inputs, and what they are divided by; `None` for neither."""

    def measure(self, outputs: Tensor, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss to minimise, and three sums: of losses, of right outputs, and how many.

        Args:
            outputs: Those of the network.
            inputs: The normalised inputs.
            labels: The labels.
        """


class Classification:
    """The cross entropy of classes, or of the next tokens, and its accuracy."""

    has_accuracy: ClassVar[bool] = True
    lost: ClassVar[float] = 1e3

    def outputs(self, dataset: Dataset) -> int:
        """Return the number of classes."""
        return len(dataset.classes)

    def normalisation(self, dataset: Dataset) -> tuple[Tensor, Tensor] | None:
        """Return mean and deviation of the training inputs; text has none."""
        return None if dataset.is_text else dataset.normalisation()

    def measure(self, outputs: Tensor, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy, and the sums."""
        loss = functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())
        right, count = (outputs.detach().argmax(-1) == labels).sum(), labels.numel()
        return loss, torch.stack(
            [loss.detach().double() * count, right.double(), torch.full_like(right, count).double()]
        )


class Reconstruction:
    """The cross entropy of an image's pixels is minimised, and its squared error measured.

        minimised:  (1/N) sum_n sum_p cross_entropy(x_np, sigmoid(f_np))
        measured:   (1/N) sum_n sum_p (x_np - sigmoid(f_np))^2

    x are pixels from 0 to 1, f the outputs. The second is what the literature of K-FAC reports of
    autoencoders: unlike the first, it is zero for a perfect reconstruction of grey pixels.

    References:
        Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature", arXiv:1503.05671.
    """

    has_accuracy: ClassVar[bool] = False
    lost: ClassVar[float] = 1e5

    def outputs(self, dataset: Dataset) -> int:
        """Return the number of pixels."""
        return dataset.train.inputs[0].numel()

    def normalisation(self, dataset: Dataset) -> tuple[Tensor, Tensor] | None:
        """Return what maps pixels to values from 0 to 1.

        Raises:
            ExperimentError: The inputs are no pixels.
        """
        if dataset.train.inputs.dtype != torch.uint8:
            raise ExperimentError(
                "training.loss = reconstruction takes pixels, which are bytes: choose another "
                "data.source, such as digits28"
            )
        return torch.tensor(0.0), torch.tensor(WHITE)

    def measure(self, outputs: Tensor, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy of an image, and the sums."""
        pixels, count = inputs.flatten(1), len(inputs)
        summed = functional.binary_cross_entropy_with_logits(outputs, pixels, reduction="sum")
        error = (outputs.detach().sigmoid() - pixels).square().sum().double()
        return summed / count, torch.stack(
            [error, torch.zeros_like(error), torch.full_like(error, count)]
        )


TASKS: dict[str, Task] = {
    "cross_entropy": Classification(),
    "reconstruction": Reconstruction(),
}
"""The task of each loss of `settings.LOSSES`."""
