"""Stage families: the base class or protocol of each, and the classes that pass between stages.

    model --capture--> LayerCall --curvature--> Samples --> Statistic (factors)
          --basis--> decomposition --> CurvatureOperator
          --link--> GradientPair --clip--> --update-->

Known methods are combinations of parts:

    K-FAC      = curvature kfac | conv_kfac, basis kfac,  update momentum
    EKFAC      = curvature kfac | conv_kfac, basis ekfac, update momentum
    EKFACnag   = ... update nag;   EKFACadam = ... update adam;   EKFACradam = ... update radam

All stages share one mathematical convention. It stands at the top of `kfactk.samples`. A curvature,
a basis and a link derive from the base class below and inherit its defaults. Any other stage is an
object of a class with the members of its protocol. Our stages are frozen attrs classes whose fields
are their options. A stage holds no state and calls no collective: the framework hands it tensors,
and keeps, averages, reduces and saves what it returns.
"""

from __future__ import annotations

import abc
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import attrs
import torch
from torch import Tensor, nn

from kfactk.assignment import Assignment, Workload
from kfactk.operators import CurvatureOperator
from kfactk.samples import LayerCall, Samples, Statistic

Tensors = Mapping[str, Tensor]
"""Named tensors: factors, one decomposed factor, or moments."""
Decomposition = Mapping[str, Tensors]
"""For the name of each factor, what `Basis.decompose` made of it."""


@attrs.frozen(eq=False)
class Layer:
    """One layer that a curvature covers: the parameters that are preconditioned together.

    Args:
        name: Unique name: the module's path in the model, followed by `[part]` where there is one.
        module: The module. Read parameters through `tensors`, since wrappers may replace them.
        parameters: Names of the trained parameters, the anchor first; those of a module inside have
            its name in front, as "out_proj.weight". A frozen bias is not among them: the layer's
            matrix then has no bias column.
        part: Which part of the module this is; "" where the module is one layer.
        sites: All modules that hold these parameters; several where modules are tied.
        replay: How a call of the module runs again, where the layer lies inside the module; `None`
            where the module's own calls are the layer's.

    Example:
        >>> layer = Layer("fc", nn.Linear(2, 3), ("weight", "bias"))
        >>> layer.anchor.shape, layer.bias, layer.path
        (torch.Size([3, 2]), True, 'fc')
    """

    name: str
    module: nn.Module
    parameters: tuple[str, ...]
    part: str = ""
    sites: tuple[nn.Module, ...] = attrs.field(
        default=attrs.Factory(lambda self: (self.module,), takes_self=True)
    )
    replay: Replay | None = None

    @property
    def bias(self) -> bool:
        """Whether the layer's matrix has a bias column."""
        return "bias" in self.parameters

    @property
    def path(self) -> str:
        """The module's path in the model."""
        return self.name.removesuffix(f"[{self.part}]") if self.part else self.name

    @property
    def anchor(self) -> nn.Parameter:
        """The parameter under which the layer's curvature is saved."""
        return self.tensors()[self.parameters[0]]

    def tensors(self) -> dict[str, nn.Parameter]:
        """Return the parameters themselves, by name."""
        return {name: operator.attrgetter(name)(self.module) for name in self.parameters}


def parameter_at(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a parameter of a module, or of one inside ("out_proj.weight"); `None` for none.

    Example:
        >>> parameter_at(nn.Sequential(nn.Linear(2, 3)), "0.weight").shape
        torch.Size([3, 2])
    """
    try:
        owner, key = owner_of(module, name)
    except AttributeError:  # there is no such module inside
        return None
    return owner._parameters.get(key)


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a parameter of this name, and the name there."""
    path, _, key = name.rpartition(".")
    return module.get_submodule(path) if path else module, key


@attrs.frozen(eq=False)
class ModuleCall:
    """One call of a module, with all that it takes to run it again.

    Args:
        module: The module. Read settings from it, and parameters from here.
        args: Its arguments, tensors detached.
        kwargs: Its keyword arguments, likewise.
        parameters: All parameters that the call could use, by name, detached: those of modules
            inside too, as "out_proj.weight".
        training: Whether the module was in training mode.
        examples: Number of examples of the model's output; `None` where it is not known. A module
            that gets the rows of all examples in one dimension needs it.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    parameters: Tensors
    training: bool
    examples: int | None = None


@attrs.frozen(eq=False)
class InnerCall:
    """One product of inputs and parameters inside a module's call.

    Args:
        part: The part of the module whose parameters it uses.
        inputs: In the form that the curvature's `samples` takes.
        output: Its output, part of the graph of the module's output.
        tag: What `LayerCall.tag` says of it.
    """

    part: str
    inputs: Tensor
    output: Tensor
    tag: str = ""


@attrs.frozen(eq=False)
class Replayed:
    """What a call of a module gave when it ran again.

    Args:
        outputs: The tensors of the module's output that are followed.
        inner: The products inside; each output leads to one of `outputs`.
    """

    outputs: Sequence[Tensor]
    inner: Sequence[InnerCall]


class Replay(Protocol):
    """Runs calls of a module again, to read gradients inside of it.

    The framework calls `run` where the gradients of the module's outputs arrive, with gradients
    enabled, and with the random state, the autocast and the attention kernels of the call. It then
    differentiates `outputs` with respect to the output of each product. The user's own forward and
    the global random state stay as they are.

    Laws: `run(call).outputs` equal what the call itself returned, which is checked each time. Where
    the module computes one of them from another, so does `run`, from the tensor that it returns.
    """

    def outputs(self, output: Any) -> Sequence[Any]:
        """Return the tensors in the module's output that are followed, always in the same order.

        Where the loss depends on others too, the guard refuses the layers.
        """

    def run(self, call: ModuleCall) -> Replayed:
        """Compute the outputs again, from `call.parameters`."""


class Curvature(abc.ABC):
    """How a layer's parameters form a matrix, and which factors its samples are summed into.

    Laws: `tensors(matrix(x)) == x` exactly. Per-example gradients sum to autograd's gradient of the
    summed loss. Factors are symmetric positive semi-definite. They do not depend on the order,
    duplication and splitting of the batch.
    """

    provides: ClassVar[frozenset[str]]
    """Names of the tensors that `assemble` returns. Kronecker factors are called A (input side) and
    G (output side); a is the diagonal of A, `[..., d_in]`. C and K are factors of the input's
    channels and of the taps of a kernel: `C kron K` stands for A without its bias. What stands for
    a wide side is named by `stand_ins`."""
    default_basis: ClassVar[str | Mapping[str, Any] | None] = None
    """The basis of a block that names none, where the recipe's does not fit."""
    statistics_from: ClassVar[str] = "samples"
    """What factors are made of: "samples", or the mini-batch "gradient" (`GradientCurvature`)."""
    row_factors: ClassVar[frozenset[str]] = frozenset()
    """Names of the factors that are no sums but data of single examples (`Statistic.rows`)."""

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
        diagonal, A0, A1, ... or G0, G1, ... (`kfactk.sides`); for C and K also nothing.
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
    def factors_of_gradient(self, layer: Layer, gradient: Tensor) -> dict[str, Statistic]:
        """Return sums and counts of all factors.

        Args:
            layer: The layer.
            gradient: `[..., d_out, d_in]`, as `matrix` joins it.
        """

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


@attrs.frozen(eq=False)
class FactorContext:
    """What `Basis.decompose` may know besides the matrix it decomposes.

    Args:
        damping: The layer's damping tau.
        mean_diagonal: `trace / dimension` of each square matrix that the basis requires, `[...]`;
            of A and G also where a diagonal or blocks stand for it.
        previous: The matrix's decomposition at the last refresh, where it is on this rank.
    """

    damping: float
    mean_diagonal: Tensors
    previous: Tensors | None = None


WAIVABLE: Mapping[str, str] = MappingProxyType(
    {
        "linear": "solve is linear",
        "self-adjoint": "solve is self-adjoint",
        "damped-inverse": "solve is (F + damping I)^-1",
        "fisher": "there is an F, with multiply and condition",
    }
)
"""Laws that a basis may waive, by name, each with what it says."""


class Basis(abc.ABC):
    """How the assembled matrices are decomposed, and the operator that the result makes.

    An author writes `requires`, `decompose` and `operator`; the rest has defaults. The laws of the
    operator stand at `kfactk.CurvatureOperator`. Where damping is seen at the refresh only, they
    hold for the damping of the refresh.
    """

    takes_stand_ins: ClassVar[bool] = False
    """Whether it treats what a curvature has in place of wide matrices (`Curvature.stand_ins`).
    `decompose` and `operator` are then given these under their own names."""

    @property
    @abc.abstractmethod
    def requires(self) -> frozenset[str]:
        """Names of the matrices it needs from the curvature; a class attribute or a property."""

    @property
    def laws(self) -> frozenset[str]:
        """Further laws it claims; `kfactk.testing.BasisLaws` tests those claimed.

        - "rotation-equivariant": in other orthonormal coordinates of inputs and outputs, `solve` is
          the same operator.
        - "null-space-independent": it does not depend on which eigenvectors span the null space of
          A or G.
        - "closer-than-kfac": on the mini-batch it was measured on, F is at least as close to the
          Fisher matrix, in the Frobenius norm, as `A kron G`. Where the basis requires C,
          `C kron K` or `C kron I_taps` stands for A; where it requires a, `diag(a)` does.
        - "exact-when-kronecker": for one example with T = 1, F is the Fisher matrix.
        """
        return frozenset()

    @property
    def waives(self) -> frozenset[str]:
        """Laws of every basis that its operator does not obey, by name (`WAIVABLE`).

        Stages that need one of them are refused in a recipe with the basis.
        """
        return frozenset()

    def unsupported(self, shape: tuple[int, ...]) -> str | None:
        """Return why it cannot treat layers whose matrix has this shape, or `None` when it can."""
        return None

    @property
    def moments_from(self) -> str | None:
        """Where moments come from: "samples" (Fisher pass) or "gradient" (the user's own gradient).

        `None` for a basis without moments.
        """
        return None

    @property
    def damped_at(self) -> str:
        """Where damping enters: "solve", so that a changed one acts at once, or the "refresh"."""
        return "solve"

    @property
    def moment_decay(self) -> float:
        """Decay of the running mean of the moments, in [0, 1]; 0 keeps the last mini-batch's."""
        return 0.0

    @property
    def forms(self) -> Mapping[str, str]:
        """What parts of a decomposition and moments are, by name; a damaged state is known by it.

        - "eigenvalues": `[..., n]` of a matrix `[..., n, n]`, none negative. Of a diagonal, such as
          a, they have its shape.
        - "eigenvectors": `[..., n, n]`, orthonormal columns.
        - "cholesky": `[..., n, n]`, lower triangular, the diagonal positive.
        - "inverse": `[..., n, n]`, symmetric positive semi-definite, made by a Cholesky factor.
        - "diagonal": of the shape of the layer's matrix, none negative.

        What has no form must be finite only. Saved tensors are checked when they are loaded.
        """
        return {}

    @abc.abstractmethod
    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Decompose one matrix.

        Args:
            name: Which of `requires` it is.
            matrix: `[..., n, n]`, or whatever the curvature assembles under this name.
            context: What couples it to the layer's other matrices and to the last refresh.

        Raises:
            DecompositionError: It cannot be decomposed. The last good decomposition stays in use.
        """

    @abc.abstractmethod
    def operator(
        self, decomposition: Decomposition, moments: Tensors, damping: float, matrices: Tensors
    ) -> CurvatureOperator:
        """Return F of the layer as an operator.

        The framework keeps the operator until the next refresh or another damping. What it holds
        counts as memory of the optimizer. The tensors given do not change while it is in use.

        Args:
            decomposition: What `decompose` made of each matrix.
            moments: Averaged moments; empty before the first batch was measured.
            damping: tau.
            matrices: The averaged matrices, each made when it is read, on ranks that keep factors.
                Read them in `multiply` alone, and only where the decomposition does not tell F.
        """

    def moments(self, decomposition: Decomposition, samples: Samples) -> dict[str, Statistic]:
        """Return moments of the per-example gradients, in the basis."""
        return {}

    def gradient_moments(
        self, decomposition: Decomposition, gradient: Tensor, num_terms: Tensor | float
    ) -> dict[str, Statistic]:
        """Return moments of the mini-batch mean gradient.

        Args:
            decomposition: What `decompose` made of each matrix.
            gradient: `[..., d_out, d_in]`.
            num_terms: Number of likelihood terms that it is the mean over.
        """
        return {}

    def transport(
        self, moments: Tensors, old: Decomposition, new: Decomposition
    ) -> dict[str, Tensor]:
        """Carry moments from the old basis to the new one; those left out are reset."""
        return {}


class Likelihood(Protocol):
    """What the model's output means: a distribution R(y | f(x)), of which F is the information.

    It may have one more member, by which the first backward is checked. `misfit(output, gradient,
    *, measured)` returns why a loss with this gradient at the model's output is not the
    likelihood's, or `None`. The gradient is that of the summed loss. `measured` says whether
    curvature is measured on it, so that its size matters.
    """

    def view(self, output: Tensor) -> Tensor:
        """Return the output as `[N, S, C]`: examples, terms of one example, the event axis.

        The result shares its graph with `output`.

        Raises:
            CaptureError: The output cannot be this distribution's parameters. The message says what
                it looks like, and the remedy.
        """

    def term_weights(self, view: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
        """Return the weight of each term, `[N, S]`, zero for masked ones; `None` when all are 1.

        Args:
            view: What `view` returned, detached.
            batch: The arguments of the model's forward and of `Optimizer.observe`, by name.
        """

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        """Draw targets from the model's own predictive distribution, in the form `nll` takes."""

    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log-likelihood of each term, `[N, S]`."""

    def root(self, view: Tensor) -> Iterator[Tensor]:
        """Yield detached `[N, S, C]` columns.

        Their outer products over C sum to the Fisher information of the output, for each term.
        """


class Fisher(Protocol):
    """Whose targets the gradients are taken with.

    Laws: the gradients' outer products summed over the losses are, in expectation, M times F.

    One that listens to the user's backward may have one more member: `loss_terms(batch)` returns M,
    the number of terms of the user's loss, given the arguments of the forward and of
    `Optimizer.observe` by name. The model's output is not read then. Where it returns `None`, the
    likelihood counts.
    """

    own_pass: ClassVar[bool]
    """Whether the framework runs backward passes of its own over `losses`. Otherwise it listens to
    the user's backward."""

    def losses(
        self,
        view: Tensor,
        likelihood: Likelihood,
        weights: Tensor | None,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        """Yield the scalar summed losses of one forward.

        They are scaled so that the **sum** of their gradients' outer products is M F.
        """

    @property
    def seed(self) -> int:
        """Seed that, with step, micro-batch and rank, gives every draw."""


@attrs.frozen(eq=False)
class LinkedLayer:
    """One of the layers that a link joins, as the link sees it.

    Args:
        layer: The layer.
        shape: Of its matrix, `[..., d_out, d_in]`.
        damping: Its damping tau.
        matrices: Its averaged matrices by name, each made when it is read: those that the basis
            requires.

    Example:
        >>> layer = Layer("fc", nn.Linear(2, 3), ("weight", "bias"))
        >>> LinkedLayer(layer, (3, 3), damping=0.1).name
        'fc'
    """

    layer: Layer
    shape: tuple[int, ...]
    damping: float
    matrices: Tensors = attrs.field(factory=dict)

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    @property
    def has_rows(self) -> bool:
        """Whether its curvature gives `factor_rows`."""
        return False

    def factor_rows(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return what `Curvature.factor_rows` gives of all examples, where it `has_rows`."""
        raise NotImplementedError(f"layer {self.name!r} has no rows")


@attrs.frozen(eq=False)
class Prepared:
    """What a link has made of matrices and statistics, to be used until the next time.

    Args:
        tensors: By name; they are saved. Names and shapes follow from the layers alone.
        failures: What could not be made, each a clause with its reason. The rest works without it.
            Failures are counted as failed decompositions are, and told once.
    """

    tensors: Tensors = attrs.field(factory=dict)
    failures: Sequence[str] = ()


class Link(abc.ABC):
    """What joins layers: it measures them together, and corrects their preconditioned gradients.

    Laws: on the concatenation of its layers the corrected preconditioner is linear, self-adjoint
    and positive definite. With one layer it changes nothing. A layer without a gradient counts as
    one whose gradient is zero.

    It is applied where all its layers have curvature and it has been measured. It is measured
    whenever factors are, on passes that give samples of each layer, and its statistics decay as
    factors do. What is costly is prepared where bases are due. Both are saved under the anchor of
    its first layer.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"linear", "self-adjoint", "damped-inverse"})
    """Laws that no basis of the recipe may waive (`WAIVABLE`)."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """Names of the matrices that it reads of each layer; every rank then keeps them."""
    solves: ClassVar[bool] = False
    """Whether it solves for its layers by itself. What it prepared then stands in place of the
    blocks' operators: these do not solve, and `correct` is given gradients for what they would
    make. Bases with moments are refused, which would be measured for nothing."""

    damped_at: ClassVar[str] = "solve"
    """When a changed damping acts on the correction: in the next "solve" or, where `prepare` reads
    it, the next "refresh". The latter cannot be combined with a controller of the damping."""

    def order(self, layers: Sequence[LinkedLayer]) -> Sequence[LinkedLayer]:
        """Return the layers that it joins, in its order; by default all, in the model's order.

        Args:
            layers: Those that blocks precondition now.

        Raises:
            CombinationError: It cannot join them. The message says why, and the remedy.
        """
        return layers

    @abc.abstractmethod
    def rows(self, layer: LinkedLayer, samples: Samples) -> Tensors:
        """Return what is kept of each example of one layer until the pass ends, by name.

        Each tensor has the examples in dimension 0.
        """

    @abc.abstractmethod
    def statistics(
        self,
        layers: Sequence[LinkedLayer],
        rows: Mapping[str, Tensors],
        num_terms: Tensor | float,
    ) -> dict[str, Statistic]:
        """Return sums and counts of what the layers of one pass give together.

        Names and shapes follow from the layers alone, also where no rows are given.

        Args:
            layers: The layers, in order.
            rows: By layer name, what `rows` returned; layers that the pass did not reach are not
                among them. All have the same examples.
            num_terms: Number of likelihood terms of the forward; 0 on later passes over it.
        """

    def remark(
        self,
        layers: Sequence[LinkedLayer],
        rows: Mapping[str, Tensors],
        places: Mapping[str, Sequence[int]],
    ) -> str | None:
        """Return what the user should know of how the layers ran in a pass; it is told once.

        Args:
            layers: The layers, in order.
            rows: As for `statistics`.
            places: By layer name, the place of each of its calls in the order of the forward.

        Returns:
            `None` where there is nothing to tell.

        Raises:
            CaptureError: They cannot be joined so. The message says why, and the remedy.
        """
        return None

    def prepare(self, layers: Sequence[LinkedLayer], statistics: Tensors) -> Prepared:
        """Return what `correct` needs that is costly; by default, nothing.

        It is asked for after bases were decomposed, and depends on its arguments alone.

        Args:
            layers: The layers, in order; their matrices may be read.
            statistics: The averaged statistics.

        Raises:
            DecompositionError: Nothing can be made. What was made last stays in use.
        """
        return Prepared()

    @abc.abstractmethod
    def correct(
        self,
        layers: Sequence[LinkedLayer],
        gradients: Tensors,
        preconditioned: Tensors,
        statistics: Tensors,
    ) -> dict[str, Tensor]:
        """Return the corrected preconditioned gradients, `[..., d_out, d_in]` by layer name.

        Args:
            layers: The layers, in order.
            gradients: By layer name; layers without a gradient are not among them.
            preconditioned: For the same names, what the blocks made of them. They stay unchanged.
            statistics: The averaged statistics, and what `prepare` made.
        """


@attrs.frozen(eq=False)
class GradientPair:
    """One preconditioned parameter on its way to the update rule.

    Args:
        gradient: The user's gradient, any shape.
        preconditioned: Its preconditioned form, same shape.
        lr: Learning rate of the parameter's group.
        damping: tau of the parameter's block.
    """

    gradient: Tensor
    preconditioned: Tensor
    lr: float
    damping: float = 0.0


Dot = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Inner products pair by pair, `[len]`; supplied by the framework, which knows about shards."""


class Clip(Protocol):
    """Bounds the preconditioned gradients. Laws: never enlarges; zero stays zero.

    It may have an attribute `needs`: laws that no basis of the recipe may waive (`WAIVABLE`).
    """

    def clip(self, pairs: Sequence[GradientPair], dot: Dot) -> tuple[list[Tensor], Tensor]:
        """Return the clipped gradients, in order, and the factor applied.

        The factor is a scalar tensor, 1 where nothing was clipped; it is recorded.
        """


class Update(Protocol):
    """Makes the torch.optim optimiser that takes the step.

    It may have an attribute `default_damping`: tau where the recipe gives none. Rules that do not
    divide by the size of their gradients want a larger one than 0.001.

    A rule whose step is `momentum * d - lr * p`, where d is its last step, has "momentum" in its
    groups, and an attribute `velocity_key`: the key of d in the state of each parameter. A
    controller needs such a rule.
    """

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Return the optimiser over `groups`.

        Groups are dicts with "params". Their own "lr" and "weight_decay" must be kept.
        """


@attrs.frozen
class QuadraticModel:
    """The quadratic model of the loss h along two directions: what a controller decides by.

        M(d) - M(0) = <grad h, d> + d^T (F + eta I + lambda I) d / 2
        d = lr v_0 + momentum v_1

    v_0 is minus the preconditioned gradient, and v_1 the last step, which is zero at first. h is
    the mini-batch loss with `eta |theta|^2 / 2`, where eta is the weight decay of each group. F is
    the exact Fisher matrix of all parameters together on the mini-batch, and no approximation.

    Args:
        slopes: `<grad h, v_i>`.
        curvature: `v_i^T (F + eta I) v_j`.
        squares: `<v_i, v_j>`.

    Example:
        >>> model = QuadraticModel((-2.0, 0.0), ((3.0, 0.0), (0.0, 0.0)), ((1.0, 0.0), (0.0, 0.0)))
        >>> model.change((0.5, 0.0), damping=1.0)
        -0.5
    """

    slopes: tuple[float, float]
    curvature: tuple[tuple[float, float], tuple[float, float]]
    squares: tuple[tuple[float, float], tuple[float, float]]

    def damped(self, damping: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return `v_i^T (F + eta I + lambda I) v_j`, `[2][2]`."""
        (a, b), (c, d) = (
            tuple(one + damping * other for one, other in zip(*rows, strict=True))
            for rows in zip(self.curvature, self.squares, strict=True)
        )
        return (a, b), (c, d)

    def change(self, step: tuple[float, float], damping: float) -> float:
        """Return `M(d) - M(0)`.

        Args:
            step: lr and momentum.
            damping: lambda.
        """
        matrix = self.damped(damping)
        linear = sum(slope * size for slope, size in zip(self.slopes, step, strict=True))
        square = sum(
            matrix[i][j] * step[i] * step[j] for i in range(len(step)) for j in range(len(step))
        )
        return linear + square / 2


class Controller(Protocol):
    """Sets lr, momentum and damping in each step, by the quadratic model and the loss.

    The framework evaluates the model and the loss, and keeps the numbers in the parameter groups:
    "lr", "momentum", "damping" and those that `numbers` names. A controller sees numbers alone, the
    same on every rank.

    It needs an update rule that keeps its velocity (`Update`), and a closure in each step. It may
    have an attribute `needs`: laws that no basis of the recipe may waive (`WAIVABLE`).

    Laws: what it returns depends on the arguments alone, and is finite. A step that `decide` gives
    never raises the model above `M(0)`, and without a last step its momentum is 0.
    """

    @property
    def numbers(self) -> Mapping[str, float]:
        """Its own numbers by name, each with its first value."""

    def first_damping(self, weight_decay: float) -> float:
        """Return the damping of the blocks that a recipe has where the user gives none."""

    def dampings(self, step: int, numbers: Mapping[str, float]) -> Sequence[float]:
        """Return the dampings of the blocks to try in a step: positive, the present one first.

        Args:
            step: Index of the step, from 0.
            numbers: All numbers by name.
        """

    def decide(
        self, models: Sequence[QuadraticModel], numbers: Mapping[str, float]
    ) -> tuple[int, float, float]:
        """Return which of the dampings is taken, and lr and momentum of the step.

        Args:
            models: One for each damping.
            numbers: All numbers by name.
        """

    def evaluates(self, step: int) -> bool:
        """Return whether the loss is evaluated after a step: one more forward and backward."""

    def adapt(
        self, before: float, after: float, model: QuadraticModel, numbers: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Return the new values of its own numbers, by what a step did to the loss.

        Args:
            before: h before the step.
            after: h after it on the same mini-batch; it may be infinite or NaN.
            model: The model of the step.
            numbers: All numbers by name, lr and momentum those of the step.
        """


class Placement(Protocol):
    """Which rank does what. A placement only answers; the framework moves tensors accordingly.

    Laws: every matrix and every gradient has a rank. The answer depends on the arguments alone, so
    that every rank gets the same.
    """

    process_group: Any
    """The ranks that share a model, a `torch.distributed` group; `None` for all."""
    wire_dtype: str | None
    """Precision of what travels, such as "bfloat16"; `None` for that of the tensors themselves."""

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        """Divide the work of a model among `ranks` ranks."""


class Pace(Protocol):
    """Decides when the statistics of each block are refreshed again.

    A refresh measures the factors of a block, decomposes them, and measures its moments on samples.
    At each, the framework compares the new averages of the factors with those of earlier refreshes,
    and asks for the interval to the next one. A pace sees numbers alone, the same on every rank.

    Laws: the interval is a whole number of at least 1. It depends on the arguments alone. The first
    one is 1, so that there soon is something to compare. Larger changes never give a longer one.
    """

    @property
    def keeps(self) -> int:
        """With how many earlier refreshes the new one is compared; at least 1.

        The framework keeps the factors of so many: memory of that many more sets of factors.
        """

    def interval(self, changes: Sequence[float], intervals: Sequence[int]) -> int:
        """Return the interval to the next refresh, in units of `factor_every`.

        Args:
            changes: For each earlier refresh that is kept, the last one first, how much the block
                has changed since: the largest `||X - X_k||_F / ||X_k||_F` of its factors X; 0 where
                nothing changed, inf where X_k was zero. Empty at the first refresh.
            intervals: As many intervals that were decided, the last one first.
        """


class Tracker(Protocol):
    """Records what happened, on rank 0 only.

    The framework batches nothing for it, and goes on, with a warning, when it raises. Only an
    `OptionError` of `start` is raised by `bind`. No method should wait for a store that does not
    answer. A tracker that keeps what it could not send in a file has the option `tracking_uri` and
    a method `import_records(path)`, which sends it and returns what was done: `python -m kfactk
    import-records` calls it.
    """

    @property
    def every(self) -> int:
        """Record one step in so many."""

    def start(self, recipe: Mapping[str, Any]) -> None:
        """Begin a run; called once, at bind, with the recipe as text-safe nested mappings."""

    def record(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Take the metrics of one step; 0-dimensional tensors may still be on the device."""

    def flush(self) -> None:
        """Write what is held back, for readers before the end; the framework calls only `close`."""

    def close(self) -> None:
        """Flush and release resources; may be called twice."""
