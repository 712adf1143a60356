"""The laws that the two stages obey, alone and together, one test each."""

import torch
from kfactk import linalg
from kfactk.testing import (
    BasisLaws,
    Case,
    CurvatureLaws,
    PipelineLaws,
    Situation,
    close,
    law,
    truth,
)
from torch import Tensor


class TestDiagonalFisher(CurvatureLaws):
    stage = "diagonal"

    @law(case="known_cases")
    def test_it_is_the_diagonal(self, case: Case) -> None:
        """The factor is the diagonal of the dense Fisher matrix."""
        dense = truth.dense_fisher(self.gradients(case), num_terms=len(case.inputs))
        found = linalg.vec(self.means(case)["square"])
        close(found, dense.diagonal(dim1=-2, dim2=-1), "the factor is not the Fisher's diagonal")


class TestDiagonalInverse(BasisLaws):
    stage = "diagonal"
    curvature = "diagonal"

    def block(self, situation: Situation) -> Tensor:
        return torch.diag_embed(linalg.vec(situation.matrices["square"]) + situation.damping)


class TestTogether(PipelineLaws):
    recipe = {"curvature": "diagonal", "basis": "diagonal"}
