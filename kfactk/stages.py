"""The protocols of the stage families, and the small classes that pass between stages.

    model -capture-> Use -curvature-> Samples -> Statistic (factors) -basis-> decomposition, moments -> Pair -clip-> -update->

Known methods are combinations of parts:

    K-FAC      = curvature kfac | conv_kfac, basis kfac,  update momentum
    EKFAC      = curvature kfac | conv_kfac, basis ekfac, update momentum
    EKFACnag   = ... update nag;   EKFACadam = ... update adam;   EKFACradam = ... update radam

The mathematical convention that all of them share stands at the top of `kfactk.samples`. A stage is an object of any class that has the
members below; ours are frozen attrs classes whose fields are the options. Stages hold no state and call no collective: tensors are
handed in and out, the framework keeps, averages, reduces and saves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor, nn

from kfactk.assignment import Assignment, Workload
from kfactk.samples import LayerCall, Samples, Statistic

Tensors = Mapping[str, Tensor]
"""Named tensors: factors, one decomposed factor, or moments."""
Decomposition = Mapping[str, Tensors]
"""For each factor's name, what `Basis.decompose` made of it."""


@attrs.frozen(eq=False)
class Layer:
    """One covered layer.

    Args:
        name: Its qualified name in the model.
        module: The module; its parameters are always read through it, since wrappers may replace them.
        parameters: Names of the parameters that are preconditioned together, `"weight"` first. A frozen bias is not among them, and
            then the layer's matrix has no bias column.
    """

    name: str
    module: nn.Module
    parameters: tuple[str, ...]

    @property
    def bias(self) -> bool:
        """Whether the layer's matrix has a bias column."""
        return "bias" in self.parameters

    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters themselves, by name."""
        return {name: getattr(self.module, name) for name in self.parameters}


class Curvature(Protocol):
    """How a layer's parameters form a matrix, and which factors its samples are summed into.

    Laws: `tensors(matrix(x)) == x` exactly; per-example gradients sum to autograd's gradient of the summed loss; factors are symmetric
    positive semi-definite, independent of the order, duplication and splitting of the batch.
    """

    provides: ClassVar[frozenset[str]]
    """Names of the tensors that `assemble` returns. Kronecker factors are called A (input side) and G (output side); C and K are
    factors of the input's channels and of the taps of a kernel, so that `C kron K` stands for A without its bias."""

    def unsupported(self, module: nn.Module) -> str | None:
        """Why this module cannot be preconditioned exactly, for a reader; `None` when it can."""

    def matrix(self, layer: Layer, tensors: Tensors) -> Tensor:
        """Join tensors shaped like `layer.parameters` into `[..., d_out, d_in]`, bias last."""

    def tensors(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        """Inverse of `matrix`."""

    def blank(self, layer: Layer) -> LayerCall:
        """A use of the layer on zeros, of the smallest valid size: tells the shapes of factors and moments without data."""

    def samples(
        self, layer: Layer, uses: Sequence[LayerCall], *, terms: Tensor | float, first: bool
    ) -> Samples:
        """View the uses of the layer in one forward as samples; several uses of a shared module concatenate along T."""

    def factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """Sums and counts to be averaged over micro-batches, ranks and time."""

    def assemble(self, layer: Layer, factors: Tensors) -> Tensors:
        """The averaged factors as the tensors named in `provides`; a mapping may make each when it is asked for, and only those that the
        basis requires are. A and G are square: `[..., d_in, d_in]` and `[..., d_out, d_out]`; what other names hold is between a
        curvature and its basis."""


@runtime_checkable
class PartsFactors(Protocol):
    """What a curvature may have besides: `factors` in two parts, of which one needs no gradients, and so no Fisher pass.

    Law: together they are `factors`. A subclass that replaces `factors` alone has none.
    """

    def input_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """The factors made of inputs alone; the samples' gradients may be all zeros."""

    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        """The others."""


@attrs.frozen(eq=False)
class FactorContext:
    """What couples the factors of one layer when each is decomposed on its own.

    Args:
        damping: The layer's damping tau.
        mean_diagonal: For each square matrix that the basis requires, `trace / dimension`, `[...]`.
    """

    damping: float
    mean_diagonal: Tensors


class Basis(Protocol):
    """How the assembled matrices are decomposed, and how a gradient is preconditioned with the result.

    Laws: `precondition` is linear, self-adjoint and positive definite in the gradient; `damping * precondition -> identity` as damping
    grows (for a basis that sees damping at its refresh only: when refreshed with it); it agrees with the dense damped inverse of what
    it claims to represent.
    """

    @property
    def requires(self) -> frozenset[str]:
        """Names of the matrices it needs from the curvature; may depend on its options."""

    @property
    def laws(self) -> frozenset[str]:
        """Further laws it claims; `kfactk.testing.BasisLaws` tests those claimed.

        "rotation-equivariant": in other orthonormal coordinates of inputs and outputs, `precondition` is the same operator.
        "null-space-independent": it does not depend on which eigenvectors span the null space of A or G.
        "closer-than-kfac": on the mini-batch it was measured on, F is at least as close to the Fisher matrix, in the Frobenius norm, as
        A kron G; where it requires C, `C kron K` or `C kron I_taps` stands for A. "exact-when-kronecker": for one example with T = 1, F
        is the Fisher matrix.
        """

    @property
    def moments_from(self) -> str | None:
        """Where its moments come from: "samples" (Fisher pass), "gradient" (the user's own gradient), or `None`."""

    @property
    def moment_decay(self) -> float:
        """Decay of the running mean of the moments; 0 keeps the last mini-batch's."""

    def decompose(self, name: str, matrix: Tensor, context: FactorContext) -> dict[str, Tensor]:
        """Decompose one matrix, `[..., n, n]`.

        Raises:
            DecompositionError: It cannot be decomposed; the framework goes on with the last good one.
        """

    def moments(self, decomposition: Decomposition, samples: Samples) -> dict[str, Statistic]:
        """Moments measured on per-example gradients, in the basis; empty for a basis without any."""

    def gradient_moments(
        self, decomposition: Decomposition, gradient: Tensor, terms: Tensor | float
    ) -> dict[str, Statistic]:
        """Moments measured on the mini-batch mean gradient `[..., d_out, d_in]` over `terms` likelihood terms."""

    def transport(
        self, moments: Tensors, old: Decomposition, new: Decomposition
    ) -> dict[str, Tensor]:
        """Carry moments from the old basis to the new one; what is left out is reset."""

    def precondition(
        self, gradient: Tensor, decomposition: Decomposition, moments: Tensors, damping: float
    ) -> Tensor:
        """`(F + damping I)^-1` applied to `[..., d_out, d_in]`. `moments` may be empty: no batch has been measured yet."""

    def product(
        self, vector: Tensor, matrices: Tensors, decomposition: Decomposition, moments: Tensors
    ) -> Tensor:
        """`F` applied to `[..., d_out, d_in]`, undamped, F being what this basis represents."""

    def condition(self, decomposition: Decomposition, moments: Tensors, damping: float) -> Tensor:
        """Condition number of the damped curvature, for the record: exact or a lower bound, a scalar tensor."""


@runtime_checkable
class Redecomposes(Protocol):
    """What a basis may have besides: a decomposition that starts from the last one, where that is cheaper.

    Laws: those of `decompose`. A subclass that replaces `decompose` alone has none.
    """

    def redecompose(
        self, name: str, matrix: Tensor, context: FactorContext, last: Tensors
    ) -> dict[str, Tensor]:
        """Decompose one matrix of which there is a decomposition already, of an earlier average.

        Raises:
            DecompositionError: It cannot be decomposed; the framework goes on with the last one.
        """


Operator = Callable[[Tensor], Tensor]
"""A linear operator on matrices `[..., d_out, d_in]`."""


@runtime_checkable
class MakesOperator(Protocol):
    """What a basis may have besides: `precondition` in two parts, so that what does not depend on the gradient is done once.

    Between refreshes, and while damping stays as it is, every step applies the same operator. What it holds counts as memory of the
    optimizer. Law: `operator(decomposition, moments, damping)(gradient)` is `precondition(gradient, decomposition, moments, damping)`; a
    subclass that replaces `precondition` alone has none.
    """

    def operator(self, decomposition: Decomposition, moments: Tensors, damping: float) -> Operator:
        """`(F + damping I)^-1`. The tensors given do not change while it is in use."""


class Likelihood(Protocol):
    """What the model's output means: the distribution R(y | f(x)) whose Fisher information is taken."""

    def view(self, output: Tensor) -> Tensor:
        """The output as `[N, S, C]`: examples, terms of one example, the event axis. Shares its graph with `output`.

        Raises:
            CaptureError: The output cannot be this distribution's parameters; says what it looks like and the remedy.
        """

    def term_weights(self, view: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
        """Weight of each term, `[N, S]`, zero for masked ones; `None` when all are 1. `batch` names the arguments of the model's forward
        and those given to `Optimizer.observe`."""

    def sample(self, view: Tensor, generator: torch.Generator) -> Tensor:
        """Draw targets from the model's own predictive distribution, in the form `nll` takes."""

    def nll(self, view: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each term, `[N, S]`."""

    def root(self, view: Tensor) -> Iterator[Tensor]:
        """Detached `[N, S, C]` columns whose outer products over C sum to the Fisher information of the output, for each term."""


class Fisher(Protocol):
    """Whose targets the gradients are taken with.

    Laws: the gradients' outer products summed over the losses are, in expectation, M times F.
    """

    own_pass: ClassVar[bool]
    """Whether the framework runs backward passes of its own over `losses`; otherwise the user's own backward is listened to."""

    def losses(
        self,
        view: Tensor,
        likelihood: Likelihood,
        weights: Tensor | None,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        """Scalar summed losses of one forward, scaled so that the **sum** of their gradients' outer products is M F."""

    @property
    def seed(self) -> int:
        """Seed that, with step, micro-batch and rank, gives every draw."""


@attrs.frozen(eq=False)
class GradientPair:
    """One preconditioned parameter on its way to the update rule.

    Args:
        gradient: The user's gradient, any shape.
        preconditioned: Its preconditioned form, same shape.
        lr: Learning rate of the parameter's group.
    """

    gradient: Tensor
    preconditioned: Tensor
    lr: float


Dot = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Inner products pair by pair, `[len]`; supplied by the framework, which knows about shards."""


class Clip(Protocol):
    """Bounds the preconditioned gradients. Laws: never enlarges; zero stays zero."""

    def clip(self, pairs: Sequence[GradientPair], dot: Dot) -> tuple[list[Tensor], Tensor]:
        """The clipped preconditioned gradients, in order, and the factor (1 for untouched) as a scalar tensor for the record."""


class Update(Protocol):
    """Makes the torch.optim optimiser that takes the step."""

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """The optimiser over `groups` (dicts with "params" and, perhaps, their own "lr" and "weight_decay", which must be kept)."""


class Placement(Protocol):
    """Which rank does what. A placement only answers; the framework moves sums, decompositions and gradients accordingly.

    Laws: every matrix and every gradient has a rank; the answer depends on the arguments alone, so that every rank gets the same.
    """

    process_group: Any
    """The ranks that share a model, a `torch.distributed` group; `None` for all."""
    wire_dtype: str | None
    """Precision of what travels, such as "bfloat16"; `None` for that of the tensors themselves."""

    def assign(self, workload: Workload, ranks: int) -> Assignment:
        """Divide the work of a model among `ranks` ranks."""


class Tracker(Protocol):
    """Records what happened, on rank 0 only. The framework batches nothing for it, and goes on, with a warning, when it raises."""

    @property
    def every(self) -> int:
        """Record one step in so many."""

    def start(self, recipe: Mapping[str, Any]) -> None:
        """Called once, at bind, with the recipe as text-safe nested mappings."""

    def record(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Take figures of one step; 0-dimensional tensors may still be on the device."""

    def flush(self) -> None:
        """Write what is held back, for those who want to read before the end; the framework itself calls `close` alone."""

    def close(self) -> None:
        """Flush and let go of resources; may be called twice."""
