"""The table of truths names tests that exist, has every stage, and notes what tests compare."""

from __future__ import annotations

import ast
import functools
import re

import pytest
import torch

from docs import measuring, truths_page
from docs.measuring import Comparison, ComparisonPlugin
from docs.truths_page import FAMILIES, PAGE, ROOT, Truth, truths
from kfactk import testing
from kfactk.registry.registry import registry

F64 = torch.float64
pytest_plugins = ["pytester"]
OURS = "kfactk"
NUMBER = r"(?:0|\d\.\de[+-]\d\d)"
MEASURED = re.compile(rf"\| ({NUMBER}) \| ({NUMBER}) \|$", re.MULTILINE)
TESTS = """
import torch
from tests import deviations

def test_near():
    one = torch.full((2,), 2.0, dtype=torch.float64)
    torch.testing.assert_close([one, one.float()], [one + 1e-9, one.float()], rtol=0, atol=2e-9)
    torch.testing.assert_close({"a": one}, {"a": one}, rtol=1e-3, atol=0)
    assert deviations.deviation(one + 4e-3, one) < 1e-2
    assert deviations.deviation(2 * one, one) > 0.1
    assert deviations.deviation(one.float(), one.float()) < 1

def test_far():
    torch.testing.assert_close(1.0, 2.0)

def test_nothing():
    pass
"""


@functools.cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def is_there(file: str, test: str) -> bool:
    """Return whether a file has a test, perhaps inherited from the laws."""
    name, _, method = test.split("[")[0].partition("::")
    found = {
        node.name: node
        for node in tree(file).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    if name not in found:
        return False
    if not method:
        return isinstance(found[name], ast.FunctionDef)
    names = {ast.unparse(base) for base in getattr(found[name], "bases", ())}
    return any(hasattr(getattr(testing, base, None), method) for base in names)


@pytest.mark.parametrize("truth", truths(), ids=lambda truth: truth.cells().split(" | ")[0][2:])
def test_named_tests_exist(truth: Truth) -> None:
    missing = [test for test in truth.tests if not is_there(truth.file, test)]
    assert not missing, f"{truth.file} has no {missing}: correct docs/truths.toml"
    assert truth.tests


def test_a_name_that_is_nowhere_is_found() -> None:
    file = "tests/kfactk_stages/update/test_adam.py"
    assert is_there(file, "TestAdam::test_equals_its_counterpart")
    assert is_there(file, "test_is_equation_13[rates0-options0]")
    assert not is_there(file, "test_is_equation_14")
    assert not is_there(file, "TestAdam::test_is_equation_13")
    assert not is_there(file, "TestAdam")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_has_a_row(family: str) -> None:
    there = {
        info.name
        for info in registry().stages()
        if info.distribution == OURS and info.family == family
    }
    shown = {stage for truth in truths() if truth.family == family for stage in truth.stages}
    assert shown == there, "correct docs/truths.toml, and run: python -m docs.truths_page"


def test_all_families_with_numbers_have_a_section() -> None:
    families = {info.family for info in registry().stages() if info.distribution == OURS}
    assert families - set(FAMILIES) == {"placement", "tracker"}


def test_the_page_is_that_of_the_rows() -> None:
    written = PAGE.read_text(encoding="utf-8")
    expected = truths_page.page(dict.fromkeys(truths(), "0 | 0"))
    assert MEASURED.sub("| 0 | 0 |", written) == expected, "run: python -m docs.truths_page"


def test_every_deviation_is_below_what_is_allowed() -> None:
    numbers = MEASURED.findall(PAGE.read_text(encoding="utf-8"))
    assert len(numbers) == len(truths())
    assert all(float(found) <= float(allowed) for found, allowed in numbers)
    assert any(float(found) for found, _ in numbers)


def test_tensors_in_float64_that_pass_are_noted(pytester: pytest.Pytester) -> None:
    """In a run of its own, what passes below a limit: 1e-9 of 2, then 0, then 2e-3 of 1."""
    plugin = ComparisonPlugin()
    result = pytester.inline_run(pytester.makepyfile(TESTS), plugins=[plugin])
    result.assertoutcome(passed=2, failed=1)
    assert sorted(plugin.outcomes.values()) == ["failed", "passed", "passed"]
    ((name, noted),) = plugin.found.items()
    assert name.endswith("::test_near")
    assert [each.deviation for each in noted] == pytest.approx([5e-10, 0.0, 2e-3], rel=1e-5)
    assert [each.allowed for each in noted] == pytest.approx([1e-9, 1e-3, 1e-2], rel=1e-5)
    assert truths_page.cells(noted) == "2.0e-03 | 1.0e-02"
    assert torch.testing.assert_close.__module__.startswith("torch")
    assert type(measuring.deviations.deviation(torch.ones(1), torch.ones(1))) is float


def test_an_expected_zero_has_an_absolute_deviation() -> None:
    found, zero = torch.tensor([3e-9, 4e-9], dtype=F64), torch.zeros(2, dtype=F64)
    noted = measuring.compared(found, zero, None, 1e-8)
    assert noted == Comparison(pytest.approx(5e-9), pytest.approx(2**0.5 * 1e-8))


def test_what_is_not_finite_has_no_part() -> None:
    expected = torch.tensor([float("inf"), 2.0], dtype=F64)
    assert measuring.compared(expected, expected, 0.1, 0.0) == Comparison(0.0, 0.1)


def test_a_test_that_does_not_pass_is_named(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "")
    with pytest.raises(RuntimeError, match=r"must pass first.*test_far"):
        truths_page.run([str(pytester.makepyfile(TESTS))])


def test_a_test_that_compares_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truths_page, "run", lambda ids: ComparisonPlugin())
    with pytest.raises(RuntimeError, match=r"compares nothing in float64"):
        truths_page.measure()
