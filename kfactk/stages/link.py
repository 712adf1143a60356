"""Links: what joins layers, and corrects their preconditioned gradients."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
from torch import Tensor

from kfactk.samples import Samples, Statistic
from kfactk.stages.layer import Layer, Tensors


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
        >>> from torch import nn
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


@attrs.frozen(eq=False)
class Preparation:
    """What `prepare` of a link will make, and what that takes: told from shapes alone.

    Args:
        tensors: Shapes by name of what it makes, in the precision of the layers' matrices.
        eigh: Sides of the matrices whose eigenvectors it takes.
        cholesky: Sides of those that it divides into triangles.
        products: FLOPs of matrix products.
        double: Whether it computes in double precision, whatever that of the layers.
        workspace: Bytes that it needs at its peak, besides what it makes.
        triangular: FLOPs of triangular solves: n^2 for each column.

    Example:
        >>> Preparation({"inverse": (3, 3)}, cholesky=(3,), products=2 * 27.0).numbers
        9
    """

    tensors: Mapping[str, tuple[int, ...]] = attrs.field(factory=dict)
    eigh: Sequence[int] = ()
    cholesky: Sequence[int] = ()
    products: float = 0.0
    double: bool = False
    workspace: int = 0
    triangular: float = 0.0

    @property
    def numbers(self) -> int:
        """How many numbers it makes."""
        return sum(math.prod(shape) for shape in self.tensors.values())


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
    it, the next "refresh". A controller that tries dampings has `prepare` called for each."""

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

    def preparation(self, layers: Sequence[LinkedLayer]) -> Preparation | None:
        """Return what `prepare` will make and take, for `plan` and `coverage`, or `None`.

        They say of a link that prepares something, and returns `None` here, that it is not told.
        What `rows`, `statistics` and `correct` take is counted on tensors without numbers.

        Args:
            layers: The layers, in order. Their shapes may be read, and no numbers.
        """
        return Preparation() if type(self).prepare is Link.prepare else None

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
