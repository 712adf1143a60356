"""Under a controller, the scale of the loss is told where it is certain, and never otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk.testing._support.ranks import shared_workers
from kfactk_stages.likelihood._misfit import certain_factor, slope_between

N, C, T = 24, 5, 6
Loss = Callable[[Tensor], Tensor]
RECIPE: dict[str, Any] = {
    "curvature": "kfac",
    "basis": {"name": "kfac", "solver": "eigh"},
    "update": "velocity",
    "controller": {"name": "quadratic", "model_damping": 1.0, "adapt_every": 2},
    "factor_every": 1,
    "basis_every": 2,
}
torch.manual_seed(0)
LABELS, VALUES = torch.randint(C, (N,)), torch.randn(N, C)
TOKENS = torch.randint(C, (N, T))
MASKED = TOKENS.clone()
MASKED[:, 4:] = -100
MASKED[::3] = -100
MANY = VALUES.clone()
MANY[:, 2:] = 0.0


def net(classes: int = C, size: float = 2.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, classes))
    with torch.no_grad():
        model[2].weight.mul_(size)
    return model


def told(
    loss: Loss,
    *,
    shape: tuple[int, ...] = (N,),
    classes: int = C,
    steps: int = 3,
    size: float = 2.0,
    after: Callable[[Any], object] | None = None,
    half: bool = False,
    **options: Any,
) -> list[str]:
    """What steps with a loss say of its scale."""
    model = net(classes, size)
    optimizer = kfactk.build(**{**RECIPE, **options}).bind(model)
    inputs = torch.randn(*shape, 7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = loss(model(inputs))
        value.backward()
        if after is not None:
            after(optimizer)
        return value

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.step(closure)
    return [str(each.message) for each in caught if "slopes from your loss" in str(each.message)]


ENTROPY: dict[str, Loss] = {
    "mean": lambda z: F.cross_entropy(z, LABELS),
    "smoothed": lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.3),
    "weights of classes": lambda z: F.cross_entropy(z, LABELS, torch.tensor([0.2, 3.0, 1, 5, 1])),
    "ignored": lambda z: F.cross_entropy(z, LABELS.where(LABELS != 2, -100)),
    "masked, over all": lambda z: (
        F.cross_entropy(z, LABELS, reduction="none") * (LABELS > 1)
    ).mean(),
    "distilled": lambda z: F.kl_div(z.log_softmax(1), VALUES.softmax(1), reduction="batchmean"),
    "mixed": lambda z: 0.3 * F.cross_entropy(z, LABELS) + 0.7 * F.cross_entropy(z, LABELS.flip(0)),
    "policy gradient": lambda z: -(z.log_softmax(1)[range(N), LABELS] * VALUES[:, 0]).mean(),
    "of probabilities": lambda z: F.nll_loss(z - z.logsumexp(1, True), LABELS),
    "entropy bonus": lambda z: (
        F.cross_entropy(z, LABELS)
        - 0.1 * torch.distributions.Categorical(logits=z).entropy().mean()
    ),
    "weights of examples": lambda z: (
        F.cross_entropy(z, LABELS, reduction="none") * torch.rand(N, generator=generator())
    ).mean(),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("size", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("name", ENTROPY)
def test_losses_of_the_usual_scale_are_silent(name: str, size: float) -> None:
    """Also at first, where all classes are as likely, and smoothing is a factor of the gradient."""
    assert told(ENTROPY[name], size=size) == []


@pytest.mark.parametrize("factor", [0.1, 4.0])
@pytest.mark.parametrize("size", [0.0, 2.0])
def test_a_loss_of_another_scale_is_told_once_with_the_line_to_paste(
    factor: float, size: float
) -> None:
    [message] = told(lambda z: factor * F.cross_entropy(z, LABELS), steps=5, size=size)
    assert f"is {factor:g} times the mean negative log-likelihood of likelihood" in message
    assert f"which is {1 / factor:.3g} times that of your loss" in message
    assert f"loss = loss / {factor:g} (said once)" in message


def test_a_sum_is_told_at_the_first_step() -> None:
    [message] = told(lambda z: F.cross_entropy(z, LABELS, reduction="sum"), steps=1)
    assert "is 24 times" in message
    assert "It is a sum over its 24 terms: take the mean, reduction='mean'" in message


SEQUENCES = {"name": "categorical", "class_axis": -1}


@pytest.mark.parametrize(
    ("likelihood", "reduction", "words"),
    [
        (SEQUENCES, "mean", []),
        (SEQUENCES, "sum", ["sum over its 144 terms"]),
        ({**SEQUENCES, "targets": "labels"}, "mean", []),
        ({**SEQUENCES, "targets": "labels"}, "sum", ["sum over its 64 terms"]),
    ],
)
def test_ignored_targets_are_counted_or_not(likelihood: Any, reduction: str, words: Any) -> None:
    """A mean over the labels that are there is one, also where the likelihood knows no labels."""

    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return self.inner(x)

    model = Labelled()
    optimizer = kfactk.build(**RECIPE, likelihood=likelihood).bind(model)
    x = torch.randn(N, T, 7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, MASKED).movedim(-1, 1), MASKED, reduction=reduction)
        loss.backward()
        return loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step(closure)
        optimizer.step(closure)
    found = [str(each.message) for each in caught if "slopes from" in str(each.message)]
    assert len(found) == len(words)
    if words and "targets" in likelihood:
        assert words[0] in found[0]
    elif words:
        assert "is 144 times" in found[0]


GAUSSIAN: list[tuple[Any, Loss, float]] = [
    ({}, lambda f: F.mse_loss(f, VALUES), 2 / C),
    ({"variance": C / 2}, lambda f: F.mse_loss(f, VALUES), 1.0),
    ({"divisor": "entries"}, lambda f: F.mse_loss(f, VALUES), 2.0),
    ({"divisor": "entries", "variance": 0.5}, lambda f: F.mse_loss(f, VALUES), 1.0),
    ({"variance": 0.5}, lambda f: F.mse_loss(f, VALUES, reduction="sum") / N, 1.0),
    ({}, lambda f: (f - VALUES).square().sum(1).mean() / 2, 1.0),
    ({}, lambda f: (f - VALUES).square().sum() / 2, float(N)),
]


@pytest.mark.parametrize(("options", "loss", "factor"), GAUSSIAN)
def test_squared_errors_tell_by_two_gradients(options: Any, loss: Loss, factor: float) -> None:
    """The remedy is the likelihood whose mean negative log-likelihood the loss is."""
    likelihood = {"name": "gaussian", **options}
    assert told(loss, steps=1, likelihood=likelihood) == []
    found = told(loss, likelihood=likelihood)
    if factor == 1:
        assert found == []
        return
    [message] = found
    assert f"is {factor:.3g} times" in message
    if factor == N:
        assert "sum over its 24 terms" in message
        return
    variance = options.get("variance", 1.0) / factor
    assert f"'variance': {variance}" in message
    assert told(loss, likelihood={**likelihood, "variance": variance}) == []


OTHERS: dict[str, tuple[Any, Loss]] = {
    "absolute": ("gaussian", lambda f: F.l1_loss(f, VALUES)),
    "huber": ("gaussian", lambda f: F.huber_loss(f, VALUES, delta=0.5)),
    "weighted": ("gaussian", lambda f: ((f - VALUES).square().sum(1) * LABELS).mean()),
    "binary": (
        "bernoulli",
        lambda f: F.binary_cross_entropy_with_logits(f, MANY.sign().relu(), reduction="sum") / N,
    ),
    "soft binary": (
        "bernoulli",
        lambda f: F.binary_cross_entropy_with_logits(f, VALUES.sigmoid(), reduction="sum") / N,
    ),
    "counts": (
        "poisson",
        lambda f: F.poisson_nll_loss(f, LABELS[:, None].float().expand(N, C), reduction="sum") / N,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_are_silent(name: str) -> None:
    likelihood, loss = OTHERS[name]
    assert told(loss, likelihood=likelihood) == []


@pytest.mark.parametrize("name", ["binary", "soft binary", "counts"])
def test_other_losses_of_another_scale_are_told(name: str) -> None:
    likelihood, loss = OTHERS[name]
    [message] = told(lambda f: 3 * loss(f), likelihood=likelihood)
    assert "is 3 times" in message


def noisy(f: Tensor) -> Tensor:
    """Return the mean over terms of two numbers with predicted noise."""
    loss = F.gaussian_nll_loss(f[:, :2], VALUES[:, :2], f[:, 2:].exp(), reduction="sum")
    return loss / N


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.5, float(N)])
def test_predicted_noise_tells_at_the_first_step(factor: float) -> None:
    """`F.gaussian_nll_loss` takes the mean over all numbers: half of it, for two of each term."""
    options: dict[str, Any] = {"likelihood": "heteroscedastic", "classes": 4, "steps": 1}
    found = told(lambda f: factor * noisy(f), **options)
    assert len(found) == (factor != 1)
    assert all(f"is {factor:g} times" in each for each in found)
    assert told(lambda f: factor * noisy(f), **(options | {"size": 0.0})) == []
    [mean] = told(lambda f: F.gaussian_nll_loss(f[:, :2], VALUES[:, :2], f[:, 2:].exp()), **options)
    assert "is 0.5 times" in mean


@pytest.mark.parametrize("advantages", [VALUES[:, 3], LABELS.float()])
def test_predicted_noise_of_weighed_terms_tells_nothing(advantages: Tensor) -> None:
    def loss(f: Tensor) -> Tensor:
        mean, log_variance = f.chunk(2, -1)
        losses = (mean - VALUES[:, :2]).square() * (-log_variance).exp() + log_variance
        return (losses.sum(-1) * advantages).mean() / 2

    assert told(loss, likelihood="heteroscedastic", classes=4) == []


def test_missing_values_of_a_mean_are_silent() -> None:
    values = VALUES.clone()
    values[::2] = float("nan")
    there = ~values.isnan()

    def loss(f: Tensor) -> Tensor:
        return (f - values)[there].square().sum() / 2 / (N / 2)

    assert told(loss, likelihood="gaussian") == []


@pytest.mark.parametrize(("share", "count"), [(1 / 3, 0), (1.0, 1)])
def test_micro_batches_add_up(share: float, count: int) -> None:
    """Their mean is one; the sum of their means is three times that."""
    model = net()
    optimizer = kfactk.build(**RECIPE).bind(model)
    x = torch.randn(N, 7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for rows in range(3):
            loss = share * F.cross_entropy(model(x[rows::3]), LABELS[rows::3])
            loss.backward()
            total = total + loss.detach()
        return total

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(closure)
    found = [str(each.message) for each in caught if "slopes from" in str(each.message)]
    assert len(found) == count
    assert all("is 3 times" in each for each in found)


class Two(nn.Module):
    """Two heads, of which the second may read the first."""

    def __init__(self, chained: bool) -> None:
        super().__init__()
        self.body, self.policy = nn.Linear(7, 8), nn.Linear(8, C)
        self.value, self.chained = nn.Linear(8 + C, 1), chained

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.body(x))
        policy = 3 * self.policy(hidden)
        read = policy if self.chained else policy.detach()
        return {"policy": policy, "value": self.value(torch.cat([hidden, read], 1))}


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize(("weight", "words"), [(0.5, ""), (2.0, "of head 'policy' is 4 times")])
def test_heads_have_weights(chained: bool, weight: float, words: str) -> None:
    torch.manual_seed(0)
    model = Two(chained)
    heads = [kfactk.head("policy", "categorical", weight=0.5), kfactk.head("value", "gaussian")]
    optimizer = kfactk.build(**RECIPE, likelihood=heads).bind(model)
    x = torch.randn(N, 7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        out = model(x)
        loss = weight * F.cross_entropy(out["policy"], LABELS)
        loss = loss + (out["value"] - VALUES[:, :1]).square().mean() / 2
        loss.backward()
        return loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(closure)
    found = [str(each.message) for each in caught if "slopes from" in str(each.message)]
    assert bool(found) == (bool(words) and not chained)
    assert all(words in each for each in found)


def test_gradients_that_are_changed_after_the_backward_tell_nothing() -> None:
    """A gradient scaler in the closure multiplies the loss, and divides the gradients."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def loss(z: Tensor) -> Tensor:
        return scaler.scale(F.cross_entropy(z, LABELS))

    def divide(optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.div_(64.0)

    assert told(loss, after=divide) == []

    def unscale(optimizer: Any) -> None:
        scaler._per_optimizer_states.clear()  # as `update` does
        scaler.unscale_(optimizer)

    assert told(loss, after=unscale) == []
    assert len(told(loss)) == 1


def test_half_precision_is_silent() -> None:
    assert told(ENTROPY["mean"], half=True) == []
    likelihood = {"name": "gaussian", **GAUSSIAN[3][0]}
    assert told(GAUSSIAN[3][1], likelihood=likelihood, half=True) == []


def test_without_a_controller_nothing_is_told_of_the_scale() -> None:
    model = net()
    optimizer = kfactk.build(curvature="kfac").bind(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (5 * F.cross_entropy(model(torch.randn(N, 7)), LABELS)).backward()
        optimizer.step()


def test_a_bad_batch_leaves_the_look_to_the_next() -> None:
    model = net()
    optimizer = kfactk.build(**RECIPE).bind(model)
    factors: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = factors[-1] * F.cross_entropy(model(torch.ones(N, 7)), LABELS)
        loss.backward()
        return loss

    found: Sequence[Any] = []
    for factor in (float("nan"), 7.0, 7.0):
        factors.append(factor)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step(closure)
        found = [*found, *(each for each in caught if "is 7 times" in str(each.message))]
    assert len(found) == 1


def on_ranks(rank: int, factor: float) -> int:
    model = net()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = kfactk.build(**RECIPE).bind(wrapped)
    x, y = torch.randn(N, 7, generator=generator())[rank::2], LABELS[rank::2]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = factor * F.cross_entropy(wrapped(x), y)
        loss.backward()
        return loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.step(closure)
    return sum("slopes from your loss" in str(each.message) for each in caught)


@pytest.mark.xdist_group("ranks")
def test_each_rank_has_a_mean_of_its_own() -> None:
    assert shared_workers().run(2, on_ranks, 1.0) == [0, 0]
    assert shared_workers().run(2, on_ranks, 5.0) == [1, 1]


def test_factors_are_certain_where_probabilities_differ() -> None:
    z = 3 * torch.randn(N, C, generator=generator())
    p, y = z.softmax(1), F.one_hot(LABELS, C)
    assert certain_factor(p, 0.25 * (p - y)) == pytest.approx(0.25, rel=1e-4)
    assert certain_factor(p, 0.25 * (p - 0.8 * y - 0.2 / C)) is None
    flat = torch.full((N, C), 1 / C)
    assert certain_factor(flat, 0.25 * (flat - y)) is None
    assert slope_between((p, p + 1e-9), (p - y, p - y)) is None
