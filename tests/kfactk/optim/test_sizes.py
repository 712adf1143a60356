"""What `bind` says of large curvature, before anything is allocated."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from typing import Any

import pytest
from torch import nn

import kfactk
from kfactk import KfactkWarning
from kfactk.errors import MemoryExhaustedError
from kfactk.optim import sizes
from kfactk_stages.curvature.kfac import Kfac


def model(width: int = 3000) -> nn.Sequential:
    layers = OrderedDict(fc=nn.Linear(4, 5), head=nn.Linear(5, width))
    return nn.Sequential(layers)


def bound(monkeypatch: pytest.MonkeyPatch, free: int | None, **options: Any) -> kfactk.Optimizer:
    monkeypatch.setattr(sizes, "free_bytes", lambda device: free)
    return kfactk.build(**options).bind(model())


def said(recipe: kfactk.Recipe, module: nn.Module) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe.bind(module)
    return [str(each.message) for each in caught if each.category is KfactkWarning]


def test_what_does_not_fit_is_refused_with_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryExhaustedError) as caught:
        bound(monkeypatch, 50_000_000)
    text = str(caught.value)
    assert "50 MB are free on cpu" in text
    assert re.search(r"Layers: 'head' \d+ MB \(G 3000 x 3000\), 'fc' ", text)
    for remedy in ("exclude=['head']", "'max_side': 750", "stagger=True", "mem_opt"):
        assert remedy in text


@pytest.mark.parametrize(
    "remedy", [{"exclude": ["head"]}, {"curvature": {"name": "conv_kfac", "max_side": 512}}]
)
def test_the_remedies_make_it_fit(monkeypatch: pytest.MonkeyPatch, remedy: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KfactkWarning)
        bound(monkeypatch, 50_000_000, **remedy).close()


def test_where_free_memory_is_not_known_nothing_is_refused(monkeypatch: Any) -> None:
    bound(monkeypatch, None).close()


def test_where_the_need_is_not_known_nothing_is_refused(monkeypatch: Any) -> None:
    class Blind(Kfac):
        def blank(self, layer: Any) -> Any:
            assert float(layer.anchor.detach().sum()) < 1e9  # reads numbers
            return super().blank(layer)

    bound(monkeypatch, 1, curvature=Blind()).close()


def test_one_line_warns_of_wide_layers_and_pasting_it_ends_it() -> None:
    recipe = kfactk.build(curvature={"name": "kfac", "max_side": 16})
    [text] = said(recipe, model(40))
    assert "'head' (output side 40: diagonal)" in text
    assert "'fc'" not in text
    found = re.search(r"curvature=({.*?})", text)
    assert found is not None
    pasted = recipe.evolve(curvature=eval(found[1]))
    assert said(pasted, model(40)) == []
    assert pasted.coverage(model(40)).rows[2].wide == ("output side 40: diagonal",)


def test_a_decomposition_of_minutes_is_said_at_bind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "SLOW", 1.0)
    [text] = said(kfactk.build(), model())
    assert re.search(r"'head' 8\.3 s \(G 3000 x 3000\).*'max_side': 750", text)
