"""TD3 with a consistency actor in one file: learn online, save a cpql policy, score it.

    python examples/td3_actor.py --folder runs/td3-pendulum
    python scripts/evaluate.py checkpoint=runs/td3-pendulum      # again, with all metrics

Of cpql it takes the actor, the critic and, when it has learnt, the policy: the algorithm is all here. It is
TD3 (Fujimoto et al. 2018, Algorithm 1) but for two things. The actor follows the critic's gradient through
its sampling steps; and where TD3 adds noise to actions, in acting and in the critic's target, the actor
brings noise of its own.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

from cpql import ActorConfig, ConsistencyActor, Policy, TwinCritic
from cpql.deploy.policy import PolicyConfig
from cpql.io import versions
from cpql.tasks import Task
from cpql.training.evaluation import evaluate

HIDDEN = (128, 128)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--env", default="Pendulum-v1", help="Gymnasium's id, continuous actions (default: %(default)s)")
    add("--steps", type=int, default=10_000, help="of the environment (default: %(default)s)")
    add("--warm-up", type=int, default=1_000, help="of them with random actions (default: %(default)s)")
    add("--batch-size", type=int, default=128, help="default: %(default)s")
    add("--discount", type=float, default=0.98, help="default: %(default)s")
    add("--reward-scale", type=float, default=0.1, help="rewards times this (default: %(default)s)")
    add("--rate", type=float, default=1e-3, help="Adam's, of actor and critic (default: %(default)s)")
    add("--target-rate", type=float, default=0.01, help="of the target critic (default: %(default)s)")
    add(
        "--actor-period",
        type=int,
        default=2,
        help="critic steps for each of the actor (default: %(default)s)",
    )
    add(
        "--refinements", type=float, nargs="*", default=[], help="noise levels of later steps (default: none)"
    )
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--episodes", type=int, default=20, help="of the evaluation (default: %(default)s)")
    add("--folder", type=Path, help="where to save the policy; nothing is saved where it isn't given")
    return parser.parse_args(argv)


def train(o: argparse.Namespace) -> tuple[Policy, list[float]]:
    """Train as the options say; returns the policy, and the return of every episode on the way."""
    torch.manual_seed(o.seed)
    random = np.random.default_rng(o.seed)
    environment = gym.make(o.env)
    space = environment.action_space
    assert isinstance(space, gym.spaces.Box) and environment.observation_space.shape is not None
    (states,), (actions,) = environment.observation_space.shape, space.shape
    actor = ConsistencyActor(
        states, actions, ActorConfig(t_max=5.0, refinements=tuple(o.refinements), hidden=(64, 64))
    )
    critic = TwinCritic(states, actions, HIDDEN)
    target = copy.deepcopy(critic)
    actor_optimiser = torch.optim.Adam(actor.parameters(), o.rate)
    critic_optimiser = torch.optim.Adam(critic.parameters(), o.rate)

    widths = [states, actions, 1, 1, states]  # state, action, reward, whether the task goes on, next state
    rows = np.zeros((o.steps, sum(widths)), np.float32)
    returns, total = [], 0.0
    state, _ = environment.reset(seed=o.seed)
    for step in range(o.steps):
        if step < o.warm_up:
            action = random.uniform(-1, 1, actions).astype(np.float32)
        else:
            with torch.no_grad():
                action = actor(torch.as_tensor(state, dtype=torch.float32)).numpy()
        scaled = space.low + (action + 1) / 2 * (space.high - space.low)
        following, reward, terminated, truncated, _ = environment.step(scaled)
        rows[step] = np.concatenate(
            [state, action, [o.reward_scale * float(reward), not terminated], following]
        )
        state, total = following, total + float(reward)
        if terminated or truncated:
            returns.append(total)
            state, total = environment.reset()[0], 0.0
        if step < o.warm_up:
            continue

        batch = torch.from_numpy(rows[random.integers(step + 1, size=o.batch_size)])
        s, a, r, goes_on, s_next = torch.split(batch, widths, -1)
        with torch.no_grad():
            y = (r + o.discount * goes_on * target(s_next, actor(s_next)).amin(0).unsqueeze(-1)).squeeze(-1)
        critic_loss = (critic(s, a) - y).square().mean(-1).sum()
        critic_optimiser.zero_grad()
        critic_loss.backward()
        critic_optimiser.step()

        if step % o.actor_period == 0:
            actor_loss = -critic(s, actor(s))[0].mean()
            actor_optimiser.zero_grad()
            actor_loss.backward()
            actor_optimiser.step()
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
                slow.lerp_(fast, o.target_rate)
    environment.close()

    config = PolicyConfig(
        states,
        actions,
        tuple(space.low.tolist()),
        tuple(space.high.tolist()),
        actor.config,
        HIDDEN,
        critic_layer_norm=False,
        candidates=1,
        temperature=1.0,
        task=Task(o.env, o.env),
        origin={"agent": "td3_actor", "step": o.steps, "seed": o.seed, "versions": versions()},
    )
    return Policy(actor, target, config), returns


def main(argv: list[str] | None = None) -> Policy:
    """Train, say how it went, save and score."""
    o = arguments(argv)
    if o.folder is not None and o.folder.exists():
        raise SystemExit(f"{o.folder} is there already: name another folder")
    torch.set_num_threads(1)
    policy, returns = train(o)
    for i in range(0, len(returns), 10):
        part = returns[i : i + 10]
        print(f"episodes {i + 1} to {i + len(part)}: mean return {np.mean(part):.0f}")
    result = evaluate(policy, policy.config.task, o.episodes, seed=1000)
    print(f"return {result.mean:.0f} ± {result.std:.0f} over {o.episodes} episodes of {o.env}, {result.rule}")
    if o.folder is not None:
        policy.save(o.folder)
        print(f"saved in {o.folder}")
    return policy


if __name__ == "__main__":
    main()
