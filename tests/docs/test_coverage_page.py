"""The page says what is covered now, and most of every model is."""

import re

import pytest

from docs import coverage_page
from docs.coverage_page import PAGE, Model

LESS = {"torchvision swin_t": 69, "transformers Mixtral": 33}
"""Models of which less than 98.5 % is covered, with what is."""
WRITTEN = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+) % \|", PAGE.read_text(), re.MULTILINE))
MODELS = list(coverage_page.models())


def test_the_page_has_every_model():
    assert list(WRITTEN) == [model.name for model in MODELS]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_models_are_covered_as_the_page_says(model: Model):
    share, left = coverage_page.covered(model)
    assert share == pytest.approx(float(WRITTEN[model.name]), abs=0.2)
    assert share >= LESS.get(model.name, 98.5)
    assert (share == 100) == (not left)
