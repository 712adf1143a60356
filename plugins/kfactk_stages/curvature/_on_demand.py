"""Matrices that are made when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import attrs
from torch import Tensor


@attrs.frozen(eq=False)
class OnDemand(Mapping[str, Tensor]):
    """A mapping that makes a value each time it is read; what is not read costs nothing.

    Args:
        makers: For each name, a function that makes the tensor.

    Example:
        >>> import torch
        >>> matrices = OnDemand({"I": lambda: torch.eye(1), "huge": lambda: torch.eye(10**9)})
        >>> list(matrices), matrices["I"]
        (['I', 'huge'], tensor([[1.]]))
    """

    makers: Mapping[str, Callable[[], Tensor]]

    def __getitem__(self, name: str) -> Tensor:
        return self.makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self.makers

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)
