"""Which parameters have a block: every one of them is told, with the truth counted by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import kfactk
from kfactk import PluginError
from kfactk.preconditioner.coverage import Coverage, ModelSurvey, Row
from kfactk.preconditioner.rules import BlockRule
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.curvature.conv_kfac import ConvKfac

RULE = BlockRule(ConvKfac(), Ekfac())


def ids(*parameters: nn.Parameter) -> set[int]:
    return {id(parameter) for parameter in parameters}


def coverage(model: nn.Module) -> Coverage:
    return ModelSurvey(model, [RULE]).coverage(ids(*model.parameters()))


def reasons(model: nn.Module) -> dict[str, str]:
    return {row.parameter: row.reason for row in coverage(model)}


PARTS = {
    "linear": (lambda: nn.Linear(2, 3), 2, 0),
    "no bias": (lambda: nn.Linear(2, 3, bias=False), 1, 0),
    "conv": (lambda: nn.Conv2d(2, 4, 3, groups=2), 2, 0),
    "norm": (lambda: nn.BatchNorm1d(3), 0, 2),
    "embedding": (lambda: nn.Embedding(4, 2), 0, 1),
    "attention": (lambda: nn.MultiheadAttention(4, 2), 0, 4),
    "nothing": (nn.ReLU, 0, 0),
    "transposed": (lambda: nn.ConvTranspose1d(2, 2, 2), 2, 0),
}


@settings(max_examples=30)
@given(st.lists(st.sampled_from(sorted(PARTS)), max_size=5), st.booleans())
def test_every_parameter_has_one_row_and_a_block_or_a_reason(
    names: list[str], nested: bool
) -> None:
    parts = [PARTS[name][0]() for name in names]
    model = nn.Sequential(*parts)
    table = coverage(nn.ModuleDict({"body": model}) if nested else model)
    assert [row.parameter.removeprefix("body.") for row in table] == [
        name for name, _ in model.named_parameters()
    ]
    assert len(table.covered) == sum(PARTS[name][1] for name in names)
    assert len(table.plain) == sum(PARTS[name][2] for name in names)
    assert all((row.block is None) == bool(row.reason) for row in table)
    assert sum(row.numel for row in table) == sum(
        parameter.numel() for parameter in model.parameters()
    )


def test_the_root_itself_can_be_a_layer() -> None:
    assert str(coverage(nn.Linear(2, 3))).splitlines()[1] == "weight     3x2    block (root)"


def test_a_model_without_parameters() -> None:
    assert str(coverage(nn.ReLU())).endswith(
        "0 of 0 parameters preconditioned (0 of 0 elements, 0.0%)"
    )


def test_tied_weights_have_no_block_and_name_each_other() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5), "free": nn.Linear(3, 3)}
    )
    model["out"].weight = model["embed"].weight
    found = reasons(model)
    assert set(coverage(model).covered) == {"free.weight", "free.bias"}
    assert found["out.bias"] == "tied: it shares a parameter with embed.weight"
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    layers[1].bias = layers[0].bias
    assert reasons(layers)["0.weight"] == "tied: it shares a parameter with 1.bias"


def test_a_module_registered_twice_has_one_block() -> None:
    shared = nn.Linear(3, 3)
    table = coverage(nn.Sequential(shared, nn.ReLU(), shared))
    assert table.covered == ("0.weight", "0.bias")


def test_reasons_that_readers_need() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = nn.ModuleDict(
        {
            "own": Own(2, 2),
            "weight_norm": parametrizations.weight_norm(nn.Linear(2, 2)),
            "attention": nn.MultiheadAttention(4, 2),
            "frozen": nn.Linear(2, 2).requires_grad_(False),
            "partly": nn.Linear(2, 2),
            "loose": nn.ParameterList([nn.Parameter(torch.ones(2))]),
        }
    )
    model["partly"].weight.requires_grad_(False)
    found = reasons(model)
    assert "subclass of Linear with its own forward" in found["own.weight"]
    assert "parametrized" in found["weight_norm.bias"]
    assert "never calls its forward" in found["attention.out_proj.weight"]
    assert found["frozen.weight"] == found["partly.weight"] == "frozen (requires_grad is False)"
    assert found["partly.bias"] == "the layer's weight is not trained"
    assert found["loose.0"] == "no curvature for ParameterList"
    assert not coverage(model).covered


def test_what_is_trained_is_asked_anew() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    survey, everything = ModelSurvey(model, [RULE]), ids(*model.parameters())
    assert [layer.name for layer, _ in survey.layers(everything)] == ["0", "1"]
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    [(layer, rule)] = survey.layers(everything)
    assert (layer.name, layer.parameters, rule) == ("1", ("weight",), RULE)
    assert survey.layers(ids()) == []
    table = survey.coverage(ids(model[1].weight))
    reason = {row.parameter: row.reason for row in table}["0.bias"]
    assert reason == "not among the optimizer's parameters"
    assert table.plain == ()


def test_a_scalar_parameter() -> None:
    row = Row("scale", (), None, "no curvature", True)
    assert row.numel == 1
    assert "scalar" in str(Coverage((row,)))


def test_parts_of_parameters_that_are_not_there_are_the_curvatures_fault() -> None:
    class Absent(ConvKfac):
        def parts(self, module: nn.Module) -> Mapping[str, tuple[str, ...]]:
            return {"": ("weight", "inside.bias")}

    with pytest.raises(PluginError, match=r"Absent failed on module '0'.*'inside\.bias'"):
        ModelSurvey(nn.Sequential(nn.Linear(2, 2)), [BlockRule(Absent(), Ekfac())])


class Attending(nn.Module):
    """A table that is the head too, attention, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.head.weight = self.words.weight
        self.attn = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.gain = nn.Parameter(torch.ones(4))


ATTENTION = {
    "attn.in_proj_weight": "attn[in_proj]",
    "attn.in_proj_bias": "attn[in_proj]",
    "attn.out_proj.weight": "attn[out_proj]",
    "attn.out_proj.bias": "attn[out_proj]",
    "attn.bias_k": "attn[bias_k]",
    "attn.bias_v": "attn[bias_v]",
}
OUT_PROJ = {
    "attn.out_proj.weight": "attn.out_proj",
    "attn.out_proj.bias": "attn.out_proj[bias]",
}
TIED = {"words.weight": "words", "head.bias": "head[bias]"}


@pytest.mark.parametrize(
    ("curvature", "changed", "of_gradient"),
    [
        (["all", "gradient"], {}, {"gain", "attn.bias_k", "attn.bias_v"}),
        (
            [kfactk.block("gradient", layers=["attn.out_proj"]), "all", "gradient"],
            OUT_PROJ,
            {"gain", "attn.bias_k", "attn.bias_v", *OUT_PROJ},
        ),
        (
            [kfactk.block("gradient", layers=["head"]), "all", "gradient"],
            {"words.weight": "head"},
            {"gain", "attn.bias_k", "attn.bias_v", *TIED},
        ),
    ],
)
def test_rules_on_gradients_take_once_what_others_leave(
    curvature: list[object], changed: dict[str, str], of_gradient: set[str]
) -> None:
    """What attention and tied tables hold is theirs, but where a gradient's rule comes first."""
    model = Attending()
    table = kfactk.build(curvature=curvature).coverage(model)
    wanted = ATTENTION | TIED | {"gain": "[gain]"} | changed
    assert {row.parameter: row.block for row in table} == wanted
    assert {row.parameter for row in table if "gradient" in row.stages} == of_gradient


def test_what_is_excluded_inside_a_module_is_no_gradients_either() -> None:
    recipe = kfactk.build(curvature=["all", "gradient"], exclude=["attn.out_proj"])
    assert recipe.coverage(Attending()).plain == tuple(OUT_PROJ)


def test_layers_of_all_rules_come_in_the_models_order() -> None:
    model = Attending()
    survey = ModelSurvey(model, kfactk.build(curvature=["all", "gradient"]).rules)
    found = [layer.path for layer, _ in survey.layers(ids(*model.parameters()))]
    assert found == ["", "words", "head", "attn", "attn", "attn", "attn"]


@pytest.mark.parametrize("wrapped", ["whole", "parts", "checkpointed"])
def test_patterns_name_layers_as_they_are_without_wrappers(wrapped: str) -> None:
    """Compilation is lazy: nothing is compiled here."""
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model: nn.Module = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 3)})
    make = wrapper.checkpoint_wrapper if wrapped == "checkpointed" else torch.compile
    if wrapped == "whole":
        model = torch.compile(model)  # type: ignore[assignment]
    else:
        model["body"], model["head"] = make(model["body"]), make(model["head"])  # type: ignore[operator, index]
    head = kfactk.block("kfac", basis="kfac", layers=["head"])
    plain = kfactk.build(curvature=[head, "kfac"], exclude=["body"]).coverage(model)
    assert ["kfac, kfac" in row.stages for row in plain] == [False, False, True, True]
    assert [row.reason for row in plain][:2] == ["excluded (exclude='body')"] * 2
    name = next(name for name, _ in model.named_modules() if name.endswith("body"))
    kfactk.build(exclude=[name]).coverage(model)
    with pytest.raises(kfactk.OptionError, match=r"Give one of: (?!.*_orig_mod).*head"):
        kfactk.build(exclude=["tail"]).coverage(model)


def test_a_preset_on_a_model_without_its_layers_says_what_to_do() -> None:
    with pytest.raises(kfactk.OptionError, match=r"Give one of: 0, 1.* preset.*kfactk.block\("):
        kfactk.preset("transformer").coverage(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
