"""What `bind` checks, and makes, of a recipe and the blocks of a model."""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import nn

from kfactk.capture.fisher_pass import FisherPass
from kfactk.capture.linearized import Locate
from kfactk.errors import CombinationError, KfactkWarning
from kfactk.optim.control import Control, Groups
from kfactk.optim.settings import Settings
from kfactk.optim.sizes import check_sizes
from kfactk.options import plain
from kfactk.preconditioner.preconditioner import Preconditioner
from kfactk.timing import StageTimer
from kfactk.validation import stage_label


def preconditioner_of(
    recipe: Settings, model: nn.Module, trained: Container[int], timer: StageTimer
) -> Preconditioner:
    """Return the preconditioner of a model, as the recipe says.

    Args:
        recipe: The recipe.
        model: The model.
        trained: The ids of the trained parameters; the caller keeps it current.
        timer: Times the stages.
    """
    return Preconditioner(
        model,
        recipe.rules,
        recipe.placement,
        schedule=recipe.schedule,
        factor_decay=recipe.factor_decay,
        lag=recipe.lag,
        first_moment=recipe.first_moment,
        link=recipe.link,
        trained=trained,
        exclude=recipe.exclude,
        timer=timer,
    )


def fisher_pass_of(recipe: Settings, preconditioner: Preconditioner, scaler: Any) -> FisherPass:
    """Return what measures curvature on forwards, as the recipe says.

    Args:
        recipe: The recipe.
        preconditioner: Takes the samples.
        scaler: The loop's `torch.amp.GradScaler`, or `None`.
    """
    return FisherPass(
        preconditioner,
        recipe.fisher,
        recipe.heads,
        recipe.output,
        reduction=recipe.reduction,
        unseen=recipe.unseen,
        scaler=scaler,
        every=recipe.observe != "manual",
        exclude=recipe.exclude,
    )


def check_blocks(
    preconditioner: Preconditioner,
    trained: Container[int],
    recipe: Settings,
    masked: Container[str] = (),
) -> None:
    """Check that blocks cover the model, fit into memory, and can be linked; warn of wide sides.

    Args:
        preconditioner: Has the blocks.
        trained: The ids of the trained parameters.
        recipe: The recipe.
        masked: The names of the parameters that the user has masked.

    Raises:
        CombinationError: With `strict`, a trained parameter has no block; a basis does not take
            what stands for a wide side; the recipe's link cannot join the layers, or other ranks
            hold one of them.
        MemoryExhaustedError: They do not fit.
    """
    _check_coverage(preconditioner, trained, recipe, masked)
    told = check_sizes(preconditioner.blocks.current(), preconditioner.placement, recipe)
    if told:
        warnings.warn(told, KfactkWarning, stacklevel=4)
    preconditioner.check_link()


def _check_coverage(
    preconditioner: Preconditioner,
    trained: Container[int],
    recipe: Settings,
    masked: Container[str],
) -> None:
    """Check that something is preconditioned, and with `strict` everything; warn of steps past it.

    Raises:
        CombinationError: With `strict`, a trained parameter has no block.
    """
    plain_names = preconditioner.survey.coverage(trained).plain
    if recipe.strict and plain_names:
        raise CombinationError(
            f"strict=True, and no block preconditions {', '.join(plain_names)}. See "
            "print(recipe.coverage(model)) for the reasons. Leave these parameters out of "
            "params, choose a curvature that supports them, or drop strict."
        )
    if not preconditioner.blocks.current():
        warnings.warn(
            "no layer is preconditioned: the update rule alone trains this model. See "
            "print(recipe.coverage(model)) for the reasons. Are these parameters this model's?",
            KfactkWarning,
            stacklevel=5,
        )
    elif getattr(recipe.clip, "of_whole_step", False):
        unbounded = [name for name in plain_names if name not in masked]
        if unbounded:
            warnings.warn(_unbounded(recipe, unbounded), KfactkWarning, stacklevel=5)


def _unbounded(recipe: Settings, names: Sequence[str]) -> str:
    """Return what is told of parameters that a clip of the whole step does not see."""
    first = names[0]
    return (
        f"{stage_label('clip', recipe.clip)} bounds the step of the blocks, and no block has "
        f"{', '.join(names)}: such a parameter steps by lr times its gradient, however far. "
        "Choose a curvature that supports it; make a spread that is a parameter of its own "
        "the weight of nn.Linear(1, n, bias=False), called with ones; or slow it down, which "
        f"schedules of lr leave as it is: recipe.bind(model, masks={{{first!r}: "
        f"torch.full_like(model.get_parameter({first!r}), 0.01)}})."
    )


def controlled(
    recipe: Settings,
    model: nn.Module,
    preconditioner: Preconditioner,
    locate: Locate,
    groups: Groups,
    defaults: Mapping[str, Any],
    scaler: Any,
) -> Control | None:
    """Return what the recipe's controller does with the steps; `None` without one.

    Args:
        recipe: The recipe.
        model: The model.
        preconditioner: Has the communicator.
        locate: Finds the heads in an output of the model.
        groups: The parameter groups.
        defaults: What a group has that does not say otherwise.
        scaler: The loop's `torch.amp.GradScaler`, or `None`.

    Raises:
        CombinationError: It cannot set the numbers of the groups.
    """
    if recipe.controller is None:
        return None
    control = Control(
        recipe.controller,
        model,
        preconditioner.communicator,
        locate,
        velocity_key=getattr(recipe.update, "velocity_key", ""),
        usual={
            name: float(plain(defaults[name])) for name in ("lr", "momentum") if name in defaults
        },
        decayed=recipe.weight_decay_at == "gradient",
    )
    if scaler is not None:
        raise CombinationError(
            "a controller evaluates the loss in a closure, and torch.amp.GradScaler takes "
            "no closure. Train in bfloat16 without a scaler, or build the recipe with "
            "controller=None."
        )
    control.check(groups, closure=True)
    return control
