"""Rows: the laws on the F that they make; what is kept, joined and trained."""

import copy
import io
from typing import ClassVar

import pytest
import torch
from torch import nn

import kfactk
from kfactk import Layer, LayerCall, Statistic
from kfactk.statistics import local_means
from kfactk.testing import CurvatureLaws
from kfactk.testing._support.division import equal_on_ranks, on_ranks
from kfactk.testing._support.laws import close, law
from kfactk.testing._support.layers import averaged
from kfactk.testing._support.training import Training
from kfactk.testing.curvature import described
from kfactk_stages.curvature.rows import RowsCurvature
from tests.deviations import deviation


def fisher_sum(sums):
    """M F as a matrix for each group, from the statistics of rows."""
    a, g, d = (sums[name].total.double() for name in ("inputs", "gradients", "matrices"))
    every = torch.cat([torch.einsum("ntgo,ntgi->ngoi", g, a), d])
    flat = every.flatten(2).transpose(0, 1)
    counts = {float(each.count) for each in sums.values()}
    assert len(counts) == 1, f"rows are counted differently: {counts}"
    return Statistic(flat.mT @ flat, counts.pop())


class TestRows(CurvatureLaws):
    """Laws of factors hold for F: rows themselves depend on the order of the examples."""

    stage: ClassVar = "rows"

    def sums(self, case, **how):
        return {"F": fisher_sum(super().sums(case, **how))}

    def matrices(self, case, **how):
        factors = self.curvature.factors(case.layer, self.samples(case, **how))
        return dict(self.curvature.assemble(case.layer, local_means(factors)))

    def means(self, case, **how):
        """F in the precision of the rows."""
        precision = self.samples(case, **how).dtype
        return {name: each.to(precision) for name, each in averaged(self.sums(case, **how)).items()}

    @law(examples=10, case="cases")
    def test_fisher_is_that_of_autograd(self, case):
        """F is the mean of vec(D) vec(D)^T over examples, one by one."""
        d = self.gradients(case).flatten(-2)
        d = d if d.ndim > 2 else d.unsqueeze(0)
        close(self.means(case)["F"], d.mT @ d / d.shape[-2], "F is not that of autograd")

    @law(case="cases")
    def test_parted_factors_are_the_factors(self, case):
        """All factors need gradients."""
        assert self.curvature.input_factors(case.layer, self.samples(case)) == {}

    @law(case="cases")
    def test_blank_tells_the_shapes(self, case):
        """Dimensions and precision of blank() are those of data, and all but the rows' number."""
        layer, real = case.layer, self.samples(case)
        call = self.curvature.blank(layer)
        assert case.module(call.inputs).shape == call.gradient.shape
        blank = self.curvature.samples(layer, [call], num_terms=1.0, first=True)
        found = [self.curvature.factors(layer, samples) for samples in (blank, real)]
        fixed = [{n: each.total[:0, :0] for n, each in sums.items()} for sums in found]
        assert described(fixed[0]) == described(fixed[1])

    @law(case="cases")
    def test_the_smaller_form_is_kept(self, case):
        """Pairs or D_n, never more numbers than the smaller of both."""
        samples = self.samples(case)
        sums = self.curvature.factors(case.layer, samples)
        kept = sum(each.total.numel() for each in sums.values())
        sides, product = samples.d_in + samples.d_out, samples.d_in * samples.d_out
        smaller = min(samples.positions * sides, product)
        assert kept == samples.examples * samples.groups * smaller


def layer_of(module):
    return Layer("layer", module, tuple(name for name, _ in module.named_parameters()))


def factors(module, x, g):
    curvature, layer = RowsCurvature(), layer_of(module)
    samples = curvature.samples(layer, [LayerCall(x, g)], num_terms=float(len(x)), first=True)
    return curvature.factors(layer, samples)


def test_forwards_of_different_lengths_join():
    layer = nn.Linear(6, 5).double()
    parts = [
        factors(layer, torch.randn(n, t, 6).double(), torch.randn(n, t, 5).double())
        for n, t in ((2, 1), (1, 2), (3, 4))  # the last one is kept as D_n
    ]
    joined = {name: parts[0][name] + parts[1][name] + parts[2][name] for name in parts[0]}
    assert joined["inputs"].total.shape == (3, 4, 1, 7)
    assert joined["matrices"].total.shape == (3, 1, 5, 7)
    expected = sum(fisher_sum(part).total for part in parts)
    torch.testing.assert_close(fisher_sum(joined).total, expected)
    assert fisher_sum(joined).count == 6


def bound(model, *, updates="sgd", **options):
    given = {"curvature": "rows", "basis": {"name": "cg", "iterations": 40}, "clip": "none"}
    given |= {"update": updates, "lr": 1.0, "damping": 0.1, "fisher": "empirical"}
    return kfactk.build(**(given | options)).bind(model)


def convolutional():
    torch.manual_seed(3)
    layers = [nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)]
    return nn.Sequential(*layers).double()


def batch(n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def gradients(model, x, y, reduction="mean"):
    loss = nn.functional.cross_entropy(model(x), y, reduction=reduction)
    return torch.autograd.grad(loss, list(model.parameters()))


def blocks(tensors):
    """Per layer and group, weight and bias as one vector."""
    (w0, b0, w1, b1), groups = tensors, []
    for weight, bias in zip(w0.chunk(2), b0.chunk(2), strict=True):
        groups.append(torch.cat([weight.flatten(1), bias[:, None]], 1).flatten())
    return [*groups, torch.cat([w1, b1[:, None]], 1).flatten()]


def dense_step(model, x, y, damping):
    """The step of each block by a dense solve, from autograd on one example at a time."""
    model = copy.deepcopy(model)  # one that nothing listens to
    each = [blocks(gradients(model, x[n : n + 1], y[n : n + 1], "sum")) for n in range(len(x))]
    found = []
    for number, gradient in enumerate(blocks(gradients(model, x, y))):
        d = torch.stack([one[number] for one in each])
        eye = torch.eye(d.shape[1], dtype=d.dtype)
        found.append(torch.linalg.solve(d.T @ d / len(x) + damping * eye, gradient))
    return found


def train(model, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("parts", [[slice(0, 5)], [slice(0, 2), slice(2, 5)]])
def test_a_step_is_the_dense_solve(parts):
    model, (x, y) = convolutional(), batch()
    optimizer = bound(model, reduction="sum", lr=0.2)
    expected = dense_step(model, x, y, 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for rows in parts:
        nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="sum").backward()
    optimizer.step()
    moved = blocks([a - b.detach() for a, b in zip(before, model.parameters(), strict=True)])
    for found, wanted in zip(moved, expected, strict=True):
        assert deviation(found, wanted) < 1e-10


def test_rows_are_those_of_the_last_batch():
    model = convolutional()
    optimizer = bound(model, lr=0.0, factor_every=1, basis_every=1, factor_decay=0.95)
    train(model, optimizer, *batch(7, seed=1))
    x, y = batch(5, seed=2)
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    expected = dense_step(model, x, y, 0.1)
    train(model, optimizer, x, y)
    moved = blocks([a - b.detach() for a, b in zip(before, model.parameters(), strict=True)])
    for found, wanted in zip(moved, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_a_checkpoint_resumes_bit_for_bit():
    def started():
        model = convolutional()
        return model, bound(model, lr=0.1, factor_every=2, basis_every=4, updates="adam")

    model, optimizer = started()
    for step in range(3):
        train(model, optimizer, *batch(4 + step, seed=step))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved = torch.load(_file(saved), weights_only=True)
    again, resumed = started()
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for step in range(3, 7):
        train(model, optimizer, *batch(6, seed=step))
        train(again, resumed, *batch(6, seed=step))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def _file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return file


def kept_bytes(optimizer):
    storages = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and str(key).startswith("kfactk."):
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())


@on_ranks
def test_rows_travel_to_the_ranks_that_solve():
    recipe = {"curvature": "rows", "basis": {"name": "cg", "iterations": 30}, "clip": "none"}
    recipe |= {"update": torch.optim.SGD, "placement": "mem_opt"}
    equal_on_ranks(Training(), recipe)


def test_memory_is_linear_in_the_sides():
    sizes = []
    for wide in (5000, 10000):
        model = nn.Linear(16, wide)
        optimizer = bound(model, lr=0.1, basis="cg")
        x, y = torch.randn(4, 16), torch.randint(wide, (4,))
        train(model, optimizer, x, y)
        sizes.append(kept_bytes(optimizer))
    assert sizes[1] < 2.1 * sizes[0]
    assert sizes[1] <= 2 * 4 * 4 * (wide + 17) + 1000  # factors and decomposition, float32
    assert all(bool(p.isfinite().all()) for p in model.parameters())
