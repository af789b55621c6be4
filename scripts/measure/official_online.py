"""The papers' own codes learning online, with their settings: a yardstick for ours in the same steps.

Their main programs want gym and the d4rl package, which are dead. What these do with an agent between its
calls is written again here, over Gymnasium: CPQL's 10,000 random steps and an update a step; Consistency-AC's
two environments, falling share of random actions and an update every fourth round. Both store a time limit as
a terminal, choose among 50 candidates, and are evaluated that way. The agents are theirs, as checked out.
"""

from __future__ import annotations

import argparse
import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv

from cpql.io import versions
from measure.official import borrowed
from measure.online import merged

__all__ = ["official_online"]

RANDOM_STEPS, ENVIRONMENTS, UPDATE_EVERY, EPISODES = 10_000, 2, 4, 10

Array = NDArray[np.float64]
Act = Callable[[Array], Array]


def official_online(options: argparse.Namespace) -> dict[str, Any]:
    """Train the checkouts that were given, and keep their curves beside ours."""
    warnings.filterwarnings("ignore", "Implicit dimension choice for softmax")  # theirs
    torch.set_num_threads(1)
    rows = []
    for label, folder, source, train in (
        ("official CPQL", options.cpql, "agents/ql_cm.py", cpql),
        ("official Consistency-AC", options.cac, "agents/online_agent.py", cac),
    ):
        if folder is None:
            continue
        torch.manual_seed(options.seed)
        np.random.seed(options.seed)
        curve: list[tuple[int, float]] = []

        def evaluate(
            steps: int, act: Act, curve: list[tuple[int, float]] = curve, label: str = label
        ) -> None:
            curve.append((steps, returns(options.env, act)))
            print(f"{label}, {steps:,} steps: {curve[-1][1]:,.1f}", flush=True)

        train(folder, options, evaluate)
        rows.append(
            {
                "task": options.task or options.env,
                "mode": "online",
                "label": label,
                "seed": options.seed,
                "environment": options.env,
                "rule": "best of 50 candidates by softmax of Q, theirs",
                "finished": True,
                "steps": [steps for steps, _ in curve],
                "returns": [round(value, 1) for _, value in curve],
                "episodes": [EPISODES] * len(curve),
                "data": "none",
                "precision": "fp32",
                "sha256": hashlib.sha256((folder / source).read_bytes()).hexdigest(),
                "versions": versions(),
            }
        )
    return merged(rows)


def cpql(folder: Any, options: argparse.Namespace, evaluate: Callable[[int, Act], None]) -> None:
    """As `main.py --rl_type online` goes."""
    (learner,) = borrowed(folder, "agents.ql_cm")
    environment = gymnasium.make(options.env)
    space = environment.action_space
    assert isinstance(space, gymnasium.spaces.Box)
    space.seed(options.seed)
    observation, _ = environment.reset(seed=options.seed)
    agent = learner.CPQL(
        "cpu",
        observation.size,
        space.shape[0],
        rl_type="online",
        action_space=space,
        alpha=0.05,
        eta=1.0,
        lr=3e-4,
        grad_norm=2.0,
        memory_size=options.steps,
    )
    for step in range(options.steps):
        random = step < RANDOM_STEPS
        action = space.sample() if random else agent.sample_action(np.asarray(observation))
        following, reward, terminated, truncated, _ = environment.step(action)
        done = terminated or truncated
        agent.append_memory(observation, action, reward, following, 1.0 - done)
        observation = environment.reset()[0] if done else following
        if not random:
            agent.train(agent.memory, batch_size=256)
        if (step + 1) % options.every == 0:
            evaluate(step + 1, agent.sample_action)


def cac(folder: Any, options: argparse.Namespace, evaluate: Callable[[int, Act], None]) -> None:
    """As `online.py` goes, with hopper-medium-v2's settings where those are by task."""
    (learner,) = borrowed(folder, "agents.online_agent")
    environments = DummyVecEnv([lambda: gymnasium.make(options.env)] * ENVIRONMENTS)
    environments.seed(options.seed)
    spaces = environments.observation_space, environments.action_space
    assert isinstance(spaces[0], gymnasium.spaces.Box)
    assert isinstance(spaces[1], gymnasium.spaces.Box)
    spaces[1].seed(options.seed)
    agent = learner.OnlineAgent(
        state_dim=spaces[0].shape[0],
        action_dim=spaces[1].shape[0],
        max_action=float(spaces[1].high[0]),
        model="consistency",
        device="cpu",
        discount=0.99,
        tau=0.005,
        n_timesteps=5,
        lr=1e-5,
        grad_norm=9.0,
    )
    buffer = ReplayBuffer(
        100_000, *spaces, "cpu", ENVIRONMENTS, optimize_memory_usage=True, handle_timeout_termination=False
    )
    coins = np.random.default_rng(options.seed)
    observations = np.asarray(environments.reset())
    rounds = options.steps // ENVIRONMENTS
    for step in range(rounds):
        epsilon = max(1.0 - 0.99 * step / (0.1 * rounds), 0.01)
        if coins.random() < epsilon:
            actions = np.stack([spaces[1].sample() for _ in observations])
        else:
            actions = np.stack([agent.sample_action(o) for o in observations])
        following, rewards, dones, infos = environments.step(actions)
        last = np.array(following)
        for k in np.flatnonzero(dones):
            last[k] = infos[k]["terminal_observation"]
        buffer.add(observations, last, actions, rewards, dones, infos)
        observations = np.asarray(following)
        if step > 0 and step % UPDATE_EVERY == 0:
            agent.train(buffer, iterations=1, batch_size=256)
        if (step + 1) * ENVIRONMENTS % options.every == 0:
            evaluate((step + 1) * ENVIRONMENTS, agent.sample_action)


def returns(env: str, act: Act) -> float:
    """The mean return of some episodes."""
    total = 0.0
    environment = gymnasium.make(env)
    for episode in range(EPISODES):
        observation, _ = environment.reset(seed=100 + episode)
        done = False
        while not done:
            observation, reward, terminated, truncated, _ = environment.step(act(np.asarray(observation)))
            total += float(reward)
            done = terminated or truncated
    environment.close()
    return total / EPISODES
