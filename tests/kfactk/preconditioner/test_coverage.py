"""Which parameters have a block, and why the others have none; counted by hand."""

from __future__ import annotations

import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import kfactk
from kfactk.preconditioner.coverage import Coverage, ModelSurvey, Row
from kfactk.preconditioner.rules import BlockRule
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.curvature.conv_kfac import ConvKfac
from kfactk_stages.curvature.kfac import Kfac

RULE = BlockRule(ConvKfac(), Ekfac(), label="conv_kfac, ekfac")


def ids(model: nn.Module) -> set[int]:
    return {id(parameter) for parameter in model.parameters()}


def coverage(model: nn.Module) -> Coverage:
    return ModelSurvey(model, [RULE]).coverage(ids(model))


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
    "transposed": (lambda: nn.ConvTranspose1d(2, 2, 2), 0, 2),
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
    line = str(coverage(nn.Linear(2, 3))).splitlines()[1]
    assert line == "weight     3x2    block (root) (conv_kfac, ekfac)"


def test_a_model_without_parameters() -> None:
    assert str(coverage(nn.ReLU())).endswith(
        "0 of 0 parameters preconditioned (0 of 0 elements, 0.0%)"
    )


def test_modules_tied_in_part_have_no_block_and_name_each_other() -> None:
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


def tied(one: nn.Module, other: nn.Module) -> nn.Sequential:
    """Both modules with the parameters of the first one."""
    for name, parameter in one.named_parameters():
        setattr(other, name, parameter)
    return nn.Sequential(one, other)


def test_modules_with_the_same_parameters_make_one_layer_of_several_sites() -> None:
    model = tied(nn.Linear(3, 3), nn.Linear(3, 3))
    assert coverage(model).covered == ("0.weight", "0.bias")
    [(layer, rule)] = ModelSurvey(model, [RULE]).layers(ids(model))
    assert rule is RULE
    assert (layer.name, layer.module, layer.sites) == ("0", model[0], (model[0], model[1]))


def test_tied_modules_with_other_settings_have_no_block() -> None:
    model = tied(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=0))
    assert not coverage(model).covered
    reason = "tied: it shares a parameter with 1.bias, 1.weight, of a module with other settings"
    assert reasons(model)["0.weight"] == reason


def test_tied_modules_of_two_rules_have_no_block() -> None:
    model = tied(nn.Linear(3, 3), nn.Linear(3, 3))
    rules = [BlockRule(Kfac(), KfacInverse(), ("1",)), RULE]
    table = ModelSurvey(model, rules).coverage(ids(model))
    assert not table.covered
    assert {row.reason for row in table} == {"tied: it shares a parameter with 1.bias, 1.weight"}


def test_one_parameter_under_two_names_has_no_block() -> None:
    model = nn.Linear(3, 3)
    model.register_parameter("again", model.weight)
    assert "again" in reasons(model)["weight"]


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
    assert "subclass of Linear whose forward may differ" in found["own.weight"]
    assert "parametrized" in found["weight_norm.bias"]
    assert "never calls its forward" in found["attention.out_proj.weight"]
    assert found["frozen.weight"] == found["partly.weight"] == "frozen (requires_grad is False)"
    assert found["partly.bias"] == "the layer's weight is not trained"
    assert found["loose.0"] == "no curvature for ParameterList"
    assert not coverage(model).covered


def test_what_is_trained_is_asked_anew() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    survey, trained = ModelSurvey(model, [RULE]), ids(model)
    assert [layer.name for layer, _ in survey.layers(trained)] == ["0", "1"]
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    found = [(layer.name, layer.parameters) for layer, _ in survey.layers(trained)]
    assert found == [("1", ("weight",))]
    assert survey.layers(set()) == []
    table = survey.coverage({id(model[1].weight)})
    reason = {row.parameter: row.reason for row in table}
    assert reason["0.bias"] == "not among the optimizer's parameters"
    assert table.plain == ()


# ----------------------------------------------------------------------------------- several rules


def test_the_first_rule_that_supports_a_module_takes_it() -> None:
    model = nn.ModuleDict(
        {"conv": nn.Conv1d(2, 2, 2), "body": nn.Linear(2, 2), "head": nn.Linear(2, 2)}
    )
    head = BlockRule(Kfac(), KfacInverse(), ("head",), "kfac, kfac")
    linear = BlockRule(Kfac(), Ekfac(), label="kfac, ekfac")
    table = ModelSurvey(model, [head, linear, RULE]).coverage(ids(model))
    assert {row.parameter: row.stages for row in table if row.parameter.endswith("weight")} == {
        "conv.weight": "conv_kfac, ekfac",
        "body.weight": "kfac, ekfac",
        "head.weight": "kfac, kfac",
    }


def test_reasons_are_those_of_all_rules_that_may_take_a_module() -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
    linear, norm = (
        kfactk.build(curvature=name).coverage(model) for name in ("kfac", ["kfac", "norm"])
    )
    [one], [other] = ([r.reason for r in t if r.parameter == "0.weight"] for t in (linear, norm))
    assert one == "no curvature for Embedding"
    assert other == one  # said once
    rules = [BlockRule(Kfac(), Ekfac(), ("1",))]
    table = ModelSurvey(model, rules).coverage(ids(model))
    assert {row.parameter: row.reason for row in table}[
        "0.weight"
    ] == "no block's layers= matches it"


# -------------------------------------------------------------------------- after the model changed


def test_the_survey_follows_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    survey = ModelSurvey(model, [RULE])

    def layers() -> list[str]:
        survey.tracker.look()
        return [layer.name for layer, _ in survey.layers(ids(model))]

    assert layers() == ["0", "1"]
    model.append(nn.Linear(2, 2))
    assert layers() == ["0", "1", "2"]
    model[1] = nn.ReLU()
    assert layers() == ["0", "2"]
    model[2] = nn.Sequential(model[2])
    assert layers() == ["0", "2.0"]
    model[2][0].weight = model[0].weight
    assert layers() == []  # tied in part
    model[2][0].bias = model[0].bias
    assert layers() == ["0"]


def test_a_layer_is_the_same_whatever_its_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    survey = ModelSurvey(model, [RULE])

    def keys() -> dict[str, object]:
        survey.tracker.look()
        return {layer.name: layer.key for layer, _ in survey.layers(ids(model))}

    before = keys()
    model[0], model[1] = model[1], model[0]
    assert keys() == {"0": before["1"], "1": before["0"]}
    model[0], model[1] = model[1], model[0]
    assert keys() == before
    model[0].bias.requires_grad_(False)
    assert keys() == {"0": keys()["0"], "1": before["1"]} != before
    model[0].bias.requires_grad_(True)
    model[0].weight = nn.Parameter(torch.ones(2, 2))
    assert keys() == before
    model[0].weight = nn.Parameter(torch.ones(2, 5))
    assert keys()["0"] != before["0"]


def test_a_scalar_parameter() -> None:
    row = Row("scale", (), None, "no curvature", True)
    assert row.numel == 1
    assert "scalar" in str(Coverage((row,)))
