"""Laws of links: on all layers together they are linear, self-adjoint and positive definite."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from kfactk.samples import Samples, Statistic
from kfactk.stages import Layer, Link, LinkedLayer, Tensors
from kfactk.testing._support.division import InRecipe
from kfactk.testing._support.laws import close, law
from kfactk.testing._support.training import Training, flattened, identical, through_file

F64 = torch.float64
STEPS = 3


@attrs.frozen(eq=False)
class Linear(LinkedLayer):
    """A linear layer whose A and G are sums over the rows of its samples, one an example."""

    @property
    def has_rows(self) -> bool:
        """It has."""
        return True

    def factor_rows(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the inputs and the output gradients."""
        return samples.inputs(), samples.gradients()


@attrs.frozen(eq=False)
class Chain:
    """Layers of one model with what they saw of a batch, and their preconditioner.

    Args:
        layers: In the model's order; each takes what the one before it gives.
        inputs: Of each layer, `[N, 1, d_in]`, bias included.
        gradients: Of each layer, `[N, 1, d_out]`.
        draws: Where vectors are drawn.
    """

    layers: Sequence[LinkedLayer]
    inputs: Sequence[Tensor]
    gradients: Sequence[Tensor]
    draws: torch.Generator

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.inputs[0])

    def samples(self, number: int, rows: slice = slice(None)) -> Samples:
        """Return what one layer saw of some examples."""
        a, g = self.inputs[number][rows], self.gradients[number][rows]
        return Samples(a, g, num_terms=float(len(a)))

    def vector(self) -> dict[str, Tensor]:
        """Draw a gradient of all layers."""
        return {
            each.name: torch.randn(each.shape, generator=self.draws, dtype=F64)
            for each in self.layers
        }

    def alone(self, vector: Tensors) -> dict[str, Tensor]:
        """Return what the blocks make of a gradient: damped K-FAC, by its dense matrices."""
        found = {}
        for each in self.layers:
            if each.name in vector:
                root = each.damping**0.5
                a, g = (m + root * torch.eye(len(m), dtype=F64) for m in _factors(each))
                found[each.name] = torch.linalg.solve(
                    a, torch.linalg.solve(g, vector[each.name]), left=False
                )
        return found


def _factors(layer: LinkedLayer) -> tuple[Tensor, Tensor]:
    return layer.matrices["A"], layer.matrices["G"]


@st.composite
def chains(draw: st.DrawFn, fewest: int = 1, most: int = 4) -> Chain:
    """Draw a chain of layers with a bias, a batch of up to 6 examples, and dampings.

    Args:
        draw: Given by Hypothesis.
        fewest: Least number of layers.
        most: Largest number of layers.
    """
    seed, count, examples = (
        draw(st.integers(0, 2**16)),
        draw(st.integers(fewest, most)),
        draw(st.integers(1, 6)),
    )
    sizes = draw(st.lists(st.integers(1, 3), min_size=count + 1, max_size=count + 1))
    damping = draw(st.sampled_from([1e-3, 0.1, 10.0]))
    generator = torch.Generator().manual_seed(seed)
    layers, inputs, gradients = [], [], []
    for number, (d_in, d_out) in enumerate(itertools.pairwise(sizes)):
        a, g = (
            torch.randn(examples, 1, size, generator=generator, dtype=F64) for size in (d_in, d_out)
        )
        a = torch.cat([a, torch.ones(examples, 1, 1, dtype=F64)], -1)
        g *= 10.0 ** draw(st.integers(-2, 1))
        module = nn.Linear(d_in, d_out, dtype=F64)
        matrices = {
            name: rows.flatten(0, 1).T @ rows.flatten(0, 1) / examples
            for name, rows in (("A", a), ("G", g))
        }
        layer = Layer(str(number), module, ("weight", "bias"))
        layers.append(Linear(layer, (d_out, d_in + 1), damping, matrices))
        inputs.append(a)
        gradients.append(g)
    return Chain(layers, inputs, gradients, generator)


class LinkLaws(InRecipe):
    """Laws of every link.

    They try it on chains of linear layers whose blocks are damped K-FAC, and in a recipe. A link
    that does not work with the default basis names another one in `in_recipe`.

    Example:
        >>> class TestTwoLevel(LinkLaws):
        ...     stage = "two_level"
        >>> TestTwoLevel().test_correction_is_self_adjoint()
    """

    family = "link"

    def measured(self, chain: Chain, rows: slice = slice(None)) -> dict[str, Statistic]:
        """Return what the link measures of some examples of the chain."""
        stage: Link = self.subject()
        kept = {
            layer.name: stage.rows(layer, chain.samples(number, rows))
            for number, layer in enumerate(chain.layers)
        }
        terms = len(range(*rows.indices(chain.examples)))
        return stage.statistics(chain.layers, kept, float(terms))

    def corrected(self, chain: Chain, vector: Tensors) -> dict[str, Tensor]:
        """Return what the blocks and the link make of a gradient."""
        stage: Link = self.subject()
        statistics = {
            name: each.total / each.count
            for name, each in self.measured(chain).items()
            if each.total is not None
        }
        statistics |= stage.prepare(chain.layers, statistics).tensors
        alone = chain.alone(vector)
        copies = {name: tensor.clone() for name, tensor in alone.items()}
        found = stage.correct(chain.layers, vector, alone, statistics)
        for name, tensor in copies.items():
            assert torch.equal(alone[name], tensor), (
                f"what the block made of the gradient of layer {name!r} was modified"
            )
        wanted = {name: tuple(tensor.shape) for name, tensor in vector.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        assert shapes == wanted, f"the shapes {shapes} are not those of the gradients, {wanted}"
        return found

    @law(chain=chains(), scale=st.floats(-3, 3))
    def test_correction_is_linear(self, chain: Chain, scale: float) -> None:
        """The corrected preconditioner of `x + s y` is that of x plus s times that of y."""
        x, y = chain.vector(), chain.vector()
        both = self.corrected(chain, {name: x[name] + scale * y[name] for name in x})
        one, other = self.corrected(chain, x), self.corrected(chain, y)
        sums = {name: one[name] + scale * other[name] for name in x}
        _same(both, sums, "the correction is not linear")

    @law(chain=chains())
    def test_correction_is_self_adjoint(self, chain: Chain) -> None:
        """`<x, P y> = <P x, y>` on all layers together."""
        x, y = chain.vector(), chain.vector()
        one, other = _dot(x, self.corrected(chain, y)), _dot(self.corrected(chain, x), y)
        size = _dot(x, self.corrected(chain, x)) + _dot(y, self.corrected(chain, y))
        close(
            one / size,
            other / size,
            "the corrected preconditioner is not self-adjoint on all layers together",
        )

    @law(chain=chains())
    def test_correction_is_positive_definite(self, chain: Chain) -> None:
        """`<x, P x> > 0` on all layers together."""
        x = chain.vector()
        product = float(_dot(x, self.corrected(chain, x)))
        assert product > 0, f"<x, P x> is {product}: not positive definite"

    @law(chain=chains(most=1))
    def test_one_layer_is_left_as_it_is(self, chain: Chain) -> None:
        """With one layer the preconditioner is that of its block."""
        x = chain.vector()
        _same(self.corrected(chain, x), chain.alone(x), "a layer alone was changed by the link")

    @law(chain=chains(fewest=2), data=st.data())
    def test_layers_without_a_gradient_count_as_zero(
        self, chain: Chain, data: st.DataObject
    ) -> None:
        """Leaving a layer out of the gradients is the same as a gradient of zeros."""
        x = chain.vector()
        left = data.draw(st.sampled_from(sorted(x)), label="left out")
        without = self.corrected(chain, {name: each for name, each in x.items() if name != left})
        zero = self.corrected(chain, {**x, left: torch.zeros_like(x[left])})
        del zero[left]
        _same(without, zero, f"layer {left!r} has no gradient, and does not count as zero")

    @law(chain=chains(fewest=2))
    def test_statistics_are_sums_over_examples(self, chain: Chain) -> None:
        """Those of two halves of a batch add up to those of the whole; without any, they are 0."""
        whole, half = self.measured(chain), chain.examples // 2
        parts = self.measured(chain, slice(0, half)), self.measured(chain, slice(half, None))
        stage: Link = self.subject()
        none = stage.statistics(chain.layers, {}, 0.0)
        for name, each in whole.items():
            total = (parts[0][name] + parts[1][name]).total
            assert each.total is not None
            assert total is not None
            close(total, each.total, f"{name} of a batch in two parts is not that of the whole")
            zero = none[name].total
            assert zero is not None, f"{name} has no tensor where no layer ran: give zeros"
            assert zero.shape == each.total.shape, f"the shape of {name} depends on the data"
            assert not zero.any(), f"{name} is not zero where no layer ran"

    @law(examples=20, chain=chains())
    def test_what_is_prepared_is_what_was_told(self, chain: Chain) -> None:
        """`preparation` names what `prepare` makes, with its shapes, or tells nothing."""
        stage: Link = self.subject()
        told = stage.preparation(chain.layers)
        if told is None:
            return
        statistics = {
            name: each.total / each.count
            for name, each in self.measured(chain).items()
            if each.total is not None
        }
        made = stage.prepare(chain.layers, statistics).tensors
        shapes = {name: tuple(tensor.shape) for name, tensor in made.items()}
        wanted = {name: tuple(shape) for name, shape in told.tensors.items()}
        assert shapes == wanted, f"prepare made {shapes}, and preparation told {wanted}"
        counts = (*told.eigh, *told.cholesky, told.products, told.triangular, told.workspace)
        assert all(0 <= each < math.inf for each in counts), f"preparation told {told}"

    @law()
    def test_a_resumed_run_is_the_uninterrupted_one(self) -> None:
        """What was measured is saved: a loaded run goes on bit for bit."""
        training, recipe = Training(), {"update": torch.optim.SGD, **self.in_recipe()}
        made = training.build(recipe)
        model, optimizer = training.run(made, STEPS)
        resumed_model, resumed = training.run(made, 1)
        resumed_model.load_state_dict(model.state_dict())
        resumed.load_state_dict(through_file(optimizer.state_dict()))
        for number in range(STEPS, STEPS + 2):
            training.step(optimizer, model, number)
            training.step(resumed, resumed_model, number)
        saved: list[Any] = [flattened(each.state_dict()) for each in (optimizer, resumed)]
        assert any(".link." in name for name, _ in saved[0]), "nothing of the link is in the state"
        identical(saved[0], saved[1], "a resumed run has left the uninterrupted one")
        for one, other in zip(model.parameters(), resumed_model.parameters(), strict=True):
            close(other, one, "a resumed run has other parameters", rtol=0, atol=0)


def _dot(x: Tensors, y: Tensors) -> Tensor:
    return torch.stack([(x[name] * y[name]).sum() for name in x]).sum()


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], says: str) -> None:
    for name, tensor in expected.items():
        size = float(tensor.abs().max())
        close(found[name], tensor, f"{says}: layer {name!r}", rtol=1e-8, atol=1e-8 * size + 1e-12)
