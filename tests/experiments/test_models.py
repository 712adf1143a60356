import pytest
import torch

from experiments import models


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "channels", "size"), [("digits_resnet", 1, 8), ("resnet8", 3, 32)]
)
def test_logits_and_initial_weights(name: str, channels: int, size: int):
    model, same, other = (
        models.make(name, channels=channels, classes=10, seed=seed) for seed in (0, 0, 1)
    )
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 10)
    assert torch.equal(model.stem.weight, same.stem.weight)
    assert not torch.equal(model.stem.weight, other.stem.weight)


def test_resnet8_has_the_usual_size():
    convolutions = (
        9 * (3 * 16 + 2 * 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64) + 16 * 32 + 32 * 64
    )
    norms = 2 * (3 * 16 + 3 * 32 + 3 * 64)
    assert (
        count(models.make("resnet8", channels=3, classes=10, seed=0))
        == convolutions + norms + 64 * 10 + 10
    )


def test_resnet50_keeps_the_resolution_of_small_images():
    model = models.make("resnet50", channels=3, classes=10, seed=0)
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
    models.make("digits_resnet", channels=1, classes=10, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
