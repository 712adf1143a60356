"""Workloads drawn by Hypothesis: layers of a few shapes, some grouped, some kept together."""

from __future__ import annotations

import attrs
from hypothesis import strategies as st

from kfactk.assignment import Work, Workload

side = st.integers(1, 40)


@st.composite
def works(draw: st.DrawFn, name: str) -> Work:
    o, i = draw(side), draw(side)
    lead = draw(st.sampled_from([(), (), (3,)]))
    return Work(
        name,
        {"A": (*lead, i, i), "G": (*lead, o, o)},
        (*lead, o, i),
        indivisible=draw(st.sampled_from([False, False, True])),
    )


@st.composite
def workloads(draw: st.DrawFn, *, largest: int = 6) -> Workload:
    layers = draw(st.integers(1, largest))
    factor, scale = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return Workload(
        tuple(draw(works(f"layer{n}")) for n in range(layers)),
        factor_every=factor,
        scale_every=scale,
        basis_every=draw(st.integers(1, 12)),
        sampled=draw(st.booleans()),
    )


def one(workload: Workload, work: Work) -> Workload:
    """The same periods with one layer."""
    return attrs.evolve(workload, works=(work,))
