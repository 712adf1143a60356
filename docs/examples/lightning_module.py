"""kfactk in Lightning: automatic optimization, a scheduler, and a run resumed from a checkpoint."""

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import kfactk


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
        )

    def training_step(self, batch, index):
        x, y = batch
        loss = F.cross_entropy(self.network(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        x, y = batch
        self.log("accuracy", (self.network(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        options = {"lr": 0.05, "damping": 0.03, "basis_every": 20}
        recipe = kfactk.build(curvature="kfac", basis="ekfac", update="momentum", **options)
        optimizer = recipe.bind(self.network)  # the model that training_step calls, not self
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def trainer(epochs):
    saved = ModelCheckpoint(dirpath="checkpoints", filename="{epoch}", save_top_k=-1)
    return lightning.Trainer(
        max_epochs=epochs,
        callbacks=[saved],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
    )


def main():
    lightning.seed_everything(0)
    points = torch.rand(1280, 2) * 2 - 1
    labels = (points.prod(1) > 0).long()  # opposite quadrants: no line separates the classes
    training = DataLoader(TensorDataset(points[:1024], labels[:1024]), batch_size=64)
    validation = DataLoader(TensorDataset(points[1024:], labels[1024:]), batch_size=256)

    first = trainer(epochs=4)
    first.fit(Classifier(), training, validation)
    print(f"accuracy {first.callback_metrics['accuracy']:.3f}")

    resumed = trainer(epochs=4)
    resumed.fit(Classifier(), training, validation, ckpt_path="checkpoints/epoch=1.ckpt")
    print(f"accuracy {resumed.callback_metrics['accuracy']:.3f}, resumed after two epochs")


if __name__ == "__main__":
    main()
