"""Actors and critics: shared trunks, rollouts, two optimizers, target networks.

Truth is EKFAC written again, fed with the examples that each step learns from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.situations.by_hand import (
    LR,
    Hand,
    assert_same,
    bound,
    categorical,
    draw,
    gaussian,
    sgd,
    take,
)

STEPS, STATES = 3, 7


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.policy, self.value = nn.Linear(6, 3), nn.Linear(6, 1)
        self.double()

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(states)
        return self.policy(hidden), self.value(hidden).squeeze(-1)


class Rollout:
    """States, and for each the action taken, its probability then, and the return."""

    def __init__(self, model: nn.Module, step: int) -> None:
        self.states, self.returns = draw(STATES, 4, seed=step), draw(STATES, seed=step + 100)
        logits, values = [], []
        with torch.no_grad():
            for state in self.states:  # as an environment does: one state at a time
                policy, value = model(state[None])
                logits.append(policy)
                values.append(value)
        self.actions = (torch.arange(STATES) + step) % 3
        self.old = torch.cat(logits).log_softmax(-1)[range(STATES), self.actions]
        self.advantages = self.returns - torch.cat(values)


def losses(model: nn.Module, rollout: Rollout, which: slice | list[int]) -> Tensor:
    """Return PPO's loss of some states, with the value's and the entropy's."""
    logits, values = model(rollout.states[which])
    log_p = logits.log_softmax(-1)
    ratio = (log_p.gather(-1, rollout.actions[which, None]).squeeze(-1) - rollout.old[which]).exp()
    gain = rollout.advantages[which]
    policy = -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return policy + 0.5 * (values - rollout.returns[which]).square() - 0.01 * entropy


def least_likely(output: Tensor) -> Tensor:
    """Take the place of random targets of `mc`."""
    return output.argmin(-1)


def exact(model: nn.Module, rollout: Rollout, n: int) -> list[Tensor]:
    return categorical(model(rollout.states[[n]])[0])


def drawn(model: nn.Module, rollout: Rollout, n: int) -> list[Tensor]:
    logits = model(rollout.states[[n]])[0]
    return [F.cross_entropy(logits, least_likely(logits))]


def of_the_loss(model: nn.Module, rollout: Rollout, n: int) -> list[Tensor]:
    return [losses(model, rollout, [n]).sum()]


Examples = Callable[[nn.Module, Rollout, int], list[Tensor]]
FISHERS = pytest.mark.parametrize(
    ("options", "examples", "layers"),
    [
        ({"fisher": "exact", "exclude": ["value"]}, exact, ["trunk.0", "policy"]),
        (
            {"fisher": {"name": "mc", "draw": least_likely}, "exclude": ["value"]},
            drawn,
            ["trunk.0", "policy"],
        ),
        ({"fisher": "empirical"}, of_the_loss, ["trunk.0", "policy", "value"]),
    ],
    ids=["exact", "mc", "empirical"],
)


@FISHERS
def test_epochs_on_one_rollout(
    options: dict[str, Any], examples: Examples, layers: list[str]
) -> None:
    """As PPO: a rollout without gradients, then steps on halves, each with a look at the policy."""
    model = ActorCritic()
    twin = copy.deepcopy(model)
    optimizer, rule = bound(model, **options), sgd(twin)
    for step in range(STEPS):
        rollout, same = Rollout(model, step), Rollout(twin, step)
        for half in ([0, 2, 4, 6], [1, 3, 5]):
            optimizer.zero_grad()
            loss = losses(model, rollout, half).mean()
            with torch.no_grad():
                model(rollout.states)  # how far the policy has moved
            loss.backward()
            optimizer.step()
            hand = Hand(twin, layers)
            for n in half:
                hand.example(examples, twin, same, n)
            take(rule, hand, losses(twin, same, half).mean())
    assert_same(model, twin)


@FISHERS
def test_an_episode_of_calls_with_one_backward(
    options: dict[str, Any], examples: Examples, layers: list[str]
) -> None:
    """As REINFORCE: each state is a forward of its own, and the episode's sum is the loss."""
    model = ActorCritic()
    twin = copy.deepcopy(model)
    optimizer = bound(model, reduction="sum", lr=LR / STATES, **options)
    rule = sgd(twin, LR / STATES)
    for step in range(STEPS):
        rollout, same = Rollout(model, step), Rollout(twin, step)
        optimizer.zero_grad()
        torch.cat([losses(model, rollout, [n]) for n in range(STATES)]).sum().backward()
        optimizer.step()
        hand = Hand(twin, layers)
        for n in range(STATES):
            hand.example(examples, twin, same, n)
        take(rule, hand, losses(twin, same, slice(None)).sum())
    assert_same(model, twin)


class Actor(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        self.double()


class Critics(nn.Module):
    """Two critics, of which SAC takes the lower."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.one, self.two = (
            nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in range(2)
        )
        self.double()

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        both = torch.cat([states, actions], -1)
        return torch.cat([self.one(both), self.two(both)], -1)


class Agent:
    """What SAC keeps; `noise` is that of its actions."""

    def __init__(self) -> None:
        self.actor, self.critics = Actor(), Critics()
        self.target = copy.deepcopy(self.critics).requires_grad_(False)

    def critic_losses(self, states: Tensor, step: int) -> Tensor:
        actions, rewards = draw(STATES, 2, seed=step + 1), draw(STATES, seed=step + 2)
        with torch.no_grad():
            after = draw(STATES, 4, seed=step + 3)
            wanted = rewards + 0.9 * self.target(after, self.actor(after)).amin(-1)
        return (self.critics(states, actions) - wanted[:, None]).square().sum(-1) / 2

    def actor_losses(self, states: Tensor, step: int) -> Tensor:
        actions = self.actor(states) + 0.1 * draw(STATES, 2, seed=step + 4)
        return 0.2 * actions.square().sum(-1) - self.critics(states, actions).amin(-1)

    def follow(self) -> None:
        """Move the target network a little."""
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.critics.parameters(), strict=True):
                slow.lerp_(fast, 0.1)


def by_hand(agent: Agent) -> None:
    """Train an agent with the curvature of each network's own batches."""
    actor_rule, critic_rule = sgd(agent.actor), sgd(agent.critics)
    for step in range(0, 30, 10):
        states, actions = draw(STATES, 4, seed=step), draw(STATES, 2, seed=step + 1)
        hand = Hand(agent.critics, ["one.0", "one.2", "two.0", "two.2"])
        for state, action in zip(states, actions, strict=True):
            hand.example(lambda s, a: gaussian(agent.critics(s[None], a[None])), state, action)
        take(critic_rule, hand, agent.critic_losses(states, step).mean())
        hand = Hand(agent.actor, ["0", "2"])
        for state in states:
            hand.example(lambda s: gaussian(agent.actor(s[None])), state)
        take(actor_rule, hand, agent.actor_losses(states, step).mean())
        agent.follow()


@pytest.mark.parametrize("way", ["frozen", "left out", "evaluated"])
def test_two_optimizers_and_a_target_network(way: str) -> None:
    """As SAC; the actor's step calls the critics, whose gradients it does not want."""
    agent, twin = Agent(), Agent()
    options = {"likelihood": "gaussian"}
    manual = {"observe": "manual"} if way == "left out" else {}
    actor_optimizer = bound(agent.actor, **options)
    critic_optimizer = bound(agent.critics, **options, **manual)
    for step in range(0, 30, 10):
        states = draw(STATES, 4, seed=step)
        critic_optimizer.zero_grad()
        loss = agent.critic_losses(states, step).mean()
        critic_optimizer.observe()
        loss.backward()
        critic_optimizer.step()
        agent.critics.requires_grad_(way != "frozen")
        agent.critics.train(way != "evaluated")
        actor_optimizer.zero_grad()
        agent.actor_losses(states, step).mean().backward()
        actor_optimizer.step()
        agent.critics.requires_grad_(True).train()
        agent.follow()
    by_hand(twin)
    assert_same(agent.actor, twin.actor)
    assert_same(agent.critics, twin.critics)
    assert_same(agent.target, twin.target)
