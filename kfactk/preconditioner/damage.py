"""Find damage in the tensors of a saved state, and refuse it before anything is taken over.

A test on a tensor gives a flag on the tensor's device. The flags of all tensors are read together,
so that a load waits once for each device, and one error names everything that is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfactk.distributed.sharding import is_sharded
from kfactk.errors import StateError

TOLERANCE = 0.01
"""How far a tensor may be from its form, relative to its size: far more than any rounding gives."""
SHOWN = 3
"""How many faults a message names."""
REMEDY = "Load an earlier checkpoint."
OTHER_MODEL = (
    "Bind the recipe it was saved with to a model like the one it was saved with, or load an "
    "earlier checkpoint."
)
"""What to do where a state is another model's or recipe's, if it is not damaged."""


class Damage:
    """What is wrong with a saved state.

    Example:
        >>> damage = Damage()
        >>> damage.check_values("a factor", torch.tensor([1.0, math.nan]))
        >>> damage.refuse()
        Traceback (most recent call last):
        ...
        kfactk.errors.StateError: the saved state is damaged: a factor holds NaN or inf. Load an ...
    """

    def __init__(self) -> None:
        self._faults: list[str] = []
        self._misfits: list[str] = []
        self._flags: list[tuple[Tensor, str]] = []

    def note_misfit(self, fault: str) -> None:
        """Note a fault that the state of another model or recipe has too."""
        self._misfits.append(fault)

    def note(self, fault: str) -> None:
        """Note a fault, in words that follow "the saved state is damaged:"."""
        self._faults.append(fault)

    def suspect(self, wrong: Tensor, fault: str) -> None:
        """Note a fault that there is where the flag `wrong`, on any device, is true."""
        self._flags.append((wrong, fault))

    def check_values(
        self,
        where: str,
        tensor: Tensor,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        infinite: bool = False,
    ) -> None:
        """Check that all values are finite and in [low, high]; of a DTensor, those of this rank.

        Args:
            where: What the tensor is.
            tensor: Of any dtype.
            low: Least value.
            high: Largest absolute value.
            infinite: Whether inf counts as a value.
        """
        values = real_values(tensor)
        if values is None or not values.numel():
            return
        least, largest = torch.aminmax(values)
        if values.is_floating_point():
            extreme = torch.maximum(-least, largest)  # NaN in either is NaN in both
            finite = ~torch.isnan(extreme) if infinite else torch.isfinite(extreme)
            self.suspect(~finite, f"{where} holds NaN" + ("" if infinite else " or inf"))
            if high < math.inf and not infinite:
                self.suspect(
                    finite & (extreme > high), f"{where} holds more than {high:.3g} in size"
                )
        if low > -math.inf:
            self.suspect(least < low, f"{where} holds less than {low:g}")

    def check_form(self, where: str, tensor: Tensor, form: str) -> None:
        """Check that a finite tensor has one of `FORMS`."""
        if tensor.numel():
            fault, wrong = FORMS[form]
            self.suspect(wrong(tensor), f"{where} {fault}")

    def refuse(self) -> None:
        """Read all flags.

        Raises:
            StateError: Something is wrong.
        """
        by_device: dict[torch.device, list[tuple[Tensor, str]]] = {}
        for flag, fault in self._flags:
            by_device.setdefault(flag.device, []).append((flag, fault))
        for flags in by_device.values():
            found = torch.stack([flag for flag, _ in flags]).tolist()
            self._faults += [fault for (_, fault), wrong in zip(flags, found, strict=True) if wrong]
        self._flags.clear()
        if self._misfits:
            raise StateError(
                f"the saved state does not fit this model and recipe: {_joined(self._misfits)}. "
                f"{OTHER_MODEL}"
            )
        if self._faults:
            raise StateError(f"the saved state is damaged: {_joined(self._faults)}. {REMEDY}")


def _joined(faults: Sequence[str]) -> str:
    """Return the first faults, each once, and how many more there are."""
    faults = list(dict.fromkeys(faults))
    more = f" (and {len(faults) - SHOWN} more)" if len(faults) > SHOWN else ""
    return "; ".join(faults[:SHOWN]) + more


def real_values(tensor: Tensor) -> Tensor | None:
    """Return what a tensor holds as real numbers that can be compared, on this rank.

    `None` where they cannot be: booleans, and classes of tensors that do not tell.
    """
    values = tensor.detach()
    if is_sharded(values):
        values = values.to_local()
    try:
        if values.layout != torch.strided:
            values = values.coalesce().values() if values.is_sparse else values.values()
        if values.is_complex():
            values = torch.view_as_real(values.resolve_conj())
        if values.is_floating_point() and values.dtype.itemsize == 1:
            values = values.float()
        return None if values.dtype == torch.bool else values
    except (NotImplementedError, RuntimeError, TypeError):
        if type(tensor) is Tensor:
            raise
        return None


def form_fault(value: Any) -> str:
    """Return why a value is no tensor that data can be read from; "" where it is one."""
    if not isinstance(value, Tensor):
        return f"is no tensor, but a {type(value).__name__}"
    if value.is_meta:
        return "is a tensor without data, on the device 'meta'"
    return ""


def curvature_fault(value: Any) -> str:
    """Return why a value cannot be a tensor of curvature; "" where it can."""
    fault = form_fault(value)
    if not fault and (value.layout != torch.strided or value.is_quantized):
        return f"is no dense tensor, but one of layout {value.layout}"
    return fault


def number_of(value: Any, low: float, high: float, *, whole: bool = False) -> float | None:
    """Return a tensor of one element, or a number, as a number; `None` where it is out of range.

    Args:
        value: What was saved.
        low: Least value.
        high: Largest value.
        whole: Whether it must be a whole number.

    Example:
        >>> number_of(torch.tensor(3), 0, 9, whole=True), number_of("3", 0, 9), number_of(2.5, 3, 9)
        (3, None, None)
    """
    if isinstance(value, Tensor):
        if curvature_fault(value) or value.ndim or value.is_complex():
            return None
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not low <= value <= high or (whole and value != int(value)):
        return None
    return int(value) if whole else value


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _not_semidefinite(matrix: Tensor) -> Tensor:
    """Return whether a matrix is not symmetric, or a minor of two rows is negative."""
    size = matrix.abs().amax()
    diagonal = _diagonal(matrix)
    root = diagonal.clamp(min=0).sqrt()
    asymmetric = (matrix - matrix.mT).abs().amax() > TOLERANCE * size
    bound = root.unsqueeze(-1) * root.unsqueeze(-2) + TOLERANCE * size
    return asymmetric | (diagonal.amin() < -TOLERANCE * size) | (matrix.abs() > bound).any()


def _not_orthonormal(vectors: Tensor) -> Tensor:
    """Return whether columns have not length 1, or a product with a probe changes its length.

    The probe is turned there and back, `U (U^T v) = v`: n^2 operations, where `U^T U` takes n^3.
    """
    n = vectors.shape[-1]
    index = torch.arange(n, device=vectors.device, dtype=torch.float64)
    probe = torch.cos(index.square() + 1).to(vectors.dtype).unsqueeze(-1)
    apart = (vectors @ (vectors.mT @ probe) - probe).square().sum((-2, -1))
    lengths = (vectors.square().sum(-2) - 1).abs().amax()
    return (lengths > TOLERANCE) | (apart > TOLERANCE**2 * probe.square().sum()).any()


def _no_cholesky_factor(lower: Tensor) -> Tensor:
    """Return whether a diagonal entry is not positive, or there is anything above the diagonal."""
    return (_diagonal(lower) <= 0).any() | lower.triu(1).ne(0).any()


def _no_triangle(root: Tensor) -> Tensor:
    """Return whether a diagonal has a zero, or there is anything above it."""
    return (_diagonal(root) == 0).any() | root.triu(1).ne(0).any()


def _not_invertible(root: Tensor) -> Tensor:
    """Return whether a diagonal has a zero, or a matrix a row or column of zeros."""
    size = root.abs()
    if root.ndim == 1:
        return (size == 0).any()
    return (size.amax(-1) == 0).any() | (size.amax(-2) == 0).any()


def _no_contraction(matrix: Tensor) -> Tensor:
    """Return whether a row is longer than 1."""
    return (matrix.square().sum(-1) > (1 + TOLERANCE) ** 2).any()


FORMS: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "nonnegative": ("holds negative values", lambda tensor: (tensor < 0).any()),
    "semidefinite": ("is not symmetric positive semi-definite", _not_semidefinite),
    "eigenvectors": ("has no orthonormal columns", _not_orthonormal),
    "cholesky": ("is not lower triangular with a positive diagonal", _no_cholesky_factor),
    "root": ("cannot be inverted: it has a zero, or a row or column of zeros", _not_invertible),
    "lower": (
        "is not lower triangular with a diagonal without zeros; it may be of another structure",
        _no_triangle,
    ),
    "upper": (
        "is not upper triangular with a diagonal without zeros; it may be of another structure",
        lambda root: _no_triangle(root.mT),
    ),
    "contraction": ("has rows longer than 1", _no_contraction),
    "correlations": ("holds more than 1 in size", lambda t: (t.abs() > 1 + TOLERANCE).any()),
    "count": ("is no whole number from 1 on", lambda t: ((t < 1) | (t != t.round())).any()),
}
"""By the name of each form, the fault of what has not the form, and the test for it."""
