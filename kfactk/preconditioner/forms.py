"""The forms that what a basis keeps must have; a damaged checkpoint has not."""

from __future__ import annotations

import torch
from torch import Tensor

from kfactk.errors import PluginError
from kfactk.preconditioner.damage import Damage
from kfactk.preconditioner.state import PREFIX
from kfactk.sides import is_diagonal
from kfactk.stages import Basis, Decomposition, Tensors
from kfactk.validation import square

STATED = {
    *("eigenvalues", "eigenvectors", "cholesky", "inverse", "diagonal", "root", "contraction"),
    *("correlations", "count", "lower", "matrix", "upper"),
}
"""The forms that a basis may state; see `Basis.forms`."""
CHECKED_AS = {
    "eigenvalues": "nonnegative",
    "diagonal": "nonnegative",
    "inverse": "semidefinite",
}
"""What is checked of a form, where its own name is not that of a check."""


def check_forms(
    basis: Basis,
    decomposition: Decomposition,
    moments: Tensors,
    matrices: Tensors,
    gradient: tuple[int, ...],
    where: str,
    damage: Damage,
    kind: str = "basis",
) -> None:
    """Check that what a basis keeps has the forms that the basis states.

    Args:
        basis: The stage.
        decomposition: What it made of each matrix.
        moments: Averaged moments.
        matrices: Tensors of the matrices' shapes.
        gradient: Shape of the layer's matrix.
        where: The layer, in words that follow a name.
        damage: Receives what is wrong.
        kind: First word, after the prefix, of the decomposition's keys.

    Raises:
        PluginError: The basis states a form that there is not.
    """
    forms = basis.forms
    if unknown := sorted(set(forms.values()) - STATED):
        raise PluginError(
            f"basis {type(basis).__name__} states the form {unknown[0]!r}, which is not known. Use "
            f"one of: {', '.join(sorted(STATED))}."
        )
    dtypes = set()
    for matrix, parts in decomposition.items():
        for name, value in parts.items():
            if form := forms.get(name):
                dtypes.add(value.dtype)
                shape = _shape_of_part(form, matrix, matrices[matrix])
                place = f"{PREFIX}{kind}.{matrix}.{name}{where}"
                _check_part(place, value, form, shape, damage)
    if len(dtypes) > 1:
        damage.note(f"the parts of the decomposition{where} have several dtypes")
    for name, value in moments.items():
        if form := forms.get(name):
            _check_part(f"{PREFIX}moment.{name}{where}", value, form, gradient, damage)


def _check_part(
    where: str, value: Tensor, form: str, shape: tuple[int, ...], damage: Damage
) -> None:
    if tuple(value.shape) != shape:
        damage.note_misfit(f"{where} has the shape {tuple(value.shape)}, where it must be {shape}")
    elif precise(where, value, damage) and form != "matrix":  # which is a shape alone
        damage.check_form(where, value, CHECKED_AS.get(form, form))


def precise(where: str, value: Tensor, damage: Damage) -> bool:
    """Return whether a tensor has a precision that curvature is kept in; note where it has not."""
    precise = value.dtype in (torch.float32, torch.float64)
    if not precise:
        damage.note(f"{where} has the dtype {value.dtype}, where curvature is float32 or float64")
    return precise


def _shape_of_part(form: str, name: str, matrix: Tensor) -> tuple[int, ...]:
    """Return the shape of a part of a matrix's decomposition; a and g are diagonals of one."""
    if form == "count":
        return (*matrix.shape[:-1], 1)
    one_each = form in ("eigenvalues", "correlations")
    whole = not one_each or is_diagonal(name) or not square(matrix)
    return tuple(matrix.shape if whole else matrix.shape[:-1])
