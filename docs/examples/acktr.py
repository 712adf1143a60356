"""Train an advantage actor-critic (A2C) by ACKTR, Adam and RMSprop on tasks of Gymnasium.

python acktr.py --task cartpole --optimizer acktr adam rmsprop --seeds 0 1 2 --json acktr.json
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
SETTINGS = {  # chosen by trials; of ACKTR, lr is the longest step, eta_max
    "cartpole": {
        "acktr": {"lr": 1.0, "radius": 0.01, "normalize": False},
        "adam": {"lr": 0.01, "normalize": True},
        "rmsprop": {"lr": 0.003, "normalize": False},
    },
    "pendulum": {
        "acktr": {"lr": 0.25, "radius": 0.01, "normalize": False},
        "adam": {"lr": 0.001, "normalize": False},
        "rmsprop": {"lr": 0.003, "normalize": False},
    },
}


class ActorCritic(nn.Module):
    """A trunk, a policy (logits, or means and logarithms of the variances) and a value."""

    def __init__(self, inputs, actions, continuous):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.policy, self.value = nn.Linear(64, actions), nn.Linear(64, 1)
        nn.init.orthogonal_(self.policy.weight, 0.01)
        self.spread = None
        if continuous:  # the same in all states: a layer whose input is 1, so that K-FAC has it
            self.spread = nn.Linear(1, actions, bias=False)
            nn.init.zeros_(self.spread.weight)

    def forward(self, states):
        hidden = self.trunk(states)
        policy = self.policy(hidden)
        if self.spread is not None:
            log_variance = self.spread(torch.ones(len(states), 1))
            policy = torch.cat([policy, log_variance], -1)
        return {"policy": policy, "value": self.value(hidden)}


def distribution(output, continuous):
    if not continuous:
        return torch.distributions.Categorical(logits=output["policy"])
    mean, log_variance = output["policy"].chunk(2, -1)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    return torch.distributions.Independent(normal, 1)


def make_optimizer(model, name, settings):
    if name != "acktr":
        rule = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[name]
        return rule(model.parameters(), lr=settings["lr"], eps=1e-5)
    recipe = kfactk.build(
        curvature="kfac",
        basis="kfac",
        fisher="mc",  # draws actions and values from what the model predicts
        likelihood=[  # F is that of policy and value together
            kfactk.head("policy", "heteroscedastic" if model.spread else "categorical"),
            kfactk.head("value", "gaussian", weight=VALUE),
        ],
        clip={"name": "trust_region", "radius": settings["radius"]},
        update="sgd",
        lr=settings["lr"],
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
        self.actions = space.shape[0] if self.continuous else int(space.n)

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


def train(task, name, settings, seed, steps):
    """Return pairs: steps in all environments, and the mean return of the last 50 episodes."""
    torch.manual_seed(seed)
    rollout = Rollout(task, seed)
    model = ActorCritic(rollout.inputs, rollout.actions, rollout.continuous)
    optimizer = make_optimizer(model, name, settings)
    updates, curve = steps // (ENVIRONMENTS * ROLLOUT), []
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * (1 - update / updates)
        states, actions, advantages, targets = rollout.collect(model)
        if settings["normalize"]:
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
    parser.add_argument("--optimizer", nargs="+", choices=SETTINGS["cartpole"], default=["acktr"])
    parser.add_argument("--lr", type=float, help="its own if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=40_000, help="in all environments together")
    parser.add_argument("--json", help="file to write the curves to")
    given = parser.parse_args()
    runs = []
    for name in given.optimizer:
        settings = SETTINGS[given.task][name]
        if given.lr is not None:
            settings = {**settings, "lr": given.lr}
        for seed in given.seeds:
            curve = train(given.task, name, settings, seed, given.steps)
            runs.append({"optimizer": name, **settings, "seed": seed, "curve": curve})
            for at, mean in curve[:: max(1, len(curve) // 5)] + curve[-1:]:
                print(f"{name}, seed {seed}, {at} steps: return {mean:.1f}")
        last = [run["curve"][-1][1] for run in runs if run["optimizer"] == name]
        print(f"{name}: median {np.median(last):.1f}, from {min(last):.1f} to {max(last):.1f}")
    if given.json:
        with open(given.json, "w") as file:
            json.dump({"task": given.task, "steps": given.steps, "runs": runs}, file)


if __name__ == "__main__":
    main()
