"""BatchNorm over processes is torch's BatchNorm over the whole batch, backwards too."""

import pytest
import torch
from torch import Tensor, nn

from experiments import norm
from kfactk.testing._support.ranks import shared_workers

pytestmark = pytest.mark.xdist_group("ranks")


def model() -> nn.Module:
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
    net = model()
    norm.share_batch_norms(net)
    return learnt(net, images().chunk(ranks)[rank].clone())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_statistics_are_of_the_whole_batch(ranks: int):
    truth = learnt(model(), images())
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
