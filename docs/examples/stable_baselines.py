"""Train the A2C agent of Stable-Baselines3 by ACKTR."""

from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import kfactk

LONGEST_STEP = 0.25


def main():
    games = make_vec_env("CartPole-v1", n_envs=16, seed=0)
    agent = A2C(
        "MlpPolicy",
        games,
        learning_rate=LONGEST_STEP,  # the agent sets it before each step
        n_steps=8,
        gae_lambda=0.95,
        vf_coef=0.5,
        max_grad_norm=float("inf"),  # the trust region bounds the step
        seed=0,
        device="cpu",
    )
    policy = agent.policy
    recipe = kfactk.build(
        curvature="kfac",
        basis="kfac",
        likelihood=[
            # evaluate_actions returns values, log-probabilities and entropies, and no logits
            kfactk.head(lambda _: policy.action_dist.distribution.logits, "categorical"),
            kfactk.head("0", "gaussian", weight=2 * agent.vf_coef),
        ],
        clip={"name": "trust_region", "radius": 0.01},
        update="sgd",
        lr=LONGEST_STEP,
        damping=0.01,
        factor_every=1,
        basis_every=10,
    )
    policy.optimizer = recipe.bind(policy, entry="evaluate_actions")
    for _ in range(3):
        agent.learn(4000, reset_num_timesteps=False)
        mean, _ = evaluate_policy(agent, games, n_eval_episodes=20)
        print(f"after {agent.num_timesteps} steps: return {mean:.1f}")


if __name__ == "__main__":
    main()
