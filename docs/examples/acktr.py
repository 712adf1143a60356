"""Train an advantage actor-critic (A2C) by ACKTR, Adam or RMSprop on tasks of Gymnasium.

python acktr.py --task cartpole --optimizer acktr --seeds 0 1 2 --json acktr.json
"""

import argparse
import json

import gymnasium as gym
import numpy as np
import torch
from torch import nn

import kfactk

ENVIRONMENTS, ROLLOUT, VALUE, GAE = 16, 8, 0.5, 0.95
TASKS = {  # name, scale of rewards, discount, weight of the entropy
    "cartpole": ("CartPole-v1", 0.05, 0.99, 0.01),
    "pendulum": ("Pendulum-v1", 0.05, 0.9, 0.0),
}
RATES = {"acktr": 0.25, "adam": 0.003, "rmsprop": 0.003}


class ActorCritic(nn.Module):
    """A trunk, a policy (logits, or mean and logarithm of the variance) and a value."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.policy, self.value = nn.Linear(64, outputs), nn.Linear(64, 1)
        nn.init.orthogonal_(self.policy.weight, 0.01)

    def forward(self, states):
        hidden = self.trunk(states)
        return {"policy": self.policy(hidden), "value": self.value(hidden)}


def distribution(output, continuous):
    if not continuous:
        return torch.distributions.Categorical(logits=output["policy"])
    mean, log_variance = output["policy"].chunk(2, -1)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    return torch.distributions.Independent(normal, 1)


def make_optimizer(model, name, lr, radius, continuous):
    if name != "acktr":
        rule = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[name]
        return rule(model.parameters(), lr=lr, eps=1e-5)
    recipe = kfactk.build(
        curvature="kfac",
        basis="kfac",
        likelihood=[  # F is that of policy and value together
            kfactk.head("policy", "heteroscedastic" if continuous else "categorical"),
            kfactk.head("value", "gaussian", weight=VALUE),
        ],
        clip={"name": "trust_region", "radius": radius},
        update="sgd",
        lr=lr,  # the longest step, eta_max
        damping=0.01,
        factor_every=1,
        basis_every=10,
    )
    return recipe.bind(model)


class Rollout:
    """Acts in several environments at once, and keeps what A2C learns from."""

    def __init__(self, task, seed):
        name, self.scale, self.gamma, _ = TASKS[task]
        restart = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        self.games = gym.make_vec(
            name, ENVIRONMENTS, vectorization_mode="sync", vector_kwargs=restart
        )
        self.observed, _ = self.games.reset(seed=seed)
        self.running, self.returns = np.zeros(ENVIRONMENTS), []
        space = self.games.single_action_space
        self.continuous = isinstance(space, gym.spaces.Box)
        self.bound = space.high if self.continuous else None
        self.inputs = self.games.single_observation_space.shape[0]
        self.outputs = 2 * space.shape[0] if self.continuous else int(space.n)

    @torch.no_grad()  # what the policy does to act does not count
    def collect(self, model):
        kept = []
        for _ in range(ROLLOUT):
            states = torch.as_tensor(self.observed, dtype=torch.float32)
            output = model(states)
            action = distribution(output, self.continuous).sample()
            given = action.numpy()
            if self.continuous:
                given = np.clip(given, -1, 1) * self.bound
            self.observed, reward, ended, stopped, more = self.games.step(given)
            self.running += reward
            reward = torch.as_tensor(reward * self.scale, dtype=torch.float32)
            for k in np.flatnonzero(ended | stopped):
                self.returns.append(self.running[k])
                self.running[k] = 0.0
                if stopped[k] and not ended[k]:  # the game would have gone on
                    last = torch.as_tensor(more["final_obs"][k], dtype=torch.float32)
                    reward[k] += self.gamma * model(last[None])["value"].item()
            done = torch.as_tensor(ended | stopped, dtype=torch.float32)
            kept.append((states, action, reward, done, output["value"].squeeze(-1)))
        states, actions, rewards, ends, values = map(torch.stack, zip(*kept, strict=True))
        following = model(torch.as_tensor(self.observed, dtype=torch.float32))["value"].squeeze(-1)
        advantages, ahead = torch.zeros_like(values), torch.zeros(ENVIRONMENTS)
        for t in reversed(range(ROLLOUT)):  # generalized advantage estimation
            goes_on = self.gamma * (1 - ends[t])
            ahead = rewards[t] + goes_on * following - values[t] + GAE * goes_on * ahead
            advantages[t], following = ahead, values[t]
        targets = (advantages + values).flatten()
        return states.flatten(0, 1), actions.flatten(0, 1), advantages.flatten(), targets


def train(task, name, lr, radius, seed, steps):
    """Return the steps in the environments, and the mean return of the episodes until then."""
    torch.manual_seed(seed)
    rollout = Rollout(task, seed)
    model = ActorCritic(rollout.inputs, rollout.outputs)
    optimizer = make_optimizer(model, name, lr, radius, rollout.continuous)
    updates, curve = steps // (ENVIRONMENTS * ROLLOUT), []
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - update / updates)
        states, actions, advantages, targets = rollout.collect(model)
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        output = model(states)  # the forward that counts: a row is a state
        policy = distribution(output, rollout.continuous)
        loss = -(policy.log_prob(actions) * advantages).mean()
        loss = loss + VALUE * (output["value"].squeeze(-1) - targets).square().mean() / 2
        loss = loss - TASKS[task][3] * policy.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        if name != "acktr":
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if (update + 1) % max(1, updates // 20) == 0 and rollout.returns:
            at = (update + 1) * ENVIRONMENTS * ROLLOUT
            curve.append((at, float(np.mean(rollout.returns[-50:]))))
    rollout.games.close()
    return curve


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=TASKS, default="cartpole")
    parser.add_argument("--optimizer", choices=RATES, default="acktr")
    parser.add_argument("--lr", type=float, help="its own if not given")
    parser.add_argument("--radius", type=float, default=0.01, help="of the trust region, in nats")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=40_000, help="in all environments together")
    parser.add_argument("--json", help="file to write the curves to")
    given = parser.parse_args()
    lr = RATES[given.optimizer] if given.lr is None else given.lr
    runs = []
    for seed in given.seeds:
        curve = train(given.task, given.optimizer, lr, given.radius, seed, given.steps)
        runs.append({"seed": seed, "curve": curve})
        for at, mean in curve[:: max(1, len(curve) // 5)] + curve[-1:]:
            print(f"{given.optimizer}, seed {seed}, {at} steps: return {mean:.1f}")
    if given.json:
        with open(given.json, "w") as file:
            json.dump({**vars(given), "lr": lr, "runs": runs}, file)


if __name__ == "__main__":
    main()
