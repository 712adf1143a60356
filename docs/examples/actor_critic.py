"""Train an actor-critic (A2C) with a shared trunk to balance a pole on a cart."""

import torch
from torch import nn
from torch.nn import functional as F

import kfactk


class CartPole:
    """Poles on carts, all at once; one that falls starts again."""

    def __init__(self, number):
        self.state = self.start(number)

    @staticmethod
    def start(number):
        return (torch.rand(number, 4) - 0.5) / 10

    def step(self, action):
        _, speed, angle, turn = self.state.unbind(1)
        force = 20.0 * action - 10.0
        push = (force + 0.05 * turn.square() * angle.sin()) / 1.1
        spin = 9.8 * angle.sin() - angle.cos() * push
        spin = spin / (0.5 * (4 / 3 - 0.1 * angle.cos().square() / 1.1))
        pull = push - 0.05 * spin * angle.cos() / 1.1
        change = torch.stack([speed, pull, turn, spin], 1)
        self.state = self.state + 0.02 * change
        fallen = (self.state[:, 0].abs() > 2.4) | (self.state[:, 2].abs() > 0.21)
        self.state = torch.where(fallen[:, None], self.start(len(fallen)), self.state)
        return self.state, fallen.float()


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.policy, self.value = nn.Linear(64, 2), nn.Linear(64, 1)

    def forward(self, state):
        hidden = self.trunk(state)
        return self.policy(hidden), self.value(hidden).squeeze(-1)


def main():
    torch.manual_seed(0)
    model, game, gamma = ActorCritic(), CartPole(16), 0.99
    recipe = kfactk.build(
        curvature="kfac",
        likelihood=[  # of the first and the second output
            kfactk.head("0", "categorical"),
            kfactk.head("1", "gaussian", weight=0.5),
        ],
        update="adam",
        lr=0.01,
        damping=0.001,
    )
    optimizer = recipe.bind(model)

    state, falls = game.state, 0.0
    for update in range(150):
        states, actions, ends = [], [], []
        with torch.no_grad():  # the rollout does not count
            for _ in range(20):
                action = torch.distributions.Categorical(logits=model(state)[0]).sample()
                states.append(state)
                actions.append(action)
                state, end = game.step(action.float())
                ends.append(end)
            future, returns = model(state)[1], []
            for end in reversed(ends):
                future = (1 - end) * (1 + gamma * future)
                returns.append(future)
        states, actions = torch.cat(states), torch.cat(actions)
        returns = torch.cat(returns[::-1])

        logits, values = model(states)  # the one forward that counts: a row is a state
        advantages = returns - values.detach()
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
        distribution = torch.distributions.Categorical(logits=logits)
        policy_loss = -(distribution.log_prob(actions) * advantages).mean()
        value_loss = F.smooth_l1_loss(values, returns)
        optimizer.zero_grad()
        (policy_loss + 0.5 * value_loss - 0.01 * distribution.entropy().mean()).backward()
        optimizer.step()

        falls += sum(end.sum().item() for end in ends)
        if update % 50 == 49:
            print(f"update {update + 1}: a pole falls once in {50 * 20 * 16 / falls:.1f} steps")
            falls = 0.0


if __name__ == "__main__":
    main()
