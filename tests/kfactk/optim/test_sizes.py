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


def model(width: int = 2000) -> nn.Sequential:
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
    assert re.search(r"Layers: 'head' \d+ MB \(G 2000 x 2000\), 'fc' ", text)
    for remedy in ("exclude=['head']", "'max_side': 500", "stagger=True", "mem_opt"):
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


LADDER: dict[str, tuple[tuple[int, int], tuple[str, ...], str]] = {
    "line": ((64, 8000), ("output side 8000: diagonal",), "'max_side': 8000"),
    "head": ((768, 50257), ("output side 50257: diagonal",), "'wide': 'diagonal'"),
    "mlp": ((4096, 14336), ("output side 14336: diagonal",), "'' 21 s (A 4097 x 4097)"),
    "vgg": ((25088, 4096), ("input side 25089: diagonal",), "'' 21 s (G 4096 x 4096)"),
}
"""Inputs and outputs of wide layers, what stands for their sides, and what `bind` says."""


@pytest.mark.parametrize("name", LADDER)
def test_the_default_says_what_a_wide_layer_costs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "free_bytes", lambda device: None)
    (d_in, d_out), wide, words = LADDER[name]
    module = nn.Sequential(nn.utils.skip_init(nn.Linear, d_in, d_out))
    [text] = said(kfactk.build(), module)
    assert words.replace("''", "'0'") in text
    assert kfactk.build().coverage(module).rows[0].wide == wide
    assert "in one step of every 100" in text or name in ("line", "head")
    pasted = [eval(each) for each in re.findall(r"curvature=({.*?})", text)]
    assert pasted
    [again] = said(kfactk.build(curvature={**pasted[0], "max_side": 1024}), module) or [""]
    assert "one decomposition" not in again


def test_a_line_keeps_a_wide_side_whole() -> None:
    [text] = said(kfactk.build(), model(2200))
    *_, whole = re.findall(r"curvature=({.*?})", text)
    assert "To keep it whole" in text
    recipe = kfactk.build(curvature=eval(whole))
    assert said(recipe, model(2200)) == []
    assert recipe.coverage(model(2200)).rows[2].wide == ()


def test_a_decomposition_of_minutes_is_said_at_bind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "SLOW", 1.0)
    [text] = said(kfactk.build(), model())
    assert re.search(r"'head' 2\.5 s \(G 2000 x 2000\).*'max_side': 500", text)


def inside() -> nn.ModuleDict:
    """Return modules whose layers lie inside."""
    rnn = nn.LSTM(6, 10)
    return nn.ModuleDict({"attn": nn.MultiheadAttention(20, 2), "rnn": rnn, "fc": nn.Linear(4, 5)})


def test_one_line_warns_of_all_wide_layers_and_ends_it() -> None:
    limits = [{"name": name, "max_side": 16} for name in ("attention", "rnn")]
    recipe = kfactk.build(curvature=["kfac", *limits])
    [text] = said(recipe, inside())
    assert "'attn[in_proj]' (input side 21: diagonal, output side 20: diagonal)" in text
    assert "'rnn[ih_l0]' (output side 40: diagonal)" in text
    found = re.search(r"curvature=(\[.*?\]);", text)
    assert found is not None
    pasted = recipe.evolve(curvature=eval(found[1]))
    assert said(pasted, inside()) == []
    assert pasted.coverage(inside()).covered == recipe.coverage(inside()).covered


def test_the_remedy_of_one_curvature_among_several_makes_it_fit(monkeypatch: Any) -> None:
    module = nn.ModuleDict({"rnn": nn.LSTM(600, 500), "norm": nn.LayerNorm(500)})
    monkeypatch.setattr(sizes, "free_bytes", lambda device: 100_000_000)
    recipe = kfactk.build(curvature="all")
    with pytest.raises(MemoryExhaustedError) as caught:
        recipe.bind(module)
    found = re.search(r"let shorter sides be whole, curvature=(\[.*?\]);", str(caught.value))
    assert found is not None
    assert {"name": "rnn", "max_side": 500} in eval(found[1])
    with pytest.warns(KfactkWarning, match="too wide to be a matrix"):
        recipe.evolve(curvature=eval(found[1])).bind(module)


def test_a_basis_of_whole_matrices_gets_no_line_on_shorter_sides(monkeypatch: Any) -> None:
    monkeypatch.setattr(sizes, "free_bytes", lambda device: 1)
    for curvature, basis in (({"name": "rnn", "time": "chain"}, None), ("rnn", "singd")):
        block = kfactk.block(curvature, basis=basis)
        with pytest.raises(MemoryExhaustedError) as caught:
            kfactk.build(curvature=[block]).bind(nn.LSTM(500, 500))
        assert "max_side" not in str(caught.value)
        assert "exclude" in str(caught.value) or "mem_opt" in str(caught.value)
