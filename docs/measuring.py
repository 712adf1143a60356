"""Note how far the results of tests are from their truths: a plugin of pytest.

It looks at what passes `torch.testing.assert_close`, and at what `tests.deviations.deviation`
returns and is found to be below a limit, if both sides are float64. A deviation is
`|found - expected| / |expected|`, norms over all entries. What a test allows for each entry is
given as the same ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from tests import deviations

DEFAULT = 1e-7
"""The `rtol` and `atol` of `torch.testing.assert_close` for float64."""


@attrs.frozen(order=True)
class Comparison:
    """One comparison of a test.

    Args:
        deviation: `|found - expected| / |expected|`; of an expected zero, `|found|`.
        allowed: The largest that the test lets pass.
    """

    deviation: float
    allowed: float


class Measured(float):
    """A deviation that is noted when it is found to be below a limit."""

    note: Callable[[Comparison], None]

    def __lt__(self, limit: float) -> bool:
        below = super().__lt__(limit)
        if below:
            self.note(Comparison(float(self), float(limit)))
        return below


class ComparisonPlugin:
    """The plugin.

    Attributes:
        found: The comparisons of each test, by its id.
        outcomes: "passed", "failed" or "skipped" for each test, by its id.
    """

    def __init__(self) -> None:
        self.found: dict[str, list[Comparison]] = {}
        self.outcomes: dict[str, str] = {}
        self._test = ""
        self._patch = pytest.MonkeyPatch()

    def pytest_configure(self) -> None:
        """Put what notes comparisons in the place of both functions, before tests are imported."""
        assert_close, deviation = torch.testing.assert_close, deviations.deviation

        def noting_close(actual: Any, expected: Any, **options: Any) -> None:
            assert_close(actual, expected, **options)
            for found, truth in pairs(actual, expected):
                self._note(compared(found, truth, options.get("rtol"), options.get("atol")))

        def noting_deviation(found: Tensor, expected: Tensor) -> float:
            value = deviation(found, expected)
            if not in_float64(found, expected):
                return value
            measured = Measured(value)
            measured.note = self._note
            return measured

        self._patch.setattr(torch.testing, "assert_close", noting_close)
        self._patch.setattr(deviations, "deviation", noting_deviation)

    def pytest_unconfigure(self) -> None:
        """Take both back."""
        self._patch.undo()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Remember which test runs."""
        self._test = item.nodeid
        try:
            return (yield)  # type: ignore[misc]
        finally:
            self._test = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome: that of the call, or what went wrong around it."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def _note(self, comparison: Comparison) -> None:
        if self._test:
            self.found.setdefault(self._test, []).append(comparison)


def compared(found: Tensor, expected: Tensor, rtol: float | None, atol: float | None) -> Comparison:
    """Return the comparison of two tensors `[...]` within `atol + rtol |expected|` by entry."""
    rtol, atol = (DEFAULT if each is None else each for each in (rtol, atol))
    known = expected.isfinite()
    found, expected = found[known], expected[known]
    size = float(expected.norm()) or 1.0
    slack = atol + rtol * expected.abs()
    return Comparison(float((found - expected).norm()) / size, float(slack.norm()) / size)


def pairs(found: Any, expected: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the float64 tensors that `assert_close` compares; a Python float is one of them."""
    if isinstance(expected, Mapping):
        for name, each in expected.items():
            yield from pairs(found[name], each)
    elif isinstance(expected, Sequence):
        for one, other in zip(found, expected, strict=True):
            yield from pairs(one, other)
    elif isinstance(expected, float):
        yield torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    elif in_float64(found, expected):
        yield found.detach(), expected.detach()


def in_float64(*tensors: Any) -> bool:
    """Return whether all are tensors in float64."""
    return all(isinstance(each, Tensor) and each.dtype == torch.float64 for each in tensors)
