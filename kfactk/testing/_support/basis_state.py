"""The laws of bases on their state: decompositions and moments, saved, allocated, carried over."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from hypothesis import assume
from torch import Tensor

from kfactk.errors import DecompositionError, StateError
from kfactk.operators import SpectralOperator
from kfactk.preconditioner.damage import Damage
from kfactk.preconditioner.forms import check_forms
from kfactk.preconditioner.state import BlockState
from kfactk.statistics import RunningMean
from kfactk.testing._support.basis_frame import BasisFrame, same
from kfactk.testing._support.laws import law
from kfactk.testing._support.situations import Situation, dense, enlarged, named, separated
from kfactk.testing._support.strategies import seeds
from kfactk.validation import square


class BasisStateLaws(BasisFrame):
    """What is kept of a basis between steps."""

    @law(examples=10, situation="situations")
    def test_moments_come_from_where_it_says(self, situation: Situation) -> None:
        """`moments_from` names the one source of moments, and `moment_decay` is in [0, 1]."""
        basis, parts = situation.basis, situation.decomposition
        decay, source = basis.moment_decay, basis.moments_from
        assert 0 <= decay <= 1, f"moment_decay is {decay}, which is not in [0, 1]"
        of_samples = basis.moments(parts, situation.samples)
        of_gradient = basis.gradient_moments(parts, situation.mean_gradient, situation.num_terms)
        if source != "gradient":
            assert not of_gradient, (
                f"moments_from is {source!r}, yet gradient_moments gives {', '.join(of_gradient)}: "
                "the framework never asks for them"
            )
        if source is None:
            assert not of_samples, (
                f"moments_from is None, yet moments gives {', '.join(of_samples)}: the framework "
                "never asks for them"
            )
        else:
            assert of_gradient or of_samples, (
                f"moments_from is {source!r}, yet nothing comes from there"
            )

    @law(examples=10, situation="situations")
    def test_the_state_survives_a_checkpoint(self, situation: Situation) -> None:
        """State saved and loaded with weights_only is the same bit for bit, and so is P.

        It has the forms that the basis states.
        """
        dotted = [name for name in situation.moments if "." in name]
        assert not dotted, f"a checkpoint cannot hold {', '.join(dotted)}: names have no dots"
        _assert_forms(situation)
        moments = {name: RunningMean(value, 1.0) for name, value in situation.moments.items()}
        parts = {name: dict(each) for name, each in situation.decomposition.items()}
        file = io.BytesIO()
        torch.save(BlockState({}, parts, moments).flat(), file)
        file.seek(0)
        flat = torch.load(file, weights_only=True)
        loaded = BlockState.from_flat(flat, torch.device("cpu"))
        kept, found = (
            named(decomposition) | {f"moment {name}": value for name, value in values.items()}
            for decomposition, values in (
                (situation.decomposition, situation.moments),
                (loaded.decomposition, loaded.moment_values()),
            )
        )
        assert set(found) == set(kept), (
            f"after a checkpoint there are {sorted(found)}, where there were {sorted(kept)}: names "
            "have no dots"
        )
        changed = [
            name
            for name, value in kept.items()
            if found[name].dtype != value.dtype or not torch.equal(found[name], value)
        ]
        assert not changed, f"a checkpoint changed {', '.join(changed)}"
        again = attrs.evolve(
            situation, decomposition=loaded.decomposition, moments=loaded.moment_values()
        )
        assert torch.equal(again.solve(), situation.solve()), (
            "what was saved and loaded preconditions differently"
        )

    @law(examples=10, situation="situations")
    def test_it_can_be_allocated_without_data(self, situation: Situation) -> None:
        """On blank samples, and on corners of matrices, state has the same parts and precision.

        So checkpoints can be loaded into an optimizer that has seen nothing.
        """
        blank = situation.blank()
        matrices = blank.matrices
        for what, real, empty in (
            ("decomposition", named(situation.decomposition), named(blank.decomposition)),
            ("moments", situation.moments, blank.moments),
        ):
            wanted, found = (
                {name: (tuple(t.shape), t.dtype) for name, t in each.items()}
                for each in (real, empty)
            )
            assert found == wanted, f"{what}: without data there is {found}, with data {wanted}"
        corners = {
            name: matrix[..., :1, :1] if square(matrix) else matrix
            for name, matrix in matrices.items()
        }
        cut = attrs.evolve(situation, matrices=corners)
        parts = {
            name: situation.basis.decompose(name, corners[name], cut.context(name))
            for name in sorted(situation.basis.requires)
        }
        wanted_parts, found_parts = (
            {name: t.ndim for name, t in named(each).items()}
            for each in (situation.decomposition, parts)
        )
        assert found_parts == wanted_parts, (
            f"a corner of the matrices decomposes into {found_parts}, the whole into {wanted_parts}"
        )

    @law(examples=10, situation="situations")
    def test_each_matrix_is_decomposed_alone(self, situation: Situation) -> None:
        """A decomposition depends on its matrix and its `FactorContext` only.

        It depends neither on what was decomposed before nor on the process.
        """
        twin = copy.deepcopy(situation.basis)
        names = sorted(situation.basis.requires, reverse=True)
        for name in names:
            with contextlib.suppress(DecompositionError):  # it may be no matrix of this name
                twin.decompose(name, situation.matrices[name] + 1, situation.context(name))
        for name in names:
            alone = twin.decompose(name, situation.matrices[name], situation.context(name))
            for part, tensor in situation.decomposition[name].items():
                says = f"decompose({name!r}, ...) gives another {part!r} after other matrices: it "
                says += "depends on more than its arguments"
                assert part in alone, says
                assert torch.equal(alone[part], tensor), says

    @law(situation="grouped")
    def test_groups_stand_alone(self, situation: Situation | None) -> None:
        """The groups of a layer are preconditioned as if each were a layer of its own."""
        if situation is None or situation.groups is None:
            pytest.skip(f"what {self.label()} is measured with supports no layer with groups")
        assume(_all_separated(situation, null=True))
        measured = bool(situation.moments)
        for k in range(situation.groups):
            alone = situation.group(k)
            alone = alone if measured else attrs.evolve(alone, moments={})
            for method in ("solve", "multiply")[: 1 if self.waives("fisher") else 2]:
                together, apart = getattr(situation, method)()[k], getattr(alone, method)()
                same(together, apart, f"{method} of group {k} depends on the other groups", 1e-6)

    @law(examples=10, situation="situations", seed=seeds())
    def test_nothing_it_is_given_is_modified(self, situation: Situation, seed: int) -> None:
        """No method changes a tensor it is given: matrices, samples, state, gradients."""
        basis, parts = situation.basis, situation.decomposition
        contexts = {n: situation.next_context(n) for n in parts}
        moments, other = situation.moments, self.on_other_numbers(situation, seed)
        operator = situation.operator
        given = {f"matrix {n}": t for n, t in situation.matrices.items()}
        given |= {f"decomposition {n}": t for n, t in named(parts).items()}
        given |= {f"moment {n}": t for n, t in moments.items()}
        given |= {f"the new decomposition {n}": t for n, t in named(other).items()}
        for context in contexts.values():
            given |= {f"mean diagonal {n}": t for n, t in context.mean_diagonal.items()}
        given |= {"gradient": situation.gradient, "mean gradient": situation.mean_gradient}
        tensors = [tensor for call in situation.case.calls for tensor in call]
        given |= {f"samples {k}": tensor for k, tensor in enumerate(tensors)}
        before = {name: tensor.clone() for name, tensor in given.items()}
        calls: dict[str, Callable[[], Any]] = {
            "decompose": lambda: [
                basis.decompose(n, situation.matrices[n], contexts[n])
                for n in sorted(basis.requires)
            ],
            "moments": lambda: basis.moments(parts, situation.samples),
            "gradient_moments": lambda: basis.gradient_moments(
                parts, situation.mean_gradient, situation.num_terms
            ),
            "transport": lambda: basis.transport(moments, parts, other),
            "operator": situation.fresh_operator,
            "solve": situation.solve,
            "multiply": situation.multiply,
            "condition": operator.condition,
        }
        if self.waives("fisher"):
            del calls["multiply"], calls["condition"]
        if isinstance(operator, SpectralOperator):
            calls["logdet"] = operator.logdet
            calls["function"] = lambda: operator.function(torch.sqrt, situation.gradient)
        for method, call in calls.items():
            call()
            changed = [n for n, tensor in given.items() if not torch.equal(tensor, before[n])]
            assert not changed, f"{method} changes what it is given: {', '.join(changed)}"

    @law(examples=10, situation="any_situations")
    def test_a_wider_gradient_is_taken(self, situation: Situation) -> None:
        """State in float32, as after a load, serves a float64 gradient.

        The result has the shape and precision of the gradient.
        """
        case = situation.case.to(torch.float32)
        narrow = Situation.of(situation.basis, situation.curvature, case, damping=situation.damping)
        wide = narrow.gradient.double()
        for method in ("solve", "multiply")[: 1 if self.waives("fisher") else 2]:
            found = getattr(narrow, method)(wide)
            assert found.dtype == torch.float64, (
                f"{method} of a float64 gradient with float32 state is {found.dtype}"
            )
            assert found.shape == wide.shape, (
                f"{method} has shape {tuple(found.shape)} for a gradient of {tuple(wide.shape)}"
            )

    @law(examples=10, situation="situations")
    def test_transport_into_the_same_basis_changes_nothing(self, situation: Situation) -> None:
        """With old and new basis the same, moments are kept, or left out (reset).

        Without moments there is nothing to carry.
        """
        parts = situation.decomposition
        empty = situation.basis.transport({}, parts, parts)
        assert empty == {}, (
            f"transport of no moments gives {', '.join(empty)}: nothing has been measured"
        )
        for name, value in self.carried(situation, parts).items():
            says = f"transport from a basis to itself changes the moment {name!r}"
            same(value, situation.moments[name], says)

    @law(waivable="fisher", situation="regular_situations", seed=seeds())
    def test_transport_keeps_the_trace(self, situation: Situation, seed: int) -> None:
        """Carried into another basis, moments are left out (reset), or F keeps its trace.

        It is the trace that moments have which were measured in the new basis on the same
        mini-batch.
        """
        matrices = self.with_other_numbers(situation, seed).matrices
        new = attrs.evolve(situation, matrices=matrices).refreshed()
        carried = self.carried(situation, new.decomposition)
        if set(carried) != set(situation.moments):
            return
        moved = attrs.evolve(new, moments=carried)
        old, direct = (
            dense(each.multiply, each.gradient).diagonal(dim1=-2, dim2=-1).sum(-1)
            for each in (moved, new)
        )
        says = "moments do not fit the basis they were carried into: the trace differs from that "
        says += "of moments measured in it"
        same(old, direct, says)

    @law(waivable="fisher", situation="regular_situations")
    def test_transport_follows_the_directions(self, situation: Situation) -> None:
        """Carried to the same directions in the opposite order, moments are reset, or F is kept."""
        null = "null-space-independent" in situation.basis.laws
        assume(_all_separated(situation, null=null))
        matrices = {
            name: _turned_over(matrix) if name in ("A", "C", "K", "G") else matrix
            for name, matrix in situation.matrices.items()
        }
        new = situation.refreshed(matrices=matrices)
        carried = self.carried(situation, new.decomposition)
        if not carried:
            return
        moved = attrs.evolve(new, moments=carried, matrices=situation.matrices)
        says = "moments mix two bases: carried into one of the same directions in the opposite "
        says += "order, F is another"
        same(moved.multiply(), situation.multiply(), says, 1e-6)

    def carried(self, situation: Situation, new: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the moments after `transport`, which must be among those there were."""
        found = dict(situation.basis.transport(situation.moments, situation.decomposition, new))
        strange = sorted(set(found) - set(situation.moments))
        assert not strange, f"transport gives {', '.join(strange)}, which was not among the moments"
        return found

    def with_other_numbers(self, situation: Situation, seed: int) -> Situation:
        """Return the same layer on another mini-batch."""
        return Situation.of(
            situation.basis,
            situation.curvature,
            enlarged(situation.case, len(situation.case.gradient), seed + 1),
            damping=situation.damping,
            num_terms=situation.num_terms,
        )

    def on_other_numbers(self, situation: Situation, seed: int) -> dict[str, dict[str, Tensor]]:
        """Return the decomposition that another mini-batch gives."""
        return self.with_other_numbers(situation, seed).decomposition


def _all_separated(situation: Situation, *, null: bool) -> bool:
    return all(
        separated(matrix, null=null) for matrix in situation.required.values() if square(matrix)
    )


def _turned_over(matrix: Tensor) -> Tensor:
    """Return `2 lambda_max I - M`: the same eigenvectors, eigenvalues in the opposite order."""
    largest = torch.linalg.eigvalsh(matrix)[..., -1:, None]
    turned: Tensor = 2 * largest * torch.eye(matrix.shape[-1], dtype=matrix.dtype) - matrix
    return turned


def _assert_forms(situation: Situation) -> None:
    """Assert that parts and moments would not be taken for damaged ones."""
    damage = Damage()
    check_forms(
        situation.basis,
        situation.decomposition,
        situation.moments,
        situation.matrices,
        tuple(situation.gradient.shape),
        "",
        damage,
    )
    try:
        damage.refuse()
    except StateError as error:
        raise AssertionError(f"what it keeps has not the forms that it states: {error}") from error
