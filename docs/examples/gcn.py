"""Train a graph convolutional network: the communities of a graph, few nodes with labels."""

import torch
from torch import nn
from torch.nn import functional as F

import kfactk

NODES, COMMUNITIES = 240, 4


def graph():
    """Return features, the normalized adjacency matrix, and the community of each node."""
    labels = torch.arange(NODES) % COMMUNITIES
    same = labels[:, None] == labels
    edges = (torch.rand(NODES, NODES) < torch.where(same, 0.1, 0.02)).triu(1)
    adjacency = (edges | edges.T).float() + torch.eye(NODES)
    root = adjacency.sum(1).rsqrt()
    features = F.one_hot(labels, COMMUNITIES) + 1.5 * torch.randn(NODES, COMMUNITIES)
    return features, root[:, None] * adjacency * root, labels


class GCN(nn.Module):
    def __init__(self, hidden=32):
        super().__init__()
        self.first, self.second = nn.Linear(COMMUNITIES, hidden), nn.Linear(hidden, COMMUNITIES)

    def forward(self, features, adjacency, train_mask):
        """Return logits of every node; kfactk reads the mask."""
        hidden = (adjacency @ self.first(features)).relu()
        return adjacency @ self.second(hidden)


def main():
    torch.manual_seed(0)
    features, adjacency, labels = graph()
    train_mask = torch.arange(NODES) % 5 == 0
    model = GCN()
    recipe = kfactk.build(
        curvature="kfac",
        fisher="exact",
        likelihood={"name": "categorical", "weights": "train_mask"},
        update={"name": "adamw", "betas": (0.9, 0.99)},
        lr=0.01,
        weight_decay=0.01,
        damping=0.01,
    )
    optimizer = recipe.bind(model)

    for epoch in range(60):
        model.train()
        logits = model(features, adjacency, train_mask)
        loss = F.cross_entropy(logits[train_mask], labels[train_mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch % 20 == 0 or epoch == 59:
            right = (logits.argmax(1) == labels)[~train_mask].float().mean()
            print(f"epoch {epoch}: loss {loss:.3f}, accuracy of other nodes {right:.2f}")


if __name__ == "__main__":
    main()
