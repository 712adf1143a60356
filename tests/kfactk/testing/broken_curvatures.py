"""Curvatures each of which breaks a law, and what the law says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import nn

from kfactk import Layer, LayerCall, Samples, Statistic
from kfactk_stages.curvature.attention import Attention
from kfactk_stages.curvature.conv_kfac import ConvKfac
from kfactk_stages.curvature.kfac import Kfac


def stage(base: type = Kfac, **members: Any) -> Any:
    return type("Broken", (base,), members)()


def joined(self: Kfac, layer: Layer, calls: Sequence[LayerCall], **how: Any) -> Samples:
    return Kfac.samples(self, layer, calls, **how)


def with_factors(change: Any, base: type = Kfac) -> Any:
    """A stage whose A and G went through a function of their name, statistic and samples."""

    def changed(part: str) -> Any:
        def factors(self, layer, samples):
            found = getattr(base, part)(self, layer, samples)
            return {name: change(name, each, samples) for name, each in found.items()}

        return factors

    parts = {part: changed(part) for part in ("input_factors", "gradient_factors")}
    return stage(base, **parts)


def with_assembled(change: Any, base: type = Kfac) -> Any:
    def assemble(self, layer, factors):
        return {
            name: change(name, each) for name, each in base.assemble(self, layer, factors).items()
        }

    return stage(base, assemble=assemble)


def with_calls(change: Any, base: type = Kfac) -> Any:
    """A stage that sees other calls than it is given."""

    def samples(self, layer, calls, **how):
        return base.samples(self, layer, change(layer, calls), **how)

    return stage(base, samples=samples)


def with_samples(**members: Any) -> Any:
    """A stage whose samples have other methods."""

    def samples(self, layer, calls, **how):
        found = Kfac.samples(self, layer, calls, **how)
        found.__class__ = type("BrokenSamples", (type(found),), members)
        return found

    return stage(samples=samples)


def total(change: Any) -> Any:
    """Change the sum alone, where there is one."""
    return lambda name, each, samples: attrs.evolve(
        each, total=None if each.total is None else change(name, each.total, samples)
    )


def peek(samples: Samples) -> float:
    return float(samples.gradients().square().sum())


def bias_first(self, layer, tensors):
    matrix = Kfac.matrix(self, layer, tensors)
    return matrix.roll(1, -1) if layer.bias else matrix


def bias_first_back(self, layer, matrix):
    return Kfac.tensors(self, layer, matrix.roll(-1, -1) if layer.bias else matrix)


def without_last_chunk(name: str, each: Statistic, samples: Samples) -> Statistic:
    rows = list(samples.chunks(samples.positions * samples.d_in))
    return each if len(rows) < 2 else Statistic(each.total * 0.5, each.count)


class Remembering(Kfac):
    """Its first batch stays in the sums of the later ones."""

    before: ClassVar[dict[str, Any]] = {}

    def input_factors(self, layer, samples):
        found = super().input_factors(layer, samples)
        seen = self.before.setdefault("calls", [])
        seen.append(1)
        return {
            name: attrs.evolve(s, total=None if s.total is None else s.total * len(seen))
            for name, s in found.items()
        }


BREAKS: dict[str, tuple[str, Any, str]] = {
    "tensors flips": (
        "test_tensors_is_the_inverse_of_matrix",
        stage(
            tensors=lambda self, layer, matrix: {
                n: t.flip(0) for n, t in Kfac.tensors(self, layer, matrix).items()
            }
        ),
        r"tensors\(matrix\(x\)\) differs from x in 'weight'",
    ),
    "tensors in another order": (
        "test_tensors_is_the_inverse_of_matrix",
        stage(
            tensors=lambda self, layer, matrix: dict(
                reversed(Kfac.tensors(self, layer, matrix).items())
            )
        ),
        r"as the layer does, \['weight', 'bias'\]; it gave \['bias', 'weight'\]",
    ),
    "matrix forgets the bias": (
        "test_tensors_is_the_inverse_of_matrix",
        stage(matrix=lambda self, layer, tensors: tensors["weight"]),
        r"matrix\(\) must hold each of the \d+ numbers of weight, bias once; "
        r"from 0, 1, 2, ... it made \[\[",
    ),
    "bias first": (
        "test_matrix_has_the_order_of_the_convention",
        stage(matrix=bias_first, tensors=bias_first_back),
        "the bias as last column",
    ),
    "only the first call": (
        "test_per_example_gradients_are_autograds",
        with_calls(lambda layer, calls: calls[:1]),
        "differ from those of autograd, example by example",
    ),
    "frozen bias has a column": (
        "test_per_example_gradients_are_autograds",
        stage(
            samples=lambda self, layer, calls, **how: joined(
                self, Layer("", layer.module, ("weight", "bias")), calls, **how
            )
        ),
        "differ from those of autograd",
    ),
    "no groups": (
        "test_per_example_gradients_are_autograds",
        with_calls(
            lambda layer, calls: [attrs.evolve(u, inputs=u.inputs.flip(1)) for u in calls], ConvKfac
        ),
        "differ from those of autograd",
    ),
    "tokens are examples": (
        "test_per_example_gradients_are_autograds",
        with_calls(
            lambda layer, calls: [
                LayerCall(u.inputs.flatten(0, -2), u.gradient.flatten(0, -2), u.scale)
                for u in calls
            ]
        ),
        "(differ from those of autograd|different numbers of examples)",
    ),
    "slices are ignored": (
        "test_per_example_gradients_are_autograds",
        with_samples(
            per_example_gradients=lambda self, rows=None: self.gradients().mT @ self.inputs()
        ),
        r"the gradients of the examples \d:\d are others",
    ),
    "input moment counts terms": (
        "test_moments_are_sums_over_rows",
        with_samples(
            input_moment=lambda self: Statistic(Samples.input_moment(self).total, self.num_terms)
        ),
        r"input_moment\(\) of the samples is counted 3.5 times, not \d",
    ),
    "input moment is a mean": (
        "test_moments_are_sums_over_rows",
        with_samples(
            input_moment=lambda self: Samples.input_moment(self).scaled(1 / self.positions)
        ),
        r"input_moment\(\) of the samples is not the sum of r r\^T",
    ),
    "projection transposed": (
        "test_projected_square_is_that_of_the_gradients",
        with_samples(
            projected_square=lambda self, left, right: Samples.projected_square(
                self, None if left is None else left.mT, right
            )
        ),
        r"projected_square\(left.*\) is not sum_n \(left\^T D_n right\)\^2",
    ),
    "provides less": (
        "test_what_is_assembled",
        stage(assemble=lambda self, layer, factors: {"A": factors["A"]}),
        r"assemble\(\) returns \['A'\], where `provides` and `stand_ins` say \['A', 'G'\]",
    ),
    "A and G swapped": (
        "test_what_is_assembled",
        stage(assemble=lambda self, layer, factors: {"A": factors["G"], "G": factors["A"]}),
        r"A has shape \[\d, \d\]; for a matrix \[\d, \d\] it must be",
    ),
    "triangle of G": (
        "test_what_is_assembled",
        with_assembled(lambda name, m: m.tril()),
        "is not symmetric",
    ),
    "shifted A": (
        "test_what_is_assembled",
        with_assembled(lambda name, m: m - m.trace() * torch.eye(len(m), dtype=m.dtype)),
        "is not positive semi-definite: it has the eigenvalue -",
    ),
    "infinite": (
        "test_what_is_assembled",
        with_assembled(lambda name, m: m / 0),
        "A is not finite",
    ),
    "no 1/M": (
        "test_one_row_of_one_example_is_exact",
        with_factors(lambda name, s, samples: Statistic(s.total, float(samples.examples))),
        r"A kron G of one example with one row is not vec\(D\) vec\(D\)\^T / 3.5",
    ),
    "centred": (
        "test_one_row_of_one_example_is_exact",
        with_factors(total(lambda name, t, samples: t - t.mean() if name == "A" else t)),
        "A kron G of one example with one row is not",
    ),
    "first example weighs double": (
        "test_order_does_not_matter",
        with_factors(
            total(
                lambda name, t, s: (
                    t + s.inputs(slice(0, 1))[0].mT @ s.inputs(slice(0, 1))[0] if name == "A" else t
                )
            )
        ),
        "'A': the factor changes when the examples come in the order",
    ),
    "the last call's gradients": (
        "test_order_does_not_matter",
        with_calls(
            lambda layer, calls: [
                attrs.evolve(u, gradient=u.gradient * (i + 1)) for i, u in enumerate(calls)
            ]
        ),
        "'G': the factor changes when the calls of the layer come in another order",
    ),
    "divided twice": (
        "test_duplication_does_not_matter",
        with_factors(total(lambda name, t, samples: t / samples.examples)),
        "'A': the factor changes when every example comes twice; it is no mean over examples",
    ),
    "mean in place of the sum": (
        "test_parts_of_a_batch_add_up",
        with_factors(
            lambda name, s, samples: Statistic(
                None if s.total is None else s.total / max(samples.examples, 1),
                float(samples.examples > 0),
            )
        ),
        r"'A': the sums of the parts of a batch of \d split after \d do not add to that",
    ),
    "counts one a batch": (
        "test_parts_of_a_batch_add_up",
        with_factors(lambda name, s, samples: Statistic(s.total, s.count * 0 + 1.0)),
        r"'A': the counts of a batch of \d split after \d add to 2.0, not 1.0",
    ),
    "an empty batch fails": (
        "test_parts_of_a_batch_add_up",
        with_factors(
            lambda name, s, samples: Statistic(
                s.total, s.count / float(samples.examples) * float(samples.examples)
            )
        ),
        "division by zero",
    ),
    "gradients by examples": (
        "test_terms_normalise_the_gradients",
        with_factors(lambda name, s, samples: Statistic(s.total, float(samples.examples))),
        r"'G': with .* likelihood terms the factor must be 1/.* of that with one term",
    ),
    "inputs by terms": (
        "test_terms_normalise_the_gradients",
        with_factors(lambda name, s, samples: Statistic(s.total, samples.num_terms)),
        r"'A': with .* likelihood terms the factor must be the same as that with one term",
    ),
    "later passes count": (
        "test_later_passes_count_nothing_twice",
        stage(
            samples=lambda self, layer, calls, num_terms, first: joined(
                self, layer, calls, num_terms=num_terms, first=True
            )
        ),
        "'A': a later pass over the same forward counts",
    ),
    "later passes add nothing": (
        "test_later_passes_count_nothing_twice",
        with_factors(lambda name, s, samples: s if samples.first else Statistic(None, 0.0)),
        "'G': after two passes with the same gradients it must be 2 times that of one pass",
    ),
    "small numbers cut off": (
        "test_gradients_scale_the_factors",
        with_assembled(lambda name, m: torch.where(m.abs() < 1e-10, 0.0, m)),
        r"gradients times 2\^-\d+ do not multiply G by its square",
    ),
    "jitter": (
        "test_gradients_scale_the_factors",
        with_factors(total(lambda name, t, samples: t + 1e-10 * torch.eye(len(t), dtype=t.dtype))),
        r"'G' goes with c\^2 at c = 2, but not at c = 2\^-",
    ),
    "normalised inputs": (
        "test_inputs_scale_the_input_factor",
        with_assembled(lambda name, m: m / m.trace() if name == "A" else m),
        r"A does not follow the inputs when these are multiplied by 2\^",
    ),
    "fourth powers": (
        "test_tiny_and_huge_numbers_survive",
        with_factors(total(lambda name, t, samples: t.pow(3) / t.square().clamp(min=1e-300))),
        "'[AG]' in float32 is not what it is in float64, for inputs times",
    ),
    "half precision": (
        "test_at_least_float32_is_computed_in",
        with_calls(
            lambda layer, calls: [
                attrs.evolve(u, gradient=(u.gradient.half() * 3).to(u.gradient.dtype) / 3)
                for u in calls
            ]
        ),
        "is not computed in torch.float",
    ),
    "half in, half out": (
        "test_at_least_float32_is_computed_in",
        with_assembled(lambda name, m: m.half()),
        r"'A' is torch.float16 for torch.float(16|32|64); it must be torch.float(32|64)",
    ),
    "scale ignored": (
        "test_the_scale_of_a_call_is_honoured",
        with_calls(lambda layer, calls: [attrs.evolve(u, scale=1.0) for u in calls]),
        r"per-example gradients: torch.float16 gradients with the scales \[.*\] do not count that",
    ),
    "scale of the first call": (
        "test_the_scale_of_a_call_is_honoured",
        with_calls(lambda layer, calls: [attrs.evolve(u, scale=calls[0].scale) for u in calls]),
        "do not count that many times",
    ),
    "scale in half precision": (
        "test_the_scale_of_a_call_is_honoured",
        with_calls(
            lambda layer, calls: [
                LayerCall(u.inputs, (u.gradient * u.scale).to(u.gradient.dtype)) for u in calls
            ]
        ),
        "do not count that many times",
    ),
    "blank on ones": (
        "test_blank_tells_the_shapes",
        stage(
            blank=lambda self, layer: attrs.evolve(
                Kfac.blank(self, layer), inputs=torch.ones(1, layer.module.in_features)
            )
        ),
        r"the inputs of blank\(\) are not zero",
    ),
    "blank in float32": (
        "test_blank_tells_the_shapes",
        stage(
            blank=lambda self, layer: LayerCall(
                torch.zeros(1, layer.module.in_features), torch.zeros(1, layer.module.out_features)
            )
        ),
        r"factors of blank\(\) are {'A': .*torch.float32.* those of data {.*float64",
    ),
    "blank of two": (
        "test_blank_tells_the_shapes",
        stage(
            blank=lambda self, layer: LayerCall(
                *(t.repeat(2, 1) for t in attrs.astuple(Kfac.blank(self, layer), recurse=False)[:2])
            )
        ),
        r"blank\(\) must be one example, the smallest call; it has 2",
    ),
    "blank transposed": (
        "test_blank_tells_the_shapes",
        stage(
            blank=lambda self, layer: LayerCall(
                *(attrs.astuple(Kfac.blank(self, layer), recurse=False)[i] for i in (0, 0))
            )
        ),
        r"blank\(\) has a gradient \[1, \d\], the layer's output for its inputs is \[1, \d\]",
    ),
    "chunks are lost": (
        "test_chunks_do_not_matter",
        with_factors(without_last_chunk),
        r"the factor changes with chunk_bytes=",
    ),
    "in place": (
        "test_nothing_is_changed",
        with_calls(
            lambda layer, calls: [attrs.evolve(u, gradient=u.gradient.abs_()) for u in calls]
        ),
        "that the stage was given was changed in place",
    ),
    "factors of inputs inside a module": (
        "test_parted_factors_are_the_factors",
        stage(
            Attention,
            input_factors=lambda self, layer, samples: {"A": samples.input_moment()},
            gradient_factors=lambda self, layer, samples: {"G": samples.grad_moment()},
        ),
        r"input_factors gives \['A'\], but calls that run again are known in a Fisher pass only",
    ),
    "inputs with gradients": (
        "test_parted_factors_are_the_factors",
        stage(
            input_factors=lambda self, layer, samples: {
                "A": samples.input_moment() + samples.input_moment().scaled(peek(samples))
            }
        ),
        "the part differs from what `factors` gives",
    ),
    "rows of other factors": (
        "test_rows_make_the_factors",
        stage(
            factor_rows=lambda self, layer, samples, rows=slice(None): (
                samples.inputs(rows),
                samples.gradients(rows),
            )
        ),
        "the rows that factor_rows returns do not sum up to G",
    ),
    "a name in both parts": (
        "test_parted_factors_are_the_factors",
        stage(
            gradient_factors=lambda self, layer, samples: {
                **Kfac.input_factors(self, layer, samples),
                **Kfac.gradient_factors(self, layer, samples),
            }
        ),
        r"input_factors and gradient_factors give \['A', 'A', 'G'\], where factors gives",
    ),
    "remembers": (
        "test_nothing_is_changed",
        Remembering(),
        "a second call with the same data gives another factor",
    ),
    "draws": (
        "test_nothing_is_changed",
        with_factors(total(lambda name, t, samples: t + 0 * torch.rand(()))),
        "the stage draws from the global random numbers",
    ),
    "isinstance": (
        "test_what_cannot_be_treated_is_refused",
        stage(
            unsupported=lambda self, module: None if isinstance(module, nn.Linear) else "not linear"
        ),
        r"unsupported\(\) accepts a subclass of Linear with a forward of its own",
    ),
    "exact class alone": (
        "test_what_cannot_be_treated_is_refused",
        stage(unsupported=lambda self, module: None if type(module) is nn.Linear else "not linear"),
        r"unsupported\(\) accepts Linear with another forward set on the instance",
    ),
    "takes all": (
        "test_unrelated_modules_are_refused",
        stage(unsupported=lambda self, module: None),
        "accepts Bilinear, for which no data",
    ),
    "says nothing": (
        "test_unrelated_modules_are_refused",
        stage(unsupported=lambda self, module: None if type(module) is nn.Linear else ""),
        r"unsupported\(\) returns '' for Conv1d, not a reason",
    ),
    "raises": (
        "test_unrelated_modules_are_refused",
        stage(unsupported=lambda self, module: None if module.weight.ndim == 2 else "no matrix"),
        r"unsupported\(\) raises AttributeError for .*, where it must return a reason",
    ),
}
