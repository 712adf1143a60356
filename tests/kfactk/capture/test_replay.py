"""Calls that run again change nothing that the user sees, and are refused where they differ."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfactk
from kfactk import (
    CaptureError,
    Curvature,
    InnerCall,
    KfactkWarning,
    Layer,
    LayerCall,
    ModuleCall,
    Optimizer,
    Replay,
    Replayed,
    Samples,
    Statistic,
    Tensors,
)
from kfactk.capture.replay import CallContext, RecordedReplay, followed, recorded_arguments
from kfactk.testing._support.ranks import shared_workers
from kfactk_stages.curvature._attention import AttentionReplay
from kfactk_stages.curvature.attention import Attention
from tests.kfactk.sharded import WAYS, found, line

F64 = torch.float64
RECIPE: dict[str, Any] = {"curvature": "all", "basis": "ekfac", "damping": 0.05, "clip": "none"}


class Attending(nn.Module):
    """Attention first, so that its gradients are the last ones of a pass."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True, **settings)
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.attend(x).mean(1)))

    def attend(self, x: Tensor) -> Tensor:
        """Return what is normalised."""
        output: Tensor = self.attn(x, x, x)[0]
        return output


def batch(seed: int = 0, examples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 3, 4, generator=generator, dtype=F64)
    return x, torch.randint(3, (examples,), generator=generator)


def bound(model: nn.Module, **recipe: Any) -> Optimizer:
    return kfactk.build(**(RECIPE | recipe)).bind(model)


def gradient(model: nn.Module, seed: int = 0, **how: Any) -> None:
    x, y = batch(seed)
    F.cross_entropy(model(x), y).backward(**how)


def factors(optimizer: Optimizer) -> dict[str, Tensor]:
    views = optimizer.layers.items()
    return {f"{name} {key}": f for name, view in views for key, f in view.factors.items()}


# ------------------------------------------------------------------------------- what the user sees


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("mode", ["float64", "autocast"])
def test_the_forward_and_random_numbers_are_those_of_an_unbound_model(
    fisher: str, mode: str
) -> None:
    dtype = F64 if mode == "float64" else torch.float32
    model, twin = (Attending(dropout=0.5).to(dtype) for _ in range(2))
    optimizer = bound(model, fisher=fisher)
    seen = []
    for each in (model, twin):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            x, y = batch()
            outputs = [each(x.to(dtype)) for _ in range(2)]
            F.cross_entropy(sum(outputs, torch.zeros(())), y).backward()
        gradients = [p.grad for p in each.parameters()]
        seen.append([*outputs, *gradients, *each.buffers(), torch.get_rng_state()])
    assert all(map(torch.equal, *seen))
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), seen[0][-1])
    assert len(optimizer.layers) == 4


def test_a_context_restores_what_it_found() -> None:
    context = CallContext.now(torch.device("cpu"))
    kernels = torch.backends.cuda.flash_sdp_enabled()
    first = torch.rand(3)
    torch.backends.cuda.enable_flash_sdp(not kernels)
    state = torch.get_rng_state()
    try:
        with torch.autocast("cpu", torch.bfloat16), context.restored():
            assert torch.equal(torch.rand(3), first)
            assert torch.backends.cuda.flash_sdp_enabled() == kernels
            assert not torch.is_autocast_enabled("cpu")
        assert torch.backends.cuda.flash_sdp_enabled() != kernels
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.backends.cuda.enable_flash_sdp(kernels)


def test_copies_inside_a_forward_record_nothing() -> None:
    model, copies = Attending(), []
    optimizer = bound(model)
    handle = model.norm.register_forward_hook(
        lambda *_: (
            copies.append(copy.deepcopy(model))
            or copies.append(pickle.loads(pickle.dumps(model.attn)))
        )
    )
    gradient(model)
    handle.remove()
    optimizer.step()
    assert len(copies) == 2
    copies[0](batch()[0])
    copies[1](*[batch()[0]] * 3)
    assert not model.attn._forward_pre_hooks
    assert not model.attn._forward_hooks


def test_an_interrupted_forward_leaves_no_hook() -> None:
    class Stopped(Attending):
        stop = True

        def attend(self, x: Tensor) -> Tensor:
            found = super().attend(x)
            if self.stop:
                raise KeyboardInterrupt
            return found

    model = Stopped()
    optimizer = bound(model)
    with pytest.raises(KeyboardInterrupt):
        model(batch()[0])
    model.stop = False
    gradient(model)
    assert not model.attn._forward_pre_hooks
    optimizer.step()
    expected = Attending()
    other = bound(expected)
    gradient(expected)
    other.step()
    assert all(map(torch.equal, factors(optimizer).values(), factors(other).values()))


# ------------------------------------------------------------------------------------ what is right


def test_a_checkpointed_call_is_the_call_itself() -> None:
    class Checkpointed(Attending):
        def attend(self, x: Tensor) -> Tensor:
            return checkpoint(super().attend, x, use_reentrant=False)

    results = []
    for model in (Attending(dropout=0.4), Checkpointed(dropout=0.4)):
        optimizer = bound(model, fisher="exact")
        torch.manual_seed(5)
        gradient(model)
        optimizer.step()
        results.append(factors(optimizer))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-10, atol=1e-12)


def test_backwards_through_one_graph_add_inside_too() -> None:
    twice, once = Attending(dropout=0.4), Attending(dropout=0.4)
    optimizers = [bound(model, fisher="empirical") for model in (twice, once)]
    x, y = batch()
    torch.manual_seed(5)
    loss = F.cross_entropy(twice(x), y)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    torch.manual_seed(5)
    (3 * F.cross_entropy(once(x), y)).backward()
    for optimizer in optimizers:
        optimizer.step()
    both = [factors(optimizer) for optimizer in optimizers]
    for name, expected in both[1].items():
        torch.testing.assert_close(both[0][name], expected, rtol=1e-10, atol=1e-12)


class Fused(nn.Module):
    """Two products in one module, which nobody but its author can follow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Parameter(torch.randn(5, 4, dtype=F64))
        self.second = nn.Parameter(torch.randn(3, 5, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.first.T) @ self.second.T


class FusedReplay:
    def outputs(self, output: Any) -> tuple[Any]:
        return (output,)

    def run(self, call: ModuleCall) -> Replayed:
        [x] = call.args
        hidden = (x @ call.parameters["first"].T).requires_grad_()
        inside = torch.tanh(hidden)
        output = inside @ call.parameters["second"].T
        inner = [InnerCall("first", x, hidden), InnerCall("second", inside, output)]
        return Replayed([output], inner)


@attrs.frozen
class FusedCurvature(Curvature):
    """A curvature that an author writes for it."""

    provides: ClassVar[frozenset[str]] = frozenset({"A", "G"})

    def unsupported(self, module: nn.Module) -> str | None:
        return None if type(module) is Fused else "no Fused"

    def parts(self, module: nn.Module) -> Mapping[str, tuple[str, ...]]:
        return {"first": ("first",), "second": ("second",)}

    def replay(self, module: nn.Module) -> Replay:
        return FusedReplay()

    def matrix(self, layer: Layer, tensors: Tensors) -> Tensor:
        return tensors[layer.part]

    def tensors(self, layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
        return {layer.part: matrix}

    def blank(self, layer: Layer) -> LayerCall:
        d_out, d_in = layer.anchor.shape
        return LayerCall(layer.anchor.new_zeros(1, d_in), layer.anchor.new_zeros(1, d_out))

    def samples(
        self, layer: Layer, calls: Sequence[LayerCall], *, num_terms: Any, first: bool
    ) -> Samples:
        [call] = calls
        rows = call.inputs.unsqueeze(1), call.gradient.unsqueeze(1) * call.scale
        return Samples(*rows, num_terms=num_terms, first=first)

    def gradient_factors(self, layer: Layer, samples: Samples) -> dict[str, Statistic]:
        return {"A": samples.input_moment(), "G": samples.grad_moment()}


def test_a_curvature_of_ones_own_follows_a_fused_module() -> None:
    model, (x, y) = Fused(), (batch()[0][:, 0], batch()[1])
    optimizer = bound(model, curvature=FusedCurvature(), fisher="exact")
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    twin, g = Fused(), {5: torch.zeros(5, 5, dtype=F64), 3: torch.zeros(3, 3, dtype=F64)}
    for row in x:
        hidden = row @ twin.first.T
        output = torch.tanh(hidden) @ twin.second.T
        for log in output.log_softmax(-1):
            score = -log * log.detach().exp().sqrt()
            for each in torch.autograd.grad(score, [hidden, output], retain_graph=True):
                g[len(each)] += torch.outer(each, each) / len(x)
    for part, size in (("first", 5), ("second", 3)):
        torch.testing.assert_close(optimizer.layers[f"[{part}]"].factors["G"], g[size])


class Twofold(nn.Module):
    """Two products in one module, which returns what is after each, and one output beside them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Parameter(torch.randn(5, 4, dtype=F64))
        self.second = nn.Parameter(torch.randn(3, 5, dtype=F64))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        inside = torch.tanh(x @ self.first.T)
        beside = torch.cos(x @ self.first.T)  # made from neither
        return torch.sin(inside @ self.second.T), {"inside": inside, "beside": beside}


class TwofoldReplay:
    def outputs(self, output: Any) -> list[Any]:
        return [output[0], *output[1].values()]

    def run(self, call: ModuleCall) -> Replayed:
        [x] = call.args
        hidden = (x @ call.parameters["first"].T).requires_grad_()
        inside = torch.tanh(hidden)
        last = inside @ call.parameters["second"].T
        inner = [InnerCall("first", x, hidden), InnerCall("second", inside, last)]
        return Replayed([torch.sin(last), inside, torch.cos(hidden)], inner)


@attrs.frozen
class TwofoldCurvature(FusedCurvature):
    def unsupported(self, module: nn.Module) -> str | None:
        return None if type(module) is Twofold else "no Twofold"

    def replay(self, module: nn.Module) -> Replay:
        return TwofoldReplay()


class Using(nn.Module):
    """Classifies by some of what a module returns."""

    def __init__(self, used: str) -> None:
        super().__init__()
        self.inside, self.used = Twofold(), used

    def forward(self, x: Tensor) -> Tensor:
        last, further = self.inside(x)
        parts = {"last": last, **{name: each[:, :3] for name, each in further.items()}}
        return sum((parts[name] for name in self.used.split()), torch.zeros(()))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize(
    "used",
    ["last", "inside", "beside", "last inside", "beside last", "inside beside last"],
)
def test_every_followed_output_is_part_of_the_gradient(used: str, fisher: str) -> None:
    model, (x, y) = Using(used), (batch()[0][:, 0], batch()[1])
    optimizer = bound(model, curvature=TwofoldCurvature(), fisher=fisher)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    twin = Using(used).inside
    expected = {"first": torch.zeros(5, 5, dtype=F64), "second": torch.zeros(3, 3, dtype=F64)}
    for row, label in zip(x, y, strict=True):
        hidden = row @ twin.first.T
        inside = torch.tanh(hidden)
        product = inside @ twin.second.T
        parts = {
            "last": torch.sin(product),
            "inside": inside[:3],
            "beside": torch.cos(hidden)[:3],
        }
        logs = sum((parts[name] for name in used.split()), torch.zeros(())).log_softmax(-1)
        scores = -logs * logs.detach().exp().sqrt() if fisher == "exact" else -logs[label, None]
        for score in scores:
            wanted = {"first": hidden, "second": product}
            grads = torch.autograd.grad(
                score, list(wanted.values()), retain_graph=True, allow_unused=True
            )
            for part, g in zip(wanted, grads, strict=True):
                if g is not None:
                    expected[part] += torch.outer(g, g) / len(x)
    for part, g in expected.items():
        factors = optimizer.layers[f"inside[{part}]"].factors
        if factors or g.any():  # without a gradient of its own, a layer may have no factors
            torch.testing.assert_close(factors["G"], g)


# ---------------------------------------------------------------------------------- what is refused


class Weighing(Attending):
    """A model whose output depends on the weights of its attention."""

    def forward(self, x: Tensor) -> Tensor:
        output, weights = self.attn(x, x, x)
        return self.head(output.mean(1)) + weights.square().sum((1, 2)).unsqueeze(-1)


@pytest.mark.parametrize("average", [True, False])
def test_a_loss_outside_of_attentions_weights_is_measured(average: bool) -> None:
    """In an orthogonal basis the scale sums to the mean squared norm of the gradients."""

    class Both(Attending):
        def forward(self, x: Tensor) -> Any:
            found, weights = self.attn(x, x, x, average_attn_weights=average)
            return self.head(found.mean(1)), weights

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits, weights = model(x)
        return F.cross_entropy(logits, y) - (weights * weights.log()).flatten(1).sum(1).mean()

    (x, y), model = batch(), Both()
    fisher = {"name": "empirical", "terms": "x"}
    optimizer = bound(model, curvature="attention", fisher=fisher, lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(model, x, y).backward()
        optimizer.step()
    twin, squares = Both(), dict.fromkeys(optimizer.layers, 0.0)
    for n in range(len(x)):
        twin.zero_grad()
        loss(twin, x[n : n + 1], y[n : n + 1]).backward()
        for name, view in optimizer.layers.items():
            own = (twin.attn.get_parameter(key).grad for key in view.layer.parameters)
            squares[name] += sum(float(each.square().sum()) for each in own) / len(x)
    for name, view in optimizer.layers.items():
        [scale] = view.scale.values()
        assert float(scale.sum()) == pytest.approx(squares[name], rel=1e-10)


class Blind(Attention):
    """Attention whose calls run again without their weights."""

    def replay(self, module: nn.Module) -> Replay:
        return Unweighed()


class Unweighed(AttentionReplay):
    def outputs(self, output: Any) -> tuple[Any, ...]:
        return super().outputs(output)[:1]


def test_an_output_that_a_replay_does_not_follow_is_refused() -> None:
    model = Weighing()
    optimizer = bound(model, curvature=[Blind(), "kfac", "norm"])
    with pytest.raises(CaptureError, match=r"another output of the module is used.*'attn'"):
        gradient(model)
    optimizer.close()


def test_an_output_that_a_replay_does_not_follow_leaves_layers_plain() -> None:
    model = Weighing()
    optimizer = bound(model, curvature=[Blind(), "kfac", "norm"], unseen="plain")
    with pytest.warns(KfactkWarning, match=r"attn\[in_proj\]"):
        gradient(model)
    optimizer.step()
    assert set(optimizer.layers) == {"attn[out_proj]", "norm", "head"}


class Doubling(AttentionReplay):
    def run(self, call: ModuleCall) -> Replayed:
        again = super().run(call)
        return attrs.evolve(again, outputs=[2 * each for each in again.outputs])


class Wrong(Attention):
    def replay(self, module: nn.Module) -> Replay:
        return Doubling()


def test_a_replay_that_gives_something_else_is_refused() -> None:
    model = Attending()
    optimizer = bound(model, curvature=[Wrong(), "kfac"])
    with pytest.raises(CaptureError, match=r"difference 1\).*exclude=\['attn'\]"):
        gradient(model)
    optimizer.close()


def test_other_random_numbers_are_refused() -> None:
    attn, (x, _) = Attending(dropout=0.5).attn, batch()
    call = recorded_arguments(attn, (x, x, x), {})
    context = CallContext.now(torch.device("cpu"))
    torch.rand(())  # as a kernel of another kind would
    output = attn(x, x, x)[0].detach()
    again = RecordedReplay(
        "attn", call, context, AttentionReplay(), followed([output]), ["in_proj"]
    )
    with pytest.raises(CaptureError, match=r"'attn' gave another output when its call ran again"):
        again.calls("in_proj", {0: torch.ones_like(output)})


def test_an_argument_that_changed_is_refused() -> None:
    class Masking(Attending):
        def attend(self, x: Tensor) -> Tensor:
            mask = torch.zeros(3, 3, dtype=F64)
            found: Tensor = self.attn(x, x, x, attn_mask=mask)[0]
            mask.fill_(1)
            return found

    model = Masking()
    optimizer = bound(model)
    with pytest.raises(CaptureError, match="the input of layer 'attn' was modified in place"):
        gradient(model)
    optimizer.close()


def test_parameters_whose_memory_is_gone_are_refused() -> None:
    attn, (x, _) = Attending().attn, batch()
    call = recorded_arguments(attn, (x, x, x), {})
    output = attn(x, x, x)[0].detach()
    context = CallContext.now(torch.device("cpu"))
    again = RecordedReplay(
        "attn", call, context, AttentionReplay(), followed([output]), ["in_proj"]
    )
    attn.in_proj_weight.untyped_storage().resize_(0)
    with pytest.raises(CaptureError, match=r"'attn' are no longer gathered.*exclude=\['attn'\]"):
        again.calls("in_proj", {0: torch.ones_like(output)})


# -------------------------------------------------------------------------------------------- ranks


class Sharing(Attending):
    """Without layers whose examples meet."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(x).mean(1))


def trained(model: nn.Module, divide: Callable[[Tensor], Tensor], fisher: str) -> dict[str, Tensor]:
    optimizer = bound(model, fisher=fisher, factor_every=1, scale_every=2, basis_every=2, lr=0.05)
    for step in range(3):
        x, y = map(divide, batch(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return found(optimizer, model)


class Remembering(Sharing):
    """With two recurrent layers, of which one of three outputs is used."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.LSTM(4, 4, 2, batch_first=True).double()

    def attend(self, x: Tensor) -> Tensor:
        output: Tensor = self.attn(x)[0]
        return output


def on_a_rank(rank: int, kind: type[Sharing], way: str, fisher: str) -> dict[str, Tensor]:
    model = kind()
    WAYS[way](model, line())
    return trained(model, lambda each: each[rank::2], fisher)


@pytest.mark.xdist_group("ranks")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize(
    ("kind", "way", "fisher"),
    [
        (Sharing, "root only", "empirical"),
        (Sharing, "nested", "exact"),
        (Remembering, "nested", "empirical"),
        (Remembering, "root only", "exact"),
    ],
)
def test_fully_sharded_ranks_equal_one_process(kind: type[Sharing], way: str, fisher: str) -> None:
    truth = trained(kind(), lambda each: each, fisher)
    for ours in shared_workers().run(2, on_a_rank, kind, way, fisher):
        assert ours.keys() == truth.keys()
        for name, expected in truth.items():
            torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-11)
