"""The condition number that the K-FAC inverse tells: exact where the factors are diagonal."""

from __future__ import annotations

import torch

from kfactk import FactorContext, linalg
from kfactk_stages.basis.kfac import KfacInverse


def test_the_condition_of_diagonal_factors_is_that_of_the_damped_block() -> None:
    tau = 0.09
    matrices = {
        "A": torch.diag(torch.tensor([7.0, 2.0, 0.5], dtype=torch.float64)),
        "G": torch.diag(torch.tensor([3.0, 0.1]).double()),
    }
    context = FactorContext(
        damping=tau,
        mean_diagonal={name: linalg.mean_diagonal(matrix) for name, matrix in matrices.items()},
    )
    parts = {
        name: KfacInverse().decompose(name, matrix, context) for name, matrix in matrices.items()
    }
    pi = float(linalg.tikhonov_pi(context.mean_diagonal["A"], context.mean_diagonal["G"]))
    damped = {"A": matrices["A"].diagonal() + pi * 0.3, "G": matrices["G"].diagonal() + 0.3 / pi}
    expected = torch.linalg.cond(torch.kron(torch.diag(damped["A"]), torch.diag(damped["G"])))
    operator = KfacInverse().operator(parts, {}, tau, matrices)
    torch.testing.assert_close(operator.condition(), expected)
