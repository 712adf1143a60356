"""Train a GAN on eight clusters in the plane: one kfactk optimizer for each network."""

import torch
from torch import nn
from torch.nn import functional as F

import kfactk

NOISE = 8


def real(size):
    """Return points around a circle, in eight clusters."""
    angle = torch.randint(8, (size,)) * torch.pi / 4
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(size, 2)


def network(inputs, outputs):
    return nn.Sequential(
        nn.Linear(inputs, 64),
        nn.LeakyReLU(0.2),
        nn.Linear(64, 64),
        nn.LeakyReLU(0.2),
        nn.Linear(64, outputs),
    )


def main():
    torch.manual_seed(0)
    generator, discriminator = network(NOISE, 2), network(2, 1)
    common = {"curvature": "kfac", "lr": 0.001, "damping": 0.01}
    common["update"] = {"name": "adam", "betas": (0.5, 0.999)}
    for_generator = kfactk.build(likelihood="gaussian", **common).bind(generator)
    for_discriminator = kfactk.build(likelihood="bernoulli", **common).bind(discriminator)
    ones, zeros = torch.ones(128, 1), torch.zeros(128, 1)

    for step in range(200):
        # The discriminator learns. The forward of the generator must not count: no_grad.
        with torch.no_grad():
            fake = generator(torch.randn(128, NOISE))
        for_discriminator.zero_grad()
        logits = discriminator(torch.cat([real(128), fake]))
        loss = F.binary_cross_entropy_with_logits(logits, torch.cat([ones, zeros]))
        loss.backward()
        for_discriminator.step()

        # The generator learns. The forward of the discriminator must not count: frozen.
        discriminator.requires_grad_(False)
        for_generator.zero_grad()
        fake = generator(torch.randn(128, NOISE))
        F.binary_cross_entropy_with_logits(discriminator(fake), ones).backward()
        for_generator.step()
        discriminator.requires_grad_(True)

        if step % 100 == 0 or step == 199:
            with torch.no_grad():
                fake, centers = generator(torch.randn(1000, NOISE)), real(1000)
            far = torch.cdist(fake, centers).min(1).values.mean()  # from the nearest real point
            print(f"step {step}: distance {far:.3f}, loss of the discriminator {loss:.3f}")


if __name__ == "__main__":
    main()
