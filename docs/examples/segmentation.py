"""Label each pixel of an image, with an auxiliary head on shallow features."""

import torch
from torch import nn
from torch.nn import functional as F

import kfactk

SIDE, CLASSES, UNKNOWN = 16, 3, 255  # the last class is background


def scenes(size):
    """Return images with a bright and a dark box each, and the class of each pixel.

    The pixels around an object are not labelled, as in Pascal VOC.
    """
    place, labels = torch.arange(SIDE), torch.full((size, SIDE, SIDE), CLASSES - 1)
    images = 0.3 * torch.randn(size, 1, SIDE, SIDE)
    for kind in range(2):
        centers, halves = torch.randint(2, SIDE - 2, (size, 2)), torch.randint(2, 4, (size, 2))
        far = (place - centers[:, :, None]).abs() - halves[:, :, None]
        far = torch.maximum(far[:, 0, :, None], far[:, 1, None, :])
        images[:, 0][far < 0] = 2.0 * kind - 1 + 0.3 * torch.randn(int((far < 0).sum()))
        labels[far < 0], labels[far == 0] = kind, UNKNOWN
    return images, labels


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


class Segmentation(nn.Module):
    """Returns the classes of pixels under the keys that models of torchvision use."""

    def __init__(self, channels=16):
        super().__init__()
        self.shallow, self.deep = block(1, channels), block(channels, channels)
        self.classifier = nn.Conv2d(channels, CLASSES, 1)
        self.aux_classifier = nn.Conv2d(channels, CLASSES, 1)

    def forward(self, images, labels):  # the labels say which pixels count
        shallow = self.shallow(images)
        coarse = {
            "out": self.classifier(self.deep(shallow)),
            "aux": self.aux_classifier(shallow),
        }
        size = images.shape[-2:]
        return {name: F.interpolate(each, size, mode="bilinear") for name, each in coarse.items()}


def main():
    torch.manual_seed(0)
    model = Segmentation()
    pixels = {
        "name": "categorical",
        "class_axis": 1,  # logits are [N, classes, row, column]
        "targets": "labels",
        "ignore_index": UNKNOWN,
    }
    recipe = kfactk.build(
        curvature="conv_kfac",
        likelihood=[kfactk.head("out", pixels), kfactk.head("aux", pixels, weight=0.4)],
        update="adam",
        lr=0.003,
        damping=0.01,
    )
    optimizer = recipe.bind(model)

    for step in range(120):
        images, labels = scenes(32)
        found = model(images, labels)
        losses = {
            name: F.cross_entropy(each, labels, ignore_index=UNKNOWN)
            for name, each in found.items()
        }
        optimizer.zero_grad()
        (losses["out"] + 0.4 * losses["aux"]).backward()
        optimizer.step()
        if step % 40 == 0 or step == 119:
            print(f"step {step}: out {losses['out']:.3f}, aux {losses['aux']:.3f}")


if __name__ == "__main__":
    main()
