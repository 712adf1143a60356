"""Train a one-stage detector: classes in each cell of a grid, and boxes where an object is."""

import torch
from torch import nn
from torch.nn import functional as F

import kfactk

GRID, CELL, CLASSES = 4, 6, 3  # the last class is background


def scenes(size):
    """Return images with one bright or dark box each, the class of each cell, and the boxes."""
    pixels = GRID * CELL
    centers, halves = 4 + 16 * torch.rand(size, 2), 2 + 2 * torch.rand(size, 2)
    kinds = torch.randint(2, (size,))
    place = torch.arange(pixels) + 0.5
    inside = (place - centers[:, :, None]).abs() < halves[:, :, None]
    images = (inside[:, 0, :, None] & inside[:, 1, None, :]) * (2.0 * kinds - 1)[:, None, None]
    images = images[:, None] + 0.1 * torch.randn(size, 1, pixels, pixels)
    classes = torch.full((size, GRID, GRID), CLASSES - 1)
    row, column = (centers / CELL).long().unbind(1)
    classes[torch.arange(size), row, column] = kinds
    boxes = torch.cat([centers / CELL - torch.stack([row, column], 1), halves / CELL], 1)
    return images, classes, boxes


class Detector(nn.Module):
    def __init__(self, channels=16):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
        )
        self.classes, self.boxes = nn.Conv2d(channels, CLASSES, 1), nn.Conv2d(channels, 4, 1)

    def forward(self, images):
        features = self.backbone(images)
        return {"logits": self.classes(features), "boxes": self.boxes(features)}


def main():
    torch.manual_seed(0)
    model = Detector()
    recipe = kfactk.build(
        curvature="conv_kfac",
        likelihood={"name": "categorical", "class_axis": 1},  # logits are [N, classes, row, column]
        exclude=["boxes"],
        update="adam",
        lr=0.003,
        damping=0.01,
    )
    optimizer = recipe.bind(model)

    for step in range(120):
        images, classes, boxes = scenes(32)
        out = model(images)
        found = out["boxes"].movedim(1, -1)[classes < CLASSES - 1]
        class_loss = F.cross_entropy(out["logits"], classes)
        box_loss = F.smooth_l1_loss(found, boxes)
        optimizer.zero_grad()
        (class_loss + box_loss).backward()
        optimizer.step()
        if step % 40 == 0 or step == 119:
            print(f"step {step}: classes {class_loss:.3f}, boxes {box_loss:.4f}")


if __name__ == "__main__":
    main()
