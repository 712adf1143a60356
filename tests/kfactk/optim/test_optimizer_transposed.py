"""Models that grow images: decoders, U-Nets and generators, whose layers are transposed.

The truth is dense algebra in float64, one example at a time; for ranks, one process.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfactk
from kfactk.costmodel.counting import meta_batch, training_load
from kfactk.distributed.sharding import full_tensor
from kfactk.testing._support import truth
from kfactk.testing._support.ranks import shared_workers
from tests.kfactk import dense
from tests.kfactk.small import F64, bound, train

TAU = 0.03
WORKERS = pytest.mark.xdist_group("ranks")


class Decoder(nn.Module):
    """From a code to an image, and to labels; the last layer runs at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(3, 8)
        self.grouped = nn.ConvTranspose2d(
            4, 2, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 0), groups=2
        )
        self.twice = nn.ConvTranspose2d(2, 2, (2, 3), stride=2, dilation=(2, 1), bias=False)
        self.head = nn.Conv2d(2, 3, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        image = torch.tanh(self.grouped(self.code(x).view(-1, 4, 2, 1)))
        image = torch.tanh(self.twice(image))
        image = torch.tanh(self.twice(F.avg_pool2d(image, 2)))
        return self.head(image).mean((2, 3))


def decoder() -> nn.Module:
    torch.manual_seed(0)
    return Decoder()


def codes(examples: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, 3, dtype=F64, generator=generator), torch.arange(examples) % 3


def problem() -> dense.Problem:
    inputs, labels = codes()
    return dense.Problem(
        decoder(),
        inputs,
        lambda output: F.cross_entropy(output, labels),
        dense.exact_scores(dense.categorical_labels),
        len(inputs),
    )


@pytest.mark.parametrize("spatial", ["sud", "reduce"])
@pytest.mark.parametrize("basis", ["kfac", "ekfac"])
def test_a_step_is_that_of_dense_algebra(basis: str, spatial: str) -> None:
    whole = problem()
    model = copy.deepcopy(whole.model)
    curvature = {"name": "conv_kfac", "spatial": spatial}
    optimizer = bound(model, curvature=curvature, basis=basis, damping=TAU, lr=1.0)
    assert not optimizer.coverage().plain
    train(optimizer, model, codes())
    seen = whole.watch((nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
    vectors = {
        name: {key: part["eigenvectors"] for key, part in view.decomposition.items()}
        for name, view in optimizer.layers.items()
        if basis == "ekfac"
    }
    for name, view in optimizer.layers.items():
        expected = dense.factors(seen[name], spatial, whole.num_terms)
        for key, factor in view.factors.items():
            torch.testing.assert_close(factor, expected[key], rtol=1e-10, atol=1e-13)
    kind = "kfac" if basis == "kfac" else "exact"
    changed = dense.all_preconditioned(
        whole, seen, vectors, spatial=spatial, basis=kind, tau=TAU, null=1e-11
    )
    before = dict(whole.model.named_parameters())
    for name, parameter in model.named_parameters():
        step = before[name].detach() - parameter.detach()
        torch.testing.assert_close(step, changed[name], rtol=1e-8, atol=1e-10)


RUNS: dict[str, Any] = {
    "replicated, EKFAC": ("replicated", "ekfac", False),
    "divided, product basis": ("mem_opt", {"name": "ekfac", "inputs": "channels+taps"}, False),
    "fully sharded, K-FAC": ("comm_opt", "kfac", True),
}
"""Placement, basis, and whether the model is divided among ranks."""


def trained(rank: int, placement: str, basis: Any, shard: bool) -> dict[str, Tensor]:
    """Train on all ranks, save in the middle, and resume."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    model = whole = decoder()
    if ranks > 1 and shard:
        for layer in (whole.grouped, whole.twice, whole):
            fully_shard(layer)
    elif ranks > 1:
        whole = nn.parallel.DistributedDataParallel(model)
    recipe = {"basis": basis, "basis_every": 2, "placement": placement}
    optimizer = bound(whole, **recipe)
    for step in range(4):
        if step == 2 and not shard:
            optimizer.consolidate_state_dict(to=None)
            state = optimizer.state_dict()
            optimizer.close()
            optimizer = bound(whole, **recipe)
            optimizer.load_state_dict(state)
        x, y = codes(8, step)
        train(optimizer, whole, (x[rank::ranks], y[rank::ranks]))
    return {name: full_tensor(p).detach().clone() for name, p in model.named_parameters()}


@WORKERS
@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_equal_one_process(run: str) -> None:
    expected = trained(0, "replicated", *RUNS[run][1:])
    for parameters in shared_workers().run(2, trained, *RUNS[run]):
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-8, atol=1e-9)


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    ends = []
    for broken in (False, True):
        model = decoder()
        optimizer = bound(model, update="adam", fisher="mc", basis_every=2)
        for step in range(4):
            if broken and step == 2:
                buffer = io.BytesIO()
                torch.save((model.state_dict(), optimizer.state_dict()), buffer)
                buffer.seek(0)
                weights, state = torch.load(buffer)
                model = Decoder()
                model.load_state_dict(weights)
                optimizer = bound(model, update="adam", fisher="mc", basis_every=2)
                optimizer.load_state_dict(state)
            train(optimizer, model, codes(8, step))
        ends.append([p.detach() for p in model.parameters()])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


class UNet(nn.Module):
    """Labels of pixels, with a skip connection."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True))
        self.down = nn.Sequential(nn.Conv2d(4, 8, 3, 2, padding=1), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.leave = nn.Conv2d(8, 3, 3, padding=1)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        inner = self.down(x)
        raised = checkpoint(self.up, inner, use_reentrant=False) if self.recompute else None
        raised = self.up(inner, output_size=x.shape[2:]) if raised is None else raised
        return self.leave(torch.cat([x, raised.relu_()], 1))


def images(size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 1, size, size, generator=generator)
    return x, (x[:, 0] > 0.5).long() + (x[:, 0] > -0.5).long()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_unet_trains(precision: torch.dtype, recompute: bool) -> None:
    torch.manual_seed(0)
    model, (x, y) = UNet(recompute), images()
    likelihood = {"name": "categorical", "class_axis": 1}
    recipe = kfactk.build(curvature="all", likelihood=likelihood, lr=0.1, damping=1e-2)
    optimizer = recipe.bind(model)
    assert not optimizer.coverage().plain
    assert "up" in optimizer.layers
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_an_output_size_given_in_the_call_is_captured() -> None:
    """Images of odd size: one row and column more than the layer makes by itself."""
    torch.manual_seed(0)
    model, (x, y) = UNet().double(), images(9)
    model.down[0].padding = (0, 0)  # an image of 9 x 9 becomes one of 4 x 4
    optimizer = bound(
        model,
        curvature="all",
        likelihood={"name": "categorical", "class_axis": 1},
        fisher="empirical",
    )
    calls: list[tuple[Tensor, Any]] = []
    handle = model.up.register_forward_hook(
        lambda module, args, out: calls.append((args[0].detach(), get_gradient_edge(out)))
    )
    loss = F.cross_entropy(model(x.double()), y, reduction="sum")
    handle.remove()
    [(inputs, edge)] = calls
    (g,) = torch.autograd.grad(loss, edge)
    assert g.shape[2:] == (9, 9)
    model.up.output_padding = (1, 1)  # the same, said by the layer
    a = truth.input_rows(model.up, inputs, bias=True)
    model.up.output_padding = (0, 0)
    g = truth.output_rows(model.up, g)
    train(optimizer, model, (x.double(), y))
    factors = optimizer.layers["up"].factors
    torch.testing.assert_close(factors["A"], truth.moment(a) / 6)
    torch.testing.assert_close(factors["G"], truth.moment(g) / (6 * 81 * 81))


def test_a_generator_is_trained_through_its_discriminator() -> None:
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.ConvTranspose2d(4, 8, 4, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
        nn.Tanh(),
    )
    judge = nn.Sequential(nn.Conv2d(1, 4, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1))
    both = nn.Sequential(generator, judge)
    recipe = kfactk.build(curvature="all", likelihood="bernoulli", lr=0.02, damping=1e-2)
    ours = recipe.bind(both, generator.parameters())
    assert {"0.0", "0.3"} <= set(ours.layers)
    assert not any(name.startswith("1.") for name in ours.layers)
    noise, ones = torch.randn(16, 4, 1, 1), torch.ones(16, 1)
    losses = []
    for _ in range(6):
        ours.zero_grad()
        loss = F.binary_cross_entropy_with_logits(both(noise), ones)
        loss.backward()
        ours.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_what_training_costs_is_counted_without_data() -> None:
    with torch.device("meta"):
        model = UNet()
    likelihood = {"name": "categorical", "class_axis": 1}
    recipe = kfactk.build(curvature="all", likelihood=likelihood)
    load = training_load(model, recipe, meta_batch("1x8x8", 6))
    cost = load.layers["up"]
    assert cost.factors.products + cost.factors.convolutions > 0
    assert cost.scale.products + cost.scale.convolutions > 0
