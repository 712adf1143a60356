"""Embeddings tied to output layers: the laws; moments and squares against autograd."""

import itertools

import attrs
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from kfactk import CaptureError, Layer, LayerCall
from kfactk.testing import CurvatureLaws, effort
from kfactk.testing._support.strategies import Case, case_of
from kfactk_stages.curvature._tied import TiedSamples
from kfactk_stages.curvature.embedding import Embedding

F64 = torch.float64
laws = settings(deadline=None, max_examples=effort(30))


class Table(nn.Embedding):
    """A table as both modules use it, so that a case of the laws can call it."""

    def forward(self, x):
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class TiedCase(Case):
    """A table that an output layer has too."""

    @property
    def layer(self):
        return tied(self.module)


def tied(table, bias=False):
    """The layer of a table and of an output layer with the same weight."""
    head = nn.Linear(table.embedding_dim, table.num_embeddings, bias=bias, device="meta")
    head.weight = table.weight
    return Layer("emb", table, ("weight",), sites=(table, head))


def layer_calls(layer, calls, scales=itertools.repeat(1.0)):
    head = layer.sites[1]
    return [
        LayerCall(x, g, scale, module=head if x.is_floating_point() else layer.module)
        for (x, g), scale in zip(calls, scales, strict=False)
    ]


@st.composite
def tables(draw):
    rows = draw(st.integers(1, 5))
    return Table(
        rows, draw(st.integers(2, 3)), padding_idx=draw(st.none() | st.integers(0, rows - 1))
    )


def of_either_kind(module, shape, generator):
    if torch.rand((), generator=generator) < 0.5:
        return torch.randn(*shape, module.embedding_dim, generator=generator, dtype=F64)
    return torch.randint(module.num_embeddings, shape, generator=generator)


def tied_cases():
    """Draw one to three calls of either kind, of the same examples and of their own lengths."""
    shapes = st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple)
    cases = case_of(tables(), lambda draw, _: draw(shapes), most_calls=3, fill=of_either_kind)
    return cases.map(lambda case: TiedCase(**attrs.asdict(case, recurse=False)))


class TestTied(CurvatureLaws):
    stage = "embedding"

    def cases(self):
        return tied_cases()

    def samples(self, case, *, scales=None, num_terms=None, first=True):
        calls = layer_calls(
            case.layer, case.calls, itertools.repeat(1.0) if scales is None else scales
        )
        num_terms = float(len(case.inputs)) if num_terms is None else num_terms
        return self.curvature.samples(case.layer, calls, num_terms=num_terms, first=first)
