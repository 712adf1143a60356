"""Normalisation layers of strangers: known by what they compute, and measured as torch's are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfactk import Layer, LayerCall
from kfactk_stages.curvature._foreign_norms import stand_in
from kfactk_stages.curvature.norm import Norm


class PlainRms(nn.Module):
    """RMSNorm as language models write it: `x` is normalised in float32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), eps

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x.float()).type_as(x) * self.weight


class OnePlus(PlainRms):
    """The weight is what is added to one."""

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x) * (1 + self.weight)


class WithBias(nn.Module):
    """LayerNorm whose eps is in its code alone."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))
        self.bias = nn.Parameter(torch.rand(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Wrapped(nn.LayerNorm):
    """A subclass with a forward of its own, which computes the same."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Widened(nn.LayerNorm):
    """A subclass that takes parameters of float32 alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Centreless(nn.LayerNorm):
    """A subclass that normalises as RMSNorm does, and has its base's parameters."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * scale * self.weight + self.bias


class OtherEps(nn.LayerNorm):
    """A subclass whose forward has an eps of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, 1e-3)


class OfElements(nn.GroupNorm):
    """A subclass of a layer of channels that normalises the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.num_channels,), self.weight, self.bias, self.eps)


class Counting(PlainRms):
    """It keeps notes of its calls."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.calls, self.seen = 0, torch.zeros(())
        self.notes: dict[str, list[int]] = {"rows": []}
        self.widths: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.notes["rows"].append(len(x))
        self.widths.add(x.shape[-1])
        return super().forward(x)


class Noisy(PlainRms):
    """It adds noise in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * torch.randn_like(x) * self.training


STRANGERS: dict[str, tuple[Callable[[], nn.Module], nn.Module]] = {
    "in float32": (lambda: PlainRms(4), nn.RMSNorm(4, 1e-6)),
    "another eps": (lambda: PlainRms(4, 3e-4), nn.RMSNorm(4, 3e-4)),
    "one plus weight": (lambda: OnePlus(4), nn.RMSNorm(4, 1e-6)),
    "with bias": (lambda: WithBias(4), nn.LayerNorm(4)),
    "without bias": (lambda: WithBias(4, bias=False), nn.LayerNorm(4, bias=False)),
    "subclass": (lambda: Wrapped(4), nn.LayerNorm(4)),
    "subclass of another": (lambda: Centreless(4), nn.RMSNorm(4, 1e-5)),
    "subclass with its own eps": (lambda: OtherEps(4), nn.LayerNorm(4, 1e-3)),
    "subclass of channels": (lambda: OfElements(2, 4), nn.LayerNorm(4)),
    "of two": (lambda: OnePlus(2), nn.RMSNorm(2, 1e-6)),
}


ROUNDING = ("in float32", "another eps", "subclass")
"""Those that compute in float32."""


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4)])
def test_layers_of_strangers_are_those_of_torch(name: str, shape: tuple[int, ...]) -> None:
    """Their D of every example is autograd's, with small inputs too, where eps tells."""
    make, like = STRANGERS[name]
    torch.manual_seed(0)
    module = make().double()
    assert Norm().unsupported(module) is None
    width = module.get_parameter("weight").numel()
    names = tuple(name for name, each in module._parameters.items() if each is not None)
    layer = Layer("norm", module, names)
    for scale in (1.0, 1e-3):
        x = scale * torch.randn(*shape[:-1], width, dtype=torch.float64)
        output = module(x)
        g = torch.randn_like(output)
        call = LayerCall(x, g)
        found = Norm().samples(layer, [call], num_terms=1.0, first=True).per_example_gradients()
        for n in range(len(x)):
            alone = (output[n] * g[n]).sum()
            grads = torch.autograd.grad(alone, list(layer.tensors().values()), retain_graph=True)
            expected = Norm().matrix(layer, dict(zip(names, grads, strict=True)))
            rtol = 1e-5 if name in ROUNDING else 1e-9
            torch.testing.assert_close(found[:, n], expected, rtol=rtol, atol=rtol)
    assert repr(stand_in(module)) == repr(type(like)(width, eps=like.eps, elementwise_affine=False))


def test_trying_out_leaves_the_layer_as_it_is() -> None:
    module, seen = PlainRms(4), []
    module.register_forward_hook(lambda *args: seen.append(1))
    before, state = module.weight, torch.get_rng_state()
    assert Norm().unsupported(module) is None
    assert module.weight is before
    assert torch.equal(torch.get_rng_state(), state)
    assert not seen


def test_trying_out_leaves_what_a_layer_notes_as_it_is() -> None:
    module = Counting(4)
    assert Norm().unsupported(module) is None
    assert (module.calls, float(module.seen)) == (0, 0.0)
    assert module.notes == {"rows": []}
    assert module.widths == set()


def test_trying_out_draws_no_random_numbers() -> None:
    module = Noisy(4)
    state = torch.get_rng_state()
    assert Norm().unsupported(module) == "no curvature for Noisy"
    assert torch.equal(torch.get_rng_state(), state)
    assert Norm().unsupported(module.eval()) is None


def test_trying_out_costs_little_where_layers_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = []
    forward = PlainRms.forward

    def counted(self: PlainRms, x: Tensor) -> Tensor:
        numbers.append(x.numel())
        return forward(self, x)

    monkeypatch.setattr(PlainRms, "forward", counted)
    assert Norm().unsupported(PlainRms(4096)) is None
    assert max(numbers) <= 100 * 4096


def test_trying_out_compiles_nothing() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, args: object) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    class Compiled(PlainRms):
        @torch.compile(backend=backend)
        def forward(self, x: Tensor) -> Tensor:
            return self._norm(x) * self.weight

    assert Norm().unsupported(Compiled(4)) is None
    assert not compiled


def test_trying_out_does_not_depend_on_inference_mode() -> None:
    with torch.inference_mode():
        assert Norm().unsupported(PlainRms(4)) is None


@pytest.mark.parametrize("width", [3, 4])
def test_the_eps_of_torch_is_that_of_the_inputs_precision(width: int) -> None:
    class Default(PlainRms):
        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, self.weight.shape, self.weight)

    module = Default(width)
    x = 1e-3 * torch.randn(5, width)
    output = module(x)
    gradient = torch.randn_like(output)
    samples = Norm().samples(
        Layer("norm", module, ("weight",)), [LayerCall(x, gradient)], num_terms=1.0, first=True
    )
    [expected] = torch.autograd.grad(output, [module.weight], gradient)
    found = samples.per_example_gradients().sum(1)[:, 0, 0]
    torch.testing.assert_close(found, expected)


class ChannelsFirst(nn.Module):
    """LayerNorm of channels in dimension 1, which for two dimensions is the last one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(1, -1, *[1] * (x.ndim - 2))
        x = x - x.mean(1, keepdim=True)
        return weight * x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt()


class OfBatch(PlainRms):
    """It normalises by all rows together."""

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean() + self.eps)


class Squared(PlainRms):
    """Its weight acts by its square."""

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x) * self.weight.square()


class BySize(PlainRms):
    """The size of its weight acts."""

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x) * self.weight.abs()


class OfImages(PlainRms):
    """It normalises channels, in dimension 1, of images alone."""

    def forward(self, x: Tensor) -> Tensor:
        images = x.ndim == 4
        found = super().forward(x.movedim(1, -1) if images else x)
        return found.movedim(-1, 1) if images else found


class Slow(PlainRms):
    """Its weight learns a tenth as fast."""

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x) * (0.1 * self.weight + 0.9 * self.weight.detach())


class Gated(PlainRms):
    """It takes a gate besides."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return self._norm(x) * self.weight * (1 if gate is None else gate)


class Scale(PlainRms):
    """It does not normalise."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


OTHERS = [ChannelsFirst, OfBatch, Squared, BySize, OfImages, Slow, Gated, Scale]


@pytest.mark.parametrize("cls", OTHERS)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_what_computes_something_else_is_no_such_layer(cls: type[nn.Module], width: int) -> None:
    assert Norm().unsupported(cls(width)) == f"no curvature for {cls.__name__}"


def test_layers_of_one_precision_are_tried_out_in_it() -> None:
    assert Norm().unsupported(Widened(4)) is None


def test_a_changed_eps_is_seen() -> None:
    module = PlainRms(4)
    assert stand_in(module).eps == 1e-6
    module.eps = 1e-3
    assert stand_in(module).eps == 1e-3


def test_norms_of_transformers_are_covered() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    assert transformers.__version__
    for cls in (LlamaRMSNorm, T5LayerNorm, GemmaRMSNorm):
        for dtype in (torch.float32, torch.bfloat16):
            assert Norm().unsupported(cls(8).to(dtype)) is None
