"""EKFAC in a basis of channels: the laws of bases, against `blockdiag(U_C kron I_taps, 1)`."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import kfactk
from kfactk import (
    CombinationError,
    FactorContext,
    Layer,
    LayerCall,
    OptionError,
    Samples,
    Statistic,
)
from kfactk.assignment import Workload
from kfactk.preconditioner.block import Block
from kfactk.testing import BasisLaws, effort
from kfactk.testing._support.basis_traits import BasisTraitLaws
from kfactk.testing._support.situations import Situation
from kfactk.testing._support.strategies import Case, conv_cases
from kfactk.testing._support.truth import (
    dense_fisher,
    dense_kron,
    module_gradients,
    projected_square,
    vec,
)
from kfactk_stages.basis import _operators
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.curvature.conv_kfac import ConvKfac
from kfactk_stages.placement.comm_opt import CommOpt
from tests.kfactk.dense import each_group, ekfac_block, is_eigenbasis

F64 = torch.float64
law = settings(max_examples=effort(40), deadline=None)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
NULL = {F64: 1e-10, torch.float32: 1e-6}
ROUNDING = {F64: 1e-9, torch.float32: 1e-4}
CHANNELS = Ekfac(inputs="channels")


def widened(u_c: Tensor, d_in: int, u_k: Tensor | None = None) -> Tensor:
    """`blockdiag(U_C kron U_K, 1)`, entry by entry."""
    c = len(u_c)
    u_k = torch.eye(d_in // c, dtype=u_c.dtype) if u_k is None else u_k
    taps = len(u_k)
    out = torch.zeros(d_in, d_in, dtype=u_c.dtype)
    for i in range(c):
        for j in range(c):
            for one in range(taps):
                for other in range(taps):
                    out[i * taps + one, j * taps + other] = u_c[i, j] * u_k[one, other]
    if d_in > c * taps:
        out[-1, -1] = 1
    return out


def pooled(scale: Tensor, values: tuple[Tensor, Tensor, Tensor], tolerance: float) -> Tensor:
    """Give null directions their mean: of C tap by tap, of K by channel, of G by column."""
    out = scale.clone()
    c, k, g = (
        [
            i
            for i, value in enumerate(each.tolist())
            if value <= tolerance * max(0.0, float(each.max()))
        ]
        for each in values
    )
    channels, taps = len(values[0]), len(values[1])
    for row in out:
        for tap in range(taps) if c else ():
            at = [i * taps + tap for i in c]
            row[at] = row[at].mean()
        for channel in range(channels) if k else ():
            at = [channel * taps + tap for tap in k]
            row[at] = row[at].mean()
    if g:
        for column in out.T:
            column[g] = column[g].mean()
    return out


class TestEkfacChannels(BasisLaws):
    """Its block is `Q diag(s* + tau) Q^T` with Q = blockdiag(U_C kron I_taps, 1) kron U_G."""

    stage: ClassVar[Any] = {"name": "ekfac", "inputs": "channels"}
    curvature: ClassVar[Any] = {"name": "conv_kfac", "spatial": "sua"}

    def block(self, situation: Situation) -> Tensor:
        return each_group(situation.groups, lambda k: self.block_of(situation, k))

    def block_of(self, situation: Situation, k: Any) -> Tensor:
        dtype, d_in, matrices = (
            situation.gradient.dtype,
            situation.gradient.shape[-1],
            dict(situation.required),
        )
        vectors = {
            name: parts["eigenvectors"][k].double()
            for name, parts in situation.decomposition.items()
        }
        if "K" not in matrices:
            taps = d_in // len(vectors["C"])
            matrices["K"] = vectors["K"] = torch.eye(taps, dtype=F64).expand(
                situation.groups or 1, taps, taps
            )
            vectors["K"] = vectors["K"][0]
            matrices["K"] = matrices["K"] if situation.groups else matrices["K"][0]
        values = {}
        for name, u in vectors.items():
            matrix = matrices[name][k].double()
            assert is_eigenbasis(matrix, u, ROUNDING[dtype]), f"the eigenvectors of {name} are none"
            values[name] = (u.T @ matrix @ u).diagonal()
        u_a = widened(vectors["C"], d_in, vectors["K"])
        if situation.moments:
            scale = self.scale(situation, k, u_a, vectors["G"])
            scale = pooled(scale, (values["C"], values["K"], values["G"]), NULL[dtype])
        else:
            a = torch.stack([one * other for one in values["C"] for other in values["K"]])
            a = torch.cat([a, a.mean().reshape(1)]) if len(a) < d_in else a
            scale = torch.outer(values["G"], a)
        return ekfac_block(u_a, vectors["G"], scale, situation.damping)

    def scale(self, situation: Situation, k: Any, u_a: Tensor, u_g: Tensor) -> Tensor:
        return projected_square(situation.per_example[k], u_g, u_a) / situation.num_terms


class TestEkfacChannelsOfPatches(TestEkfacChannels):
    """With the mean over taps of a factor of patches."""

    curvature: ClassVar[Any] = "conv_kfac"


class TestEkfacTaps(TestEkfacChannels):
    """Taps rotated too, by what a factor of patches says of them."""

    stage: ClassVar[Any] = {"name": "ekfac", "inputs": "channels+taps"}
    curvature: ClassVar[Any] = "conv_kfac"


class TestEkfacTapsStationary(TestEkfacTaps):
    """And by their distance; on ranks each of which decomposes some of the layers."""

    curvature: ClassVar[Any] = {"name": "conv_kfac", "spatial": "stationary"}

    def in_recipe(self) -> dict[str, Any]:
        return {**super().in_recipe(), "placement": "comm_opt"}


class TestEkfacTapsOfReduce(BasisTraitLaws):
    """With "reduce" directions in the null spaces carry gradient."""

    stage: ClassVar[Any] = {"name": "ekfac", "inputs": "channels+taps"}
    curvature: ClassVar[Any] = {"name": "conv_kfac", "spatial": "reduce"}

    block, block_of, scale = (
        TestEkfacChannels.block,
        TestEkfacChannels.block_of,
        TestEkfacChannels.scale,
    )
    test_it_is_the_dense_damped_inverse = BasisLaws.test_it_is_the_dense_damped_inverse


class TestEkfacChannelsRunning(TestEkfacChannels):
    """Its scale is M times the square of the mini-batch's mean gradient."""

    stage: ClassVar[Any] = {"name": "ekfac", "inputs": "channels", "scale": "running"}

    def scale(self, situation: Situation, k: Any, u_a: Tensor, u_g: Tensor) -> Tensor:
        return situation.num_terms * (u_g.T @ situation.mean_gradient[k].double() @ u_a) ** 2


def orthogonal(*shape: int, seed: int) -> Tensor:
    return torch.linalg.qr(
        torch.randn(*shape, shape[-1], dtype=F64, generator=torch.Generator().manual_seed(seed))
    ).Q


def decomposition_of(
    c: int, d_out: int, lead: tuple[int, ...], seed: int, taps: int = 0
) -> dict[str, dict[str, Tensor]]:
    sides = {"C": c, "G": d_out, **({"K": taps} if taps else {})}
    return {
        name: {
            "eigenvalues": torch.ones(*lead, n, dtype=F64),
            "eigenvectors": orthogonal(*lead, n, seed=seed + k),
        }
        for k, (name, n) in enumerate(sides.items())
    }


def samples_of(case: Case, calls: int, chunk_bytes: int, spatial: str = "sua") -> Samples:
    given_ = [LayerCall(case.inputs, case.gradient, 1.0 + k) for k in range(calls)]
    return ConvKfac(spatial=spatial, chunk_bytes=chunk_bytes).samples(
        case.layer, given_, num_terms=2.0, first=True
    )


@law
@given(
    conv_cases(),
    st.integers(1, 2),
    st.sampled_from([1, 2**28]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_scale_is_that_of_autograds_gradients(
    case: Case, calls: int, chunk_bytes: int, with_left: bool, with_taps: bool, seed: int
) -> None:
    """Channels are rotated in the images or in the gradients, for any geometry."""
    samples = samples_of(case, calls, chunk_bytes)
    truth = sum(range(1, calls + 1)) * module_gradients(case.module, case.inputs, case.gradient)
    groups = range(len(truth)) if truth.ndim == 4 else [...]
    lead = (len(truth),) if truth.ndim == 4 else ()
    c = case.module.in_channels // case.module.groups
    left, right = orthogonal(*lead, samples.d_out, seed=seed), orthogonal(*lead, c, seed=seed + 1)
    taps = (
        orthogonal(*lead, math.prod(case.module.kernel_size), seed=seed + 2) if with_taps else None
    )
    rights = [widened(right[k], samples.d_in, None if taps is None else taps[k]) for k in groups]
    expected = torch.stack(
        [
            projected_square(truth[k], left[k] if with_left else None, each)
            for k, each in zip(groups, rights, strict=True)
        ]
    )
    found: Statistic = samples.projected_square_of_channels(
        left if with_left else None, right, taps
    )
    assert found.total is not None
    torch.testing.assert_close(found.total, expected if lead else expected[0], rtol=1e-9, atol=1e-9)
    assert found.count == 2.0


@pytest.mark.parametrize(
    ("channels", "outputs", "size"), [(2, 2, 9), (2, 8, 3), (5, 2, 3), (1, 3, 4), (3, 4, 1)]
)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "replicate"])
def test_whichever_side_is_rotated_first(
    channels: int, outputs: int, size: int, padding_mode: str
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, outputs, 3, padding=1, padding_mode=padding_mode).double()
    inputs = torch.randn(4, channels, size, size, dtype=F64)
    case = Case(conv, inputs, torch.randn(4, outputs, size, size, dtype=F64))
    samples = samples_of(case, 1, 2**28)
    left, right = orthogonal(outputs, seed=1), orthogonal(channels, seed=2)
    truth = projected_square(
        module_gradients(conv, inputs, case.gradient), left, widened(right, samples.d_in)
    )
    found = samples.projected_square_of_channels(left, right).total
    plain = (
        Samples(samples.inputs(), samples.gradients(), num_terms=2.0)
        .projected_square_of_channels(left, right)
        .total
    )
    assert found is not None
    assert plain is not None
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(plain, truth, rtol=1e-10, atol=1e-10)


@law
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(), (2,)]),
    st.integers(0, 99),
)
def test_transport_is_the_diagonal_of_the_old_operator_in_the_new_basis(
    c: int, taps: int, d_out: int, bias: bool, with_taps: bool, lead: tuple[int, ...], seed: int
) -> None:
    d_in = c * taps + bias
    old, new = (
        decomposition_of(c, d_out, lead, seed + k, taps if with_taps else 0) for k in (0, 7)
    )
    scale = torch.randn(
        *lead, d_out, d_in, dtype=F64, generator=torch.Generator().manual_seed(seed)
    ).square()
    carried = CHANNELS.transport({"scale": scale}, old, new)["scale"]
    for k in range(2) if lead else [...]:
        bases = [
            {name: parts["eigenvectors"][k] for name, parts in each.items()} for each in (old, new)
        ]
        operators = [
            dense_kron(widened(each["C"], d_in, each.get("K")), each["G"]) for each in bases
        ]
        operator = operators[0] @ torch.diag(vec(scale[k])) @ operators[0].T
        torch.testing.assert_close(
            vec(carried[k]),
            (operators[1].T @ operator @ operators[1]).diagonal(),
            rtol=1e-9,
            atol=1e-11,
        )
    torch.testing.assert_close(
        CHANNELS.transport({"scale": scale}, old, old)["scale"], scale, rtol=1e-9, atol=1e-11
    )


@law
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(), (2,)]),
    st.integers(0, 99),
)
@pytest.mark.parametrize("dense", [0, 10**6])
def test_small_and_large_layers_have_the_same_operator(
    dense: int,
    c: int,
    taps: int,
    d_out: int,
    bias: bool,
    with_taps: bool,
    lead: tuple[int, ...],
    seed: int,
) -> None:
    """By one basis of the whole input side, and tap by tap."""
    d_in = c * taps + bias
    parts = decomposition_of(c, d_out, lead, seed, taps if with_taps else 0)
    left, right = (parts[name]["eigenvectors"] for name in ("G", "C"))
    tap = parts["K"]["eigenvectors"] if with_taps else None
    generator = torch.Generator().manual_seed(seed)
    spectrum, vector = (
        torch.randn(*lead, d_out, d_in, dtype=F64, generator=generator) for _ in range(2)
    )
    spectrum = spectrum.square()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_operators, "DENSE", dense)
        operator = _operators.operator_in(left, right, tap, spectrum=spectrum, damping=0.1)
    found = operator.solve(vector), operator.multiply(vector)
    for k in range(2) if lead else [...]:
        basis = dense_kron(widened(right[k], d_in, None if tap is None else tap[k]), left[k])
        for each, weights in zip(found, (1 / (spectrum[k] + 0.1), spectrum[k]), strict=True):
            truth = basis @ torch.diag(vec(weights)) @ basis.T @ vec(vector[k])
            torch.testing.assert_close(vec(each[k]), truth, rtol=1e-9, atol=1e-11)


@law
@given(conv_cases(), st.sampled_from(["channels", "channels+taps"]), st.integers(0, 99))
def test_it_is_no_farther_from_the_fisher_than_the_product_of_factors(
    case: Case, inputs: str, seed: int
) -> None:
    """A' kron G is diagonal in this basis, and s* the best diagonal, whatever the bias has."""
    basis = Ekfac(inputs=inputs)
    layer, samples = case.layer, samples_of(case, 1, 2**28, "sud")
    means = {
        name: s.total / s.count
        for name, s in ConvKfac().factors(layer, samples).items()
        if s.total is not None
    }
    matrices = ConvKfac().assemble(layer, means)
    parts = {
        name: basis.decompose(name, matrices[name], FactorContext(0.1, {}))
        for name in basis.requires
    }
    found = basis.moments(parts, samples)["scale"]
    assert found.total is not None
    gradients, d_in = module_gradients(case.module, case.inputs, case.gradient), samples.d_in
    for k in range(len(gradients)) if gradients.ndim == 4 else [...]:
        fisher = dense_fisher(gradients[k], 2.0)
        vectors = {name: each["eigenvectors"][k] for name, each in parts.items()}
        q = dense_kron(widened(vectors["C"], d_in, vectors.get("K")), vectors["G"])
        mine = q @ torch.diag(vec(found.total[k] / 2.0)) @ q.T
        a = widened(matrices["C"][k], d_in, matrices["K"][k] if "K" in parts else None)
        if "bias" in layer.parameters and d_in > 1:
            a[-1, -1] = 10.0 ** (seed % 5 - 2)
        kfac = dense_kron(a, matrices["G"][k])
        assert (fisher - mine).norm() <= (fisher - kfac).norm() * (1 + 1e-9) + 1e-12 * fisher.norm()


@pytest.mark.parametrize("spatial", ["sud", "sua", "reduce"])
@pytest.mark.parametrize("groups", [1, 2])
def test_c_is_the_factor_of_channels_that_is_closest(spatial: str, groups: int) -> None:
    """`C kron I_taps` leaves a remainder that is orthogonal to every `X kron I_taps`."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 2, (3, 2), groups=groups, padding=1).double()
    inputs = torch.randn(3, 4, 5, 4, dtype=F64)
    case, curvature = Case(conv, inputs, torch.randn_like(conv(inputs))), ConvKfac(spatial=spatial)
    samples = curvature.samples(
        case.layer, [LayerCall(case.inputs, case.gradient.detach())], num_terms=3.0, first=True
    )
    matrices = curvature.assemble(
        case.layer,
        {n: s.total / s.count for n, s in curvature.factors(case.layer, samples).items()},
    )
    for k in range(groups) if groups > 1 else [...]:
        a, c = matrices["A"][k], matrices["C"][k]
        remainder = (a - widened(c, len(a)))[:-1, :-1]
        for i in range(len(c)):
            for j in range(len(c)):
                assert (
                    abs(float(sum(remainder[i * 6 + tap, j * 6 + tap] for tap in range(6)))) < 1e-10
                )


def test_c_of_a_linear_layer_is_a() -> None:
    matrices = ConvKfac().assemble(
        Layer("fc", nn.Linear(2, 1), ("weight", "bias")), {"A": torch.eye(3), "G": torch.eye(1)}
    )
    assert matrices["C"] is matrices["A"]
    assert matrices["K"].tolist() == [[1.0]]


def test_nothing_of_the_size_of_patches_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With uncorrelated activations a step on a large layer makes no matrix of the size of A."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(6, 4, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    )
    optimizer = kfactk.build(**RECIPE, basis_every=1).bind(model)
    sides: list[int] = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda matrix: (sides.append(matrix.shape[-1]), eigh(matrix))[1]
    )
    monkeypatch.setattr(
        "kfactk_stages.curvature.conv_kfac.kron", lambda *_: pytest.fail("A was formed")
    )
    monkeypatch.setattr(
        _operators, "joint_basis", lambda *_: pytest.fail("a basis of the size of A was formed")
    )
    for _ in range(2):
        step(model, optimizer, torch.randn(8, 6, 6, 6))
    assert sorted(set(sides)) == [3, 4, 6, 145]  # the linear layer's own, and channels
    view = optimizer.layers["0"]
    assert {name: tuple(factor.shape) for name, factor in view.factors.items()} == {
        "C": (6, 6),
        "G": (4, 4),
    }
    assert view.scale["scale"].shape == (4, 151)


RECIPE: dict[str, Any] = {
    "curvature": {"name": "conv_kfac", "spatial": "sua"},
    "basis": {"name": "ekfac", "inputs": "channels"},
    "update": "sgd",
    "lr": 0.05,
    "damping": 0.01,
}


def step(model: nn.Module, optimizer: Any, inputs: Tensor) -> None:
    optimizer.zero_grad()
    labels = torch.arange(len(inputs)) % 3
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


@pytest.mark.parametrize("inputs", ["channels", "channels+taps"])
@pytest.mark.parametrize("spatial", ["sud", "sua", "reduce", "stationary"])
def test_views_are_of_the_dense_block(spatial: str, inputs: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, groups=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)
    ).double()
    recipe = {
        **RECIPE,
        "curvature": {"name": "conv_kfac", "spatial": spatial},
        "basis": {"name": "ekfac", "inputs": inputs},
    }
    optimizer = kfactk.build(**recipe).bind(model)
    step(model, optimizer, torch.randn(6, 2, 5, 5, dtype=F64))
    view = optimizer.layers["0"]
    vectors = {name: parts["eigenvectors"] for name, parts in view.decomposition.items()}
    q = dense_kron(widened(vectors["C"], 19, vectors.get("K")), vectors["G"])
    fisher = q @ torch.diag(vec(view.scale["scale"])) @ q.T
    v = {"weight": torch.randn(3, 2, 3, 3, dtype=F64), "bias": torch.randn(3, dtype=F64)}
    given_ = vec(view.matrix(v))
    torch.testing.assert_close(
        vec(view.matrix(view.fisher_product(v))), fisher @ given_, rtol=1e-9, atol=1e-12
    )
    damped = fisher + 0.01 * torch.eye(len(fisher), dtype=F64)
    torch.testing.assert_close(
        damped @ vec(view.matrix(view.precondition(v))), given_, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    ("module", "inputs", "matrices"),
    [
        (nn.Conv2d(4, 6, 3), "channels", {"C": (4, 4), "G": (6, 6)}),
        (nn.Conv2d(4, 6, 3), "channels+taps", {"C": (4, 4), "G": (6, 6), "K": (9, 9)}),
        (
            nn.Conv1d(4, 6, 5, groups=2),
            "channels+taps",
            {"C": (2, 2, 2), "G": (2, 3, 3), "K": (2, 5, 5)},
        ),
        (nn.Conv3d(3, 3, 2, groups=3), "channels", {"C": (3, 1, 1), "G": (3, 1, 1)}),
        (nn.Linear(4, 3), "channels+taps", {"C": (5, 5), "G": (3, 3), "K": (1, 1)}),
    ],
)
@pytest.mark.parametrize("spatial", ["sud", "sua", "stationary"])
def test_the_work_of_a_layer_is_of_its_channels(
    module: nn.Module, inputs: str, matrices: dict[str, Any], spatial: str
) -> None:
    """Matrices of one layer stay together, since there is no one statistic for each."""
    layer = Layer("mine", module, ("weight", "bias"))
    found = Block(layer, ConvKfac(spatial=spatial), Ekfac(inputs=inputs)).work()
    assert found.matrices == matrices
    assert found.indivisible
    shares = CommOpt().assign(Workload((found,)), 4).shares["mine"]
    assert len(set(shares.inverse_workers.values())) == 1


def test_a_curvature_without_c_is_refused() -> None:
    with pytest.raises(CombinationError, match="needs C, which curvature 'kfac' does not provide"):
        kfactk.build(curvature="kfac", basis=RECIPE["basis"])


def test_other_inputs_are_refused() -> None:
    with pytest.raises(OptionError, match="inputs='taps'"):
        Ekfac(inputs="taps")


def test_columns_that_are_no_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="8 columns are not 3 channels times taps"):
        kfactk.project_channels(torch.ones(2, 8), None, torch.eye(3))
    with pytest.raises(ValueError, match="1 columns are not 2 channels"):
        kfactk.project_channels(torch.ones(2, 1), None, torch.eye(2))


def test_the_condition_is_that_of_the_dense_block() -> None:
    parts = decomposition_of(2, 3, (), 0)
    parts["C"]["eigenvalues"] = torch.tensor([1.0, 5.0], dtype=F64)
    parts["G"]["eigenvalues"] = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    scale = torch.rand(3, 9, dtype=F64)
    told = float(CHANNELS.operator(parts, {"scale": scale}, 0.1, {}).condition())
    assert math.isclose(told, float((scale.max() + 0.1) / (scale.min() + 0.1)), rel_tol=1e-12)
    unmeasured = CHANNELS.operator(parts, {}, 0.1, {})
    told = float(unmeasured.condition())
    assert math.isclose(told, (10 + 0.1) / (0.5 + 0.1), rel_tol=1e-12)
    assert unmeasured.solve(torch.ones(3, 9, dtype=F64)).shape == (3, 9)
