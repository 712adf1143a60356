"""The laws of curvatures: what flows through a layer becomes the right matrices.

Per-example gradients and the order of the weights are compared with autograd, example by example.
Factors may be of any kind: each must be a mean over examples. A and G, where a stage provides them,
must be the Kronecker factors.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from random import Random
from typing import Any

import attrs
import pytest
import torch
from hypothesis import assume, strategies as st
from torch import Tensor

from kfactk.sides import is_diagonal, names_of, slices_of
from kfactk.testing._support import truth
from kfactk.testing._support.division import CurvatureInRecipe
from kfactk.testing._support.laws import close, law
from kfactk.testing._support.layers import (
    KNOWN,
    OnLayers,
    averaged,
    near,
    present,
    reason_against,
    same,
    undone,
)
from kfactk.testing._support.strategies import (
    Case,
    binary_exponents,
    decimal_exponents,
    dtypes,
    foreign_modules,
    seeds,
    tampered,
)

LARGEST, SMALLEST = 1e37, 1e-36
"""Between these, float32 represents a number to full precision, with room for a sum."""


class CurvatureLaws(OnLayers, CurvatureInRecipe):
    """The laws that every curvature obeys.

    By default the laws draw all configurations of the layers that the strategies know and that
    `unsupported` accepts: linear layers, convolutions, transposed convolutions, layer norm,
    embeddings and bags of them, attention. Override `cases` and `covers` for a layer of another
    class; `single_row_cases` for Kronecker factors that approximate even where there is one row;
    `arranged` for a stage with the examples elsewhere than in dim 0. Where calls of a module run
    again (`replay`), the laws see the calls inside.

    Example:
        >>> class TestKfac(CurvatureLaws):
        ...     stage = "kfac"
    """

    @law(case="cases")
    def test_tensors_is_the_inverse_of_matrix(self, case: Case) -> None:
        """Parameters become a matrix and come back exactly, with names, shapes and order."""
        undone(self.curvature, case.layer)

    @law(case="known_cases")
    def test_matrix_has_the_order_of_the_convention(self, case: Case) -> None:
        """Rows are outputs; columns are inputs as in `weight.reshape(d_out, -1)`, the bias last.

        Groups come first.
        """
        tensors = {name: parameter.detach() for name, parameter in case.layer.tensors().items()}
        matrix = self.curvature.matrix(case.layer, tensors)
        says = "the matrix is not [..., d_out, d_in] with the bias as last column"
        close(matrix, truth.as_matrix(case.module, tensors), says, rtol=0)

    @law(case="cases", some=st.integers(0, 2))
    def test_per_example_gradients_are_autograds(self, case: Case, some: int) -> None:
        """Each D is what autograd gives for that example alone, summed over the layer's calls.

        All D sum to the gradient of the summed loss.
        """
        samples, expected = self.samples(case), self.gradients(case)
        found = samples.per_example_gradients()
        says = "the per-example gradients D_n = sum_t g a^T differ from those of autograd, example "
        close(found, expected, says + "by example")
        sizes = (samples.examples, samples.d_out, samples.d_in)
        assert sizes == expected.shape[-3:], (
            f"(examples, d_out, d_in) is {sizes}, the per-example gradients have "
            f"{list(expected.shape)}"
        )
        rows = slice(some, some + 1)
        says = f"the gradients of the examples {some}:{some + 1} are others"
        close(samples.per_example_gradients(rows), expected[..., rows, :, :], says)
        parameters = case.layer.tensors()
        total = sum(((case.output(x) * g).sum() for x, g in case.calls), torch.zeros(()))
        gradients = torch.autograd.grad(total, list(parameters.values()))
        whole = dict(zip(parameters, gradients, strict=True))
        says = "the per-example gradients do not sum to autograd's gradient of the summed loss"
        close(found.sum(-3), self.curvature.matrix(case.layer, whole), says)

    @law(case="known_cases", num_terms=st.sampled_from([None, 3.5]))
    def test_moments_are_sums_over_rows(self, case: Case, num_terms: float | None) -> None:
        """Moments are sums of a a^T and g g^T over all rows, counted by examples and by terms."""
        samples, bias = self.samples(case, num_terms=num_terms), "bias" in case.layer.parameters
        a = torch.cat([truth.input_rows(case.module, x, bias=bias) for x, _ in case.calls], -2)
        g = torch.cat([truth.output_rows(case.module, g) for _, g in case.calls], -2)
        examples = len(case.inputs)
        terms = examples if num_terms is None else num_terms
        for what, moment, rows, count in (
            ("input_moment", samples.input_moment(), a, examples),
            ("grad_moment", samples.grad_moment(), g, terms),
        ):
            says = f"{what}() of the samples is not the sum of r r^T over the rows r"
            close(present(moment.total), truth.moment(rows), says)
            assert float(moment.count) == count, (
                f"{what}() of the samples is counted {float(moment.count)} times, not {count}"
            )

    @law(case="cases", seed=seeds(), sides=st.sampled_from(["", "left", "right", "left and right"]))
    def test_projected_square_is_that_of_the_gradients(
        self, case: Case, seed: int, sides: str
    ) -> None:
        """`projected_square` is the sum over examples of the squares of `left^T D_n right`."""
        samples, d = self.samples(case, num_terms=2.0), self.gradients(case)
        rotations = dict(zip(("left", "right"), rotations_of(d, seed), strict=True))
        left, right = (rotation if side in sides else None for side, rotation in rotations.items())
        found = samples.projected_square(left, right)
        says = f"projected_square({sides or 'no rotation'}) is not sum_n (left^T D_n right)^2"
        close(present(found.total), truth.projected_square(d, left, right), says)
        assert float(found.count) == 2.0, (
            f"projected_square is counted {float(found.count)} times, not by its 2 likelihood terms"
        )

    @law(case="cases")
    def test_what_is_assembled(self, case: Case) -> None:
        """`assemble` returns the tensors named in `provides`; A and G are positive semi-definite.

        They are symmetric too.
        """
        found, stand_ins = self.matrices(case), self.curvature.stand_ins(case.layer)
        provides = {
            each for name in self.curvature.provides for each in stand_ins.get(name, (name,))
        }
        assert set(found) == provides, (
            f"assemble() returns {sorted(found)}, where `provides` and `stand_ins` say "
            f"{sorted(provides)}"
        )
        shape = self.curvature.matrix(case.layer, case.layer.tensors()).shape
        for name, tensor in found.items():
            assert tensor.isfinite().all(), f"{name} is not finite: {tensor.tolist()}"
            if name not in ("A", "G"):
                continue
            side = shape[-1] if name == "A" else shape[-2]
            expected = (*shape[:-2], side, side)
            assert tensor.shape == expected, (
                f"{name} has shape {list(tensor.shape)}; for a matrix {list(shape)} it must be "
                f"{list(expected)}"
            )
            close(tensor, tensor.mT, f"{name} is not symmetric")
            values = torch.linalg.eigvalsh(tensor)
            least, largest = float(values.min()), float(values.abs().max())
            assert least >= -1e-10 * largest, (
                f"{name} is not positive semi-definite: it has the eigenvalue {least:.3g}, beside "
                f"{largest:.3g}"
            )

    @law(case="cases", num_terms=st.sampled_from([1.0, 3.5]))
    def test_rows_make_the_factors(self, case: Case, num_terms: float) -> None:
        """What `factor_rows` returns sums up to A and G."""
        samples = self.samples(case, num_terms=num_terms)
        rows = self.curvature.factor_rows(case.layer, samples)
        found = self.matrices(case, num_terms=num_terms)
        if rows is None or not {"A", "G"} <= found.keys():
            return
        counts = {"A": float(samples.examples), "G": num_terms}
        for (name, count), each in zip(counts.items(), rows, strict=True):
            flat = each.flatten(0, 1)
            says = f"the rows that factor_rows returns do not sum up to {name}"
            close(flat.mT @ flat / count, found[name], says)

    @law(case="single_row_cases", num_terms=st.sampled_from([1.0, 3.5]))
    def test_one_row_of_one_example_is_exact(self, case: Case, num_terms: float) -> None:
        """For one example with T = 1, A kron G is the Fisher matrix, vec(D) vec(D)^T / M."""
        one = case.rows([0])
        found = self.matrices(one, num_terms=num_terms)
        says = f"A kron G of one example with one row is not vec(D) vec(D)^T / {num_terms}"
        expected = truth.dense_fisher(self.gradients(one), num_terms)
        close(truth.dense_kron(found["A"], found["G"]), expected, says)

    @law(case="cases", random=st.randoms(use_true_random=False))
    def test_order_does_not_matter(self, case: Case, random: Random) -> None:
        """The order of the examples, and of the layer's calls, does not change the factors."""
        order, expected = list(range(len(case.inputs))), self.means(case)
        random.shuffle(order)
        says = f"the factor changes when the examples come in the order {order}"
        same(self.means(case.rows(order)), expected, says)
        (inputs, gradient), *further = case.calls[::-1]
        backwards = attrs.evolve(case, inputs=inputs, gradient=gradient, further=tuple(further))
        says = "the factor changes when the calls of the layer come in another order"
        same(self.means(backwards), expected, says)

    @law(case="cases")
    def test_duplication_does_not_matter(self, case: Case) -> None:
        """The factors are means over examples: the same batch twice has the same."""
        twice = case.rows(2 * list(range(len(case.inputs))))
        says = "the factor changes when every example comes twice; it is no mean over examples"
        same(self.means(twice), self.means(case), says)

    @law(case="cases", cut=st.integers(0, 3))
    def test_parts_of_a_batch_add_up(self, case: Case, cut: int) -> None:
        """Sums and counts of two parts of a batch, an empty one included, add to the whole's."""
        order, whole = list(range(len(case.inputs))), self.sums(case)
        one, two = self.sums(case.rows(order[:cut])), self.sums(case.rows(order[cut:]))
        assert set(one) == set(two) == set(whole), (
            f"a part of a batch gives the factors {sorted(one)} and {sorted(two)}, "
            f"not {sorted(whole)}"
        )
        for name, each in whole.items():
            joined, split = one[name] + two[name], f"a batch of {len(order)} split after {cut}"
            says = f"{name!r}: the sums of the parts of {split} do not add to that of the whole"
            close(present(joined.total), present(each.total), says)
            counts = float(joined.count), float(each.count)
            assert abs(counts[0] - counts[1]) <= 1e-9 * counts[1], (
                f"{name!r}: the counts of {split} add to {counts[0]}, not {counts[1]}"
            )

    @law(case="cases", num_terms=st.sampled_from([0.5, 3.0, 70.0]), on_device=st.booleans())
    def test_terms_normalise_the_gradients(
        self, case: Case, num_terms: float, on_device: bool
    ) -> None:
        """Factors of gradients are means over likelihood terms; those of inputs are not."""
        number = torch.tensor(num_terms, dtype=torch.float64) if on_device else num_terms
        found, alone = self.means(case, num_terms=number), self.means(case, num_terms=1.0)
        for name, degree in self._degrees(case).items():
            divided = alone[name] / (num_terms if degree else 1.0)
            due = f"1/{num_terms} of" if degree else "the same as"
            says = f"with {num_terms} likelihood terms the factor must be {due} that with one term"
            close(found[name], divided, f"{name!r}: {says}")

    @law(case="cases")
    def test_parted_factors_are_the_factors(self, case: Case) -> None:
        """`factors` is the sum of `input_factors` and `gradient_factors`, which share no name.

        The factors of inputs do not depend on gradients.
        """
        whole, blind = self.sums(case), self.samples(case.times(gradients=0.0))
        inputs = self.curvature.input_factors(case.layer, blind)
        gradients = self.curvature.gradient_factors(case.layer, self.samples(case))
        assert not inputs or self.curvature.replay(case.module) is None, (
            f"input_factors gives {sorted(inputs)}, but calls that run again are known in a Fisher "
            "pass only: leave it empty"
        )
        both = sorted([*inputs, *gradients])
        assert both == sorted(whole), (
            f"input_factors and gradient_factors give {both}, where factors gives {sorted(whole)}"
        )
        for name, each in {**inputs, **gradients}.items():
            says = f"{name!r}: the part differs from what `factors` gives"
            close(present(each.total), present(whole[name].total), says)
            assert float(each.count) == float(whole[name].count), (
                f"{name!r}: the part is counted otherwise than in `factors`"
            )

    @law(case="cases")
    def test_later_passes_count_nothing_twice(self, case: Case) -> None:
        """A second Fisher pass over a forward (`first=False`) adds gradients, but no counts.

        It adds no inputs either.
        """
        first, later, degrees = self.sums(case), self.sums(case, first=False), self._degrees(case)
        assert set(later) == set(first), (
            f"a later pass gives the factors {sorted(later)}, the first one {sorted(first)}"
        )
        for name, degree in degrees.items():
            count = float(later[name].count)
            assert count == 0, (
                f"{name!r}: a later pass over the same forward counts {count} times; it must count "
                "nothing"
            )
            joined, times = averaged({name: first[name] + later[name]})[name], 2 if degree else 1
            says = f"after two passes with the same gradients it must be {times} times that of one "
            says += "pass (inputs are taken once a forward, gradients at every pass)"
            close(joined, times * averaged(first)[name], f"{name!r}: {says}")

    @law(case="cases", power=binary_exponents())
    def test_gradients_scale_the_factors(self, case: Case, power: int) -> None:
        """Gradients times c multiply each factor by a power of c: A by none, G by c^2."""
        plain, scaled = self.means(case), self.means(case.times(gradients=2.0**power))
        for name, degree in self._degrees(case).items():
            says = f"{name!r} goes with c^{degree} at c = 2, but not at c = 2^{power}"
            close(scaled[name] / 2.0 ** (power * degree), plain[name], says)
        if {"A", "G"} <= set(self.curvature.provides):
            before, after = self.matrices(case), self.matrices(case.times(gradients=2.0**power))
            for name in names_of("A", before):
                close(after[name], before[name], f"{name} depends on the size of the gradients")
            for name in names_of("G", before):
                says = f"gradients times 2^{power} do not multiply {name} by its square"
                close(after[name] / 4.0**power, before[name], says)

    @law(case="known_cases", power=binary_exponents())
    def test_inputs_scale_the_input_factor(self, case: Case, power: int) -> None:
        """Inputs times c multiply A by c^2, and leave G alone.

        They multiply the bias' row and column of A by c, and its corner not at all.
        """
        self._want_kronecker()
        before, after = self.matrices(case), self.matrices(case.times(inputs=2.0**power))
        names = names_of("A", before)
        sizes = [before[name].shape[-1] for name in names]
        scale = torch.full((sum(sizes),), 2.0**power, dtype=torch.float64)
        if "bias" in case.layer.parameters:
            scale[-1] = 1.0
        for name, columns in zip(names, slices_of(sizes), strict=True):
            says = f"{name} does not follow the inputs when these are multiplied by 2^{power}"
            other = scale[columns] if is_diagonal(name) else scale[columns, None]
            close(after[name] / scale[columns] / other, before[name], says)
        for name in names_of("G", before):
            close(after[name], before[name], f"{name} depends on the size of the inputs")

    @law(
        case="cases",
        decade=decimal_exponents(),
        which=st.sampled_from(["inputs", "gradients", "both"]),
    )
    def test_tiny_and_huge_numbers_survive(self, case: Case, decade: int, which: str) -> None:
        """In float32 the factors are right at every scale at which float32 can represent them."""
        known = type(case.module) in KNOWN
        inputs = 10.0 ** (decade if known and which != "gradients" else 0)
        gradients = 10.0 ** (decade if which == "gradients" else 0)
        if which == "both":
            assume(abs(decade) < 18)
            gradients = 1 / inputs
        single = case.to(torch.float32).times(inputs=inputs, gradients=gradients)
        expected = self.means(single.to(torch.float64))
        for name, each in self.means(single).items():
            if not (expected[name].abs() >= LARGEST).any():
                says = f"{name!r} in float32 is not what it is in float64, for inputs times "
                says += f"{inputs:g} and gradients times {gradients:g}"
                near(each, expected[name], says, 1e-4, atol=SMALLEST)

    @law(case="cases", dtype=dtypes())
    def test_at_least_float32_is_computed_in(self, case: Case, dtype: torch.dtype) -> None:
        """Curvature is computed in float32 at least, and of float64 layers in float64."""
        self._want_own_calls(case)
        low = case.to(dtype)
        wide = low.to(torch.float64)
        working = torch.float64 if dtype == torch.float64 else torch.float32
        gradients = self.samples(low).per_example_gradients()
        found = {"per-example gradients": gradients, **self.means(low), **self.matrices(low)}
        expected = {
            "per-example gradients": self.gradients(wide),
            **self.means(wide),
            **self.matrices(wide),
        }
        for name, each in found.items():
            assert each.dtype == working, (
                f"{name!r} is {each.dtype} for {dtype}; it must be {working}"
            )
            says = f"{name!r} of {dtype} data is not computed in {working}"
            near(each, expected[name], says, 1e-5)

    @law(
        case="cases",
        power=st.sampled_from([-30, -1, 10]),
        dtype=st.sampled_from([torch.float16, torch.float64]),
        on_device=st.booleans(),
    )
    def test_the_scale_of_a_call_is_honoured(
        self, case: Case, power: int, dtype: torch.dtype, on_device: bool
    ) -> None:
        """A call's gradient counts times its `scale`, multiplied in float32 at least.

        The scale is a number or a tensor.
        """
        self._want_own_calls(case)
        low = case.to(dtype)
        numbers = [2.0 ** (power + 2 * call) for call in range(len(case.calls))]
        wide = low.to(torch.float64)
        first, *further = [
            (x, g * number) for (x, g), number in zip(wide.calls, numbers, strict=True)
        ]
        true = attrs.evolve(wide, inputs=first[0], gradient=first[1], further=tuple(further))
        scales = [torch.tensor(number) for number in numbers] if on_device else numbers
        says = f"{dtype} gradients with the scales {numbers} do not count that many times"
        found = self.samples(low, scales=scales).per_example_gradients()
        near(found, self.gradients(true), f"per-example gradients: {says}", 1e-5)
        expected = self.means(true)
        for name, each in self.means(low, scales=scales).items():
            near(each, expected[name], f"{name!r}: {says}", 1e-5)

    @law(case="cases", dtype=dtypes())
    def test_blank_tells_the_shapes(self, case: Case, dtype: torch.dtype) -> None:
        """`blank` is a call on zeros that the layer accepts; what is made of it has real shapes.

        That is factors, matrices and moments.
        """
        module, case = case.module, case.to(dtype)
        layer, real = case.layer, self.samples(case)
        call = self.curvature.blank(layer)
        assert not call.inputs.any(), "the inputs of blank() are not zero"
        assert not call.gradient.any(), "the gradient of blank() is not zero"
        if self.curvature.replay(module) is None:  # otherwise it is a call inside the module
            inputs = call.inputs.double() if call.inputs.is_floating_point() else call.inputs
            shape = module(inputs).shape
            assert call.gradient.shape == shape, (
                f"blank() has a gradient {list(call.gradient.shape)}, the layer's output for its "
                f"inputs is {list(shape)}"
            )
        blank = self.curvature.samples(layer, [call], num_terms=1.0, first=True)
        assert blank.examples == 1, (
            f"blank() must be one example, the smallest call; it has {blank.examples}"
        )
        found: dict[str, list[dict[str, str]]] = {"factors": [], "matrices": [], "moments": []}
        for samples in (blank, real):
            means = averaged(self.curvature.factors(layer, samples))
            square = present(samples.projected_square(None, None).total)
            found["factors"].append(described(means))
            found["matrices"].append(described(self.curvature.assemble(layer, means)))
            found["moments"].append(described({"square": square}))
        for what, (of_blank, of_data) in found.items():
            assert of_blank == of_data, f"{what} of blank() are {of_blank}, those of data {of_data}"

    @law(case="cases", size=st.sampled_from([1, 300, 3000]))
    def test_chunks_do_not_matter(self, case: Case, size: int) -> None:
        """Statistics do not depend on the option `chunk_bytes`, where a stage has it."""
        stage: Any = self.curvature
        if not (attrs.has(type(stage)) and "chunk_bytes" in attrs.fields_dict(type(stage))):
            pytest.skip(f"{self.label()} has no option chunk_bytes")
        chunked = type(self)()
        chunked.curvature = attrs.evolve(stage, chunk_bytes=size)
        same(chunked.means(case), self.means(case), f"the factor changes with chunk_bytes={size}")
        samples, others = self.samples(case), chunked.samples(case)
        rotations = rotations_of(samples.per_example_gradients(), 0)
        expected, found = (
            {"projected square": present(each.projected_square(*rotations).total)}
            for each in (samples, others)
        )
        same(found, expected, f"it changes with chunk_bytes={size}")

    @law(case="cases")
    def test_nothing_is_changed(self, case: Case) -> None:
        """A stage has no state: it changes nothing it is given and repeats itself.

        It draws no global random numbers either.
        """
        given = [*case.module.parameters(), *itertools.chain(*case.calls)]
        kept = [tensor.detach().clone() for tensor in given]
        random, before = torch.get_rng_state(), self.means(case)
        self.matrices(case)
        self.samples(case).projected_square(None, None)
        says = "a second call with the same data gives another factor"
        same(self.means(case), before, says, rtol=0, atol=0)
        for was, now in zip(kept, given, strict=True):
            assert torch.equal(was, now), (
                f"a tensor {list(was.shape)} that the stage was given was changed in place"
            )
        assert all(parameter.grad is None for parameter in case.module.parameters()), (
            "the stage filled .grad of a parameter"
        )
        assert torch.equal(random, torch.get_rng_state()), (
            "the stage draws from the global random numbers"
        )

    @law(case="cases")
    def test_what_cannot_be_treated_is_refused(self, case: Case) -> None:
        """`unsupported` refuses every form of a layer that computes or trains something else.

        It says why.
        """
        for what, module in tampered(case.module):
            assert reason_against(self.curvature, module, what), (
                f"unsupported() accepts {what}; its gradients would be taken for those of the "
                "plain layer"
            )

    @law()
    def test_unrelated_modules_are_refused(self) -> None:
        """`unsupported` gives a reason for modules of other classes, and never raises."""
        for module in foreign_modules():
            name = type(module).__name__
            if reason_against(self.curvature, module, name) is None:
                assert type(module) in self.covers, (
                    f"unsupported() accepts {name}, for which no data is drawn, so whether it is "
                    "treated exactly is not tested. Refuse it; or add it to `covers` of this class "
                    "and draw it in `cases`"
                )


def described(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return shape and precision of each tensor."""
    return {
        name: f"{list(tensor.shape)} {tensor.dtype}" for name, tensor in sorted(tensors.items())
    }


def rotations_of(gradients: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return square matrices of normal numbers for both sides of `[..., N, d_out, d_in]`."""
    generator, lead = torch.Generator().manual_seed(seed), gradients.shape[:-3]
    left, right = (
        torch.randn(*lead, size, size, generator=generator, dtype=gradients.dtype)
        for size in gradients.shape[-2:]
    )
    return left, right
