"""The first backward that counts tells whether the loss is the likelihood's."""

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfactk
from kfactk_stages.likelihood._misfit import temperature
from kfactk_stages.likelihood._noise import other_noise
from kfactk_stages.likelihood.gaussian import Gaussian

N, C, T = 24, 5, 6
Loss = Callable[[Tensor], Tensor]


def said(loss: Loss, *, shape: tuple[int, ...] = (N,), classes: int = C, **options: Any) -> str:
    """What two steps with a loss warn of."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, classes))
    optimizer = kfactk.build(**{"curvature": "kfac", "basis_every": 1, **options}).bind(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            loss(model(torch.randn(*shape, 7))).backward()
            optimizer.step()
    return "\n".join(str(each.message) for each in caught)


torch.manual_seed(0)
LABELS, TARGETS = torch.randint(C, (N,)), torch.randn(N, C)
TOKENS = torch.randint(C, (N, T))
OF_CLASSIFICATION: dict[str, Loss] = {
    "cross entropy": lambda z: F.cross_entropy(z, LABELS),
    "of sums": lambda z: F.cross_entropy(z, LABELS, reduction="sum"),
    "smoothed": lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.1),
    "weighted": lambda z: F.cross_entropy(z, LABELS, torch.rand(C)),
    "distilled": lambda z: F.kl_div(z.log_softmax(1), TARGETS.softmax(1), reduction="batchmean"),
    "focal": lambda z: (
        (1 - z.softmax(1).gather(1, LABELS[:, None])) ** 2
        * F.cross_entropy(z, LABELS, reduction="none")[:, None]
    ).mean(),
    "policy gradient": lambda z: -(z.log_softmax(1)[range(N), LABELS] * TARGETS[:, 0]).mean(),
    "hinge": lambda z: F.multi_margin_loss(z, LABELS),
    "of logarithms": lambda z: F.nll_loss(z - z.logsumexp(1, True), LABELS),
    "z-loss": lambda z: F.cross_entropy(z, LABELS) + 1e-4 * z.logsumexp(1).square().mean(),
}
OTHERS: dict[str, Loss] = {
    "squared error": lambda z: F.mse_loss(z, TARGETS),
    "values of actions": lambda z: F.smooth_l1_loss(z[range(N), LABELS], TARGETS[:, 0]),
    "images": lambda z: F.binary_cross_entropy_with_logits(z, TARGETS.sigmoid()),
    "contrast": lambda z: F.cross_entropy(F.normalize(z) @ F.normalize(TARGETS).T, torch.arange(N)),
    "triplets": lambda z: F.triplet_margin_loss(z, TARGETS, TARGETS.flip(0)),
}


@pytest.mark.parametrize("name", OF_CLASSIFICATION)
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_losses_of_classification_are_silent(name: str, fisher: str):
    assert said(OF_CLASSIFICATION[name], fisher=fisher) == ""


@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_under_categorical_are_told_once(name: str):
    told = said(OTHERS[name])
    assert told.count("does not sum to zero over the classes") == 1
    assert "likelihood='gaussian'" in told


def test_other_losses_are_silent_where_they_are_measured_themselves():
    assert said(OTHERS["squared error"], fisher="empirical") == ""


def test_half_precision_is_silent():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for fisher in ("mc", "empirical"):
            assert said(OF_CLASSIFICATION["cross entropy"], classes=300, fisher=fisher) == ""


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize(
    ("axis", "words"), [(1, "{'name': 'categorical', 'class_axis': 2}"), (-1, "")]
)
def test_a_wrong_axis_of_classes_is_told_with_the_right_one(axis: int, words: str, fisher: str):
    told = said(
        lambda z: F.cross_entropy(z.movedim(-1, 1), TOKENS),
        shape=(N, T),
        fisher=fisher,
        likelihood={"name": "categorical", "class_axis": axis},
    )
    assert words in told
    assert bool(told) == bool(words)


def test_cross_entropy_under_bernoulli_is_told():
    told = said(OF_CLASSIFICATION["cross entropy"], likelihood="bernoulli")
    assert "likelihood='categorical'" in told


def told_of_numbers(loss: Loss, output: Tensor, **options: Any) -> str | None:
    """What is told of a loss under `gaussian` by its gradient at an output."""
    f = output.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(f), f)
    return Gaussian(**options).misfit(output, gradient, measured=False)


BINARY = (TARGETS > 0).float()


@pytest.mark.parametrize(
    ("loss", "shape", "words"),
    [
        (OF_CLASSIFICATION["cross entropy"], (N, C), "likelihood='categorical'"),
        (lambda z: F.binary_cross_entropy_with_logits(z, BINARY), (N, C), "'bernoulli'"),
        (lambda z: F.cross_entropy(z, TOKENS), (N, C, T), "'categorical', 'class_axis': 1}"),
    ],
)
def test_losses_of_classes_under_gaussian_are_told(loss: Loss, shape: tuple[int, ...], words: str):
    """At first, where all probabilities are equal, targets of -1 and 1 have such a gradient."""
    output = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    found = told_of_numbers(loss, output)
    assert found is not None
    assert words in found
    assert told_of_numbers(loss, 0 * output) is None


def test_cross_entropy_under_gaussian_is_told_once():
    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, LABELS)

    model = nn.Linear(7, C)
    x = 3 * torch.randn(N, 7, generator=torch.Generator().manual_seed(2))
    for fisher, number in (("mc", 1), ("empirical", 0)):
        recipe = kfactk.build(curvature="kfac", likelihood="gaussian", fisher=fisher, lr=0.0)
        optimizer = recipe.bind(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                optimizer.zero_grad()
                loss(model(x)).backward()
                optimizer.step()
        assert len([each for each in caught if "softmax cross" in str(each.message)]) == number
        optimizer.close()


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.mse_loss(z, TARGETS),
        lambda z: F.mse_loss(z, F.one_hot(LABELS, C).float()),
        lambda z: F.mse_loss(z, 2 * BINARY - 1),
        lambda z: F.mse_loss(z, BINARY),
        lambda z: F.smooth_l1_loss(z, BINARY),
        lambda z: F.l1_loss(z, TARGETS),
        lambda z: F.mse_loss(z.sigmoid(), BINARY),
        lambda z: F.mse_loss(z.softmax(1), F.one_hot(LABELS, C).float()),
        lambda z: (F.normalize(z) @ F.normalize(TARGETS).T).logsumexp(1).mean(),
    ],
)
def test_losses_of_numbers_are_silent(loss: Loss, scale: float):
    assert told_of_numbers(loss, scale * torch.randn(N, C)) is None


def noisy(variance: Loss, *, weigh: Loss = torch.mean) -> Loss:
    """Return the loss of two numbers whose second half of the output gives a variance."""

    def loss(f: Tensor) -> Tensor:
        mean, s = f.movedim(-1, 0).chunk(2)
        v, y = variance(s), TARGETS.T[: len(mean)]
        return weigh(((mean - y).square() / v + v.log()) / 2)

    return loss


VARIANCES: dict[str, Loss] = {
    "torch.cat([m, 2 * s], -1)": lambda s: (2 * s).exp(),
    "torch.cat([m, s.log()], -1)": lambda s: s,
    "torch.cat([m, 2 * s.log()], -1)": torch.square,
    "torch.cat([m, torch.nn.functional.softplus(s).log()], -1)": F.softplus,
    "torch.cat([m, 2 * torch.nn.functional.softplus(s).log()], -1)": (
        lambda s: F.softplus(s).square()
    ),
}


def positive(z: Tensor) -> Tensor:
    mean, s = z.chunk(2, -1)
    return torch.cat([mean, 0.2 + 9 * s.square()], -1)


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("remedy", VARIANCES)
def test_another_meaning_of_the_noise_is_told_with_the_line_to_paste(remedy: str, columns: int):
    class Model(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return positive(super().forward(x))

    torch.manual_seed(0)
    model = Model(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 2 * columns))
    optimizer = kfactk.build(curvature="kfac", likelihood="heteroscedastic").bind(model)
    noisy(VARIANCES[remedy])(model(torch.randn(N, 7))).backward()
    with pytest.warns(kfactk.KfactkWarning, match="the second half is the") as caught:
        optimizer.step()
    assert remedy in str(caught[0].message)


def advantages(losses: Tensor) -> Tensor:
    """Weigh each term as a policy's gradient does."""
    return (losses.sum(0) * TARGETS[:, 4]).mean()


def test_advantages_do_not_hide_another_meaning_of_the_noise():
    options: dict[str, Any] = {"likelihood": "heteroscedastic", "classes": 4}
    of_deviations = noisy(lambda s: (2 * s).exp(), weigh=advantages)
    assert "2 * s" in said(of_deviations, **options)
    assert said(of_deviations, fisher="empirical", **options) == ""


SILENT_NOISE: dict[str, Loss] = {
    "torch's": lambda f: F.gaussian_nll_loss(f[:, :2], TARGETS[:, :2], f[:, 2:].exp()),
    "a policy's": noisy(torch.exp, weigh=advantages),
    "weighed by the noise": lambda f: noisy(
        torch.exp, weigh=lambda losses: (losses * f[:, 2:].detach().exp().sqrt().T).mean()
    )(f),
    "with a penalty": lambda f: noisy(torch.exp)(f) + 0.1 * f[:, 2:].square().mean(),
    "other tails": lambda f: (
        (f[:, :2] - TARGETS[:, :2]).abs() * (-f[:, 2:] / 2).exp() + f[:, 2:] / 2
    ).mean(),
    "a bounded variance": noisy(torch.sigmoid),
    "a single number's error": lambda f: (f[:, 0] - TARGETS[:, 0]).square().mean(),
}


@pytest.mark.parametrize("name", SILENT_NOISE)
def test_losses_with_noise_are_silent(name: str):
    assert said(SILENT_NOISE[name], likelihood="heteroscedastic", classes=4) == ""


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("name", SILENT_NOISE)
def test_no_output_makes_a_loss_with_noise_another_one(name: str, scale: float):
    f = (scale * torch.randn(N, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad(SILENT_NOISE[name](f), f)
    assert other_noise(f.detach(), gradient) is None


@pytest.mark.parametrize("columns", [1, 2, 10])
@pytest.mark.parametrize("divisor", ["terms", "entries"])
def test_means_over_entries_are_told_where_the_gradient_is_measured(columns: int, divisor: str):
    labels = torch.randint(2, (N, columns)).float()
    told = said(
        lambda z: F.binary_cross_entropy_with_logits(z, labels),
        classes=columns,
        fisher="empirical",
        likelihood={"name": "bernoulli", "divisor": divisor},
    )
    assert ("divisor='entries'" in told) == (columns > 1 and divisor == "terms")
    assert not told or f"{columns**-2:.3g} times what it should be" in told


@pytest.mark.parametrize(
    ("factor", "options", "words"),
    [
        (1.0, {"reduction": "mean"}, ""),
        (float(N), {"reduction": "sum"}, ""),
        (float(N), {"reduction": "mean"}, "is 24 times"),
        (1.0, {"reduction": "sum"}, "is 0.0417 times"),
        (0.25, {"reduction": "mean"}, "divide the damping by k^2"),
    ],
)
def test_the_size_of_a_measured_gradient_is_told(factor: float, options: Any, words: str):
    told = said(lambda z: factor * F.cross_entropy(z, LABELS), fisher="empirical", **options)
    assert words in told
    assert bool(told) == bool(words)
    assert said(lambda z: factor * F.cross_entropy(z, LABELS), **options) == ""  # mc


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_the_weight_of_a_single_term_is_no_factor_of_the_loss(likelihood: str, terms: int):
    """A state of an episode has an advantage, and a batch may end with one example."""
    labels, classes = torch.eye(3)[:terms], 3 if likelihood == "categorical" else 1

    def loss(z: Tensor) -> Tensor:
        if likelihood == "categorical":
            return 7 * F.cross_entropy(z, labels.argmax(1))
        return 7 * F.binary_cross_entropy_with_logits(z, labels[:, :1])

    options: dict[str, Any] = {"likelihood": likelihood, "fisher": "empirical"}
    told = said(loss, shape=(terms,), classes=classes, **options)
    assert ("is 7 times" in told) == (terms == 2)
    if likelihood == "bernoulli":
        options["likelihood"] = {"name": "bernoulli", "divisor": "entries"}
        told = said(loss, shape=(terms,), classes=classes, **options)
        assert ("is 7 times" in told) == (terms == 2)


def test_outputs_that_are_logarithms_of_probabilities_are_silent():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, C), nn.LogSoftmax(1))
    optimizer = kfactk.build(curvature="kfac").bind(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.nll_loss(model(torch.randn(N, 7)), LABELS).backward()
        optimizer.step()


@pytest.mark.parametrize("smoothing", [0.1, 0.2])
def test_smoothed_labels_are_silent_before_the_first_step(smoothing: float):
    """All classes are equal there, so that smoothing is a factor of the gradient."""
    model = nn.Linear(7, C)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = kfactk.build(curvature="kfac", fisher="empirical").bind(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(model(torch.randn(N, 7)), LABELS, label_smoothing=smoothing).backward()
        optimizer.step()


def test_masked_labels_that_the_likelihood_does_not_know_are_told():
    labels = TOKENS.clone()
    labels[:, T // 2 :] = -100
    told = said(
        lambda z: F.cross_entropy(z.movedim(-1, 1), labels),
        shape=(N, T),
        fisher="empirical",
        likelihood={"name": "categorical", "class_axis": -1},
    )
    assert "is 2 times" in told
    assert "targets=" in told


def test_backwards_that_count_nothing_are_passed_over():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, C))
    optimizer = kfactk.build(curvature="kfac").bind(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.randn(N, 7, requires_grad=True)
        logits = model(x)
        torch.autograd.grad(logits.sum(), x, retain_graph=True)
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        (F.cross_entropy(logits, LABELS) + slope.square().mean()).backward()
        optimizer.step()


def several(*losses: Callable[[Tensor], Tensor], **options: Any) -> str:
    """What a step warns of in which each loss has a backward of its own through one forward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, C))
    optimizer = kfactk.build(**{"curvature": "kfac", **options}).bind(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits = model(torch.randn(N, 7))
        for loss in losses:
            loss(logits).backward(retain_graph=True)
        optimizer.step()
    return "\n".join(str(each.message) for each in caught)


PENALTIES: dict[str, Loss] = {
    "z-loss": lambda z: z.logsumexp(1).square().mean(),
    "size of the logits": lambda z: z.square().mean(),
    "another head's loss": lambda z: F.mse_loss(z.mean(1), TARGETS[:, 0]),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_penalty_with_a_backward_of_its_own_is_silent(name: str, fisher: str):
    entropy = OF_CLASSIFICATION["cross entropy"]
    for losses in ((PENALTIES[name], entropy), (entropy, PENALTIES[name])):
        assert several(*losses, fisher=fisher) == ""


def test_a_loss_that_does_not_fit_is_told_beside_a_penalty():
    for losses in (("z-loss", "size of the logits"), ("size of the logits", "z-loss")):
        told = several(*(PENALTIES[name] for name in losses), OTHERS["squared error"])
        assert told.count("does not sum to zero over the classes") == 1


def test_a_loss_in_two_backwards_is_looked_at_as_a_whole():
    halves: list[Loss] = [
        lambda z: F.cross_entropy(z[::2], LABELS[::2]) / 2,
        lambda z: F.cross_entropy(z[1::2], LABELS[1::2]) / 2,
    ]
    assert several(*halves, fisher="empirical") == ""
    assert "is 0.5 times" in several(lambda z: F.cross_entropy(z, LABELS) / 2, fisher="empirical")
    shares: list[Loss] = [
        lambda z: z.square().sum(),
        lambda z: F.cross_entropy(z, LABELS) - z.square().sum(),
    ]
    assert several(*shares) == ""


def test_a_misfit_whose_gradient_is_thrown_away_is_not_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, C))
    optimizer = kfactk.build(curvature="kfac").bind(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = model(torch.randn(N, 7))
        logits.square().sum().backward(retain_graph=True)
        optimizer.zero_grad()
        F.cross_entropy(logits, LABELS).backward()
        optimizer.step()


TEMPERED: dict[str, Loss] = {
    "cross entropy": lambda z: F.cross_entropy(z / 2, LABELS),
    "weighted": lambda z: F.cross_entropy(z / 2, LABELS, torch.rand(C)),
    "policy gradient": lambda z: -((z / 2).log_softmax(1)[range(N), LABELS] * TARGETS[:, 0]).mean(),
}


@pytest.mark.parametrize("name", TEMPERED)
def test_a_temperature_in_the_loss_is_told_with_its_value(name: str):
    told = said(TEMPERED[name])
    assert told.count("output=lambda logits: logits / 2)") == 1
    remedy: dict[str, Any] = {"output": lambda logits: logits / 2}
    assert said(TEMPERED[name], **remedy) == ""
    assert "temperature" not in said(TEMPERED[name], fisher="empirical")


@pytest.mark.parametrize("name", OF_CLASSIFICATION)
def test_losses_without_a_temperature_have_none(name: str):
    for dtype in (torch.float32, torch.bfloat16):
        for size in (0.1, 1.0, 5.0):
            torch.manual_seed(1)
            z = (size * torch.randn(N, C)).to(dtype).requires_grad_()
            OF_CLASSIFICATION[name](z.float()).backward()
            assert temperature(z.detach(), z.grad) is None


def test_bonuses_and_mixtures_have_no_temperature():
    losses: dict[str, Loss] = {
        "entropy": lambda z: -0.3 * (-z.softmax(1) * z.log_softmax(1)).sum(1).mean(),
        "softer": lambda z: F.cross_entropy(z / 3, LABELS),
        "soft": lambda z: F.kl_div(
            (z / 4).log_softmax(1), TARGETS.softmax(1), reduction="batchmean"
        ),
        "size": lambda z: 0.01 * z.square().mean(),
    }
    for name, loss in losses.items():
        for size in (0.1, 0.5, 2.0):
            torch.manual_seed(1)
            z = (size * torch.randn(N, C)).requires_grad_()
            (F.cross_entropy(z, LABELS) + loss(z)).backward()
            assert temperature(z.detach(), z.grad) is None, name


def test_the_curvature_of_the_remedy_is_that_of_the_loss():
    """Exact: G of the last layer is the mean Hessian of the loss at the logits."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(7, C)).double(), torch.randn(N, 7).double()
    recipe = kfactk.build(
        curvature="kfac", fisher="exact", output=lambda z: z / 2, lr=0.0, basis="kfac"
    )
    optimizer = recipe.bind(model)
    logits = model(x)
    F.cross_entropy(logits / 2, LABELS).backward()
    optimizer.step()
    hessian = torch.autograd.functional.hessian(
        lambda z: F.cross_entropy(z / 2, LABELS, reduction="sum"), logits.detach()
    )
    truth = sum(hessian[n, :, n] for n in range(N)) / N
    torch.testing.assert_close(optimizer.layers["0"].factors["G"], truth)


def test_empty_batches_and_lost_ones_leave_the_check_to_the_next(recwarn):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, C))
    optimizer = kfactk.build(curvature="kfac", factor_every=1, scale_every=1).bind(model)
    for examples, factor in ((0, 1.0), (N, float("nan")), (N, 0.0)):
        optimizer.zero_grad()
        (factor * model(torch.randn(examples, 7)).square().sum()).backward()
        optimizer.step()
    assert not [each for each in recwarn if "sum to zero" in str(each.message)]
    optimizer.zero_grad()
    loss = model(torch.randn(N, 7)).square().mean()
    loss.backward()
    with pytest.warns(kfactk.KfactkWarning, match="does not sum to zero"):
        optimizer.step()


class Saved:
    """What the graph keeps of a forward, in place of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_nothing_keeps_the_graph_of_a_forward():
    model = nn.Sequential(nn.Linear(7, C))
    optimizer, kept = kfactk.build(curvature="kfac").bind(model), []

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        kept.append(weakref.ref(saved))
        return saved

    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            logits = model(torch.randn(N, 7))
        assert kept[0]() is not None
        del logits
        assert kept[0]() is None
    finally:
        gc.enable()
    optimizer.close()


class Plain:
    """A likelihood with the members that every one has."""

    def __init__(self) -> None:
        whole = kfactk.build().likelihood
        self.view, self.term_weights = whole.view, whole.term_weights
        self.sample, self.nll, self.root = whole.sample, whole.nll, whole.root


def test_likelihoods_without_the_check_are_not_asked():
    assert said(OTHERS["squared error"], likelihood=Plain()) == ""


class Rebuilds(nn.Sequential):
    """Returns its inputs, as an autoencoder does, beside labels that it does not read."""

    def __init__(self, columns: int) -> None:
        super().__init__(nn.Linear(columns, 8), nn.Tanh(), nn.Linear(8, columns))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        found: Tensor = super().forward(x)
        return found


HALF_SUM: Loss = lambda error: 0.5 * error.square().sum(-1).mean()  # noqa: E731
MEAN: Loss = lambda error: error.square().mean()  # noqa: E731


def told_of_errors(
    loss: Loss,
    *,
    columns: int = 6,
    shape: tuple[int, ...] = (N,),
    given: str = "inputs",
    steps: int = 2,
    seed: int = 0,
    **options: Any,
) -> list[str]:
    """What steps with a loss of the error warn of; `given` says where the targets are."""
    torch.manual_seed(seed)
    model = Rebuilds(columns)
    likelihood = {"name": "gaussian", **options.pop("likelihood", {})}
    if len(shape) > 1 and "divisor" not in likelihood:
        likelihood["class_axis"] = -1
    settings = {"curvature": "kfac", "fisher": "empirical", "factor_every": 1, "scale_every": 1}
    recipe = kfactk.build(**{**settings, "likelihood": likelihood, "lr": 1e-2, **options})
    optimizer = recipe.bind(model)
    x, y = torch.randn(*shape, columns), torch.randn(*shape, columns)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            if given == "nowhere":
                x, y = torch.randn_like(x), torch.randn_like(y)
            optimizer.zero_grad()
            output = model(x, y) if given == "labels" else model(x)
            loss(output - (x if given == "inputs" else y)).backward()
            optimizer.step()
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("given", ["inputs", "labels", "the same batch"])
@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(N,), (N, T)])
def test_a_mean_of_squares_over_entries_is_told_with_the_line_to_paste(
    shape: tuple[int, ...], factor: float, given: str
):
    def loss(error: Tensor) -> Tensor:
        return factor * MEAN(error)

    [told] = told_of_errors(loss, shape=shape, given=given, steps=6)
    assert "is that of F.mse_loss" not in told
    assert "as that of F.mse_loss, and not over terms of 6 entries each" in told
    assert "likelihood={'name': 'gaussian', 'divisor': 'entries'}" in told
    pasted = {"likelihood": {"divisor": "entries"}}
    assert told_of_errors(loss, shape=shape, given=given, steps=6, **pasted) == []


def test_a_mean_of_squares_is_told_where_its_targets_are_named():
    """NaN marks terms without a label, which the loss leaves out."""

    def loss(error: Tensor) -> Tensor:
        return error[: N // 2].square().mean()

    model = Rebuilds(6)
    x, y = torch.randn(N, 6), torch.randn(N, 6)
    y[N // 2 :] = torch.nan
    likelihood = {"name": "gaussian", "targets": "labels"}
    optimizer = kfactk.build(curvature="kfac", fisher="empirical", likelihood=likelihood).bind(
        model
    )
    loss(model(x, labels=y) - y).backward()
    with pytest.warns(kfactk.KfactkWarning, match="'entries', 'targets': 'labels'"):
        optimizer.step()


def test_the_curvature_of_the_line_to_paste_is_that_many_times_as_large():
    found = []
    for divisor in ("terms", "entries"):
        torch.manual_seed(0)
        model, x = Rebuilds(6), torch.randn(N, 6)
        likelihood = {"name": "gaussian", "divisor": divisor}
        settings: dict[str, Any] = {"likelihood": likelihood, "fisher": "empirical", "lr": 0.0}
        optimizer = kfactk.build(curvature="kfac", basis="kfac", **settings).bind(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", kfactk.KfactkWarning)
            MEAN(model(x) - x).backward()
            optimizer.step()
        found.append(optimizer.layers["2"].factors["G"])
    torch.testing.assert_close(found[1], 6 * found[0])


RIGHT: dict[str, Loss] = {
    "half the sum": HALF_SUM,
    "the sum": lambda error: error.square().sum(-1).mean(),
    "known noise": lambda error: error.square().sum(-1).mean() / (2 * 0.3),
    "large units": lambda error: error.square().sum(-1).mean() / 1e8,
    "weights of examples": lambda error: (
        (torch.arange(N).view(-1, *[1] * (error.ndim - 1)) / N * error.square()).sum(-1).mean()
    ),
    "weights of columns": lambda error: (torch.arange(1, 7) / 6 * error.square()).sum(-1).mean(),
    "a mask": lambda error: (
        (error.square().sum(-1) * (torch.arange(N) % 2 == 0)[:N]).sum() / N
        if error.ndim == 2
        else HALF_SUM(error)
    ),
    "a penalty": lambda error: HALF_SUM(error) + 0.1 * error.abs().mean(),
    "Huber's": lambda error: (
        F.huber_loss(error, torch.zeros_like(error), reduction="none").sum(-1).mean()
    ),
    "absolute": lambda error: error.abs().mean(),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("seed", range(5))
def test_squares_that_are_summed_are_silent(name: str, seed: int):
    """Each with targets that are seen, that come again, and that nothing tells."""
    given = ["inputs", "labels", "the same batch", "nowhere", "inputs"][seed]
    shape = (N, T) if seed % 2 else (N,)
    assert told_of_errors(RIGHT[name], shape=shape, given=given, seed=seed, steps=6) == []


@pytest.mark.parametrize("columns", [1, 2])
def test_of_up_to_two_numbers_half_the_sum_is_as_well_their_mean(columns: int):
    assert told_of_errors(MEAN, columns=columns) == []
    assert told_of_errors(HALF_SUM, columns=columns) == []


def test_squares_are_silent_where_their_size_tells_nothing():
    assert told_of_errors(MEAN, given="nowhere", steps=6) == []
    assert told_of_errors(MEAN, fisher="exact") == []
    assert told_of_errors(MEAN, shape=(1,)) == []
