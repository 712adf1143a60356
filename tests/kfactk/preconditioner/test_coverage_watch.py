"""A change of the model or of the groups by which parameters lose their block is told once."""

from __future__ import annotations

from torch import Tensor, nn

import kfactk
from kfactk.preconditioner.coverage import ModelSurvey
from kfactk.preconditioner.coverage_watch import CoverageWatch


def watched() -> tuple[nn.Sequential, CoverageWatch, ModelSurvey]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    survey = ModelSurvey(model, kfactk.build().rules)
    watch = CoverageWatch(survey)
    assert watch.look(list(model.parameters()), any_layer=True) == ""
    return model, watch, survey


def look(model: nn.Module, watch: CoverageWatch, survey: ModelSurvey, trained: object) -> str:
    survey.tracker.look()
    parameters = list(model.parameters()) if trained is None else list(trained)  # type: ignore[call-overload]
    layers = survey.layers({id(parameter) for parameter in parameters})
    return watch.look(parameters, any_layer=bool(layers))


def test_no_change_is_not_told() -> None:
    model, watch, survey = watched()
    assert look(model, watch, survey, None) == ""
    model[0].weight.requires_grad_(False)
    assert look(model, watch, survey, None) == "", "who freezes a parameter knows of it"


def test_new_parameters_that_are_not_trained_are_told_once() -> None:
    model, watch, survey = watched()
    trained = list(model.parameters())
    model[2] = nn.Linear(4, 2)
    told = look(model, watch, survey, trained)
    assert "2.weight, 2.bias of the model are new parameters" in told
    assert "Bind after such a change, or put the new parameters in param_groups" in told
    assert look(model, watch, survey, trained) == ""


def test_a_layer_of_another_class_is_told_with_the_reason() -> None:
    class Other(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model, watch, survey = watched()
    other = Other(4, 2)
    other.weight, other.bias = model[2].weight, model[2].bias
    model[2] = other
    told = look(model, watch, survey, None)
    assert "2.weight, 2.bias (Other is a subclass of Linear" in told
    assert "have lost their block" in told


def test_tensors_that_are_not_the_models_are_told() -> None:
    model, watch, survey = watched()
    told = look(model, watch, survey, [nn.Parameter(model[0].weight.detach().flatten())])
    assert "param_groups hold 1 tensors that are not the model's" in told
