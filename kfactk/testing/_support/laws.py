"""The frame of all laws: a class names its stage and inherits the laws of the stage's family.

    class TestEkfac(BasisLaws):
        stage = "ekfac"

A law is a method marked with `law`. Pytest finds one test for each law; Hypothesis draws the law's
arguments. Each subclass gets its own tests, so that Hypothesis remembers failed examples for each
class. The environment variable `KFACTK_LAWS`, "quick" or "thorough", sets the number of examples.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, ClassVar

import attrs
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from torch import Tensor

from kfactk.errors import OptionError, UnknownStageError, near_names
from kfactk.registry.registry import registry

VARIABLE = "KFACTK_LAWS"
"""Environment variable that names the profile."""
PROFILES = {"quick": 1, "thorough": 30}
"""The factor by which each profile multiplies the number of examples of every law."""
HEALTH = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large)


def effort(examples: int) -> int:
    """Return how many examples to draw, given how many the quick profile draws.

    Raises:
        OptionError: `KFACTK_LAWS` names no profile.
    """
    name = os.environ.get(VARIABLE, "quick")
    if name not in PROFILES:
        raise OptionError(
            f"{VARIABLE}={name!r} is no profile of the laws.{near_names(name, PROFILES)} "
            f"Choose one of: {', '.join(PROFILES)}."
        )
    return examples * PROFILES[name]


@attrs.frozen(eq=False)
class Law:
    """How to test a law.

    Args:
        function: The law as it is written: a method whose arguments are drawn.
        drawn: For each argument a strategy, or the name of a method of the class that gives one.
        examples: How many examples the quick profile draws.
        waivable: What a stage may waive in its `waives`, and the law with it; "" for nothing.
    """

    function: Callable[..., None]
    drawn: dict[str, st.SearchStrategy[Any] | str]
    examples: int
    waivable: str = ""

    def test_of(self, owner: type[Laws]) -> Callable[..., None]:
        """Return the law as a test of one class."""

        @functools.wraps(self.function)
        def check(self: Laws, *arguments: Any, **drawn: Any) -> None:
            __tracebackhide__ = True
            if self_waives(self):
                pytest.skip(f"{self.label()} waives {waivable!r}, and this law with it")
            try:
                original(self, *arguments, **drawn)
            except Exception as error:
                text = " ".join((original.__doc__ or original.__name__).split())
                error.add_note(f"{self.label()} breaks a law of its family: {text}")
                raise

        original, waivable = self.function, self.waivable

        def self_waives(laws: Laws) -> bool:
            return bool(waivable) and laws.waives(waivable)

        test: Callable[..., None] = check
        if self.drawn:
            found = {
                name: each if isinstance(each, st.SearchStrategy) else _named(owner, each)
                for name, each in self.drawn.items()
            }
            # The explain phase would point into torch.
            phases = [phase for phase in settings().phases if phase is not Phase.explain]
            how = settings(
                max_examples=effort(self.examples), deadline=None, suppress_health_check=HEALTH
            )
            test = settings(how, phases=phases, report_multiple_bugs=False)(given(**found)(check))
        test.kfactk_law = self  # type: ignore[attr-defined]
        return test


def _named(owner: type[Laws], name: str) -> st.SearchStrategy[Any]:
    return st.deferred(lambda: getattr(owner(), name)())


def law(
    examples: int = 10, *, waivable: str = "", **drawn: st.SearchStrategy[Any] | str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a method as a law.

    Args:
        examples: How many examples the quick profile draws.
        waivable: A name that a stage may have in its `waives`; the law is skipped for it.
        drawn: A strategy for each argument, or the name of a method of the class, without
            arguments, that returns the strategy.

    Example:
        >>> class ClipLaws(Laws):
        ...     family = "clip"
        ...     @law(limit=st.floats(0.1, 10.0))
        ...     def test_zero_stays_zero(self, limit):
        ...         "Zero stays zero."
        ...         clipped, _ = self.subject().clip([], lambda xs, ys: torch.zeros(0))
        ...         assert clipped == []
        >>> class TestNone(ClipLaws):
        ...     stage = "none"
        >>> TestNone().test_zero_stays_zero()
    """

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        function.kfactk_law = Law(function, dict(drawn), examples, waivable)  # type: ignore[attr-defined]
        return function

    return mark


class Laws:
    """Base class of all laws.

    Subclasses name the stage. Pytest collects those whose name begins with `Test`.
    """

    family: ClassVar[str]
    """The stage family that the laws are for."""
    stage: ClassVar[Any] = None
    """The stage, as `kfactk.build` takes it: a name such as "ekfac", a mapping such as
    {"name": "ekfac", "scale": "running"}, a class or an object."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        written = dict.fromkeys(name for each in cls.__mro__ for name in vars(each))
        for name in written:  # tests run in this order
            marked = getattr(getattr(cls, name), "kfactk_law", None)
            if isinstance(marked, Law):
                setattr(cls, name, marked.test_of(cls))

    def subject(self) -> Any:
        """Return the stage under test.

        Raises:
            OptionError: The class names no stage.
        """
        if self.stage is None:
            raise OptionError(
                f"{type(self).__name__} names no {self.family}. Write `stage = ...` in the class, "
                "as for kfactk.build."
            )
        try:
            return registry().resolve(self.family, self.stage)
        except UnknownStageError as error:
            error.add_note(
                "Is the package that provides it installed? In its folder: pip install -e ."
            )
            raise

    def waives(self, name: str) -> bool:
        """Return whether the stage waives a law of its family; see `kfactk.Basis.waives`."""
        return name in getattr(self.subject(), "waives", ())

    def label(self) -> str:
        """Return the stage in words, for messages."""
        return f"{self.family} {self.stage!r}"


def close(
    actual: Tensor, expected: Tensor, says: str, *, rtol: float = 1e-8, atol: float = 1e-10
) -> None:
    """Assert that two tensors are equal within `atol + rtol |expected|`; NaN equals nothing.

    Raises:
        AssertionError: They differ. The message begins with `says`, which states what must hold.
    """
    __tracebackhide__ = True
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=atol, msg=lambda found: f"{says}.\n{found}"
    )
