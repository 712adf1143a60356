"""Memory that runs out is not the fault of a plugin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kfactk
from kfactk import MemoryExhaustedError, PluginError, linalg
from kfactk_stages.curvature.kfac import Kfac
from tests.kfactk.small import batch, net

SAYS: dict[str, tuple[Exception, str]] = {
    "a CPU": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 10103064196 bytes. Error code 12"
        ),
        "which asked for 9.41 GiB. Lower the batch size",
    ),
    "a CPU of Windows": (
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes."),
        "which asked for 3.81e-06 GiB. Lower",
    ),
    "MPS": (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), "layer '2'. Lower"),
    "cuBLAS": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        "layer '2'. Lower",
    ),
    "C++": (RuntimeError("std::bad_alloc"), "layer '2'. Lower"),
    "Python": (MemoryError(), "layer '2'. Lower"),
}


class Hungry(Kfac):
    error: Exception = ValueError("sizes do not match")

    def input_factors(self, layer: object, samples: object) -> dict[str, kfactk.Statistic]:
        raise type(self).error


def fail(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hungry, "error", error)
    model = net()
    optimizer = kfactk.build(curvature=Hungry()).bind(model)
    model(batch()[0])
    optimizer.close()


@pytest.mark.parametrize("who", SAYS)
def test_memory_is_named(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, message = SAYS[who]
    with pytest.raises(MemoryExhaustedError, match=rf"memory ran out in curv.*{message}") as caught:
        fail(error, monkeypatch)
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, RuntimeError)
    assert str(error) in str(caught.value)


def test_torchs_own_class_stays_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fail(error, monkeypatch)
    assert caught.value is error
    assert any("memory ran out in curvature" in note for note in error.__notes__)


def test_other_errors_are_still_the_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match="sizes do not match"):
        fail(RuntimeError("sizes do not match"), monkeypatch)


def test_a_real_allocation_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine has 2^60 bytes."""

    def huge(self: object, layer: object, samples: object) -> object:
        return torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(Hungry, "input_factors", huge)
    with pytest.raises(MemoryExhaustedError, match=r"asked for 1.07e\+09 GiB"):
        fail(RuntimeError(), monkeypatch)


@pytest.mark.parametrize("name", ["eigh", "cholesky"])
def test_a_decomposition_without_memory_is_no_failed_decomposition(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else is tried on a CPU: each attempt would want as much memory."""

    def fails(matrix: Tensor) -> None:
        tried.append(matrix)
        raise SAYS["a CPU"][0]

    tried: list[Tensor] = []

    monkeypatch.setattr(torch.linalg, "eigh" if name == "eigh" else "cholesky_ex", fails)
    with pytest.raises(type(SAYS["a CPU"][0])) as caught:
        linalg.eigh(torch.eye(3)) if name == "eigh" else linalg.cholesky(torch.eye(3), 0.1)
    assert caught.value is SAYS["a CPU"][0]
    assert len(tried) == 1
