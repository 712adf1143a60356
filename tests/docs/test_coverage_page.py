"""The page says what is covered now, and most of every model is."""

import ast
import re

import pytest

from docs import coverage_page
from docs.coverage_page import HEAD, PAGE, Model

FLOOR = 99.4
LESS = {"torchvision swin_t": 69.3, "transformers ViT": 98.5}
"""Models of which less than that is covered, with what is."""
WRITTEN = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+) % \|", PAGE.read_text(), re.MULTILINE))
MODELS = list(coverage_page.models())


def test_the_page_has_every_model():
    assert PAGE.read_text().startswith(HEAD)
    assert list(WRITTEN) == [model.name for model in MODELS]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_models_are_covered_as_the_page_says(model: Model):
    share, left = coverage_page.covered(model)
    assert share == pytest.approx(float(WRITTEN[model.name]), abs=0.2)
    assert share >= LESS.get(model.name, FLOOR)
    assert (share == 100) == (not left)


def test_statistics_of_gradients_cover_the_tokens_and_positions_of_a_vit():
    """As the page says: `curvature=[...]` is read from there."""
    (written,) = re.findall(r"`curvature=(\[.+\])` covers 100 %\nof it", PAGE.read_text())
    (vit,) = [model for model in MODELS if model.name == "transformers ViT"]
    assert coverage_page.covered(vit, ast.literal_eval(written)) == (100, {})
