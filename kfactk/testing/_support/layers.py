"""What the laws of curvatures share: the layers that are drawn, and what a stage makes of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from kfactk.capture.replay import CallContext, RecordedReplay, followed, recorded_arguments
from kfactk.errors import OptionError
from kfactk.samples import LayerCall, Samples, Statistic
from kfactk.stages import Curvature, Layer
from kfactk.testing._support import truth
from kfactk.testing._support.laws import Laws, close
from kfactk.testing._support.strategies import (
    CONV,
    TRANSPOSED,
    Case,
    Kind,
    first_output,
    foreign_modules,
    kinds,
    kinds_inside,
)

KNOWN = (nn.Linear, *CONV.values())
"""Layers whose matrix and rows `truth` can compute."""


class OnLayers(Laws):
    """Laws over layers with data."""

    family = "curvature"
    pytestmark = pytest.mark.filterwarnings(
        "ignore:Using padding='same' with even kernel:UserWarning"
    )
    covers: ClassVar[tuple[type[nn.Module], ...]] = (
        *KNOWN,
        *TRANSPOSED.values(),
        nn.LayerNorm,
        nn.Embedding,
        nn.EmbeddingBag,
        nn.MultiheadAttention,
        *(nn.RNN, nn.LSTM, nn.GRU),
        *(nn.RNNCell, nn.LSTMCell, nn.GRUCell),
    )
    """Classes of modules that `cases` can draw; `unsupported` must refuse all others."""

    def cases(self) -> st.SearchStrategy[Case]:
        """Return the layers to test the stage on, with data."""
        return self._layers_of([kind.cases for kind in self._accepted()])

    def single_row_cases(self) -> st.SearchStrategy[Case]:
        """Return the cases with T = 1, where Kronecker factors of one example are exact."""
        self._want_kronecker()
        single = [kind.single_row for kind in self._accepted() if kind.single_row is not None]
        return self._layers_of(single).filter(lambda case: not self.curvature.stand_ins(case.layer))

    def known_cases(self) -> st.SearchStrategy[Case]:
        """Return the cases whose rows and matrix the laws know: linear layers, convolutions."""
        if not any(
            type(each) in KNOWN
            and type(each) in self.covers
            and not self.curvature.unsupported(each)
            for each in foreign_modules()
        ):
            pytest.skip(
                f"{self.label()} takes neither linear layers nor convolutions, and the rows of "
                "other layers are their own"
            )
        return self.cases().filter(lambda case: type(case.module) in KNOWN)

    def arranged(self, case: Case, tensor: Tensor) -> Tensor:
        """Return an input or output gradient as the stage expects it.

        Override it for a stage that has the examples elsewhere than in dimension 0.
        """
        return tensor

    @functools.cached_property
    def curvature(self) -> Curvature:
        """The stage."""
        stage: Curvature = self.subject()
        return stage

    def samples(
        self,
        case: Case,
        *,
        scales: Sequence[Tensor | float] | None = None,
        num_terms: Any = None,
        first: bool = True,
    ) -> Samples:
        """Return the samples that the stage makes of a case; by default one term per example."""
        scales = [1.0] * len(case.calls) if scales is None else scales
        calls = [
            call
            for (x, g), scale in zip(case.calls, scales, strict=True)
            for call in self._layer_calls(case, x, g, scale)
        ]
        num_terms = float(len(case.inputs)) if num_terms is None else num_terms
        return self.curvature.samples(case.layer, calls, num_terms=num_terms, first=first)

    def sums(self, case: Case, **how: Any) -> dict[str, Statistic]:
        """Return its factors, as sums and counts."""
        return self.curvature.factors(case.layer, self.samples(case, **how))

    def means(self, case: Case, **how: Any) -> dict[str, Tensor]:
        """Return its factors, averaged."""
        return averaged(self.sums(case, **how))

    def matrices(self, case: Case, **how: Any) -> dict[str, Tensor]:
        """Return the assembled matrices."""
        return dict(self.curvature.assemble(case.layer, self.means(case, **how)))

    def gradients(self, case: Case) -> Tensor:
        """Return D by autograd, example by example."""
        if type(case.module) in KNOWN:
            return sum(
                (truth.module_gradients(case.module, x, g) for x, g in case.calls), torch.zeros(())
            )
        calls = [
            truth.per_example_gradients(
                case.module,
                x,
                g,
                lambda output, g: (first_output(output) * g).sum(),
                functools.partial(case.called_with, case.module),
            )
            for x, g in case.calls
        ]
        summed = [
            {name: sum((part[name] for part in parts), torch.zeros(())) for name in parts[0]}
            for parts in zip(*calls, strict=True)
        ]
        return torch.stack([self.curvature.matrix(case.layer, each) for each in summed], -3)

    def _layers_of(self, each: Sequence[st.SearchStrategy[Case]]) -> st.SearchStrategy[Case]:
        """Return the cases that the stage takes, one for each layer in their modules."""
        cases = st.one_of(*each).filter(
            lambda case: self.curvature.unsupported(case.module) is None
        )
        probes = (probe for kind in self._accepted() for probe in kind.probes)
        if all(set(self.curvature.parts(probe)) == {""} for probe in probes):
            return cases
        return cases.flatmap(lambda case: st.sampled_from(self._layers_in(case)))

    def _layers_in(self, case: Case) -> list[Case]:
        """Return the case for each layer in its module."""
        parts = self.curvature.parts(case.module)
        if set(parts) == {""}:
            return [case]
        return [attrs.evolve(case, part=part, names=names) for part, names in parts.items()]

    def _layer_calls(
        self, case: Case, inputs: Tensor, gradient: Tensor, scale: Tensor | float
    ) -> list[LayerCall]:
        """Return the calls that one call of the module gives the layer."""
        replay = self.curvature.replay(case.module)
        if replay is None:
            return [LayerCall(self.arranged(case, inputs), self.arranged(case, gradient), scale)]
        call = recorded_arguments(case.module, case.called_with(case.module, inputs), {})
        context = CallContext.now(inputs.device)
        outputs = followed([case.output(inputs)])
        again = RecordedReplay("layer", call, context, replay, outputs, [case.part])
        return [attrs.evolve(each, scale=scale) for each in again.calls(case.part, {0: gradient})]

    def _want_own_calls(self, case: Case) -> None:
        """Skip a law of the precision of data that the stage is given as it is."""
        if self.curvature.replay(case.module) is not None:
            pytest.skip(
                f"{self.label()} takes calls inside of the module, in the module's precision"
            )

    def _accepted(self) -> list[Kind]:
        every = [*kinds(), *kinds_inside()]
        found = [kind for kind in every if kind.supported_by(self.curvature)]
        if not found:
            raise OptionError(
                f"{self.label()} accepts no layer that the laws know how to draw. If it is for "
                "layers of another class, write `covers` and `cases` in the class of the laws (and "
                "`single_row_cases` if it has factors A and G). Otherwise `unsupported` refuses "
                "too much."
            )
        return found

    def _want_kronecker(self) -> None:
        if not {"A", "G"} <= set(self.curvature.provides):
            provides = ", ".join(sorted(self.curvature.provides))
            pytest.skip(f"{self.label()} provides {provides}, not the Kronecker factors A and G")

    def _degrees(self, case: Case) -> dict[str, int]:
        """Return the power of the gradient's scale that each factor is proportional to.

        Factors that are zero are left out.
        """
        once, twice = self.means(case), self.means(case.times(gradients=2.0))
        return {
            name: round(float((twice[name].norm() / once[name].norm()).log2()))
            for name in once
            if once[name].any() and twice[name].any()
        }


def undone(curvature: Curvature, layer: Layer) -> None:
    """Assert that `tensors` undoes `matrix`: names, shapes, order, and every number once."""
    given, start = {}, 0
    for name, parameter in layer.tensors().items():
        numbers = torch.arange(start, start + parameter.numel(), dtype=torch.float64)
        given[name] = numbers.reshape(parameter.shape)
        start += parameter.numel()
    matrix = curvature.matrix(layer, given)
    assert matrix.ndim >= 2, (
        f"matrix() must be [..., d_out, d_in]; it has shape {list(matrix.shape)}"
    )
    held = matrix.flatten().sort().values
    assert torch.equal(held, torch.arange(start, dtype=torch.float64)), (
        f"matrix() must hold each of the {start} numbers of {', '.join(given)} once; "
        f"from 0, 1, 2, ... it made {matrix.tolist()}"
    )
    back = curvature.tensors(layer, matrix)
    assert list(back) == list(given), (
        f"tensors() must name the parameters as the layer does, {list(given)}; it gave {list(back)}"
    )
    for name, tensor in given.items():
        says = f"tensors(matrix(x)) differs from x in {name!r}"
        close(back[name], tensor, says, rtol=0, atol=0)


def reason_against(curvature: Curvature, module: nn.Module, what: str = "") -> str | None:
    """Return why a curvature does not treat a module; `None` where it does.

    Args:
        curvature: The curvature.
        module: The module.
        what: What messages call it; "" for its type.
    """
    what = what or type(module).__name__
    try:
        reason: object = curvature.unsupported(module)
    except Exception as error:
        raise AssertionError(
            f"unsupported() raises {type(error).__name__} for {what}, where it must return a "
            f"reason: {error}"
        ) from error
    assert reason is None or (isinstance(reason, str) and reason.strip()), (
        f"unsupported() returns {reason!r} for {what}, not a reason"
    )
    return None if reason is None else str(reason)


def averaged(sums: Mapping[str, Statistic]) -> dict[str, Tensor]:
    """Return sum over count of each factor.

    Raises:
        AssertionError: There is no sum or no count.
    """
    for name, each in sums.items():
        assert each.total is not None, f"factor {name!r} has no sum, though there are examples"
        assert float(each.count) > 0, (
            f"factor {name!r} is counted {float(each.count)} times, though there are examples"
        )
    return {name: each.total / each.count for name, each in sums.items() if each.total is not None}


def same(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], says: str, **tolerance: float
) -> None:
    """Assert that two sets of tensors have the same names and are close."""
    assert set(found) == set(expected), f"{says}: there are {sorted(found)}, not {sorted(expected)}"
    for name, tensor in expected.items():
        close(found[name], tensor, f"{name!r}: {says}", **tolerance)


def near(found: Tensor, expected: Tensor, says: str, relative: float, *, atol: float = 0.0) -> None:
    """Assert that they agree within `relative` of the largest number expected, in float64."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    close(found.double(), expected.double(), says, rtol=0, atol=relative * largest + atol)


def present(total: Tensor | None) -> Tensor:
    """Return a sum that must be there."""
    assert total is not None, "there is no sum, though there are examples"
    return total
