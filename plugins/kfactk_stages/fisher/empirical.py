"""The empirical Fisher: the gradients that the user's own backward computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from kfactk import CaptureError, Likelihood, hookimpl
from kfactk.errors import near_names
from kfactk.options import number, text

_number = number(
    low=0, low_open=True, optional=True, hint=", how many terms the loss of one forward has"
)
_name = text(hint=": the name of an argument of the forward")


def _terms(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    (_name if isinstance(value, str) else _number)(instance, attribute, value)


def _holds_whole_batches(value: Any) -> bool:
    """Return whether a container has parts of the batch, and not an entry for each term."""
    return isinstance(value, Mapping) or (
        isinstance(value, tuple) and any(isinstance(each, Tensor) for each in value)
    )


@attrs.frozen(kw_only=True)
class Empirical:
    """The empirical Fisher: it uses the targets of the data, and adds no backward pass.

        F_emp = (1/M) sum_n vec(D_n) vec(D_n)^T,    D_n from the user's own loss

    It listens to the user's `loss.backward()`, so it measures whatever that loss is, as far as its
    gradient flows through the calls of layers in the forward. Two facts give the scale: the
    recipe's `reduction` ("mean" or "sum"), and the gradient scaler that `bind` takes, whose factor
    is divided out. Every other factor of the loss counts:

    - A loss multiplied by c scales G and the EKFAC scale by c^2, and A not at all, so damping has
      to follow. `mc` and `exact` never see the user's loss.
    - `loss / k` for k accumulated micro-batches divides G by k^2. Use `reduction="sum"` and a
      summed loss, or a damping k^2 times smaller.
    - Sample weights other than 0 and 1 are part of the loss and enter squared. In `mc` and `exact`
      they enter once.
    - The terms of one example (positions of a sequence or an image) enter D_n as a sum, cross
      products included. These vanish in expectation for sampled targets, not for the data's.

    F_emp equals neither the Fisher nor the Gauss-Newton matrix: it shrinks with the loss where
    those do not. It describes the curvature poorly away from a well-fitted, well-specified model.
    Choose it for its cost, not for its mathematics.

    With `terms`, the model's output is not read, and the likelihood plays no part. So it works for
    any loss: of detection, contrast or transcription, of a model that returns its loss, of a
    divergence. Say by `reduction` whether the loss is a mean or a sum over these terms.

    Args:
        terms: M, the number of terms of the loss in each forward: a number, or the name of an
            argument of the model's forward (or keyword of `Optimizer.observe`) that holds one
            entry for each, such as "targets"; that of a number is M itself. `None` takes the
            terms that the likelihood finds in the output.

    Raises:
        OptionError: `terms` is neither.
        CaptureError: The forward was not given that argument.

    Example:
        >>> Empirical(terms="images").loss_terms({"images": torch.zeros(8, 3, 4, 4)})
        8.0

    References:
        Kunstner, Balles & Hennig 2019, "Limitations of the empirical Fisher approximation for
        natural gradient descent", arXiv:1905.12558.
    """

    own_pass: ClassVar[bool] = False

    terms: float | str | None = attrs.field(default=None, validator=_terms)

    @property
    def reads_output(self) -> bool:
        """Whether the likelihood tells the terms, by the model's output."""
        return self.terms is None

    @property
    def seed(self) -> int:
        """0: nothing is drawn."""
        return 0

    def loss_terms(self, batch: Mapping[str, Any]) -> Tensor | float | None:
        """Return M where `terms` says it, else `None`."""
        if not isinstance(self.terms, str):
            return self.terms
        if self.terms not in batch:
            known = ", ".join(map(repr, batch)) or "none"
            raise CaptureError(
                f"terms={self.terms!r} names an argument that this forward was not given; there "
                f"are: {known}.{near_names(self.terms, batch)} Name one of those, or pass it with "
                f"Optimizer.observe({self.terms}=...)."
            )
        value = batch[self.terms]
        if isinstance(value, Tensor):
            return float(len(value)) if value.ndim else value.detach().double()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, Sized) and not _holds_whole_batches(value):
            return float(len(value))
        raise CaptureError(
            f"terms={self.terms!r} is a {type(value).__name__}, whose length is no number of "
            "terms; name a tensor, or a list with an entry for each term, or a number."
        )

    def losses(
        self,
        view: Tensor,
        likelihood: Likelihood,
        weights: Tensor | None,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        """Yield nothing: the framework listens to the user's backward."""
        return iter(())


@hookimpl
def kfactk_fishers() -> dict[str, type[Empirical]]:
    """Register the Fisher stage `empirical`."""
    return {"empirical": Empirical}
