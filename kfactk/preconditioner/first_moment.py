"""A running mean of the gradient, which is preconditioned in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor

from kfactk.errors import OptionError, near_names
from kfactk.options import flag, number
from kfactk.statistics import RunningMean


@attrs.frozen
class FirstMoment:
    """How gradients are averaged before they are preconditioned.

        m_t = (1 - beta) sum_k beta^(t - k) g_k,    m-hat_t = m_t / (1 - beta^t)

    m-hat is preconditioned; without `corrected`, m is. With `nesterov` it is

        beta m + (1 - beta) g

    and likewise with m-hat. A decay of 0 averages nothing.

    Args:
        decay: beta, in [0, 1).
        corrected: Whether to divide by `1 - beta^t`, as Adam does, so that the first gradients
            count in full.
        nesterov: Whether to look one gradient ahead, as Muon does.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> import torch
        >>> moment, mean = FirstMoment(0.5, corrected=False), RunningMean()
        >>> mean.update(torch.tensor([4.0]), moment.decay)
        >>> moment.of(mean, torch.tensor([4.0]))
        tensor([2.])

    References:
        Kingma & Ba 2015, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980.
        Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """

    decay: float = attrs.field(default=0.0, validator=number(0, 1, high_open=True))
    corrected: bool = attrs.field(default=True, validator=flag)
    nesterov: bool = attrs.field(default=False, validator=flag)

    def __attrs_post_init__(self) -> None:
        usual = {"corrected": True, "nesterov": False}
        idle = [name for name, value in usual.items() if getattr(self, name) is not value]
        if not self.decay and idle:
            raise OptionError(
                f"first_moment has {' and '.join(idle)}, and a decay of 0, with which nothing is "
                "averaged, so that they have no effect. Give a decay: first_moment={'decay': 0.95, "
                f"{', '.join(f'{name!r}: {getattr(self, name)}' for name in idle)}}}."
            )

    def written(self) -> Any:
        """Return the inverse of `as_first_moment`, in JSON's types."""
        return self.decay if self == FirstMoment(self.decay) else attrs.asdict(self)

    def of(self, mean: RunningMean, gradient: Tensor) -> Tensor:
        """Return what is preconditioned.

        Args:
            mean: The mean of the gradients, with this decay, the last one included.
            gradient: The last one, of any shape.
        """
        assert mean.value is not None
        found = mean.value
        if not self.corrected:
            found = found * ((1 - self.decay) * mean.weight)
        return gradient.to(found.dtype).lerp(found, self.decay) if self.nesterov else found


def as_first_moment(value: Any) -> FirstMoment:
    """Return what a recipe's `first_moment` names: a decay, or a mapping of options.

    Raises:
        OptionError: It names nothing.

    Example:
        >>> as_first_moment({"decay": 0.95, "nesterov": True}).written()
        {'decay': 0.95, 'corrected': True, 'nesterov': True}
    """
    if isinstance(value, FirstMoment):
        return value
    if not isinstance(value, Mapping):
        return FirstMoment(value)
    names = [field.name for field in attrs.fields(FirstMoment)]
    for name in value:
        if name not in names:
            raise OptionError(
                f"first_moment has no option {name!r}.{near_names(str(name), names)} Use one of: "
                f"{', '.join(names)}."
            )
    return FirstMoment(**value)
