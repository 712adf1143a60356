"""Curvatures: the matrix of a layer's parameters, and the factors of its samples."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from kfactk.samples import LayerCall, RowOrder, Samples, Statistic
from kfactk.stages.layer import Layer, Replay, Tensors


class Curvature(abc.ABC):
    """How a layer's parameters form a matrix, and which factors its samples are summed into.

    Laws: `tensors(matrix(x)) == x` exactly. Per-example gradients sum to autograd's gradient of the
    summed loss. Factors are symmetric positive semi-definite. They do not depend on the order,
    duplication and splitting of the batch.
    """

    statistics_from: ClassVar[str] = "samples"
    """What factors are made of: "samples", or the mini-batch "gradient" (`GradientCurvature`)."""
    reads_ones: ClassVar[bool] = False
    """Whether `samples` reads `LayerCall.ones`: layers may then be called with a `kfactk.Jet`."""
    only_measured: ClassVar[tuple[str, ...]] = ()
    """Options that nobody reads with a basis that measures nothing; `build` then warns of them."""
    row_factors: ClassVar[frozenset[str]] = frozenset()
    """Names of the factors that are no sums but data of single examples (`Statistic.rows`)."""

    @property
    @abc.abstractmethod
    def provides(self) -> frozenset[str]:
        """Names of the tensors that `assemble` returns; a class attribute or a property.

        Kronecker factors are called A (input side) and G (output side); a is the diagonal of A,
        `[..., d_in]`. C and K are factors of the input's channels and of the taps of a kernel:
        `C kron K` stands for A without its bias. A_next and G_next are those of the rows of one
        step and of the step before (`Rnn`). What stands for a wide side is named by `stand_ins`.
        """

    @property
    def must_be_read(self) -> frozenset[str]:
        """Names of `provides` that a basis must read; there are none by default.

        With a basis that does not, they would be measured for nothing: it does not fit.
        """
        return frozenset()

    @property
    def default_basis(self) -> str | Mapping[str, Any] | None:
        """The basis of a block that names none, where the recipe's does not fit."""
        return None

    @abc.abstractmethod
    def unsupported(self, module: nn.Module) -> str | None:
        """Return why this module cannot be preconditioned exactly, or `None` when it can."""

    def parts(self, module: nn.Module) -> Mapping[str, tuple[str, ...]]:
        """Return the parts of a supported module: for each, its parameters' names, anchor first.

        A part is a layer while its anchor is trained. It may hold parameters of modules inside,
        which are then no layers of their own: "out_proj.weight". The default is one part, "", of
        the weight and, where there is one, the bias.
        """
        names = ("weight", "bias")
        return {"": tuple(n for n in names if module._parameters.get(n) is not None)}

    def replay(self, module: nn.Module) -> Replay | None:
        """Return how calls of a supported module run again; `None`, the default: they need not.

        Give one where the layers lie inside a module that computes as a whole, so that the
        module's own input and output are not theirs. `samples` then takes the calls inside. They
        exist in a Fisher pass only, so `input_factors` must stay empty.
        """
        return None

    @property
    def tells_examples_apart(self) -> bool:
        """Whether factors depend on which rows are of one example; the default is True.

        Say False where A and G are sums over all rows alone: their product is then the same.
        """
        return True

    def unfold(self, layer: Layer, call: LayerCall, order: RowOrder) -> Sequence[LayerCall]:
        """Return a call with several rows of each example as calls that tell examples apart.

        A model may flatten its tokens, so that a module gets `[N T, d]` in place of `[N, T, d]`.
        Where it is known which rows are whose, the framework asks for this before `samples`.

        Args:
            layer: The layer.
            call: One that `samples` would take for N T examples.
            order: Which rows of it are whose.

        Returns:
            Calls of N examples; none, the default, where the curvature cannot. Each row is then
            taken for an example, of which the user is warned.
        """
        return ()

    def same_call(self, module: nn.Module, other: nn.Module) -> bool:
        """Return whether calls of two tied modules can be measured as those of one layer.

        The default compares class and settings: they compute the same function. A curvature may
        also accept a module `other` that it does not support by itself, of another class, which
        holds all parameters of `module`. Each call then tells which `LayerCall.module` it is of.
        What `other` holds besides makes layers of its own, where `parts(other)` names it.
        """
        return type(module) is type(other) and module.extra_repr() == other.extra_repr()

    def stand_ins(self, layer: Layer) -> Mapping[str, tuple[str, ...]]:
        """Return what this layer has in place of matrices that are too large; by default, nothing.

        For the name of each such matrix: the diagonal of its side, a or g, or blocks along its
        diagonal, A0, A1, ... or G0, G1, ... (`kfactk.sides`); for C and K also nothing. For second
        moments L and R: l or r, L0, L1, ... or R0, R1, ...
        """
        return {}

    @property
    def asked_for_stand_ins(self) -> bool:
        """Whether the user asked for `stand_ins`; otherwise `bind` warns where there are some."""
        return False

    @abc.abstractmethod
    def matrix(self, layer: Layer, tensors: Tensors) -> Tensor:
        """Join tensors shaped like `layer.parameters` into `[..., d_out, d_in]`, bias last."""

    @abc.abstractmethod
    def tensors(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        """Return the inverse of `matrix`."""

    @abc.abstractmethod
    def blank(self, layer: Layer) -> LayerCall:
        """Return a call on zeros, of the smallest valid size: it tells shapes without data."""

    @abc.abstractmethod
    def samples(
        self, layer: Layer, calls: Sequence[LayerCall], *, num_terms: Tensor | float, first: bool
    ) -> Samples:
        """View the calls of the layer in one forward as samples.

        Args:
            layer: The layer.
            calls: Several calls of a shared module concatenate along T.
            num_terms: Number M of likelihood terms of the forward.
            first: Whether this is the first Fisher pass over the forward.
        """

    def input_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return sums and counts of the factors made of inputs alone; there are none by default.

        They need no Fisher pass. The samples' gradients may be all zeros.
        """
        return {}

    @abc.abstractmethod
    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return sums and counts of the factors that need gradients."""

    def factor_rows(
        self, layer: Layer, samples: Samples, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor] | None:
        """Return the rows a and g of some examples that A and G are sums over.

            A = (1/N) sum_n sum_t a a^T,    G = (1/M) sum_n sum_t g g^T

        Links pair them with those of other layers.

        Returns:
            a, `[n, T, d_in]`, and g, `[n, T, d_out]`; `None`, the default, where A and G are no
            such sums.
        """
        return None

    def factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Return the sums and counts of all factors. Do not replace it in a subclass."""
        inputs = self.input_factors(layer, samples)
        return {**inputs, **self.gradient_factors(layer, samples)}

    def assemble(self, layer: Layer, factors: Tensors) -> Tensors:
        """Return the averaged factors as the tensors named in `provides`; the default is as is.

        `stand_ins` come in place of what they stand for.

        A mapping may make each tensor when it is asked for: the framework asks for those that the
        basis requires. A and G are square: `[..., d_in, d_in]` and `[..., d_out, d_out]`.
        """
        return {name: factors[name] for name in sorted(self.provides) if name in factors}


class GradientCurvature(Curvature):
    """A curvature whose factors are statistics of the user's own mini-batch gradient.

    No forward of its layers is followed and no Fisher pass is run for it. So it works with any
    model and any loss, and asks for no likelihood. Every parameter of a module can be a part of its
    own. What is written in `.grad` before `step()` is measured, equal on all ranks: nothing is
    summed over ranks.

    An author writes `provides`, `unsupported`, `parts`, `matrix`, `tensors` and
    `factors_of_gradient`. The members on samples are never asked for.
    """

    statistics_from: ClassVar[str] = "gradient"

    @property
    def counts_next(self) -> bool:
        """Whether a gradient counts from the next step on, and not in its own step already.

        The first gradient then makes the first basis, and no more: the step does not move the
        layer.
        """
        return False

    @abc.abstractmethod
    def factors_of_gradient(
        self, layer: Layer, gradient: Tensor, names: Collection[str] | None = None
    ) -> dict[str, Statistic]:
        """Return sums and counts of the factors.

        Args:
            layer: The layer.
            gradient: `[..., d_out, d_in]`, as `matrix` joins it.
            names: Those of `provides` that are wanted, or what stands for them; `None` for all.
        """

    def weighed_factors(
        self, layer: Layer, gradient: Tensor, weighed: Tensors
    ) -> dict[str, Statistic]:
        """Return all factors, some of what a basis weighed. Do not replace it in a subclass.

        Args:
            layer: The layer.
            gradient: `[..., d_out, d_in]`.
            weighed: What takes its place, by the name of the matrix (`Basis.weighed`).
        """
        if not weighed:
            return self.factors_of_gradient(layer, gradient)
        found = dict[str, Statistic]()
        if rest := self.provides - weighed.keys():
            found |= self.factors_of_gradient(layer, gradient, rest)
        for name, each in weighed.items():
            found |= self.factors_of_gradient(layer, each, (name,))
        return found

    def same_call(self, module: nn.Module, other: nn.Module) -> bool:
        """Return True: however modules use their parameters, the gradient is that of all uses."""
        return True

    def blank(self, layer: Layer) -> LayerCall:
        """Refuse: there are no calls."""
        raise NotImplementedError("a curvature of gradients follows no calls")

    def samples(
        self, layer: Layer, calls: Sequence[LayerCall], *, num_terms: Tensor | float, first: bool
    ) -> Samples:
        """Refuse: there are no samples."""
        raise NotImplementedError("a curvature of gradients has no samples")

    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Refuse: there are no samples."""
        raise NotImplementedError("a curvature of gradients has no samples")
