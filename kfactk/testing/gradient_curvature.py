"""The laws of curvatures of gradients: statistics of what the user's own backward left in `.grad`.

There are no samples. A layer is any parameter, and its data are the gradients of some steps.
"""

from __future__ import annotations

import copy
import functools
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import attrs
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from kfactk.errors import KfactkWarning, OptionError
from kfactk.optim.optimizer import Optimizer
from kfactk.sides import SIDES, is_diagonal, names_of, side_of, slices_of
from kfactk.stages import Basis, GradientCurvature, Layer
from kfactk.testing._support.division import CurvatureInRecipe
from kfactk.testing._support.laws import close, law
from kfactk.testing._support.layers import averaged, present, reason_against, same, undone
from kfactk.testing._support.strategies import binary_exponents, foreign_modules, seeds
from kfactk.testing._support.training import built

DECAY = 0.75
"""Decay of the running means in a recipe."""
KIND = {"L": "rows", "R": "columns"}
"""What the second moments of these names are of."""


class Held(nn.Module):
    """A module of one parameter, of any shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


MODULES: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.Linear(3, 4),
    lambda: nn.Linear(7, 2, bias=False),
    lambda: nn.Conv2d(2, 3, 2),
    lambda: nn.LayerNorm(5),
    lambda: nn.Embedding(6, 3),
    lambda: nn.Bilinear(2, 3, 2),
    lambda: nn.GRUCell(2, 3),
    lambda: Held(2, 4, 3),
    lambda: Held(),
)
"""What makes the modules that laws are tried on."""


@attrs.frozen(eq=False)
class GradientCase:
    """A layer, and the gradients of its parameters in some steps.

    Args:
        layer: The layer.
        gradients: For each step the gradient of each parameter, by name, in float64.
    """

    layer: Layer
    gradients: tuple[Mapping[str, Tensor], ...]

    def __repr__(self) -> str:
        shapes = {name: list(p.shape) for name, p in self.layer.tensors().items()}
        return f"GradientCase({self.layer.module}, {shapes}, {len(self.gradients)} steps)"


@st.composite
def _cases(
    draw: st.DrawFn, curvature: GradientCurvature, makers: Sequence[Callable[[], nn.Module]]
) -> GradientCase:
    module = draw(st.sampled_from(makers))().double()
    part, names = draw(st.sampled_from(list(curvature.parts(module).items())))
    layer = Layer(f"mine[{part}]" if part else "mine", module, tuple(names), part=part)
    generator = torch.Generator().manual_seed(draw(seeds()))
    steps = []
    for _ in range(draw(st.integers(1, 3))):
        one = {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for name, p in layer.tensors().items()
        }
        if draw(st.integers(0, 3)) == 0:  # rows without a gradient, as in an embedding
            for each in (each for each in one.values() if each.ndim):
                each[: len(each) // 2] = 0.0
        steps.append(one)
    return GradientCase(layer, tuple(steps))


class GradientCurvatureLaws(CurvatureInRecipe):
    """The laws that every curvature of gradients obeys.

    Override `modules` for parameters of other modules.

    Example:
        >>> class TestGradient(GradientCurvatureLaws):
        ...     stage = "gradient"
        >>> TestGradient().test_gradients_scale_the_factors()
    """

    degree: ClassVar[int] = 2
    """Gradients times c multiply each factor by c to this power."""
    ordered: ClassVar[bool] = False
    """Whether the order of rows and columns has a meaning, so that permutations change factors."""

    def modules(self) -> Sequence[Callable[[], nn.Module]]:
        """Return what makes the modules to test the stage on; those it does not take are left."""
        return MODULES

    def cases(self) -> st.SearchStrategy[GradientCase]:
        """Return layers with the gradients of some steps.

        Raises:
            OptionError: The stage takes none of the modules.
        """
        makers = [make for make in self.modules() if reason_against(self.curvature, make()) is None]
        if not makers:
            raise OptionError(
                f"{self.label()} accepts no module of the laws. If it is for parameters of other "
                "modules, write `modules` in the class of the laws. Otherwise `unsupported` "
                "refuses too much."
            )
        return _cases(self.curvature, makers)

    @functools.cached_property
    def curvature(self) -> GradientCurvature:
        """The stage.

        Raises:
            OptionError: Its statistics are not those of gradients.
        """
        stage = self.subject()
        if not isinstance(stage, GradientCurvature):
            raise OptionError(
                f"{self.label()} takes its statistics from samples: use CurvatureLaws."
            )
        return stage

    def matrix(self, case: GradientCase, step: int = 0) -> Tensor:
        """Return the gradient of a step as the stage joins it, `[..., d_out, d_in]`."""
        return self.curvature.matrix(case.layer, case.gradients[step])

    def means(self, case: GradientCase, gradient: Tensor | None = None) -> dict[str, Tensor]:
        """Return the factors of a gradient; by default of that of the first step."""
        gradient = self.matrix(case) if gradient is None else gradient
        return averaged(self.curvature.factors_of_gradient(case.layer, gradient))

    def matrices(self, case: GradientCase, gradient: Tensor | None = None) -> dict[str, Tensor]:
        """Return what is assembled of the factors of a gradient."""
        return dict(self.curvature.assemble(case.layer, self.means(case, gradient)))

    @law(case="cases")
    def test_tensors_is_the_inverse_of_matrix(self, case: GradientCase) -> None:
        """Parameters become a matrix and come back exactly, with names, shapes and order."""
        undone(self.curvature, case.layer)

    @law(case="cases")
    def test_what_is_assembled(self, case: GradientCase) -> None:
        """`assemble` returns what `provides` and `stand_ins` name; each side has its length."""
        found, stand_ins = self.matrices(case), self.curvature.stand_ins(case.layer)
        provides = {
            each for name in self.curvature.provides for each in stand_ins.get(name, (name,))
        }
        assert set(found) == provides, (
            f"assemble() returns {sorted(found)}, where `provides` and `stand_ins` say "
            f"{sorted(provides)}"
        )
        d_out, d_in = self.matrix(case).shape[-2:]
        for side, called in SIDES.items():
            names, n = names_of(side, found), d_in if called == "input" else d_out
            sizes = [found[name].shape[-1 if is_diagonal(name) else -2] for name in names]
            assert not names or sum(sizes) == n, (
                f"the {called} side has the length {n}, and {', '.join(names)} have {sizes}"
            )

    @law(case="cases")
    def test_moments_are_symmetric_and_positive(self, case: GradientCase) -> None:
        """Second moments are symmetric positive semi-definite, and diagonals are not negative.

        These are the sides of a layer by their names, and all that is marked as symmetric.
        """
        sums = self.curvature.factors_of_gradient(case.layer, self.matrix(case))
        marked = {name for name, each in sums.items() if each.symmetric}
        for name, tensor in {**averaged(sums), **self.matrices(case)}.items():
            assert tensor.isfinite().all(), f"{name} is not finite: {tensor.tolist()}"
            if side_of(name) not in SIDES and name not in marked:
                continue
            if is_diagonal(name) or tensor.shape[-1] != tensor.shape[-2]:
                assert (tensor >= 0).all(), f"{name} is a diagonal with numbers below zero"
                continue
            close(tensor, tensor.mT, f"{name} is not symmetric")
            values = torch.linalg.eigvalsh(tensor)
            least, largest = float(values.min()), float(values.abs().max())
            assert least >= -1e-10 * largest, (
                f"{name} is not positive semi-definite: it has the eigenvalue {least:.3g}, beside "
                f"{largest:.3g}"
            )

    @law(case="cases")
    def test_l_and_r_are_second_moments(self, case: GradientCase) -> None:
        """L is `V V^T` and R is `V^T V`, where a stage provides them; stand-ins are their parts.

        A diagonal may hold the mean of the diagonal everywhere.
        """
        v = self.matrix(case)
        found = self.matrices(case)
        if not names_of("L", found) and not names_of("R", found):
            pytest.skip(f"{self.label()} provides neither L nor R")
        for side, whole in (("L", v @ v.mT), ("R", v.mT @ v)):
            names = names_of(side, found)
            sizes = [found[name].shape[-1 if is_diagonal(name) else -2] for name in names]
            for name, s in zip(names, slices_of(sizes), strict=True):
                says = f"{name} is not the part of the second moment of {KIND[side]} that it names"
                diagonal = whole[..., s, s].diagonal(dim1=-2, dim2=-1)
                if is_diagonal(name):
                    even = bool((found[name] == found[name][..., :1]).all())
                    mean = diagonal.mean(-1, keepdim=True).expand_as(diagonal)
                    close(found[name], mean if even else diagonal, says)
                elif found[name].shape[-1] != found[name].shape[-2]:
                    close(found[name], diagonal.unsqueeze(-1), says)
                else:
                    close(found[name], whole[..., s, s], says)

    @law(case="cases", power=binary_exponents(), sign=st.sampled_from([1.0, -1.0]))
    def test_gradients_scale_the_factors(self, case: GradientCase, power: int, sign: float) -> None:
        """Gradients times c multiply each factor by c^2, and by the same for -c."""
        plain = self.means(case)
        scaled = self.means(case, sign * 2.0**power * self.matrix(case))
        says = f"gradients times {sign:g} 2^{power} do not multiply it by c^{self.degree}"
        back = {name: each / 2.0 ** (power * self.degree) for name, each in scaled.items()}
        same(back, plain, says)

    @law(case="cases")
    def test_nothing_comes_of_nothing(self, case: GradientCase) -> None:
        """A gradient of zeros counts as one, has zero factors, and makes finite matrices."""
        nothing = torch.zeros_like(self.matrix(case))
        for name, each in self.means(case, nothing).items():
            assert not each.any(), f"{name!r} of a gradient of zeros is {each.tolist()}"
        for name, each in self.matrices(case, nothing).items():
            assert each.isfinite().all(), f"{name!r} of a gradient of zeros is not finite"

    @law(case="cases", random=st.randoms(use_true_random=False))
    def test_rows_and_columns_have_no_order(self, case: GradientCase, random: Any) -> None:
        """Rows and columns in another order permute their side, and leave the other one alone.

        Where blocks stand for a side, the order changes within each.
        """
        if self.ordered:
            pytest.skip(f"{self.label()} says that rows and columns have an order")
        v, before = self.matrix(case), self.matrices(case)
        orders = {
            called: _shuffled(n, before, called, random)
            for called, n in (("output", v.shape[-2]), ("input", v.shape[-1]))
        }
        after = self.matrices(case, v[..., orders["output"], :][..., orders["input"]])
        for name in before:
            if side_of(name) not in SIDES:
                continue
            side = side_of(name)
            order, names = orders[SIDES[side]], names_of(side, before)
            sizes = [before[each].shape[-1 if is_diagonal(each) else -2] for each in names]
            s = slices_of(sizes)[names.index(name)]
            own = [index - s.start for index in order[s]]
            dim = -1 if is_diagonal(name) else -2
            expected = before[name].index_select(dim, torch.tensor(own))
            if before[name].ndim > 1 and dim == -2 and before[name].shape[-1] == len(own):
                expected = expected[..., own]
            says = f"{name} does not follow rows and columns that come in another order"
            close(after[name], expected, says)

    @law(case="cases")
    def test_groups_do_not_mix(self, case: GradientCase) -> None:
        """Of several matrices in one parameter, each makes its own part of the factors."""
        v = self.matrix(case)
        if v.ndim < 3 or len(v) < 2:
            return
        other = v.clone()
        other[1:] += 1.0
        one, two = self.means(case), self.means(case, other)
        for name, each in one.items():
            says = f"{name!r}: the part of the first group changes with the gradients of others"
            close(two[name][0], each[0], says, rtol=0, atol=0)

    @law(case="cases")
    def test_steps_count_alike(self, case: GradientCase) -> None:
        """Each step counts as one, whatever its gradient: sums of steps make their mean."""
        layer = case.layer
        gradients = [self.matrix(case, step) for step in range(len(case.gradients))]
        each = [self.curvature.factors_of_gradient(layer, v) for v in gradients]
        for name in each[0]:
            counts = [float(sums[name].count) for sums in each]
            assert counts == [1.0] * len(counts), (
                f"{name!r} of the steps is counted {counts} times, not once each"
            )
        joined = each[0]
        for sums in each[1:]:
            assert set(sums) == set(joined), f"a step gives {sorted(sums)}, not {sorted(joined)}"
            joined = {name: joined[name] + sums[name] for name in joined}
        expected = {
            name: torch.stack([present(sums[name].total) for sums in each]).mean(0)
            for name in joined
        }
        same(averaged(joined), expected, "the factor of several steps is not their mean")

    @law(case="cases")
    def test_factors_asked_for_are_those_of_all(self, case: GradientCase) -> None:
        """Asked for by a name of `provides`, a factor is what it is among all of them."""
        v, layer = self.matrix(case), case.layer
        whole = self.means(case)
        for name in sorted(self.curvature.provides):
            found = averaged(self.curvature.factors_of_gradient(layer, v, (name,)))
            more = sorted(set(found) - set(whole))
            assert not more, f"asked for {name}, it gives {more}, which are not among all factors"
            stands = set(self.curvature.stand_ins(layer).get(name, (name,)))
            missing = sorted(stands & set(whole) - set(found))
            assert not missing, f"asked for {name}, it does not give {missing}"
            says = f"it is another one when {name} alone is asked for"
            same(found, {each: whole[each] for each in found}, says, rtol=0, atol=0)

    @law(case="cases")
    def test_shapes_need_no_numbers(self, case: GradientCase) -> None:
        """Factors and matrices of a gradient on the meta device have the shapes of real ones."""
        v = self.matrix(case)
        found: list[dict[str, dict[str, list[int]]]] = []
        for gradient in (v, v.to("meta")):
            means = self.means(case, gradient)
            made = dict(self.curvature.assemble(case.layer, means))
            found.append(
                {
                    what: {name: list(each.shape) for name, each in sorted(tensors.items())}
                    for what, tensors in (("factors", means), ("matrices", made))
                }
            )
        assert found[0] == found[1], f"without numbers they are {found[1]}, with them {found[0]}"

    @law(case="cases")
    def test_float32_stays_float32(self, case: GradientCase) -> None:
        """Factors have the precision of the gradient, which is float32 at least."""
        v = self.matrix(case)
        expected = self.means(case, v.float().double())
        for name, each in self.means(case, v.float()).items():
            assert each.dtype == torch.float32, f"{name!r} of float32 is {each.dtype}"
            says = f"{name!r} of float32 is not what it is in float64"
            largest = float(expected[name].abs().max())
            close(each.double(), expected[name], says, rtol=0, atol=1e-5 * largest)

    @law(case="cases")
    def test_nothing_is_changed(self, case: GradientCase) -> None:
        """A stage has no state: it changes nothing it is given, and repeats itself.

        It draws no global random numbers either.
        """
        v = self.matrix(case).clone()
        kept, random = v.clone(), torch.get_rng_state()
        before = {name: each.clone() for name, each in self.means(case, v).items()}
        self.matrices(case, v)
        says = "a second call with the same gradient gives another factor"
        same(self.means(case, v), before, says, rtol=0, atol=0)
        assert torch.equal(v, kept), "the gradient that the stage was given was changed in place"
        assert torch.equal(random, torch.get_rng_state()), (
            "the stage draws from the global random numbers"
        )

    @law(examples=4, case="cases")
    def test_factors_are_means_over_steps(self, case: GradientCase) -> None:
        """In a recipe, factors are running means over steps, which do not depend on the loss.

        Where the basis weighs gradients, or takes nothing of the layer, the law is skipped.
        """
        model, optimizer = self._bound(case)
        basis = optimizer.recipe.rules[0].basis
        if type(basis).weighed is not Basis.weighed:
            pytest.skip("the basis weighs gradients")
        expected: dict[str, Tensor] = {}
        weight = 0.0
        for step in range(len(case.gradients)):
            _take(model, optimizer, case, step)
            weight = DECAY * weight + 1
            for name, each in self.means(case, self.matrix(case, step)).items():
                expected[name] = DECAY * expected.get(name, torch.zeros(())) + each
        found = self._kept(optimizer, case)
        says = f"with the decay {DECAY} it is not the running mean of those of the steps"
        same(found, {name: each / weight for name, each in expected.items()}, says)

    @law(examples=4, case="cases")
    def test_a_resumed_run_goes_on(self, case: GradientCase) -> None:
        """After a load, parameters and factors are bit for bit those of a run without a stop."""
        model, optimizer = self._bound(case)
        _take(model, optimizer, case, 0)
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        saved, state = torch.load(file)
        second, resumed = self._bound(case)
        second.load_state_dict(saved)
        resumed.load_state_dict(state)
        for step in (*range(1, len(case.gradients)), 0):
            _take(model, optimizer, case, step)
            _take(second, resumed, case, step)
        says = "it is another one after a load"
        factors = self._kept(optimizer, case)
        same(self._kept(resumed, case), factors, says, rtol=0, atol=0)
        parameters = dict(model.named_parameters())
        same(dict(second.named_parameters()), parameters, says, rtol=0, atol=0)

    @law()
    def test_unrelated_modules_are_refused_by_a_reason(self) -> None:
        """`unsupported` gives a reason or `None` for any module, and never raises.

        A module that it accepts has parts.
        """
        for module in (nn.Tanh(), *(make() for make in MODULES), *foreign_modules()):
            name = type(module).__name__
            if reason_against(self.curvature, module) is None:
                assert self.curvature.parts(module), (
                    f"unsupported() accepts {name}, and parts() names no parameter of it"
                )

    def _bound(self, case: GradientCase) -> tuple[nn.Module, Optimizer]:
        """Return a copy of a case's module, and an optimizer of it.

        The law is skipped where the basis does not take the case's layer.
        """
        model = copy.deepcopy(case.layer.module)
        recipe = {**self.in_recipe(), "update": torch.optim.SGD, "lr": 0.01, "factor_decay": DECAY}
        periods = dict.fromkeys(("factor_every", "scale_every", "basis_every"), 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KfactkWarning)
            optimizer = built({**recipe, **periods}).bind(model)
        if _name(case) not in optimizer.layers:
            pytest.skip("the basis does not take the layer")
        return model, optimizer

    def _kept(self, optimizer: Optimizer, case: GradientCase) -> dict[str, Tensor]:
        return optimizer.layers[_name(case)].block.state.factor_values()


def _name(case: GradientCase) -> str:
    """Return the name of the layer in a model that is its module."""
    return case.layer.name.removeprefix("mine")


def _take(model: nn.Module, optimizer: Optimizer, case: GradientCase, step: int) -> None:
    """Take a step with the gradient of a case's step; other parameters have ones."""
    for name, parameter in model.named_parameters():
        given = case.gradients[step].get(name, torch.ones_like(parameter))
        parameter.grad = given.detach().clone()
    optimizer.step()


def _shuffled(n: int, matrices: Mapping[str, Tensor], called: str, random: Any) -> list[int]:
    """Return an order of n rows or columns that leaves each in its block."""
    order: list[int] = []
    for s in _blocks(n, matrices, called):
        own = list(range(s.start, s.stop))
        random.shuffle(own)
        order += own
    return order


def _blocks(n: int, matrices: Mapping[str, Tensor], called: str) -> Iterator[slice]:
    """Yield the blocks of a side; the whole of it where there are none."""
    for side in (each for each, name in SIDES.items() if name == called):
        names = names_of(side, matrices)
        if len(names) > 1:
            yield from slices_of(matrices[name].shape[-1] for name in names)
            return
    yield slice(0, n)
