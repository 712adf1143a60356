"""Train a small causal transformer, written in plain torch, on characters."""

import torch
from torch import nn
from torch.nn import functional as F

import kfactk

TEXT = "the quick brown fox jumps over the lazy dog, and the lazy dog sleeps. " * 20
LETTERS = sorted(set(TEXT))
CONTEXT, WIDTH, HEADS = 32, 32, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.tokens = nn.Embedding(len(LETTERS), WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(LETTERS))

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1]).expand_as(tokens)  # one row for each example
        x = self.tokens(tokens) + self.positions(places)
        return self.head(self.norm(self.blocks(x)))


def main():
    torch.manual_seed(0)
    data = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    model = Transformer()
    recipe = kfactk.build(
        curvature="all",  # linear layers, embeddings and normalization layers
        likelihood={"name": "categorical", "class_axis": -1},
        update="adamw",
        lr=0.01,
        damping=0.003,
        basis_every=kfactk.early,
    )
    print(recipe.coverage(model))
    optimizer = recipe.bind(model)

    for step in range(100):
        start = torch.randint(len(data) - CONTEXT - 1, (16, 1))
        window = data[start + torch.arange(CONTEXT + 1)]
        tokens, targets = window[:, :-1], window[:, 1:]
        logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 33 == 0:
            print(f"step {step}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
