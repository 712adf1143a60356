"""What the laws of bases share: the members that a class may set, and what is drawn."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from kfactk.errors import KfactkError, OptionError
from kfactk.linalg import mean_diagonal
from kfactk.registry.registry import registry
from kfactk.stages import Curvature
from kfactk.testing._support.laws import Laws, close
from kfactk.testing._support.situations import Situation, dense, enlarged, situations
from kfactk.testing._support.strategies import Case, kinds, kinds_inside, seeds


class BasisFrame(Laws):
    """Members of every class of laws of a basis."""

    pytestmark = pytest.mark.filterwarnings(
        "ignore:Using padding='same' with even kernel:UserWarning"
    )
    family = "basis"
    curvature: ClassVar[Any] = None
    """What to measure with: anything `kfactk.build(curvature=...)` takes. `None`: the first
    registered one, by name, that provides all the matrices the basis requires."""

    def block(self, situation: Situation) -> Tensor:
        """Return the damped matrix that the basis claims to represent, in float64.

        It is `[n, n]` in the order of `vec` (columns stacked); of a layer with groups
        `[groups, n, n]`. The default is the stage's own `multiply` plus damping times the identity.
        Override it with independent algebra, on `situation.matrices` and `situation.per_example`,
        to test `multiply` too, and for a basis that damps otherwise. It must hold without damping,
        and without moments, as before the first measurement.
        """
        fisher = dense(situation.multiply, situation.gradient)
        return fisher + situation.damping * torch.eye(fisher.shape[-1], dtype=fisher.dtype)

    def measure(self) -> Any:
        """Return the curvature stage that measures.

        Raises:
            OptionError: There is none that provides what the basis requires.
        """
        requires = self.subject().reads
        wants = f"{self.label()} requires {_names(requires)}"
        if self.curvature is not None:
            found = registry().resolve("curvature", self.curvature)
            if not requires <= found.provides:
                raise OptionError(
                    f"{wants}, and curvature {self.curvature!r} provides {_names(found.provides)}. "
                    "Name another one in the class: `curvature = ...`."
                )
            return found
        provided = {}
        stages = registry().stages("curvature")
        for name in sorted({info.name for info in stages if not info.blocked}):
            try:
                found = registry().resolve("curvature", name)
            except KfactkError as error:  # claimed twice, or in need of options
                provided[name] = f"cannot be made: {error}"
                continue
            if requires <= found.provides and not _only_inside(found):
                return found
            provided[name] = f"provides {_names(found.provides)}"
        told = "; ".join(f"{name} {what}" for name, what in provided.items()) or "there is none"
        raise OptionError(
            f"{wants}, which no registered curvature provides ({told}). Say what to measure with: "
            "`curvature = ...` in the class, anything that kfactk.build takes."
        )

    def cases(self) -> st.SearchStrategy[Case]:
        """Return layers with a mini-batch, of every kind the laws know and the curvature supports.

        Override it for other layers.

        Raises:
            OptionError: There are none.
        """
        curvature = self.measure()
        known = [kind.cases for kind in kinds() if kind.supported_by(curvature)]
        if not known:
            raise OptionError(
                f"curvature {curvature!r} supports none of the layers that the laws can draw. "
                "Override `cases(self)` in the class to return a Hypothesis strategy of "
                "kfactk.testing._support.strategies.Case."
            )
        return st.one_of(known).filter(lambda case: curvature.unsupported(case.module) is None)

    def situations(self) -> st.SearchStrategy[Situation]:
        """Return any situation, measured."""
        return situations(self.subject(), self.measure(), self.cases())

    def any_situations(self) -> st.SearchStrategy[Situation]:
        """Return any situation, also before the first measurement."""
        return situations(self.subject(), self.measure(), self.cases(), bare=True)

    def regular_situations(self) -> st.SearchStrategy[Situation]:
        """Return situations with many examples and none of the numbers zero."""
        return situations(self.subject(), self.measure(), self.cases(), least=8, zeros=False)

    def few(self) -> st.SearchStrategy[Situation]:
        """Return situations with the matrices of one example and the moments of eight.

        Directions that the matrices do not know carry gradient then.
        """

        def known_to_one(situation: Situation) -> Situation:
            one = Situation.of(situation.basis, situation.curvature, situation.case.rows([0]))
            return situation.refreshed(matrices=one.matrices)

        return self.regular_situations().map(known_to_one)

    def grouped(self) -> st.SearchStrategy[Situation] | st.SearchStrategy[None]:
        """Return layers with groups; nothing where the curvature supports none."""
        curvature, probe = self.measure(), torch.nn.Conv1d(2, 2, 1, groups=2)
        if curvature.unsupported(probe) is not None:
            return st.none()
        convolutions = [
            kind.cases
            for kind in kinds()
            if any(isinstance(each, torch.nn.Conv1d) for each in kind.probes)
        ]
        grouped = st.one_of(convolutions).filter(
            lambda case: case.module.groups > 1 and curvature.unsupported(case.module) is None
        )
        return situations(self.subject(), curvature, grouped, bare=True)

    def single_rows(self) -> st.SearchStrategy[Situation]:
        """Return situations of one example with T = 1."""
        curvature = self.measure()
        supported = [kind for kind in kinds() if kind.supported_by(curvature)]
        known = [kind.single_row for kind in supported if kind.single_row is not None]
        cases = st.one_of(known) if known else self.cases()
        taken = cases.filter(lambda case: curvature.unsupported(case.module) is None)
        made = st.builds(
            lambda case, seed: Situation.of(self.subject(), curvature, case.rows([0]), seed=seed),
            taken,
            seeds(),
        )
        return made.filter(lambda situation: situation.samples.positions == 1)

    def scaled(self) -> st.SearchStrategy[Situation] | st.SearchStrategy[None]:
        """Return situations in float32, of every scale from 1e-20 to 1e20; nothing without an F.

        Matrices and F lie in this range, the damping goes with F, and the preconditioned form of
        the gradient can be represented.
        """
        return st.none() if self.waives("fisher") else _scaled(self)

    def turned(self, name: str, matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Return the matrix called `name` in rotated coordinates.

        Known for A and G. Override it for a basis that claims a law on rotations and requires
        others.

        Args:
            name: Which matrix it is.
            matrix: It, `[..., n, n]`.
            left: What output gradients are multiplied by, orthogonal.
            right: What inputs are multiplied by, orthogonal.

        Raises:
            OptionError: It is not known.
        """
        if name not in ("A", "G"):
            raise OptionError(
                f"{self.label()} claims a law on rotated coordinates, and what becomes of its "
                f"matrix {name!r} in these is not known. Override "
                "`turned(self, name, matrix, left, right)` in the class."
            )
        rotation = right if name == "A" else left
        return rotation @ matrix @ rotation.transpose(-1, -2)


@st.composite
def _scaled(draw: st.DrawFn, frame: BasisFrame) -> Situation:
    without_bias = frame.cases().filter(lambda case: "bias" not in case.layer.parameters)
    case, seed = draw(without_bias), draw(seeds())
    case = enlarged(case, draw(st.sampled_from([1, 6])), seed).to(torch.float32)
    inputs = draw(st.integers(-10, 10)) if case.inputs.is_floating_point() else 0
    gradients = draw(st.integers(max(-10, -10 - inputs), min(10, 10 - inputs)))
    case = case.times(inputs=10.0**inputs, gradients=10.0**gradients)
    found = Situation.of(frame.subject(), frame.measure(), case, seed=seed)
    size = float(mean_diagonal(dense(found.multiply, found.gradient)).mean())
    exponent = 2 * (inputs + gradients)
    ends = max(-20, exponent - 30), min(20, exponent + 30)
    scale = 10.0 ** draw(st.sampled_from(ends) | st.integers(*ends))
    damping = draw(st.sampled_from([0.01, 1.0, 100.0])) * (size or 10.0**exponent)
    return found.refreshed(gradient=found.gradient * scale, damping=damping)


def _only_inside(curvature: Curvature) -> bool:
    """Return whether a curvature takes modules whose layers lie inside, and no plain layers."""
    inside = any(kind.supported_by(curvature) for kind in kinds_inside())
    return inside and not any(kind.supported_by(curvature) for kind in kinds())


def _names(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))


def same(actual: Tensor, expected: Tensor, says: str, tolerance: float = 1e-7) -> None:
    """Assert that two tensors are equal but for rounding, relative to the largest expected."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    close(actual.double(), expected.double(), says, rtol=tolerance, atol=tolerance * largest)


def inner(x: Tensor, y: Tensor) -> float:
    """Return `<x, y>` in float64."""
    return float((x.double() * y.double()).sum())
