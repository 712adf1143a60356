"""What is counted on the meta device: against closed forms of FLOPs, shapes, and what real tensors and autograd do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfactk
from kfactk.costmodel.communication import Sizes
from kfactk.costmodel.cost import LayerCost
from kfactk.costmodel.counting import Meter, job_of, meta_batch
from kfactk.errors import CombinationError, OptionError

META = torch.device("meta")


class Net(nn.Module):
    """A convolution of 3 x 3 positions, BatchNorm, a linear layer without bias on 3 rows, and one on one row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, stride=2), nn.BatchNorm2d(4)
        self.rows, self.head = nn.Linear(12, 6, bias=False), nn.Linear(18, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.conv(images)).relu()
        return self.head(self.rows(hidden.permute(0, 2, 1, 3).flatten(2)).flatten(1))


def made(module: type[nn.Module] = Net) -> nn.Module:
    with META:
        return module()


def counted(**recipe: Any) -> Any:
    return job_of(made(), kfactk.build(**recipe), meta_batch("2x7x7", 8))


POSITIONS = {"conv": 9, "rows": 3, "head": 1}


@pytest.mark.parametrize(("basis", "solver"), [("ekfac", "eigh"), ("kfac", "cholesky")])
def test_curvature_takes_the_operations_of_its_formulas(basis: str, solver: str) -> None:
    job = counted(basis=basis)
    assert list(job.layers) == ["conv", "rows", "head"]
    for work in job.workload.works:
        found = job.layers[work.layer]
        said = LayerCost.of(
            work, job.workload, positions=POSITIONS[work.layer], batch=8, solver=solver
        )
        outputs, inputs = work.gradient[-2:]
        row = (
            2 * 8 * POSITIONS[work.layer]
        )  # FLOPs of one product of the rows of 8 examples with a number
        if work.layer == "conv":  # of the products of patches some are the same, and are made once
            assert row * outputs**2 < found.factors.products < said.factors.products
        else:  # the bias' column of ones is no product, but a sum
            assert found.factors.products == said.factors.products - (
                row * (2 * inputs - 1) if work.layer == "head" else 0
            )
        plain = (
            {"conv": row * outputs, "rows": 0, "head": row * inputs}[work.layer]
            if basis == "ekfac"
            else 0
        )  # nor is it in the scale
        assert found.scale.products + found.scale.convolutions == said.scale.products - plain
        assert found.precondition.products == said.precondition.products
        assert found.transport.products == said.transport.products
        assert (found.solver, found.sizes) == (solver, said.sizes)
        assert found.factors.launches > 0 < found.precondition.bytes


def test_forward_backward_and_fisher_pass() -> None:
    """FLOPs 2 x positions x weights forward, twice backward but for the input's gradient; the Fisher pass stops at the first layer."""
    job = counted()
    conv, linear = 2 * 8 * 9 * 4 * 18, 2 * 8 * (3 * 12 * 6 + 18 * 5)
    assert job.step.convolutions == 2 * conv  # images want no gradient
    assert job.step.products == 3 * linear
    assert job.fisher.convolutions == 0
    assert job.fisher.products == linear
    assert job.parameters == sum(parameter.numel() for parameter in Net().parameters())
    assert job.layers["conv"].retained == 8 * (2 * 49 + 4 * 9)


def test_what_the_forward_keeps_is_within_what_it_writes() -> None:
    """Autograd's saved tensors, each counted once, and outputs that share memory left out."""
    kept: dict[int, int] = {}
    model, images = Net(), torch.randn(8, 2, 7, 7)
    own = {parameter.data_ptr() for parameter in (*model.parameters(), images)}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    assert sum(kept.values()) * 0.9 <= counted().activations <= 2.5 * sum(kept.values())


def test_cost_is_proportional_to_the_batch() -> None:
    one, two = (job_of(made(), kfactk.build(), meta_batch("2x7x7", n)) for n in (8, 16))
    assert two.step.products == 2 * one.step.products
    assert two.layers["conv"].scale.products == 2 * one.layers["conv"].scale.products
    assert two.layers["conv"].precondition == one.layers["conv"].precondition


def test_periods_and_kinds_come_from_the_recipe() -> None:
    job = counted(factor_every=6, scale_every=8, basis_every=24, stagger=True)
    workload = job.workload
    assert (workload.factor_every, workload.scale_every, workload.basis_every, job.slots) == (
        6,
        8,
        24,
        12,
    )
    assert (workload.sampled, workload.itemsize, workload.device) == (True, 4, "meta")
    assert not counted(basis="kfac").workload.sampled
    running = counted(basis={"name": "ekfac", "scale": "running"})
    assert not running.workload.sampled
    assert running.layers["head"].sizes.moments == 5 * 19


@pytest.mark.parametrize(
    ("fisher", "passes"),
    [("mc", 1), ({"name": "mc", "samples": 3}, 3), ("exact", 4), ("empirical", 0)],
)
def test_passes_are_those_of_the_fisher_stage(fisher: Any, passes: int) -> None:
    """The Fisher matrix of five classes has rank four."""
    assert counted(fisher=fisher).passes == passes


def test_passes_of_sequences_grow_with_terms_where_the_stage_takes_each() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    likelihood = {"name": "categorical", "class_axis": -1}
    for fisher, passes in (("exact", 7 * 2), ("mc", 1)):
        recipe = kfactk.build(fisher=fisher, likelihood=likelihood)
        assert job_of(made(Tokens), recipe, meta_batch("7x4", 2)).passes == passes


@pytest.mark.parametrize(
    ("update", "state"), [("sgd", 0), ("momentum", 1), ("adam", 2), ("radam", 2)]
)
def test_state_is_that_of_the_update_rule(update: str, state: float) -> None:
    assert counted(update=update).state == state


def test_grouped_and_spatially_homogeneous_convolutions() -> None:
    """One pair of matrices a group; "sua" sends the moment of channels, G and the number of positions, together."""
    model = nn.Sequential(nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)).to(META)
    job = job_of(model, kfactk.build(), meta_batch("6x4x4", 2))
    assert job.layers["0"].sizes == Sizes(
        {"A": 2 * 28 * 29 // 2, "G": 2 * 3}, {"A": 2 * 28 * 29, "G": 2 * 6}, 2 * 2 * 28
    )
    plain = nn.Sequential(nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3)).to(META)
    sua = job_of(
        plain,
        kfactk.build(curvature={"name": "conv_kfac", "spatial": "sua"}),
        meta_batch("6x4x4", 2),
    )
    work = sua.workload.works[0]
    assert (work.indivisible, dict(work.matrices)) == (True, {"A": (55, 55), "G": (4, 4)})
    assert set(sua.layers["0"].sizes.sums) == {""}
    assert 6 * 7 // 2 + 4 * 5 // 2 + 1 <= sua.layers["0"].sizes.sums[""] <= 6 * 6 + 4 * 4 + 1


def test_the_workload_is_that_of_the_bound_optimizer() -> None:
    """Matrices have the shapes that training gives them."""
    torch.manual_seed(0)
    model = Net()
    optimizer = kfactk.build().bind(model)
    nn.functional.cross_entropy(model(torch.randn(4, 2, 7, 7)), torch.arange(4)).backward()
    optimizer.step()
    for work in counted().workload.works:
        view = optimizer.layers[work.layer]
        assert {name: tuple(factor.shape) for name, factor in view.factors.items()} == dict(
            work.matrices
        )


class Idle(nn.Module):
    """A model of whose layers one does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 2), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_layers_that_do_not_run_are_kept_and_cost_nothing_a_batch() -> None:
    job = job_of(made(Idle), kfactk.build(), meta_batch("3", 2))
    idle = job.layers["idle"]
    assert idle.factors.products == idle.scale.products == idle.retained == 0
    assert idle.sizes == Sizes({"A": 21, "G": 10}, {"A": 42, "G": 20}, 24)
    assert idle.precondition.products == 4 * 24 * 10


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x * x.sum().item())


def test_models_that_cannot_be_planned_are_refused() -> None:
    with pytest.raises(
        CombinationError,
        match=r"could not be run without data, .* an input of shape \(2, 3\) \(.*item.*A forward that",
    ):
        job_of(made(Looking), kfactk.build(), meta_batch("3", 2))
    with pytest.raises(CombinationError, match=r"an input of shape \(2, 5\).*Is input= right"):
        job_of(made(Looking), kfactk.build(), meta_batch("5", 2))
    with pytest.raises(
        CombinationError,
        match="no layer of the model is preconditioned, so there is nothing to place",
    ):
        job_of(nn.LayerNorm(3, device=META), kfactk.build(), meta_batch("3", 2))


@pytest.mark.parametrize("text", ["", "3x", "3x-1", "0", "3:floaty", "3:Tensor", "axb", "٣"])
def test_inputs_written_otherwise_are_refused(text: str) -> None:
    with pytest.raises(
        OptionError, match="is no shape of an example: write 3x224x224 for an image, or 512:int64"
    ):
        meta_batch(text, 2)


def test_a_meter_counts_no_views() -> None:
    tensor = torch.empty(4, 6, device=META)
    with Meter() as meter:
        tensor.T.reshape(2, 12).t()
    assert meter.amount.bytes == 4 * 24 * 2  # the copy that the reshape of a transpose makes
    with Meter() as meter:
        torch.linalg.solve_triangular(
            torch.empty(3, 3, device=META), torch.empty(3, 5, device=META), upper=False
        )
        torch.cholesky_solve(torch.empty(3, 5, device=META), torch.empty(3, 3, device=META))
    assert meter.amount.products == 9 * 5 + 2 * 9 * 5


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_backwards_of_grouped_convolutions_are_counted_by_what_they_multiply(groups: int) -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=groups, bias=False, device="meta")
    x = torch.empty(2, 4, 5, 6, device="meta", requires_grad=True)
    y = conv(x)
    with Meter() as meter:
        torch.autograd.grad(y, [x, conv.weight], torch.empty_like(y))
    multiplied = 2 * 8 * 5 * 6 * (4 // groups) * 9  # outputs by the inputs that each is made of
    assert meter.amount.convolutions == 2 * 2 * multiplied


def test_what_is_made_once_and_kept_is_not_counted() -> None:
    """Tables of the transform, here."""
    from kfactk_stages.curvature import _spectral

    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Flatten(), nn.Linear(64 * 64, 3)).to(
        "meta"
    )
    found = []
    for _ in range(2):
        found.append(job_of(model, kfactk.build(), meta_batch("64x8x8", 64)).layers["0"].factors)
    _spectral.transform_of.cache_clear()
    found.append(job_of(model, kfactk.build(), meta_batch("64x8x8", 64)).layers["0"].factors)
    assert found[0] == found[1] == found[2]
