"""The laws of curvatures: stages that break one are caught; stages for other layers obey them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import attrs
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from kfactk import Curvature, Layer, LayerCall, Samples, Statistic
from kfactk.testing import CurvatureLaws
from kfactk.testing._support.strategies import Case, case_of
from kfactk_stages.curvature._coverage import reason_against
from kfactk_stages.curvature.conv_kfac import ConvKfac
from kfactk_stages.curvature.kfac import Kfac
from tests.kfactk.testing.broken import caught, laws_of
from tests.kfactk.testing.broken_curvatures import BREAKS, stage


class DiagonalFisher(Kfac):
    """`E[D_n^2]`, entry by entry."""

    provides: ClassVar = frozenset({"square"})

    def input_factors(self, layer, samples):
        return {}

    def gradient_factors(self, layer, samples):
        return {"square": samples.projected_square(None, None)}

    def assemble(self, layer, factors):
        return factors


class TestDiagonalFisher(CurvatureLaws):
    stage = DiagonalFisher


class TestDiagonalFisherOfConvolutions(CurvatureLaws):
    stage = type("DiagonalOfAll", (DiagonalFisher, ConvKfac), {})


class Shaped(Curvature):
    """What stages of the layers below share: rows `[..., N, T, d]` of each call, along T."""

    covered: ClassVar[tuple[type[nn.Module], ...]]

    def unsupported(self, module):
        return (
            reason_against(module, self.covered)
            if "weight" in module._parameters
            else f"no weight in {type(module).__name__}"
        )

    def samples(self, layer, calls: Sequence[LayerCall], *, num_terms, first):
        rows = [self.rows(layer, call) for call in calls]
        return Samples(
            torch.cat([a for a, _ in rows], -2),
            torch.cat([g for _, g in rows], -2),
            num_terms=num_terms,
            first=first,
        )


@attrs.frozen
class UnitWise(Shaped):
    """The 2 x 2 Fisher block of weight and bias of each unit of a layer norm."""

    provides: ClassVar = frozenset({"units"})
    covered: ClassVar = (nn.LayerNorm,)

    def matrix(self, layer: Layer, tensors):
        return torch.stack([tensors[name] for name in layer.parameters], -1)[:, None]

    def tensors(self, layer: Layer, matrix: Tensor):
        return {name: matrix[:, 0, i] for i, name in enumerate(layer.parameters)}

    def blank(self, layer: Layer) -> LayerCall:
        weight = layer.tensors()["weight"].detach()
        return LayerCall(weight.new_zeros(1, len(weight)), weight.new_zeros(1, len(weight)))

    def rows(self, layer: Layer, call: LayerCall) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if call.gradient.dtype == torch.float64 else torch.float32
        x = nn.functional.layer_norm(
            call.inputs.to(wide), layer.module.normalized_shape, eps=layer.module.eps
        )
        columns = torch.stack([x, torch.ones_like(x)][: len(layer.parameters)], -1)
        rows = (columns, (call.gradient.to(wide) * call.scale)[..., None])
        return [
            each.reshape(len(x), math.prod(x.shape[1:-1]), *each.shape[-2:]).permute(2, 0, 1, 3)
            for each in rows
        ]

    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        d = samples.per_example_gradients().squeeze(-2)
        return {"units": Statistic(d.mT @ d, samples.num_terms)}


@attrs.frozen
class TokenWise(Shaped):
    """For embeddings: how often each token came, and G."""

    provides: ClassVar = frozenset({"frequency", "G"})
    covered: ClassVar = (nn.Embedding,)

    def unsupported(self, module):
        if (
            type(module) is nn.Embedding
            and "forward" not in vars(module)
            and "weight" in module._parameters
        ):
            return f"its weight is {module.weight.dtype}" if module.weight.is_complex() else None
        return f"{type(module).__name__} is no plain embedding"

    def matrix(self, layer, tensors):
        return tensors["weight"].T

    def tensors(self, layer, matrix):
        return {"weight": matrix.T}

    def blank(self, layer: Layer) -> LayerCall:
        return LayerCall(
            torch.zeros(1, dtype=torch.long),
            layer.module.weight.detach().new_zeros(1, layer.module.embedding_dim),
        )

    def rows(self, layer: Layer, call: LayerCall) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if call.gradient.dtype == torch.float64 else torch.float32
        seen = nn.functional.one_hot(call.inputs, layer.module.num_embeddings).to(wide)
        sizes = len(call.inputs), math.prod(call.inputs.shape[1:])
        return [
            each.reshape(*sizes, each.shape[-1])
            for each in (seen, call.gradient.to(wide) * call.scale)
        ]

    def input_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        seen = Statistic(
            samples.inputs().sum((0, 1)) if samples.first else None,
            float(samples.examples) * samples.first,
        )
        return {"frequency": seen}

    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        return {"G": samples.grad_moment()}


class TestUnitWise(CurvatureLaws):
    stage = UnitWise


class TestTokenWise(CurvatureLaws):
    stage = TokenWise


class Twofold(nn.Linear):
    """A layer of an outside author."""

    def forward(self, x):
        return 2 * super().forward(x)


class TwofoldKfac(Kfac):
    covered: ClassVar = (Twofold,)

    def rows(self, layer, call):
        return super().rows(layer, attrs.evolve(call, gradient=2 * call.gradient))


class TestOtherLayers(CurvatureLaws):
    stage = TwofoldKfac
    covers = (Twofold,)

    def cases(self):
        modules = st.builds(Twofold, st.integers(1, 3), st.integers(1, 3), bias=st.booleans())
        return case_of(
            modules,
            lambda draw, m: (draw(st.integers(1, 3)), m.in_features),
            most_calls=2,
            freeze=True,
        )

    def single_row_cases(self):
        return self.cases().map(lambda case: Case(case.module, case.inputs, case.gradient))


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_stage_is_caught(name: str) -> None:
    law, broken, says = BREAKS[name]
    found = caught(CurvatureLaws, broken, law)
    assert law in found, f"the law {law} lets it pass"
    assert re.search(says, found[law]), found[law]
    assert "breaks a law of its family" in found[law]


def test_each_law_can_be_broken() -> None:
    assert {law for law, _, _ in BREAKS.values()} == set(laws_of(CurvatureLaws)) - {
        "test_two_ranks_are_one_process"
    }  # see test_division.py


def fresh(stage: Any) -> Any:
    return type("TestFresh", (CurvatureLaws,), {"stage": stage})()


def test_laws_that_do_not_apply_say_so() -> None:
    with pytest.raises(
        pytest.skip.Exception, match=r"provides square, not the Kronecker factors A and G"
    ):
        fresh(DiagonalFisher).test_one_row_of_one_example_is_exact()
    with pytest.raises(pytest.skip.Exception, match="has no option chunk_bytes"):
        fresh(UnitWise).test_chunks_do_not_matter()
    with pytest.raises(pytest.skip.Exception, match="takes neither linear layers nor convolutions"):
        fresh(UnitWise).test_moments_are_sums_over_rows()


def test_a_stage_for_unknown_layers_is_told_what_to_write() -> None:
    refusing = stage(unsupported=lambda self, module: "no")
    found = caught(CurvatureLaws, refusing, "test_tensors_is_the_inverse_of_matrix")[
        "test_tensors_is_the_inverse_of_matrix"
    ]
    assert "accepts no layer that the laws know how to draw" in found
    assert "write `covers` and `cases`" in found
