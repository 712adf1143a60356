"""Refreshes that fail, on one rank of several: all ranks end, or go on, together."""

from __future__ import annotations

import warnings
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import kfactk
from kfactk import DecompositionError, KfactkError, PluginError
from kfactk.testing._support.ranks import RankError, shared_workers
from kfactk_stages.basis.ekfac import Ekfac
from kfactk_stages.basis.kfac import KfacInverse
from kfactk_stages.curvature.conv_kfac import ConvKfac
from tests.covering import covering

pytestmark = pytest.mark.xdist_group("ranks")
F64 = torch.float64
DIVIDED: list[Any] = ["comm_opt", "mem_opt", {"name": "hybrid", "fraction": 0.5}]
ALL: list[Any] = ["replicated", *DIVIDED]
WIDE = 9
"""Inputs of the first layer, bias included: only its matrix A has this size."""
STEPS = 5


@attrs.frozen(kw_only=True)
class Refusing(KfacInverse):
    """Cannot decompose the wide matrix at some of its calls, counted from 0."""

    at: tuple[int, ...] = ()
    calls: list[str] = attrs.field(factory=list, eq=False)

    def decompose(self, name: str, matrix: Tensor, context: Any) -> dict[str, Tensor]:
        if matrix.shape[-1] == WIDE:
            self.calls.append(name)
            if len(self.calls) - 1 in self.at:
                raise DecompositionError("it has a bad day")
        return super().decompose(name, matrix, context)


@attrs.frozen(kw_only=True)
class RefusingEkfac(Ekfac):
    """The same, of a basis with moments that have to stay with their eigenvectors."""

    at: tuple[int, ...] = ()
    calls: list[str] = attrs.field(factory=list, eq=False)

    def decompose(self, name: str, matrix: Tensor, context: Any) -> dict[str, Tensor]:
        if matrix.shape[-1] == WIDE:
            self.calls.append(name)
            if len(self.calls) - 1 in self.at:
                raise DecompositionError("it has a bad day")
        return super().decompose(name, matrix, context)


def mine(rank: int) -> bool:
    return dist.is_initialized() and dist.get_rank() == rank


@attrs.frozen(kw_only=True)
class Breaking(KfacInverse):
    """Fails while the wide matrix is decomposed, wherever that is."""

    def decompose(self, name: str, matrix: Tensor, context: Any) -> dict[str, Tensor]:
        if matrix.shape[-1] == WIDE:
            raise ZeroDivisionError("broken")
        return super().decompose(name, matrix, context)


@attrs.frozen(kw_only=True)
class BreakingAssembly(ConvKfac):
    """Fails on rank 1 when factors become matrices, once there is data."""

    def assemble(self, layer: Any, factors: Any) -> dict[str, Tensor]:
        if mine(1) and any(bool(factor.any()) for factor in factors.values()):
            raise ZeroDivisionError("broken")
        return super().assemble(layer, factors)


@attrs.frozen(kw_only=True)
class BreakingSamples(ConvKfac):
    """Fails on rank 1 in its Fisher pass."""

    def samples(self, layer: Any, calls: Any, *, num_terms: Any, first: bool) -> Any:
        if mine(1) and bool(calls[0].gradient.any()):
            raise ZeroDivisionError("broken")
        return super().samples(layer, calls, num_terms=num_terms, first=first)


@attrs.frozen(kw_only=True)
class BreakingMoments(Ekfac):
    """Fails on rank 1 when it measures its scale on data."""

    def moments(self, decomposition: Any, samples: Any) -> Any:
        if mine(1):
            raise ZeroDivisionError("broken")
        return super().moments(decomposition, samples)


@attrs.frozen(kw_only=True)
class Lonely(Ekfac):
    """Decomposes the wide matrix otherwise on rank 1: not at all, a bit off, or without memory."""

    how: str = "fails"

    def decompose(self, name: str, matrix: Tensor, context: Any) -> dict[str, Tensor]:
        found = super().decompose(name, matrix, context)
        if matrix.shape[-1] == WIDE and mine(1):
            if self.how == "fails":
                raise DecompositionError("it has a bad day")
            if self.how == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            found["eigenvectors"] = found["eigenvectors"] * (1 + 1e-9)
        return found


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()


def trained(
    rank: int, ranks: int, recipe: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, int], list[str]]:
    """Return parameters, counters and warnings of some steps on the rank's part of each batch."""
    model = net()
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    options = {"fisher": "exact", "clip": "none", "update": "sgd", "lr": 0.1, "damping": 0.05}
    optimizer = kfactk.build(
        **{**options, "factor_every": 1, "scale_every": 1, "basis_every": 2, **recipe}
    ).bind(wrapped)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            inputs, targets = (
                torch.randn(12, 8, generator=generator, dtype=F64),
                torch.randint(3, (12,), generator=generator),
            )
            optimizer.zero_grad()
            F.cross_entropy(wrapped(inputs[rank::ranks]), targets[rank::ranks]).backward()
            optimizer.step()
    told = [str(each.message) for each in caught if issubclass(each.category, kfactk.KfactkWarning)]
    return (
        {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        optimizer.counters,
        told,
    )


@covering(
    basis=[Refusing, RefusingEkfac],
    at=[(0,), (1,), (0, 1), (1, 2)],
    ranks=[2, 4],
    placement=ALL,
)
def test_a_matrix_that_cannot_be_decomposed_leaves_its_layer_as_it_was_everywhere(
    basis: type[Refusing], at: tuple[int, ...], ranks: int, placement: Any
) -> None:
    """Where it fails on the one rank that decomposes it, all ranks do what one process does.

    They keep the last good decomposition, or use the plain gradient.
    """
    truth, counters, told = trained(0, 1, {"basis": basis(at=at)})
    assert counters == {"skipped_batches": 0, "failed_decompositions": len(at)}
    found = shared_workers().run(
        ranks, trained, ranks, {"basis": basis(at=at), "placement": placement}
    )
    for parameters, theirs, warned in found:
        assert theirs == counters
        assert len(warned) == len(told) == 1
        assert "layer '0': it has a bad day" in warned[0]
        for name, parameter in parameters.items():
            assert torch.equal(parameter, found[0][0][name])
            torch.testing.assert_close(parameter, truth[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", ["fails", "off"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_decomposes_otherwise_takes_what_the_first_one_found(
    how: str, ranks: int
) -> None:
    truth, _, _ = trained(0, 1, {"basis": Ekfac()})
    found = shared_workers().run(ranks, trained, ranks, {"basis": Lonely(how=how)})
    for parameters, counters, told in found:
        assert counters == {"skipped_batches": 0, "failed_decompositions": 3 * (how == "fails")}
        assert len(told) == 1
        assert "layers '0' alike" in told[0]
        assert ("it has a bad day" in told[0]) == (how == "fails")
        for name, parameter in parameters.items():
            assert torch.equal(parameter, found[0][0][name])
            torch.testing.assert_close(parameter, truth[name], rtol=1e-10, atol=1e-12)


def test_memory_that_runs_out_on_one_rank_ends_all() -> None:
    with pytest.raises(RankError) as error:
        shared_workers().run(2, trained, 2, {"basis": Lonely(how="memory")})
    assert "OutOfMemoryError: CUDA out of memory" in str(error.value)
    assert "did not end" not in str(error.value)


def test_the_failure_matters() -> None:
    """What the comparison above would see if one rank's failure went by."""
    with_it, without = (trained(0, 1, {"basis": Refusing(at=at)})[0] for at in ((1,), ()))
    assert float((with_it["0.weight"] - without["0.weight"]).abs().max()) > 1e-6


def caught_on(rank: int, ranks: int, recipe: dict[str, Any]) -> str:
    """The error that the first step ends with."""
    with pytest.raises(KfactkError) as error:
        trained(rank, ranks, recipe)
    return f"{type(error.value).__name__}: {error.value}"


@pytest.mark.parametrize("placement", DIVIDED, ids=str)
def test_a_stage_that_breaks_on_one_rank_stops_all_with_its_name(placement: Any) -> None:
    said = shared_workers().run(4, caught_on, 4, {"basis": Breaking(), "placement": placement})
    own = [text for text in said if text.startswith("PluginError: basis")]
    others = [text for text in said if text not in own]
    assert len(own) == 1
    assert "Breaking failed on layer '0' (ZeroDivisionError: broken)" in own[0]
    assert len(set(others)) == 1
    where = said.index(own[0])
    assert f"rank {where} failed while it decomposed curvature (PluginError: basis" in others[0]
    assert "and so all ranks stop" in others[0]


def test_where_all_decompose_all_say_so_themselves() -> None:
    said = shared_workers().run(2, caught_on, 2, {"basis": Breaking(), "placement": "replicated"})
    assert said == [said[0]] * 2
    assert said[0].startswith("PluginError: basis")


@pytest.mark.parametrize(
    "recipe",
    [
        {"curvature": BreakingSamples(), "placement": "replicated"},
        {"curvature": BreakingAssembly(), "placement": "comm_opt"},
        {"basis": BreakingMoments(), "placement": "mem_opt"},
    ],
    ids=["samples", "matrices", "moments"],
)
def test_a_rank_that_ends_with_an_error_takes_the_others_with_it(recipe: dict[str, Any]) -> None:
    """Nobody waits for a rank that is gone: each of the others ends too, and says why."""
    with pytest.raises(RankError) as error:
        shared_workers().run(3, trained, 3, recipe)
    said = str(error.value)
    assert "ZeroDivisionError: broken" in said
    assert "did not end" not in said
    for rank in (0, 2):
        assert f"rank {rank} of 3: Traceback" in said


def test_plugin_errors_keep_their_class() -> None:
    with pytest.raises(PluginError, match="Breaking failed"):
        trained(0, 1, {"basis": Breaking()})
