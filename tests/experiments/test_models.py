"""The networks; BatchNorm over processes is torch's over the whole batch, backwards too."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments import models
from experiments.errors import ExperimentError
from experiments.settings import Model
from kfactk.testing._support.ranks import shared_workers


def make(name: str, channels: int, seed: int = 0, **options: Any) -> nn.Module:
    settings = Model(name=name, options=options)
    return models.make(settings, channels=channels, classes=10, seed=seed, trusted=False)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "channels", "size"), [("digits_resnet", 1, 8), ("resnet8", 3, 32)]
)
def test_logits_and_initial_weights(name: str, channels: int, size: int):
    model, same, other = (make(name, channels, seed) for seed in (0, 0, 1))
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 10)
    assert torch.equal(model.stem.weight, same.stem.weight)
    assert not torch.equal(model.stem.weight, other.stem.weight)


def test_resnet8_has_the_usual_size():
    convolutions = (
        9 * (3 * 16 + 2 * 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64) + 16 * 32 + 32 * 64
    )
    norms = 2 * (3 * 16 + 3 * 32 + 3 * 64)
    assert count(make("resnet8", 3)) == convolutions + norms + 64 * 10 + 10


@pytest.mark.parametrize(
    ("name", "options"), [("gpt", {"depth": 2, "heads": 2}), ("lstm", {})], ids=["gpt", "lstm"]
)
def test_text_models_see_no_later_token(name: str, options: dict[str, int]):
    model = make(name, 6, width=8, **options)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    changed = tokens.clone()
    changed[0, 4] = 9
    before, after = model(tokens), model(changed)
    assert before.shape == (1, 6, 10)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


def test_autoencoder_is_that_of_its_authors():
    settings = Model(name="autoencoder")
    model = models.make(settings, channels=1, classes=784, seed=0, trusted=False)
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    layers = [each for each in model if isinstance(each, nn.Linear)]
    assert [each.in_features for each in layers] == sizes[:-1]
    assert [each.out_features for each in layers] == sizes[1:]
    kinds = [type(each) for each in model[1:]]
    linear, logistic = nn.Linear, nn.Sigmoid
    half = [linear, logistic] * 3 + [linear]  # the code and the logits are linear
    assert kinds == [*half, *half]
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 784)
    for each in layers:
        assert ((each.weight != 0).sum(1) == 15).all()
        assert 0.9 < each.weight[each.weight != 0].std() < 1.1
        assert not each.bias.any()


def test_autoencoder_of_few_pixels_is_dense():
    model = make("autoencoder", 1, widths=[4])
    assert [tuple(each.weight.shape) for each in model if hasattr(each, "weight")] == [
        (4, 10),
        (10, 4),
    ]
    assert all(each.weight.all() for each in model if hasattr(each, "weight"))


def test_resnet50_keeps_the_resolution_of_small_images():
    model = make("resnet50", 3)
    assert count(model) == 23_520_842  # the usual figure for CIFAR-10
    shapes = {}
    for name in ("conv1", "layer1", "layer2", "layer3", "layer4"):
        model.get_submodule(name).register_forward_hook(
            lambda m, i, out, name=name: shapes.update({name: tuple(out.shape)})
        )
    model.eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert shapes == {
        "conv1": (1, 64, 32, 32),
        "layer1": (1, 256, 32, 32),
        "layer2": (1, 512, 16, 16),
        "layer3": (1, 1024, 8, 8),
        "layer4": (1, 2048, 4, 4),
    }


def test_global_random_state_does_not_change():
    before = torch.get_rng_state()
    make("digits_resnet", 1, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_signal_cnn_has_the_size_of_its_authors():
    assert count(make("signal_cnn", 1)) == 5210  # Greydanus and Kobak (2020)
    assert make("signal_cnn", 1)(torch.zeros(2, 1, 40)).shape == (2, 10)
    assert count(make("signal_cnn", 1, width=5)) < 500


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet5", {}, "there is no 'resnet5'. Did you mean 'resnet50'"),
        ("signal_cnn", {"widht": 3}, "no option 'widht'. Did you mean 'width'?"),
        ("signal_cnn", {"classes": 3}, "no option 'classes'"),
        ("signal_cnn", {"width": "much"}, "model signal_cnn: "),
        ("digits_resnet", {}, "model digits_resnet: "),
        ("my_module:network", {}, "add --trust-config"),
    ],
)
def test_networks_that_cannot_work_are_one_line(name: str, options: dict[str, Any], words: str):
    settings = Model(name=name, options=options)
    with pytest.raises(ExperimentError) as told:
        models.check(settings, torch.zeros(2, 1, 40), classes=10, trusted=False)
    assert words in str(told.value)


def test_outputs_must_be_of_the_classes(tmp_path, monkeypatch):
    text = "import torch\ndef network(channels, classes): return torch.nn.Identity()\n"
    (tmp_path / "wrong_network_of_tests.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = Model(name="wrong_network_of_tests:network")
    models.check(settings, torch.zeros(2, 10), classes=10, trusted=True)
    with pytest.raises(ExperimentError, match=r"shape \(2, 9\), not \(2, 10\)"):
        models.check(settings, torch.zeros(2, 9), classes=10, trusted=True)


def convolutions() -> nn.Module:
    torch.manual_seed(5)
    layers = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)),
    ).double()
    for parameter in layers.parameters():
        nn.init.normal_(parameter)
    return layers


def images() -> Tensor:
    return (
        torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3
    )


def learnt(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients of a sum over examples, buffers, and the output in evaluation."""
    x.requires_grad_()
    for _ in range(2):  # running statistics have a past
        y = net(x)
    y.pow(3).sum().backward()
    found = {"output": y.detach(), "input": x.grad, "evaluated": net.eval()(x).detach()}
    found |= {f"buffer {name}": value.double() for name, value in net.named_buffers()}
    return found | {
        f"gradient {name}": parameter.grad for name, parameter in net.named_parameters()
    }


def part(rank: int, ranks: int) -> dict[str, Tensor]:
    net = convolutions()
    models.share_batch_norms(net)
    return learnt(net, images().chunk(ranks)[rank].clone())


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_statistics_are_of_the_whole_batch(ranks: int):
    truth = learnt(convolutions(), images())
    found = shared_workers().run(ranks, part, ranks)
    for name, value in truth.items():
        parts = [each[name] for each in found]
        if name.startswith("gradient"):
            joined = torch.stack(parts).sum(0)
        elif name.startswith("buffer"):
            joined = parts[-1]
        else:
            joined = torch.cat(parts)
        torch.testing.assert_close(
            joined, value, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
