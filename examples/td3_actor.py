"""A bare ConsistencyActor in a hand-written TD3-style loop: nothing of cpql but the actor and the critic.

    python examples/td3_actor.py --steps 20000

Pendulum-v1, online. The actor follows the critic's gradient through its sampling steps; where TD3 smooths
its target with noise, the consistency actor brings noise of its own.
"""

from __future__ import annotations

import argparse
import copy

import gymnasium as gym
import numpy as np
import torch

from cpql import ActorConfig, ConsistencyActor, TwinCritic


def train(steps: int, seed: int = 0, batch_size: int = 128, warm_up: int = 1000) -> list[float]:
    """Train for some environment steps; returns the return of every episode."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    environment = gym.make("Pendulum-v1")
    actor = ConsistencyActor(3, 1, ActorConfig(t_max=5.0, hidden=(64, 64)))
    critic = TwinCritic(3, 1, hidden=(128, 128))
    target = copy.deepcopy(critic)
    actor_optimiser = torch.optim.Adam(actor.parameters(), 1e-3)
    critic_optimiser = torch.optim.Adam(critic.parameters(), 1e-3)

    rows = np.zeros((steps, 3 + 1 + 1 + 3), np.float32)  # state, action, reward, next state
    returns, total = [], 0.0
    state, _ = environment.reset(seed=seed)
    for step in range(steps):
        if step < warm_up:
            action = random.uniform(-1, 1, 1).astype(np.float32)
        else:
            with torch.no_grad():
                action = actor(torch.from_numpy(state)).numpy()
        following, reward, _, truncated, _ = environment.step(2.0 * action)  # Pendulum never terminates
        rows[step] = np.concatenate([state, action, [0.1 * float(reward)], following])
        state, total = following, total + float(reward)
        if truncated:
            returns.append(total)
            state, total = environment.reset()[0], 0.0
        if step < warm_up:
            continue

        batch = torch.from_numpy(rows[random.integers(step + 1, size=batch_size)])
        s, a, r, s_next = torch.split(batch, [3, 1, 1, 3], -1)
        with torch.no_grad():
            y = r.squeeze(-1) + 0.98 * target(s_next, actor(s_next)).amin(0)
        critic_loss = (critic(s, a) - y).square().mean(-1).sum()
        critic_optimiser.zero_grad()
        critic_loss.backward()
        critic_optimiser.step()

        if step % 2 == 0:
            actor_loss = -critic(s, actor(s))[0].mean()
            actor_optimiser.zero_grad()
            actor_loss.backward()
            actor_optimiser.step()
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
    return returns


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    history = train(options.steps, options.seed)
    for i in range(0, len(history), 10):
        print(f"episodes {i}-{i + 9}: mean return {np.mean(history[i : i + 10]):.0f}")
