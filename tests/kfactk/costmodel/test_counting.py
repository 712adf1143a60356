"""Counts on the meta device equal closed forms of FLOPs, and shapes and memory of real tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfactk
from kfactk.costmodel.communication import Sizes
from kfactk.costmodel.cost import LayerCost, cost
from kfactk.costmodel.counting import meta_batch, training_load
from kfactk.costmodel.hardware import CPU
from kfactk.errors import CombinationError, OptionError

META = torch.device("meta")


class Net(nn.Module):
    """A convolution of 3 x 3 positions, BatchNorm, and linear layers on 3 rows and on one row."""

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
    return training_load(made(), kfactk.build(**recipe), meta_batch("2x7x7", 8))


POSITIONS = {"conv": 9, "rows": 3, "head": 1}


@pytest.mark.parametrize(("basis", "solver"), [("ekfac", "eigh"), ("kfac", "cholesky")])
def test_training_load_of_curvature_follows_its_formulas(basis: str, solver: str) -> None:
    load = counted(basis=basis)
    assert list(load.layers) == ["conv", "rows", "head"]
    for work in load.workload.works:
        found = load.layers[work.layer]
        formula = LayerCost.of(
            work, load.workload, positions=POSITIONS[work.layer], batch=8, solver=solver
        )
        outputs, inputs = work.gradient[-2:]
        row = 2 * 8 * POSITIONS[work.layer]  # FLOPs to multiply a column of 8 examples by a number
        if work.layer == "conv":  # equal products of patches are made once
            assert row * outputs**2 < found.factors.products < formula.factors.products
        else:  # the bias column of ones needs sums, not products
            bias = row * (2 * inputs - 1) if work.layer == "head" else 0
            assert found.factors.products == formula.factors.products - bias
        bias = {"conv": row * outputs, "rows": 0, "head": row * inputs}[work.layer]
        scale = formula.scale.products - (bias if basis == "ekfac" else 0)
        assert found.scale.products + found.scale.convolutions == scale
        assert found.precondition.products == formula.precondition.products
        assert found.precondition.triangular == formula.precondition.triangular
        assert bool(found.precondition.triangular) == (basis == "kfac")
        assert found.transport.products == formula.transport.products
        assert (found.solver, found.sizes) == (solver, formula.sizes)
        assert found.factors.launches > 0 < found.precondition.bytes


def test_training_load_of_forward_backward_and_fisher_pass() -> None:
    """A forward takes 2 x positions x weights FLOPs, a backward twice that.

    The first layer has no input gradient, and a Fisher pass ends at its output.
    """
    load = counted()
    conv, linear = 2 * 8 * 9 * 4 * 18, 2 * 8 * (3 * 12 * 6 + 18 * 5)
    assert load.forward_backward.convolutions == 2 * conv  # images want no gradient
    assert load.forward_backward.products == 3 * linear
    assert load.fisher_pass.convolutions == 0
    assert load.fisher_pass.products == linear
    assert load.parameters == sum(parameter.numel() for parameter in Net().parameters())
    assert load.layers["conv"].retained == 8 * (2 * 49 + 4 * 9)


def test_training_load_has_about_the_activations_that_autograd_saves() -> None:
    """Each saved tensor counts once; outputs that share memory are left out."""
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


def test_training_load_is_proportional_to_the_batch() -> None:
    one, two = (training_load(made(), kfactk.build(), meta_batch("2x7x7", n)) for n in (8, 16))
    assert two.forward_backward.products == 2 * one.forward_backward.products
    assert two.layers["conv"].scale.products == 2 * one.layers["conv"].scale.products
    assert two.layers["conv"].precondition == one.layers["conv"].precondition


def test_training_load_takes_periods_and_slots_from_the_recipe() -> None:
    load = counted(factor_every=6, scale_every=8, basis_every=24, stagger=True)
    workload = load.workload
    assert (workload.factor_every, workload.scale_every, workload.basis_every, load.slots) == (
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
def test_training_load_has_the_passes_of_the_fisher_stage(fisher: Any, passes: int) -> None:
    """The Fisher matrix of five classes has rank four."""
    assert counted(fisher=fisher).passes == passes


def test_training_load_of_sequences_has_passes_for_each_term() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    likelihood = {"name": "categorical", "class_axis": -1}
    for fisher, passes in (("exact", 7 * 2), ("mc", 1)):
        recipe = kfactk.build(fisher=fisher, likelihood=likelihood)
        assert training_load(made(Tokens), recipe, meta_batch("7x4", 2)).passes == passes


@pytest.mark.parametrize(
    ("update", "state"), [("sgd", 0), ("momentum", 1), ("adam", 2), ("radam", 2)]
)
def test_training_load_has_the_state_of_the_update_rule(update: str, state: float) -> None:
    assert counted(update=update).state == state


def test_training_load_of_grouped_and_sua_convolutions() -> None:
    """There is a pair of matrices for each group; the statistics of "sua" travel as one piece."""
    model = nn.Sequential(nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)).to(META)
    load = training_load(model, kfactk.build(), meta_batch("6x4x4", 2))
    assert load.layers["0"].sizes == Sizes(
        {"A": 2 * 28 * 29 // 2, "G": 2 * 3}, {"A": 2 * 28 * 29, "G": 2 * 6}, 2 * 2 * 28
    )
    plain = nn.Sequential(nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3)).to(META)
    sua = training_load(
        plain,
        kfactk.build(curvature={"name": "conv_kfac", "spatial": "sua"}),
        meta_batch("6x4x4", 2),
    )
    work = sua.workload.works[0]
    assert (work.indivisible, dict(work.matrices)) == (True, {"A": (55, 55), "G": (4, 4)})
    assert set(sua.layers["0"].sizes.sums) == {""}
    assert 6 * 7 // 2 + 4 * 5 // 2 + 1 <= sua.layers["0"].sizes.sums[""] <= 6 * 6 + 4 * 4 + 1


def test_workload_is_that_of_the_bound_optimizer() -> None:
    """Matrices have the shapes of training."""
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
    """A model with a layer that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 2), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_training_load_of_a_layer_that_does_not_run_has_no_samples() -> None:
    load = training_load(made(Idle), kfactk.build(), meta_batch("3", 2))
    idle = load.layers["idle"]
    assert idle.factors.products == idle.scale.products == idle.retained == 0
    assert idle.sizes == Sizes({"A": 21, "G": 10}, {"A": 42, "G": 20}, 24)
    assert idle.precondition.products == 4 * 24 * 10


class ReadingValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x * x.sum().item())


def test_training_load_refuses_models_that_read_values() -> None:
    with pytest.raises(
        CombinationError,
        match=r"could not run without data, .* an input of shape \(2, 3\) \(.*item.*A forward that",
    ):
        training_load(made(ReadingValues), kfactk.build(), meta_batch("3", 2))
    with pytest.raises(CombinationError, match=r"an input of shape \(2, 5\).*Check input="):
        training_load(made(ReadingValues), kfactk.build(), meta_batch("5", 2))
    with pytest.raises(
        CombinationError,
        match="no layer of the model is preconditioned, so there is nothing to place",
    ):
        training_load(nn.LayerNorm(3, device=META), kfactk.build(), meta_batch("3", 2))


@pytest.mark.parametrize("text", ["", "3x", "3x-1", "0", "3:floaty", "3:Tensor", "axb", "٣"])
def test_meta_batch_refuses_other_forms(text: str) -> None:
    with pytest.raises(
        OptionError, match="is no shape of an example: write 3x224x224 for an image, or 512:int64"
    ):
        meta_batch(text, 2)


def test_training_load_leaves_out_cached_tables() -> None:
    from kfactk_stages.curvature import _spectral

    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Flatten(), nn.Linear(64 * 64, 3)).to(
        "meta"
    )
    found = []
    for _ in range(2):
        found.append(
            training_load(model, kfactk.build(), meta_batch("64x8x8", 64)).layers["0"].factors
        )
    _spectral.transform_of.cache_clear()
    found.append(training_load(model, kfactk.build(), meta_batch("64x8x8", 64)).layers["0"].factors)
    assert found[0] == found[1] == found[2]


class Language(nn.Module):
    """A table of 500 rows that is the output layer too, bags of it on the side."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(500, 8), nn.Linear(8, 500, bias=False)
        self.head.weight = self.words.weight
        self.bag = nn.EmbeddingBag(500, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.words(tokens) + self.bag(tokens).unsqueeze(1))


def test_training_load_of_tables_has_no_square_of_the_vocabulary() -> None:
    n, t, rows, width = 4, 6, 500, 8
    recipe = kfactk.build(
        curvature="all", basis="ekfac", likelihood={"name": "categorical", "class_axis": -1}
    )
    load = training_load(made(Language), recipe, meta_batch(f"{t}:int64", n))
    assert list(load.layers) == ["words", "bag"]
    tied, bag = (load.layers[name] for name in ("words", "bag"))
    for each in (tied, bag):
        assert each.sizes.kept == {"a": rows, "G": width * (width + 1)}
        assert each.sizes.moments == rows * width
        assert each.precondition.products == 4 * width**2 * rows
    # D of the output layer is one product of an example, as in the layer's own backward.
    whole = 2 * n * t * rows * width
    assert whole <= tied.scale.products <= whole + 4 * n * t * width**2 + 2 * n * t * rows
    assert tied.retained == n * t * (1 + width) + n * t * (width + rows)
    assert bag.scale.products == 2 * n * width**2


class Attending(nn.Module):
    """Attention to the inputs, or to a product of them, and a head."""

    def __init__(self, across: bool = False, extra: bool = False) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, add_bias_kv=extra)
        self.head, self.across = nn.Linear(8, 3), across

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        keys = [2 * x, 3 * x] if self.across else [x, x]
        return self.head(self.attn(x, *keys)[0].mean(0))


@pytest.mark.parametrize("across", [False, True])
def test_training_load_of_attention_counts_its_second_run(across: bool) -> None:
    with META:
        model = Attending(across)
    load = training_load(model, kfactk.build(curvature="all"), meta_batch("5x8", 4))
    product, scores, head = 2 * 4 * 5 * 8 * 8, 2 * 4 * 5 * 5 * 8, 2 * 4 * 8 * 3
    assert load.fisher_pass.products == head + 5 * product + 6 * scores
    inputs = 3 if across else 1  # the same inputs are multiplied once
    assert load.layers["attn[in_proj]"].factors.products == (inputs + 3) * product
    assert load.layers["attn[out_proj]"].factors.products == 2 * product


class Remembering(nn.Module):
    """Classifies by the last h."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.transpose(0, 1))[1][0][-1])


def test_training_load_of_a_recurrent_module_counts_its_second_run() -> None:
    with META:
        model = Remembering()
    load = training_load(model, kfactk.build(curvature="all"), meta_batch("5x6", 4))
    inputs, step, head = 2 * 4 * 5 * 6 * 32, 2 * 4 * 8 * 32, 2 * 4 * 8 * 3
    assert load.fisher_pass.products == head + inputs + 5 * step + 4 * step
    factors = load.layers["rnn[ih_l0]"].factors.products, load.layers["rnn[hh_l0]"].factors.products
    assert factors == (2 * 20 * (7**2 + 32**2), 2 * 20 * (9**2 + 32**2))


@pytest.mark.parametrize(
    ("basis", "moments", "solving", "parts"), [("soap", 1, 2, 2), ("shampoo", 0, 1, 2)]
)
def test_statistics_of_gradients_need_no_pass_and_no_message(
    basis: str, moments: int, solving: int, parts: int
) -> None:
    """Each product with a side of n costs 2 n times the gradient, whatever the batch."""
    load = counted(curvature="gradient", basis=basis)
    found, sides = load.layers["rows"], 6 + 12
    both = 2 * 6 * 12 * sides
    assert found.factors.products == both * (1 + moments)
    assert found.precondition.products == both * solving
    assert len(found.sizes.kept) == parts
    assert found.sizes.sums == {}
    assert found.sizes.moments == moments * 6 * 12
    assert (load.passes, load.fisher_pass.products, found.retained) == (0, 0.0, 0.0)


def test_a_mean_that_is_kept_in_the_basis_is_not_turned() -> None:
    """A step turns the gradient for its moments, and the mean back."""
    found = counted(curvature="gradient", basis="soap", first_moment=0.9).layers["rows"]
    both = 2 * 6 * 12 * (6 + 12)
    assert found.factors.products == 2 * both
    assert found.precondition.products == both


@pytest.mark.parametrize("placement", ["replicated", "mem_opt"])
@pytest.mark.parametrize("basis", ["soap", "muon", "shampoo"])
def test_memory_has_the_means_of_gradients_that_a_step_leaves(basis: str, placement: str) -> None:
    """Every rank averages all gradients; those of a layer turn them."""
    recipe = kfactk.build(
        curvature=["gradient"], basis=basis, update="sgd", first_moment=0.9, placement=placement
    )
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3, bias=False))
    optimizer = recipe.bind(model)
    for _ in range(2):
        nn.functional.cross_entropy(model(torch.randn(6, 5)), torch.randint(3, (6,))).backward()
        optimizer.step()
    blocks = optimizer._preconditioner.blocks.current()
    own = [mean for block in blocks for mean in block.state.gradients.values()]
    each = [block.state.gradients["mean"] for block in blocks]
    bare = recipe.evolve(first_moment=0.0)
    with META:
        blank = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3, bias=False))
    for ranks in (1, 2):
        found, less = (
            cost(load, recipe.placement.assign(load.workload, ranks), ranks, CPU)
            for load in (training_load(blank, r, meta_batch("5", 6)) for r in (recipe, bare))
        )
        more = [a - b for a, b in zip(found.held, less.held, strict=True)]
        everywhere = sum(m.value.nbytes for m in each if m.value is not None)
        turned = sum(m.value.nbytes for m in own if m.value is not None) - everywhere
        shared = placement == "mem_opt"
        assert sum(more) == ranks * everywhere + (1 if shared else ranks) * turned
        assert min(more) >= everywhere


def test_a_basis_without_matrices_costs_its_products_alone() -> None:
    found = counted(curvature="gradient", basis={"name": "muon", "steps": 3}).layers["rows"]
    gram, turn = 2 * 6 * 6 * 12, 2 * 6 * 6 * 6
    assert found.precondition.products == 3 * (2 * gram + turn)
    assert (found.factors.products, found.solver) == (0.0, "")
    assert dict(found.sizes.kept) == {}


def test_rows_cost_what_the_batch_makes_of_them() -> None:
    """Each of ten steps has two products of all pairs with the gradient; rows are sent and kept."""
    with META:
        model = nn.Linear(12, 6)
    load = training_load(model, kfactk.build(curvature="rows"), meta_batch("12", 4))
    [found] = load.layers.values()
    assert found.precondition.products == 10 * 2 * (2 * 4 * 6 * 13)
    assert dict(found.sizes.sums) == {"gradients": 4 * 6, "inputs": 4 * 13, "matrices": 0}
    assert sum(found.sizes.kept.values()) == 4 * (6 + 13) + 3


def test_blocks_of_gradients_beside_others_change_no_count_of_theirs() -> None:
    """Attention leaves `bias_k` and `bias_v` to the gradient: one module holds blocks of both."""
    with META:
        model = Attending(extra=True)
    alone, beside = (
        training_load(model, kfactk.build(curvature=curvature), meta_batch("5x8", 4))
        for curvature in ("all", ["all", "gradient"])
    )
    assert beside.layers.keys() - alone.layers.keys() == {"attn[bias_k]", "attn[bias_v]"}
    assert {name: beside.layers[name] for name in alone.layers} == dict(alone.layers)
    assert (beside.fisher_pass, beside.passes) == (alone.fisher_pass, alone.passes)
