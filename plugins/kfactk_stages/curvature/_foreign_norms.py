"""Normalisation layers of other libraries and of users, known by what they compute."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kfactk_stages.curvature._coverage import PRECISIONS, plain_class

TOLERANCE = 1e-5
"""Relative deviation up to which two results are equal; some layers compute in float32."""
LARGEST_EPS = 1e-2
"""Largest number that a layer may add to a mean square."""

_Signature = tuple[Any, ...]
_known: weakref.WeakKeyDictionary[nn.Module, tuple[_Signature, nn.Module | None]] = (
    weakref.WeakKeyDictionary()
)


def stand_in(module: nn.Module) -> nn.Module | None:
    """Return the layer of torch that normalises as this module does; `None` where none does.

    A module with a vector as its weight, and perhaps one as its bias, is tried out: its forward
    runs on random numbers, with random parameters in place of its own. It is such a layer if the
    output is `(weight + c) x_hat + bias`, with x_hat that of `nn.RMSNorm` or `nn.LayerNorm` over
    the last dimension and a constant c, whatever other dimensions there are. The module itself
    stays as it is, with the tensors, lists, dicts and sets that it keeps, and so does the state of
    torch's random numbers.

    Example:
        >>> class Own(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.zeros(4))
        ...     def forward(self, x):
        ...         return (1 + self.weight) * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        >>> stand_in(Own())
        RMSNorm((4,), eps=1e-06, elementwise_affine=False)
        >>> stand_in(nn.PReLU(4)) is None
        True
    """
    if not _may_normalise(module):
        return None
    signature = _signature(module)
    if module in _known and _known[module][0] == signature:
        return _known[module][1]
    found = _tried(module)
    _known[module] = signature, found
    return found


def _may_normalise(module: nn.Module) -> bool:
    own = {name: each for name, each in module._parameters.items() if each is not None}
    return (
        own.keys() in ({"weight"}, {"weight", "bias"})
        and not any(map(is_lazy, own.values()))
        and all(each.ndim == 1 and each.dtype in PRECISIONS for each in own.values())
        and len({each.shape for each in own.values()}) == 1
        and own["weight"].numel() > 1
        and not module._modules
        and not any(each is not None for each in module._buffers.values())
        and "forward" not in vars(module)
    )


def _signature(module: nn.Module) -> _Signature:
    """Return what the result depends on, besides what cannot change."""
    simple = (bool, int, float, str)
    settings = tuple((k, v) for k, v in vars(module).items() if isinstance(v, simple))
    shapes = tuple((k, v.shape) for k, v in module._parameters.items() if v is not None)
    return type(module).forward, shapes, settings


def _tried(module: nn.Module) -> nn.Module | None:
    """Return what a module is found to be by its results, in the first precision that it takes."""
    for dtype in (torch.float64, torch.float32):
        try:
            with _surroundings():
                return _tried_in(module, dtype)
        except Exception:  # a stranger's forward may raise anything: then it is no such layer
            continue
    return None


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """Surround a trial: it neither depends on the modes of its caller nor draws their numbers."""
    loaded = "torch._dynamo" in sys.modules
    with (
        torch.compiler.set_stance("force_eager") if loaded else contextlib.nullcontext(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        yield


def _tried_in(module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    generator = torch.Generator().manual_seed(0)
    width = module._parameters["weight"].shape[0]  # type: ignore[union-attr]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)

    x, one, bias = drawn(3, width), drawn(width).abs() + 0.1, drawn(width)
    one[::2] *= -1  # one that acts by its size is another layer
    other = one + 1 + drawn(width).sigmoid()
    run = _Runner(module)
    # With tiny inputs eps alone is divided by, and so is known.
    none = torch.zeros_like(bias)
    tiny = (run(1e-9 * x, one, none) - run(1e-9 * x, other, none)) / (one - other)
    for kind in (nn.RMSNorm, nn.LayerNorm):
        centred = x if kind is nn.RMSNorm else x - x.mean(-1, keepdim=True)
        eps = float((1e-9 * centred).norm() / tiny.norm()) ** 2
        if not 1e-16 < eps < LARGEST_EPS:
            continue
        exact: Any = _exact(module, kind, eps, dtype)
        made = kind(width, eps=exact, elementwise_affine=False)
        if _fits(run, made, x, (one, other, bias)):
            return made
    return None


class _Runner:
    """Runs the forward of a module with other parameters, on a copy without hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._copy: Any = object.__new__(plain_class(module))
        nn.Module.__init__(self._copy)
        mine = vars(self._copy)
        mine |= {name: _copied(each) for name, each in vars(module).items() if name not in mine}
        self._copy.training = module.training
        self.shift = module._parameters.get("bias") is not None
        if len(inspect.signature(type(module).forward).parameters) != 2:
            raise TypeError("it takes more than its input")

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the last run: weight, and bias if the module has one."""
        own = self._copy._parameters
        return [own["weight"], own["bias"]] if self.shift else [own["weight"]]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the output, in float64."""
        self._copy._parameters["weight"] = nn.Parameter(weight)
        if self.shift:
            self._copy._parameters["bias"] = nn.Parameter(bias)
        elif "bias" not in vars(self._copy):
            self._copy._parameters["bias"] = None
        found = type(self._copy).forward(self._copy, x.clone())
        if not isinstance(found, Tensor) or found.shape != x.shape:
            raise TypeError("it returns something else")
        return found.double()


def _fits(
    run: _Runner, made: nn.Module, x: Tensor, parameters: tuple[Tensor, Tensor, Tensor]
) -> bool:
    """Return whether weights and biases act on the output as those of the layer would."""
    one, other, bias = parameters
    for scale in (1.0, 1e-3, 30.0):
        inputs = scale * x
        difference = run(inputs, one, bias) - run(inputs, other, bias)
        expected = (one - other) * made(inputs)
        shifted = run(inputs, one, bias) - run(inputs, one, torch.zeros_like(bias))
        wanted = bias.expand_as(shifted) if run.shift else torch.zeros_like(shifted)
        size = expected.norm() + bias.norm()
        if (difference - expected).norm() > TOLERANCE * size:
            return False
        if (shifted - wanted).norm() > TOLERANCE * size:
            return False
    apart = all(_keeps_rows_apart(run, x, one, bias, dims) for dims in (2, 3))
    return apart and _has_gradients(run, made, x, one, bias)


def _keeps_rows_apart(run: _Runner, x: Tensor, weight: Tensor, bias: Tensor, dims: int) -> bool:
    """Return whether rows do not mix where so many dimensions come before the last one.

    None of these is as long as the last one: a layer that normalises another dimension fails.
    """
    width = x.shape[-1]
    leading = [length for length in (2, 3, 4, 5) if length != width][:dims]
    rows = torch.linspace(-1.0, 2.0, math.prod(leading) * width, dtype=x.dtype, device=x.device)
    rows = (7 * rows).sin().view(-1, width)
    apart, whole = run(rows, weight, bias), run(rows.view(*leading, width), weight, bias)
    return bool((whole.view_as(apart) - apart).norm() <= TOLERANCE * apart.norm())


def _has_gradients(run: _Runner, made: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Return whether autograd gives weight and bias the gradients that the layer's own have."""
    cotangent = x.flip(0).double()
    with torch.enable_grad():
        output = run(x, weight, bias)
    found = torch.autograd.grad(output, run.parameters(), cotangent)
    wanted = [(cotangent * made(x)).sum(0), cotangent.sum(0)][: len(found)]
    pairs = zip(found, wanted, strict=True)
    return all(bool((one - two).norm() <= TOLERANCE * two.norm()) for one, two in pairs)


def _exact(
    module: nn.Module, kind: type[nn.Module], eps: float, dtype: torch.dtype
) -> float | None:
    """Return the number that a measured eps is, up to rounding.

    That is one of the module's settings, a power of ten, `None` for what `nn.RMSNorm` takes without
    one, or what was measured.
    """
    written = [v for v in vars(module).values() if isinstance(v, float) and v > 0]
    if (own := next((v for v in written if abs(v / eps - 1) < 1e-4), None)) is not None:
        return own
    if kind is nn.RMSNorm and abs(torch.finfo(dtype).eps / eps - 1) < 0.1:
        return None
    return next((v for p in range(2, 16) if abs((v := 10.0**-p) / eps - 1) < 1e-4), eps)


def _copied(value: Any) -> Any:
    """Return a copy of what a forward may change in place, and other values as they are."""
    if isinstance(value, Tensor):
        return value.clone()
    copied = copy.copy(value) if isinstance(value, (dict, list, set)) else value
    if isinstance(copied, dict):
        copied.update({key: _copied(each) for key, each in copied.items()})
    elif isinstance(copied, list):
        copied[:] = map(_copied, copied)
    return copied
